"""Times whole steps of the engine, decode and prefill, with mixed adapters against the base alone.

    python server/benchmarks/engine.py [--threads 2] [--pairs 15] [--layers 4] [--batch 8] [--adapters 1,8]

The model has random weights in a Llama shape: hidden 1280, 20 heads over 4, feed-forward 3584, vocabulary 8192. The
adapters are LoRA of ranks 8, 16 and 32 on all linear layers. Base and adapters alternate (ABBA), so that both see the
same machine; beside each ratio stands that of the base against itself, and a ratio within its spread says nothing.
Timed only if the first tokens of a mixed batch have the logits they have alone.
"""

import argparse
import json
import queue
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lorasrv.embedded import embedded_base
from lorasrv.engine.engine import Engine
from lorasrv.engine.kv_cache import BlockAllocator
from lorasrv.engine.memory import DeviceMemory
from lorasrv.engine.observer import NullObserver, StepStats
from lorasrv.engine.request import Request, RequestOutput, SamplingParams
from lorasrv.engine.runner import ModelRunner
from lorasrv.engine.scheduler import Scheduler, SchedulerLimits
from lorasrv.model.config import read_model_config
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.loader import load_model
from lorasrv.model.tensors import linear_shapes, wide_shapes
from lorasrv.model.tokenizer import Tokenizer
from lorasrv_adapters.config import parse_adapter_config
from lorasrv_adapters.image import AdapterImage, pack_image
from lorasrv_adapters.normalize import normalize
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1280,
    "intermediate_size": 3584,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}
RANKS = (8, 16, 32)
PROMPT_TOKENS = 64
NEW_TOKENS = 12
NUM_BLOCKS = 256


@dataclass(frozen=True, slots=True)
class Lease:
    """A hold on an adapter that never ends."""

    adapter_id: str
    digest: str
    image: AdapterImage

    def release(self) -> None:
        """Nothing to give back."""


