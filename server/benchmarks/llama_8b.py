"""Times decode steps of one sequence in an 8B Llama shape against the least that reading its weights takes.

    python server/benchmarks/llama_8b.py [--threads 2] [--pairs 60] [--layers 2] [--adapters 16]

Some layers of the shape (hidden 4096, feed-forward 14336, 32 heads over 8), each with weights of its own, so that no
cache holds them; a small vocabulary, since the head of the real one is a quarter of its bytes and no concern of
adapters. 16 adapters of rank 16 are registered, and the sequence uses one. The floor is what it takes to read the bytes
of a step (4-bit weights, head, adapter, keys and values) at the rate at which a buffer is read in the same turn. What
is paid once a step, embedding, head and sampling, weighs more here than in 32 layers. With `--exact off` a row's bits
may depend on its neighbours.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from floor import ReadLane, decode_bytes
from lanes import Ratio, take_turns
from lorasrv.model.loader import load_model
from ours import OurLane, Served, read_leases
from workload import Workload, write

TARGET = 0.7


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--exact", choices=("on", "off"), default="off")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    workload = Workload(
        num_layers=arguments.layers,
        hidden_size=4096,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
        vocab_size=4096,
        ranks=(arguments.rank,) * arguments.adapters,
    )
    with tempfile.TemporaryDirectory() as folder:
        files = write(workload, Path(folder), dtype=torch.bfloat16)
        model = load_model(files.base, dtype=torch.bfloat16)
        leases = read_leases(model, files.adapters)
    exact = arguments.exact == "on"
    served = Served(model, leases, num_blocks=16, max_rank=arguments.rank, exact=exact)
    prompts = workload.prompts(1).tolist()
    read = ReadLane()
    lanes = {
        "read": read,
        "adapter": OurLane(served, prompts, leases[:1]),
        "base": OurLane(served, prompts),
        "adapter again": OurLane(served, prompts, leases[:1]),
    }
    times = take_turns(lanes, rounds=1, turns=arguments.pairs)
    gigabyte_seconds = statistics.median(read.seconds(times["read"], 10**9))
    print(f"{arguments.layers} layers of an 8B Llama shape, {len(leases)} adapters of rank {arguments.rank}, ", end="")
    print(f"exact {arguments.exact}, {arguments.threads} threads, reads {1 / gigabyte_seconds:.1f} GB/s\n")
    print("| decode, B=1 | ms a step | MB read | speed over the floor | target | speed over itself |")
    print("|---|---|---|---|---|---|")
    for name, used in (("adapter", leases[:1]), ("base", [])):
        num_bytes = decode_bytes(served, used, num_positions=workload.prompt_tokens + arguments.pairs // 2)
        seconds = times[name].decode
        ratio = Ratio.of(read.seconds(times["read"], num_bytes), seconds)
        itself = Ratio.of(times["adapter again"].decode, seconds) if name == "adapter" else "-"
        target = f"at least {TARGET}" if name == "adapter" and not exact else "-"
        milliseconds = 1e3 * statistics.median(seconds)
        print(f"| {name} | {milliseconds:.2f} | {num_bytes / 1e6:.1f} | {ratio} | {target} | {itself} |", flush=True)


if __name__ == "__main__":
    main()
