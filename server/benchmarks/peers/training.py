"""Trains the same adapters on lorasrv and in a plain loop around PEFT and bitsandbytes, side by side; prints a table.

    make bench-training [ARGS="--size 60m --threads 2 --pairs 15"]

Llama shapes of random weights in NF4 with double quantization, bfloat16 activations, rank 16 on all linear layers, 4
sequences of 256 tokens a step. Timed only if losses and gradients are PEFT's. Lanes take steps in turns, so that other
load on the machine hits all of them; times are processor time of one thread, wall time of several. Ratios are medians
over pairs of adjacent turns with the quartiles, beside them lorasrv against itself, the noise. "kept" keeps what layers
compute, as the plain loop does, and runs where the memory is there; else a layer is computed again on the way back.

Four adapters together learn what four runs of one adapter learn, each adapter the same sequences in both.

Memory is what PyTorch's allocator counts from the start of a forward to the end of the backward pass, at its highest,
gradients of adapters and optimizer states apart: the same number in every run.
"""

import argparse
import logging
import statistics
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import peft
import torch
import transformers
from allocated import peak_bytes
from huggingface import load
from lanes import Lane, Ratio, take_turns
from lorasrv.model.loader import load_model
from lorasrv_kernels.cpu.isa import isa_in_use
from training_lanes import OneByOne, OurTraining, PeftTraining, Shape
from workload import SMALL, Workload, write

