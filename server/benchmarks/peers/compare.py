"""Runs the same work on lorasrv and on what else serves adapters on a CPU, side by side, and prints two tables.

    make bench-peers [VLLM_PYTHON=/path/to/python] [ARGS="--threads 2 --rounds 2 --prefills 15 --not-exact"]

A Llama shape of 446 M random weights, prompts of 64 tokens, greedy decoding; 8 adapters of ranks 8, 16 and 32 on all
linear layers, one for each of 8 sequences. The first table has tokens a second, the second one the ratios that have a
target: medians over pairs of adjacent turns with the quartiles, beside them lorasrv against itself, the noise. All
systems take a decode step in turns, so that other load on the machine hits all of them. Times are wall time; with
`--threads 1` those of everything but vLLM are processor time, so that other load counts less. Timed only if lorasrv's
logits are PEFT's. `--small` runs all of it on a tiny model, which says nothing about speed.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import IO

import bitsandbytes
import peft
import torch
import transformers
from floor import ReadLane, decode_bytes
from huggingface import HuggingFaceLane, load, with_adapters
from lanes import Lane, Times, take_turns
from lorasrv.model.loader import load_model
from lorasrv_kernels.cpu.isa import isa_in_use
from ours import OurLane, Served, read_leases
from report import COLUMNS, print_rates, print_ratios
from torch import Tensor
from vllm_lane import VllmError, VllmLane, VllmProcess
from workload import SMALL, Files, Workload, write

READ = "read"
MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Of logits, relative in the 2-norm. bitsandbytes' packed kernel rounds its scales to bfloat16."""


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=2, help="prefills of every system before its decode steps")
    parser.add_argument("--prefills", type=int, default=15, help="pairs of prefills with adapters")
    parser.add_argument("--not-exact", action="store_true", help="lorasrv with --exact off, too")
    parser.add_argument("--small", action="store_true", help="a tiny model, few pairs")
    parser.add_argument("--vllm-python", default="", help="the Python of an environment that has vLLM")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    workload = SMALL if arguments.small else Workload()
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
        check_exactly(write(SMALL, Path(folder, "gate"), dtype=torch.float32))
        files = write(workload, Path(folder, "model"), dtype=torch.bfloat16)
        comparison = Comparison(workload, files, not_exact=arguments.not_exact)
        comparison.check()
        comparison.run(rounds=arguments.rounds, prefills=2 if arguments.small else arguments.prefills)
        not_run = "no VLLM_PYTHON given"
        if arguments.vllm_python:
            with Path(folder, "vllm.log").open("w") as log:
                not_run = comparison.run_vllm(arguments.vllm_python, threads=arguments.threads, log=log)
    comparison.report(not_run=not_run)


def check_exactly(files: Files) -> None:
    """Stop unless tokens are PEFT's, and logits up to rounding, on a tiny base that is not quantized, in float32."""
    prompts = SMALL.prompts(SMALL.batch)
    model = load_model(files.base, dtype=torch.float32, quantize=False)
    served = Served(model, read_leases(model, files.adapters), num_blocks=32, max_rank=max(SMALL.ranks))
    theirs = HuggingFaceLane(
        with_adapters(load(files.base, dtype=torch.float32, nf4=False), files.adapters), prompts, adapters=True
    )
    ours = OurLane(served, prompts.tolist(), served.leases)
    check_close("float32", ours.prefill(), theirs.prefill(), MAX_DIFFERENCE[torch.float32])
    for _ in range(SMALL.new_tokens):
        ours.step()
        theirs.step()
    if ours.tokens != theirs.tokens:
        raise SystemExit("wrong result: other tokens than PEFT's in float32")


def check_close(what: str, logits: Tensor, expected: Tensor, limit: float) -> None:
    """Stop if logits [B, V] are further apart than `limit`, relatively."""
    difference = float((logits - expected).norm() / expected.norm())
    print(f"check: logits {difference:.1e} from PEFT's, {what}; at most {limit:.0e}", flush=True)
    if not difference <= limit:
        raise SystemExit("wrong result")


