"""Times steps of a merged model against those of its base with the adapter unmerged.

    python server/benchmarks/merged.py [--threads 1] [--pairs 40] [--layers 2] [--rank 16] [--batches 1,8]

Random weights in a Llama shape of hidden 1280, a LoRA adapter on all linear layers, everything in bfloat16. `lorasrv
merge` writes the merged model as it does for everybody: in bfloat16, and in NF4 from the original weights. All batches
take every step in turns. Each cell is the speed over that of the NF4 base with the adapter unmerged, the median of all
pairs with the quartiles; beside them the base without an adapter, which is what a merge could gain at most in 4 bits,
and the unmerged model against itself, the noise. Timed only if merging in bfloat16 verified itself.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from engine import Lease
from lanes import Ratio, take_turns
from lorasrv.embedded import embedded_base
from lorasrv.merge.app import merge
from lorasrv.merge.config import MergeConfig
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.loader import load_model
from ours import OurLane, Served, read_leases
from workload import Workload, write

DTYPE = torch.bfloat16
BASE = "NF4 base"


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batches", default="1,8")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    workload = Workload(num_layers=arguments.layers, ranks=(arguments.rank,) * 8)
    with tempfile.TemporaryDirectory() as name:
        models, lease = prepare(workload, Path(name))
        sizes = {name: f"{model.num_bytes / 1e6:.0f} MB" for name, model in models.items()}
        print(f"{arguments.layers} layers, {arguments.threads} threads, {arguments.pairs} pairs, rank {arguments.rank}")
        print(f"the base takes {sizes.pop(BASE)} in NF4\n")
        names = " | ".join(f"{name}, {size}" for name, size in sizes.items())
        print(f"| | unmerged ms | {names} | base alone | unmerged against itself |")
        print("|---" * (len(sizes) + 4) + "|")
        for batch in map(int, arguments.batches.split(",")):
            compare(models, lease, workload.prompts(batch).tolist(), pairs=arguments.pairs)


def prepare(workload: Workload, folder: Path) -> tuple[dict[str, DecoderModel], Lease]:
    """Writes and merges; the base and the merged models as a server holds them, and the adapter."""
    files = write(workload, folder, dtype=DTYPE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded_base() / name, files.base / name)
    adapter = files.adapters[0]

    def merged(name: str, **options: object) -> DecoderModel:
        config = MergeConfig(base=str(files.base), adapters=((str(adapter), 1.0),), out=folder / name, **options)
        merge(config)
        return load_model(folder / name, dtype=DTYPE, quantize=False)

    models = {
        BASE: load_model(files.base, dtype=DTYPE),
        "merged in bfloat16": merged("wide"),
        # random weights have nothing to be faithful to
        "merged in NF4": merged("nf4", quantize="nf4", weights="original", tolerance=100.0),
    }
    (lease,) = read_leases(models[BASE], [adapter])
    return models, lease


def compare(models: dict[str, DecoderModel], lease: Lease, prompts: Sequence[list[int]], *, pairs: int) -> None:
    """Prints the rows of one batch size."""
    rank = max(lease.image.table[:, 3].tolist())
    served = {
        name: Served(model, [lease] if name == BASE else [], num_blocks=128, max_rank=rank)
        for name, model in models.items()
    }
    base = served[BASE]
    lanes = {
        "unmerged": OurLane(base, prompts, [lease] * len(prompts)),
        **{name: OurLane(one, prompts) for name, one in served.items() if name != BASE},
        "base alone": OurLane(base, prompts),
        "again": OurLane(base, prompts, [lease] * len(prompts)),
    }
    times = take_turns(lanes, rounds=pairs, turns=2)
    for phase in ("prefill", "decode"):
        seconds = {name: getattr(one, phase) for name, one in times.items()}
        reference = seconds.pop("unmerged")
        cells = " | ".join(str(Ratio.of(reference, other)) for other in seconds.values())
        middle = 1000 * sorted(reference)[len(reference) // 2]
        print(f"| {phase}, batch {len(prompts)} | {middle:.1f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
