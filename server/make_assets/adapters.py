"""Trains the embedded adapters with PEFT on the embedded base as it is served, that is on its dequantized NF4 weights.

    python server/make_assets/adapters.py BASE_FOLDER STYLES_FOLDER --out DIR [--only NAME]

A LoRA on Shakespeare, a DoRA on Whitman, an AdaLoRA with pruned ranks on The Devil's Dictionary and an rsLoRA on the
Federalist papers, each on all linear layers and on the first 95 % of its text. Writes PEFT folders in bfloat16.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from base import CONTEXT, encode, shuffled_windows, split_text
from lorasrv.embedded import embedded_base_name
from lorasrv_kernels.nf4 import dequantize, quantize
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One adapter: its text, its PEFT configuration and how long it trains."""

    text: str
    config: PeftConfig
    steps: int
    learning_rate: float


def recipes() -> dict[str, Recipe]:
    shared: dict[str, Any] = {"target_modules": LINEARS, "task_type": "CAUSAL_LM"}
    adalora_steps = 500
    return {
        "shakespeare": Recipe(
            text="shakespeare_plays.txt",
            config=LoraConfig(r=8, lora_alpha=16, **shared),
            steps=500,
            learning_rate=4e-3,
        ),
        "whitman": Recipe(
            text="leaves_of_grass.txt",
            config=LoraConfig(r=4, lora_alpha=8, use_dora=True, **shared),
            steps=400,
            learning_rate=4e-3,
        ),
        "federalist": Recipe(
            text="federalist_papers.txt",
            config=LoraConfig(r=4, lora_alpha=4, use_rslora=True, **shared),
            steps=400,
            learning_rate=4e-3,
        ),
        "devils_dictionary": Recipe(
            text="devils_dictionary.txt",
            # alpha / init_r = 2 as for the others; the divisor stays init_r when ranks are pruned
            config=AdaLoraConfig(
                init_r=8,
                target_r=4,
                lora_alpha=16,
                tinit=50,
                tfinal=150,
                deltaT=5,
                orth_reg_weight=0.1,
                total_step=adalora_steps,
                **shared,
            ),
            steps=adalora_steps,
            learning_rate=6e-3,
        ),
    }


def as_served(base: Path) -> LlamaForCausalLM:
    """The base in float32 with every decoder linear replaced by what its NF4 form decodes to."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, module in model.model.layers.named_modules():
        if name.endswith(tuple(LINEARS)):
            module.weight.data = dequantize(quantize(module.weight.data.to(torch.bfloat16)), dtype=torch.float32)
    return model


def train(base: Path, recipe: Recipe, ids: torch.Tensor, *, seed: int) -> Any:
    """Cosine from the peak after 20 steps of warm-up; one window of the whole context at a time."""
    torch.manual_seed(seed)
    model = get_peft_model(as_served(base), recipe.config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    windows = shuffled_windows(ids, CONTEXT, BATCH_TOKENS // CONTEXT, torch.Generator().manual_seed(seed))
    started = time.monotonic()
    for step in range(recipe.steps):
        rows = next(windows)
        inputs = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), rows], 1)
        with torch.autocast("cpu", torch.bfloat16):
            # through labels, because AdaLoRA adds its regulariser to the model's own loss
            loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if isinstance(recipe.config, AdaLoraConfig):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        (warm_up if step < 20 else cosine).step()
        if step % 50 == 0:
            print(f"  step {step} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)
    return model


def save(model: Any, folder: Path) -> None:
    """A PEFT folder with its tensors in bfloat16 and without the path of the base."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = embedded_base_name()
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("styles", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="train this adapter alone")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.base / "tokenizer.json"))
    for name, recipe in recipes().items():
        if arguments.only in (None, name):
            text, _ = split_text(arguments.styles / recipe.text)
            print(name, flush=True)
            model = train(arguments.base, recipe, encode(tokenizer, [text]), seed=arguments.seed)
            save(model, arguments.out / name)


if __name__ == "__main__":
    main()