class Comparison:
    """All systems but vLLM in this process, and what was measured of each.

    Lanes are named by system and column, e.g. "bf16 base B=8"; "ours again" is the same lane once more.
    """

    def __init__(self, workload: Workload, files: Files, *, not_exact: bool) -> None:
        self._workload, self._files = workload, files
        model = load_model(files.base, dtype=torch.bfloat16)
        leases = read_leases(model, files.adapters)
        options = {"num_blocks": 256, "max_rank": max(workload.ranks)}
        self._served = Served(model, leases, **options)
        self._lanes: dict[str, OurLane | HuggingFaceLane] = {
            f"ours {column}": self._our_lane(self._served, column) for column in COLUMNS
        }
        if not_exact:
            served = Served(model, leases, exact=False, **options)
            self._lanes |= {f"not exact {column}": self._our_lane(served, column) for column in COLUMNS}
        for system in ("bitsandbytes", "bf16"):
            base = load(files.base, dtype=torch.bfloat16, nf4=system == "bitsandbytes")
            adapted = with_adapters(base, files.adapters)
            self._lanes |= {
                f"{system} {column}": HuggingFaceLane(
                    adapted if "adapters" in column else base, self._prompts(column), adapters="adapters" in column
                )
                for column in COLUMNS
            }
        self._lanes |= {f"ours again {column}": self._our_lane(self._served, column) for column in COLUMNS}
        self._read = ReadLane()
        self._times: dict[str, Times] = {}
        self._prefill_pairs: dict[str, Times] = {}
        self._vllm_pairs: dict[str, Times] = {}
        self._vllm = "vLLM"

    def check(self) -> None:
        """Stop unless our logits are bitsandbytes' and its adapters', up to rounding."""
        for column in COLUMNS:
            ours, theirs = (self._lanes[f"{system} {column}"].prefill() for system in ("ours", "bitsandbytes"))
            check_close(f"{column}, NF4 in bfloat16", ours, theirs, MAX_DIFFERENCE[torch.bfloat16])

    def run(self, *, rounds: int, prefills: int) -> None:
        """Times everything but vLLM."""
        turns = self._workload.new_tokens - 1
        small = {name: lane for name, lane in self._lanes.items() if name.endswith("B=1")}
        large = {name: lane for name, lane in self._lanes.items() if name.endswith("B=8")}
        self._times = take_turns(small, rounds=rounds, turns=turns)
        self._times |= take_turns({**large, READ: self._read}, rounds=rounds, turns=turns)
        column = "adapters B=8"
        pairs = {f"{system} {column}": self._lanes[f"{system} {column}"] for system in ("ours", "bf16", "ours again")}
        self._prefill_pairs = take_turns(pairs, rounds=prefills, turns=0)

    def run_vllm(self, python: str, *, threads: int, log: IO[str]) -> str:
        """Times vLLM against ours; returns why it was not run, or nothing."""
        try:
            for adapters in ((), self._files.adapters):
                columns = [column for column in COLUMNS if ("adapters" in column) == bool(adapters)]
                with VllmProcess(
                    python,
                    self._files.base,
                    adapters=adapters,
                    max_rank=max(self._workload.ranks),
                    threads=threads,
                    log=log,
                ) as process:
                    self._vllm = f"vLLM {process.version}, its CPU build"
                    for column in columns:
                        self._run_beside(process, column)
        except VllmError as error:
            said = Path(log.name).read_text().split("\n")
            return f"{error}, {next((line.strip() for line in reversed(said) if line.strip()), 'in silence')}"
        return ""

    def report(self, *, not_run: str) -> None:
        """Prints both tables."""
        workload = self._workload
        gigabyte_seconds = statistics.median(self._read.seconds(self._times[READ], 10**9))
        isa = isa_in_use()
        print(
            f"\n{workload}\n{torch.get_num_threads()} threads, {'PyTorch path' if isa is None else isa.name}, ", end=""
        )
        print(f"torch {torch.__version__}, reads {1 / gigabyte_seconds:.1f} GB/s\n")
        read = {column: self._bytes_read(column) for column in COLUMNS}
        systems = {
            "ours": ("lorasrv, exact", "NF4, double quant"),
            "not exact": ("lorasrv, not exact", "NF4, double quant"),
            "bitsandbytes": (f"{_HUGGING_FACE} + bitsandbytes {bitsandbytes.__version__}", "NF4, double quant"),
            "bf16": (_HUGGING_FACE, "bf16"),
            "vLLM": (self._vllm, "bf16"),
        }
        if not any(name.startswith("not exact") for name in self._lanes):
            del systems["not exact"]
        floor = {name: size * gigabyte_seconds / 1e9 for name, size in read.items()}
        print_rates(workload, systems, self._times, floor=floor, not_run=not_run)
        measured = [self._times, self._prefill_pairs, self._vllm_pairs]
        added_bytes = read["adapters B=8"] - read["base B=8"]
        least_seconds = self._read.seconds(self._times[READ], added_bytes)
        print_ratios(measured, not_run=not_run, least_seconds=least_seconds)

    def _bytes_read(self, column: str) -> int:
        """By a decode step in the middle of the run."""
        positions = self._workload.prompt_tokens + self._workload.new_tokens // 2
        leases = self._served.leases if "adapters" in column else ()
        return decode_bytes(self._served, leases, num_positions=positions, batch=len(self._prompts(column)))

    def _run_beside(self, process: VllmProcess, column: str) -> None:
        theirs = VllmLane(process, self._prompts(column).tolist(), adapters="adapters" in column)
        lanes: dict[str, Lane] = {
            f"ours {column}": self._lanes[f"ours {column}"],
            f"vLLM {column}": theirs,
            f"ours again {column}": self._lanes[f"ours again {column}"],
        }
        # its first batch compiles
        theirs.prefill()
        times = take_turns(lanes, rounds=3, turns=5, steps=4, clock=time.perf_counter)
        pairs = zip(theirs.tokens, self._lanes[f"bf16 {column}"].tokens, strict=True)
        same = sum(one[0] == other[0] for one, other in pairs)
        print(f"check: vLLM, {column}: {same} of {len(theirs.tokens)} first tokens are PEFT's in bfloat16", flush=True)
        self._vllm_pairs |= times
        self._times[f"vLLM {column}"] = times[f"vLLM {column}"]

    def _prompts(self, column: str) -> Tensor:
        return self._workload.prompts(1 if column.endswith("B=1") else self._workload.batch)

    def _our_lane(self, served: Served, column: str) -> OurLane:
        leases = served.leases if "adapters" in column else None
        return OurLane(served, self._prompts(column).tolist(), leases)


_HUGGING_FACE = f"transformers {transformers.__version__}, PEFT {peft.__version__}"


if __name__ == "__main__":
    main()
