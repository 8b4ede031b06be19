"""What a step cannot be faster than: the bytes it must read over the rate at which this machine reads."""

from collections.abc import Sequence

import torch
from engine import Lease
from lanes import default_clock
from ours import Served

_BUFFER_BYTES = 1 << 29
_REPEATS = 9


def read_bandwidth() -> float:
    """Bytes a second: the best of some sums over a buffer that no cache holds, on all threads."""
    buffer, clock = torch.ones(_BUFFER_BYTES // 4), default_clock()
    best = float("inf")
    for _ in range(_REPEATS):
        start = clock()
        buffer.sum()
        best = min(best, clock() - start)
    return _BUFFER_BYTES / best


def decode_bytes(served: Served, leases: Sequence[Lease], *, num_positions: int, batch: int = 1) -> int:
    """Bytes that a decode step reads: the base without its embedding table, adapters, keys and values."""
    model = served.model
    embedding = next(weight for _, weight in model.stored())
    assert isinstance(embedding, torch.Tensor)
    config = model.config
    position_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_size * model.dtype.itemsize
    adapters = served.traffic(leases).num_bytes
    return model.num_bytes - embedding.nbytes + adapters + batch * num_positions * position_bytes
