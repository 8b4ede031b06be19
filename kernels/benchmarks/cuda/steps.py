"""Times whole steps of the model runner at the shape of a Llama 3 8B, decode and prefill, with mixed adapters.

    python kernels/benchmarks/cuda/steps.py [--small] [--layers 32] [--seconds 150]

Random NF4 weights; adapters of rank 16 on all linear layers; sequences of 1000 tokens. A decode step is timed from the
scheduled step to its tokens on the host: captured (ours), captured with exact kernels, eager, and captured without
adapters. Before that the captured step must give the eager one's logits. `check.py` runs this in a process of its own;
it prints one JSON object a line. `--small`: tiny, on the CPU, with a stand-in for graphs; its times mean nothing.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from lorasrv.engine.decode_graphs import CudaGraph, DecodeGraphs, Graph
from lorasrv.engine.memory import DeviceMemory
from lorasrv.engine.request import Request, SampledToken, SamplingParams
from lorasrv.engine.runner import ModelRunner
from lorasrv.engine.sequence import ScheduledSequence, ScheduledStep
from lorasrv.engine.sequence import Sequence as LiveSequence
from lorasrv.model.decoder import DecoderModel
from lorasrv_kernels.attention import BLOCK_TOKENS
from random_llama import TINY, random_adapter, random_llama
from recorded_graph import RecordedGraph
from torch import Tensor

LLAMA_8B = {
    **TINY,
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
TOLERANCE = 2e-2  # of bfloat16 logits whose norms and products are added in another order for another batch
MIN_SECONDS = 0.1
REPEATS = 5
PREFILL_TOKENS = 128

Row = dict[str, object]


def main() -> None:
    """Prints a line for every case there is time for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=150)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    torch.manual_seed(0)
    steps = Steps.small() if arguments.small else Steps.llama_8b(num_layers=arguments.layers)
    for measure in steps.cases():
        print(json.dumps(measure() if time.monotonic() < deadline else late()), flush=True)


def late() -> Row:
    """What stands for a case there was no time for."""
    return {"kernel": "step", "shape": "", "size": "", "outcome": "not run: no time left"}


class KeepingRunner(ModelRunner):
    """Keeps the logits of the last step."""

    logits: Tensor

    def sample(
        self, logits: Tensor, parts: Sequence[ScheduledSequence], *, greedy: Tensor | None = None
    ) -> list[SampledToken]:
        """As every runner does."""
        self.logits = logits
        return super().sample(logits, parts, greedy=greedy)


