"""Times decode steps beside what should cost them nothing: adapters that are registered and not used, DoRA's scale.

    python server/benchmarks/registered.py [--threads 1] [--pairs 60] [--layers 2] [--registered 1000]

Random weights in a Llama shape of hidden 1280; 8 sequences, each with an adapter of its own. Three comparisons: rank 8
with one of rank 128 resident, against without; DoRA against LoRA of the same ranks; many resident adapters, of which
the batch uses 8, against these 8 alone. Both sides take every step in turns. First column: the rank rows and bytes that
a step reads of the adapters, counted from the tables; they must be equal, but for DoRA's d. Then the speed over that of
the other side, the median of all pairs with the quartiles, and the other side against itself, the noise.
"""

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from engine import Lease
from lanes import Ratio, take_turns
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.loader import load_model
from lorasrv_kernels.lora.traffic import Traffic
from lorasrv_kernels.table import Column
from ours import OurLane, Served, read_leases
from workload import Workload, write, write_adapter

DTYPE = torch.bfloat16
MIXED = (8, 16, 32, 8, 16, 32, 8, 16)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--registered", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    workload = Workload(num_layers=arguments.layers, ranks=(8,) * 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write(workload, folder, dtype=DTYPE)
        seeds = itertools.count(100)

        def adapters(ranks: Sequence[int], *, dora: bool = False) -> list[Path]:
            return [
                write_adapter(files.base, folder / f"{seed}", rank=rank, seed=seed, dtype=DTYPE, dora=dora)
                for rank, seed in zip(ranks, seeds, strict=False)
            ]

        model = load_model(files.base, dtype=DTYPE)
        eight, large, lora, dora = (
            read_leases(model, folders)
            for folders in (files.adapters, adapters([128]), adapters(MIXED), adapters(MIXED, dora=True))
        )
    bench = Bench(model, workload.prompts(8).tolist(), pairs=arguments.pairs)
    many = [replace(eight[index % 8], digest=f"{index:064x}") for index in range(arguments.registered)]
    chosen = many[:: max(1, len(many) // 8)][:8]
    print(f"{arguments.layers} layers, {arguments.threads} threads, {arguments.pairs} pairs\n")
    print("| decode, B=8 | rank rows, bytes | of the other side | target | speed | other side against itself |")
    print("|---|---|---|---|---|---|")
    d_bytes = 8 * sum(module.out_features * 4 for module in model.base.modules.values() if module.kind == "linear")
    bench.compare("rank 8, one of rank 128 resident", eight, [*eight, *large], at_least=0.98)
    bench.compare("DoRA against LoRA", dora, dora, other=lora, at_least=0.97, more_bytes=d_bytes)
    bench.compare(f"{len(many)} adapters against 8", chosen, many, other=eight, at_least=0.95)


class Bench:
    """One model, and batches of 8 on it."""

    def __init__(self, model: DecoderModel, prompts: list[list[int]], *, pairs: int) -> None:
        self._model = model
        self._prompts = prompts
        self._pairs = pairs

    def compare(
        self,
        name: str,
        used: Sequence[Lease],
        resident: Sequence[Lease],
        *,
        other: Sequence[Lease] | None = None,
        at_least: float,
        more_bytes: int = 0,
    ) -> None:
        """Prints the row of a batch with the adapters `used` of those `resident`, against one with `other` alone."""
        other = used if other is None else other
        sides = (self._serve(resident), self._serve(other))
        counts = [side.traffic(leases) for side, leases in zip(sides, (used, other), strict=True)]
        if counts[0] != counts[1] + Traffic(num_bytes=more_bytes):
            raise SystemExit(f"wrong result: {name} reads {counts[0]}, the other side {counts[1]}")
        lanes = {
            "one": OurLane(sides[0], self._prompts, used),
            "other": OurLane(sides[1], self._prompts, other),
            "again": OurLane(sides[1], self._prompts, other),
        }
        times = take_turns(lanes, rounds=1, turns=self._pairs)
        speed, itself = (Ratio.of(times["other"].decode, times[lane].decode) for lane in ("one", "again"))
        counted = " | ".join(f"{count.rank_rows}, {count.num_bytes}" for count in counts)
        print(f"| {name} | {counted} | at least {at_least} | {speed} | {itself} |", flush=True)

    def _serve(self, resident: Sequence[Lease]) -> Served:
        ranks = max(int(lease.image.table[:, Column.RANK].max()) for lease in resident)
        return Served(self._model, resident, num_blocks=128, max_rank=ranks)


if __name__ == "__main__":
    main()