SIZES = {
    "small": SMALL,
    "60m": Workload(num_layers=12, hidden_size=640, intermediate_size=1728, num_heads=10, num_kv_heads=2),
    "446m": Workload(),
}
MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Of all gradients of a kind of tensor together, relative in the 2-norm. PEFT rounds more often in bfloat16."""
METHODS = ("lora", "dora")
ADAPTERS = 4
TOGETHER = ((1, 256), (1, 64), (1, 16), (4, 256))
"""(sequences, tokens of each) that every adapter learns in a step."""
MEBIBYTE = 1 << 20


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument(
        "--small", action="store_true", help="a tiny model and few pairs, which say nothing about speed"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--parts", default="lora,dora,together,memory")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT asks transformers in the words of its version 4
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    workload = SMALL if arguments.small else SIZES[arguments.size]
    shape = Shape(length=16) if arguments.small else Shape()
    isa = isa_in_use()
    print(
        f"{workload.num_layers} layers, hidden {workload.hidden_size}, feed-forward {workload.intermediate_size}, ",
        end="",
    )
    print(f"{workload.num_heads} heads over {workload.num_kv_heads}, vocabulary {workload.vocab_size}")
    print(f"{arguments.threads} threads, {'PyTorch path' if isa is None else isa.name}, torch ", end="")
    print(f"{torch.__version__}, PEFT {peft.__version__}, bitsandbytes {bitsandbytes.__version__}\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder:
        for method in METHODS:
            Comparison(SMALL, Shape(length=32), Path(folder, f"gate-{method}"), torch.float32).check(method)
        comparison = Comparison(workload, shape, Path(folder, "model"), torch.bfloat16)
        comparison.check(*METHODS)
        pairs = 2 if arguments.small else arguments.pairs
        for part in arguments.parts.split(","):
            if part == "together":
                comparison.time_together(pairs)
            elif part == "memory":
                comparison.measure_memory()
            else:
                comparison.time(part, pairs)


class Comparison:
    """One base, loaded by both."""

    def __init__(self, workload: Workload, shape: Shape, folder: Path, dtype: torch.dtype) -> None:
        self._vocab_size = workload.vocab_size
        self._shape = shape
        self._folder = folder
        self._dtype = dtype
        base = write(replace(workload, ranks=()), folder, dtype=dtype).base
        self._model = load_model(base, dtype=dtype)
        self._theirs = load(base, dtype=dtype, nf4=True)

    def check(self, *methods: str) -> None:
        """Stop unless losses and gradients are PEFT's, up to rounding."""
        limit = MAX_DIFFERENCE[self._dtype]
        for method in methods:
            ours, theirs = self._ours(method), self._peft(method)
            (our_loss, found), (their_loss, expected) = ours.gradients(), theirs.gradients()
            if found.keys() != expected.keys():
                raise SystemExit("wrong result: gradients of other tensors than PEFT's")
            kinds = {name.rpartition("lora_")[2] for name in expected}
            differences = {"loss": abs(our_loss - their_loss) / their_loss}
            for kind in kinds:
                names = [name for name in expected if name.endswith(kind)]
                square = sum(float((found[name] - expected[name]).square().sum()) for name in names)
                differences[kind] = (square / sum(float(expected[name].square().sum()) for name in names)) ** 0.5
            said = ", ".join(f"{kind} {difference:.1e}" for kind, difference in sorted(differences.items()))
            print(f"check: {method}, {str(self._dtype)[6:]}: {said} from PEFT's; at most {limit:.0e}", flush=True)
            if not max(differences.values()) <= limit:
                raise SystemExit("wrong result")

    def time(self, method: str, pairs: int) -> None:
        """A method against the plain loop."""
        lanes: dict[str, Lane] = {
            "ours": self._ours(method),
            "PEFT": self._peft(method),
            "ours, kept": self._ours(method, checkpoint_layers=False),
            "ours again": self._ours(method),
        }
        ratios = [("PEFT", "ours"), ("PEFT", "ours, kept"), ("ours again", "ours")]
        print_lanes(f"{method}, {self._shape}", lanes, ratios, pairs=pairs, tokens=self._shape.num_tokens)

    def time_together(self, pairs: int) -> None:
        """Four adapters together against four runs of one adapter, each adapter the same sequences in both."""
        for batch, length in TOGETHER:
            shape = Shape(batch=batch, length=length, rank=self._shape.rank)
            lanes: dict[str, Lane] = {
                "together": self._ours("lora", shape, adapters=ADAPTERS),
                "separate": OneByOne([self._ours("lora", shape) for _ in range(ADAPTERS)]),
                "together again": self._ours("lora", shape, adapters=ADAPTERS),
            }
            ratios = [("separate", "together"), ("together again", "together")]
            tokens = ADAPTERS * shape.num_tokens
            print_lanes(f"{ADAPTERS} LoRA, each {shape}", lanes, ratios, pairs=pairs, tokens=tokens)

    def measure_memory(self) -> None:
        """The peak of a forward and a backward pass."""
        print("\n| method | PEFT MiB | ours MiB | of PEFT's | ours, kept MiB | of PEFT's |\n|---|---|---|---|---|---|")
        for method in METHODS:
            lanes = (self._peft(method), self._ours(method), self._ours(method, checkpoint_layers=False))
            theirs, *ours = (peak_bytes(lane.gradients) for lane in lanes)
            cells = " | ".join(f"{own / MEBIBYTE:.1f} | {own / theirs:.2f}" for own in ours)
            print(f"| {method} | {theirs / MEBIBYTE:.1f} | {cells} |", flush=True)

    def _ours(
        self, method: str, shape: Shape | None = None, *, adapters: int = 1, checkpoint_layers: bool = True
    ) -> OurTraining:
        shape = shape or self._shape
        tokens = [shape.tokens(self._vocab_size, seed) for seed in range(adapters)]
        return OurTraining(self._model, tokens, shape, method=method, checkpoint_layers=checkpoint_layers)

    def _peft(self, method: str) -> PeftTraining:
        folder = self._folder / method
        if not folder.exists():
            self._ours(method).write(folder)
        return PeftTraining(self._theirs, folder, self._shape.tokens(self._vocab_size))


def print_lanes(
    title: str, lanes: Mapping[str, Lane], ratios: Sequence[tuple[str, str]], *, pairs: int, tokens: int
) -> None:
    """Times lanes, a step a turn, and prints tokens a second, and how many times faster the second of two is."""
    times = take_turns(lanes, rounds=1, turns=pairs)
    rates = ", ".join(f"{name} {tokens / statistics.median(one.decode):.0f}" for name, one in times.items())
    print(f"\n{title}; tokens/s: {rates}")
    for slow, fast in ratios:
        print(f"    {fast} over {slow}: {Ratio.of(times[slow].decode, times[fast].decode)}", flush=True)


if __name__ == "__main__":
    main()
