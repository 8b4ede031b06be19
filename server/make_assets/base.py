"""Trains the embedded base: a byte-level BPE tokenizer and a Llama of about five million parameters.

    python server/make_assets/base.py TEXT_FOLDER --out DIR [--steps N]

Reads every `*.txt` of TEXT_FOLDER, holds out the last 5 % of each, and writes a Hugging Face folder in bfloat16 with a
`training.json` that states the held-out bits per byte. Knows nothing about serving.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

HELD_OUT_SHARE = 0.05
CONTEXT = 512
VOCAB_SIZE = 4096
BOS, EOS = "<s>", "</s>"


def split_text(path: Path) -> tuple[str, str]:
    """Training text and held-out text (the last 5 %) of one file, cut at a line end."""
    text = path.read_text(encoding="utf-8")
    cut = text.index("\n", int(len(text) * (1 - HELD_OUT_SHARE))) + 1
    return text[:cut], text[cut:]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE; `<s>` is 0, `</s>` is 1, and encoding adds `<s>` in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """[tokens] int64, texts one after the other, each closed by `</s>`."""
    ids = [i for text in texts for i in [*tokenizer.encode(text, add_special_tokens=False).ids, 1]]
    return torch.tensor(ids)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Negative log2-likelihood per UTF-8 byte, in windows that overlap by half so that tokens have context."""
    nats, num_bytes = 0.0, 0
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
        num_bytes += len(text.encode())
        stride = CONTEXT // 2
        for start in range(0, len(ids), stride):
            left = max(0, start - stride + 1)
            window = torch.cat([torch.tensor([0]), ids[left : start + stride]])
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(window[None, :-1]).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
            nats += float(loss[start - left :].sum())
    return nats / math.log(2) / num_bytes


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def learning_rate(step: int, num_steps: int) -> float:
    """Share of the peak: 100 steps of warm-up, flat, then linear to zero over the last half."""
    return min(1.0, (step + 1) / 100, 2 * (num_steps - step) / num_steps)


def shuffled_windows(ids: torch.Tensor, context: int, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches [batch, context]: every pass cuts the text at another shift and visits each window once."""
    while True:
        shift = int(torch.randint(context, (1,), generator=generator))
        starts = torch.arange(shift, len(ids) - context, context)
        order = starts[torch.randperm(len(starts), generator=generator)]
        for rows in order.split(batch)[:-1]:
            yield ids[rows[:, None] + torch.arange(context)]


def train(model: LlamaForCausalLM, ids: torch.Tensor, *, steps: int, batch_tokens: int, seed: int) -> None:
    """Muon on the matrices of the layers, AdamW on embeddings and norms; windows of half the context at first."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    optimizers = [
        torch.optim.Muon(hidden, lr=6e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=6e-3, betas=(0.9, 0.98), weight_decay=0.05),
    ]
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    compiled = torch.compile(model)
    windows: Iterator[torch.Tensor] = iter(())
    context = 0
    started = time.monotonic()
    for step in range(steps):
        if step in (0, steps // 2):
            context = CONTEXT // 2 if step == 0 else CONTEXT
            windows = shuffled_windows(ids, context, batch_tokens // context, generator)
        rows = next(windows)
        inputs = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), rows[:, :-1]], 1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = learning_rate(step, steps)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face folder in bfloat16 that samples by default: small models repeat themselves when greedy."""
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, do_sample=True, temperature=0.8, top_p=0.95
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(words, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    splits = [split_text(path) for path in sorted(arguments.texts.glob("*.txt"))]
    train_texts, held_out_texts = [a for a, _ in splits], [b for _, b in splits]
    tokenizer = train_tokenizer(train_texts)
    model = make_model(arguments.seed)
    ids = encode(tokenizer, train_texts)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(ids)} training tokens", flush=True)
    train(model, ids, steps=arguments.steps, batch_tokens=arguments.batch_tokens, seed=arguments.seed)
    save(model, tokenizer, arguments.out)
    score = bits_per_byte(model, tokenizer, held_out_texts)
    summary = {
        "held_out_bits_per_byte": round(score, 4),
        "steps": arguments.steps,
        "batch_tokens": arguments.batch_tokens,
        "seed": arguments.seed,
        "training_tokens": len(ids),
    }
    (arguments.out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