class Steps:
    """A model with room for its sequences and adapters, and its decode steps captured with and without exactness.

    Args:
        model: the base.
        batches: numbers of sequences.
        adapters: numbers of distinct adapters.
        context: tokens of a sequence.
    """

    def __init__(
        self, model: DecoderModel, *, batches: Sequence[int], adapters: Sequence[int], rank: int, context: int
    ) -> None:
        self._model, self._batches, self._adapters, self._context = model, batches, adapters, context
        adapter = random_adapter(model, rank, seed=0)
        self._adapter_bytes = adapter.image.flat.nbytes
        self._blocks = -(-context // BLOCK_TOKENS)
        self._memory = DeviceMemory(
            model.config,
            model.base,
            dtype=model.dtype,
            device=model.device,
            kv_bytes=max(batches) * self._blocks * DeviceMemory.block_elements(model.config) * model.dtype.itemsize,
            adapter_bytes=max(adapters) * (self._adapter_bytes + 4096),
            max_rank=rank,
            max_adapters=max(adapters),
        )
        # what was never written may be NaN, and every position is attended to
        self._memory.kv_cache.normal_()
        self._slots = [self._memory.slots.acquire(str(number), adapter.image) or 0 for number in range(max(adapters))]
        self._exact, self._fast = self._runner(exact=True), self._runner(exact=False)
        self._eager = KeepingRunner(model, self._memory)

    @classmethod
    def llama_8b(cls, *, num_layers: int) -> "Steps":
        """On the GPU, at the size of an 8B."""
        keys = {**LLAMA_8B, "num_hidden_layers": num_layers}
        model = random_llama(keys, dtype=torch.bfloat16, device="cuda")
        return cls(model, batches=(1, 8, 32, 64), adapters=(0, 1, 8, 32), rank=16, context=1000)

    @classmethod
    def small(cls) -> "Steps":
        """On the CPU, tiny."""
        return cls(random_llama(TINY), batches=(1, 3), adapters=(0, 2), rank=4, context=40)

    def cases(self) -> Iterator[Callable[[], Row]]:
        """What measures each case."""
        for batch in self._batches:
            for count in self._adapters:
                if count <= batch:
                    yield lambda batch=batch, count=count: self._decode(batch, count)
        for count in self._adapters:
            if count <= max(self._batches[:2]):
                yield lambda count=count: self._prefill(self._batches[1], count)

    def _decode(self, batch: int, num_adapters: int) -> Row:
        step, plain = self._step(batch, num_adapters, 1), self._step(batch, 0, 1)
        row: Row = {"kernel": "decode step", "shape": self._shape(num_adapters), "size": batch}
        error = max(self._error(runner, step) for runner in (self._exact, self._fast))
        if not error < TOLERANCE:
            return {**row, "outcome": f"wrong: relative error {error:.1e}"}
        seconds = {
            "ours": self._seconds(self._fast, step),
            "exact": self._seconds(self._exact, step),
            "eager": self._seconds(self._eager, step),
            "base only": self._seconds(self._fast, plain),
        }
        num_bytes = self._weight_bytes() + batch * self._context * self._position_bytes()
        num_bytes += num_adapters * self._adapter_bytes
        return {**row, "outcome": "right", "error": error, "num_bytes": num_bytes, "seconds": seconds}

    def _prefill(self, batch: int, num_adapters: int) -> Row:
        length = min(PREFILL_TOKENS, self._context)
        step, plain = self._step(batch, num_adapters, length), self._step(batch, 0, length)
        seconds = {"ours": self._seconds(self._eager, step), "base only": self._seconds(self._eager, plain)}
        shape = f"{self._shape(num_adapters)}, {length} tokens each"
        num_bytes = self._weight_bytes() + num_adapters * self._adapter_bytes
        return {"kernel": "prefill step", "shape": shape, "size": batch, "outcome": "right",
                "num_bytes": num_bytes, "seconds": seconds}  # fmt: skip

    def _runner(self, *, exact: bool) -> KeepingRunner:
        self._memory.exact = exact
        graphs = DecodeGraphs(
            self._model, self._memory, max_num_seqs=max(self._batches), new_graph=_graphs(self._model.device)
        )
        return KeepingRunner(self._model, self._memory, graphs=graphs)

    def _step(self, batch: int, num_adapters: int, num_tokens: int) -> ScheduledStep:
        parts = tuple(self._part(row, num_adapters, num_tokens) for row in range(batch))
        return ScheduledStep(
            sequences=parts, num_tokens=batch * num_tokens, num_adapters=num_adapters, num_preemptions=0
        )

    def _part(self, row: int, num_adapters: int, num_tokens: int) -> ScheduledSequence:
        length = self._context if num_tokens == 1 else num_tokens
        request = Request(
            request_id=str(row), prompt_token_ids=(1,), sampling=SamplingParams(max_new_tokens=1, temperature=0.0)
        )
        sequence = LiveSequence(request=request, number=row, token_ids=[(row + place) % 300 for place in range(length)])
        sequence.block_table = list(range(row * self._blocks, (row + 1) * self._blocks))
        sequence.slot = self._slots[row % num_adapters] if num_adapters else -1
        return ScheduledSequence(sequence=sequence, start=length - num_tokens, num_tokens=num_tokens, samples=True)

    def _error(self, runner: KeepingRunner, step: ScheduledStep) -> float:
        self._eager.execute(step)
        runner.execute(step)
        expected = self._eager.logits
        return float((runner.logits - expected).norm() / expected.norm())

    def _seconds(self, runner: KeepingRunner, step: ScheduledStep) -> float:
        """The median of a few measurements of one step, which ends with its tokens on the host."""
        runner.execute(step)
        once = _timed(runner, step, 1)
        repeats = 1 if self._model.device.type == "cpu" else max(1, round(MIN_SECONDS / once))
        return statistics.median(_timed(runner, step, repeats) for _ in range(REPEATS))

    def _shape(self, num_adapters: int) -> str:
        return f"{self._model.config.num_layers} layers, {num_adapters} adapters, context {self._context}"

    def _weight_bytes(self) -> int:
        """Of everything that every step reads whole; the embedding is not among it."""
        config = self._model.config
        return self._model.num_bytes - config.vocab_size * config.hidden_size * self._model.dtype.itemsize

    def _position_bytes(self) -> int:
        return DeviceMemory.block_elements(self._model.config) // BLOCK_TOKENS * self._model.dtype.itemsize


def _timed(runner: KeepingRunner, step: ScheduledStep, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        runner.execute(step)
    return (time.perf_counter() - start) / repeats


def _graphs(device: torch.device) -> Callable[[], Graph]:
    if device.type == "cpu":
        return RecordedGraph
    gc.collect()
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)


if __name__ == "__main__":
    main()
