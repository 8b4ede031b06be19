"""What a step cannot be faster than: the bytes it must read over the rate at which this machine reads."""

from collections.abc import Sequence

import torch
from engine import Lease
from lanes import Times
from ours import Served


class ReadLane:
    """Reads a buffer that no cache holds, on all threads; a lane, so that the rate is that of the same moments."""

    def __init__(self) -> None:
        self._buffer = torch.ones(1 << 25)

    def prefill(self) -> None:
        """Nothing to begin."""

    def step(self) -> None:
        """Reads it once."""
        self._buffer.sum()

    def seconds(self, times: Times, num_bytes: int) -> list[float]:
        """What reading so many bytes takes at the rate of each turn."""
        return [seconds * num_bytes / self._buffer.nbytes for seconds in times.decode]


def decode_bytes(served: Served, leases: Sequence[Lease], *, num_positions: int, batch: int = 1) -> int:
    """Bytes that a decode step reads: the base without its embedding table, adapters, keys and values."""
    model = served.model
    embedding = next(weight for _, weight in model.stored())
    assert isinstance(embedding, torch.Tensor)
    config = model.config
    position_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_size * model.dtype.itemsize
    adapters = served.traffic(leases).num_bytes
    return model.num_bytes - embedding.nbytes + adapters + batch * num_positions * position_bytes