class StepTimes(NullObserver):
    """Seconds of every step, decode steps and prefill steps apart."""

    def __init__(self) -> None:
        self.decode: list[float] = []
        self.prefill: list[float] = []

    def step_finished(self, stats: StepStats) -> None:
        """Note a step."""
        (self.prefill if stats.num_prompt_tokens else self.decode).append(stats.duration_seconds)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--adapters", default="1,8")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    counts = [int(count) for count in arguments.adapters.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder), num_layers=arguments.layers)
    leases = [random_adapter(model, number) for number in range(max(counts))]
    bench = Bench(model, leases, batch=arguments.batch)
    bench.check()
    print(f"{arguments.layers} layers, batch {arguments.batch}, {arguments.threads} threads, {arguments.pairs} pairs\n")
    print("| | base tokens/s | base against itself |", *(f"{count} adapters |" for count in counts))
    print("|---|---|---|" + "---|" * len(counts))
    cells = {count: bench.compare(count, pairs=arguments.pairs) for count in (0, *counts)}
    for phase, tokens in (("decode", 1), ("prefill", PROMPT_TOKENS)):
        rate = arguments.batch * tokens / cells[0][phase].base_seconds
        print(f"| {phase} | {rate:.0f} |", *(f"{cells[count][phase]} |" for count in (0, *counts)), flush=True)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Speed with adapters over speed without: median and quartiles over the pairs."""

    base_seconds: float
    quartiles: tuple[float, float, float]

    def __str__(self) -> str:
        low, middle, high = self.quartiles
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


class Bench:
    """One model and its adapters, run by the real engine."""

    def __init__(self, model: DecoderModel, leases: Sequence[Lease], *, batch: int) -> None:
        self._model = model
        self._leases = leases
        self._batch = batch
        self._tokenizer = Tokenizer(embedded_base())
        largest = max(lease.image.flat.nbytes for lease in leases)
        self._memory = DeviceMemory(
            model.config,
            model.base,
            dtype=model.dtype,
            device="cpu",
            kv_bytes=NUM_BLOCKS * DeviceMemory.block_elements(model.config) * model.dtype.itemsize,
            adapter_bytes=len(leases) * (largest + 4096),
            max_rank=max(RANKS),
            max_adapters=len(leases),
        )

    def compare(self, num_adapters: int, *, pairs: int) -> dict[str, Ratio]:
        """Speed with so many adapters mixed over the batch, against the base alone; by phase."""
        ratios: dict[str, list[float]] = {"decode": [], "prefill": []}
        seconds: dict[str, list[float]] = {"decode": [], "prefill": []}
        self.run(num_adapters)
        for pair in range(pairs):
            order = (num_adapters, 0) if pair % 2 else (0, num_adapters)
            first, second = (self.run(count) for count in order)
            base, adapted = (second, first) if pair % 2 else (first, second)
            for phase in ratios:
                ratios[phase].append(base[phase] / adapted[phase])
                seconds[phase].append(base[phase])
        return {
            phase: Ratio(statistics.median(seconds[phase]), tuple(statistics.quantiles(ratios[phase], n=4)))
            for phase in ratios
        }

    def run(self, num_adapters: int) -> dict[str, float]:
        """Seconds of the prefill and, in the median, of a decode step."""
        times = StepTimes()
        self._answers(num_adapters, range(self._batch), times)
        return {"decode": statistics.median(times.decode), "prefill": sum(times.prefill)}

    def check(self) -> None:
        """Stop unless a mixed batch answers as its requests do alone."""
        count = len(self._leases)
        mixed = self._answers(count, range(self._batch), NullObserver())
        for index in range(self._batch):
            if self._answers(count, [index], NullObserver())[str(index)] != mixed[str(index)]:
                raise SystemExit(f"wrong result: request {index} has another answer among others")

    def _answers(self, num_adapters: int, indices: Sequence[int], observer: NullObserver) -> dict[str, list[int]]:
        limits = SchedulerLimits(max_num_seqs=self._batch, max_batched_tokens=4096, max_model_len=512)
        arrived: queue.Queue[list[RequestOutput]] = queue.Queue()
        engine = Engine(
            ModelRunner(self._model, self._memory),
            Scheduler(limits, BlockAllocator(NUM_BLOCKS), self._memory),
            self._tokenizer,
            max_queue=self._batch,
            on_outputs=arrived.put,
            metrics=observer,
        )
        answers: dict[str, list[int]] = {str(index): [] for index in indices}
        num_open = len(answers)
        with engine:
            for index in indices:
                engine.submit(self._request(index, num_adapters))
            while num_open:
                for output in arrived.get(timeout=600):
                    answers[output.request_id].extend(output.token_ids)
                    num_open -= output.is_terminal
        return answers

    def _request(self, index: int, num_adapters: int) -> Request:
        generator = torch.Generator().manual_seed(index)
        prompt = torch.randint(CONFIG["vocab_size"], (PROMPT_TOKENS,), generator=generator)
        return Request(
            request_id=str(index),
            prompt_token_ids=tuple(prompt.tolist()),
            sampling=SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True),
            lease=self._leases[index % num_adapters] if num_adapters else None,
        )


def random_model(folder: Path, *, num_layers: int) -> DecoderModel:
    """A model of random weights, quantized as a server quantizes it."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": num_layers}))
    config = read_model_config(folder)
    torch.manual_seed(0)
    shapes = {**wide_shapes(config), **linear_shapes(config)}
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else torch.randn(shape).bfloat16() * 0.02
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return load_model(folder, dtype=torch.bfloat16)


def random_adapter(model: DecoderModel, number: int) -> Lease:
    """A LoRA adapter of random weights on all linear layers."""
    rank = RANKS[number % len(RANKS)]
    generator = torch.Generator().manual_seed(number)
    tensors = {}
    for name, module in model.base.modules.items():
        if module.kind == "linear":
            for letter, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                key = f"base_model.model.{name}.lora_{letter}.weight"
                tensors[key] = torch.randn(shape, generator=generator) * 0.02
    config = parse_adapter_config({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"})
    adapter = normalize(config, tensors, model.base)
    return Lease(str(number), adapter.digest, pack_image(adapter, model.base, model.dtype))


if __name__ == "__main__":
    main()
