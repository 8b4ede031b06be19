"""A graph without a GPU: it does the same work again, and fails if a CUDA graph would have done other work.

A CUDA graph has the addresses, shapes and numbers of the capture baked into it, and no host takes part in a replay. So
every replay here must make the same calls on the same tensors in the same order, and none that reads a tensor on the
host or sends one to the device. Kernels of this project count as one call: what they do inside is their own tests'.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HOST_OPS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"),
    *("lift_fresh", "lift_fresh_copy", "pin_memory", "_pin_memory", "repeat_interleave.Tensor"),
    # their table says what to read, and the host reads it
    *("replaced_embedding", "replaced_linear", "replaced_scale_"),
}

HOST_READS = ("tolist", "numpy", "__array__")


class RecordedGraph:
    """Stands in for `CudaGraph`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.num_replays = 0

    def capture(self, run: Callable[[], None]) -> None:
        self._run = run
        with _Recorder() as recorder:
            run()
        self.calls = recorder.calls

    def replay(self) -> None:
        self.num_replays += 1
        with _Recorder() as recorder:
            self._run()
        assert len(recorder.calls) == len(self.calls)
        for number, (call, captured) in enumerate(zip(recorder.calls, self.calls, strict=True)):
            assert call == captured, f"call {number} is not the one captured"


class _Recorder(TorchDispatchMode):
    """Notes every call with what identifies its tensors: their address, or where they were made within the run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self._inside_kernel = 0
        self._made: dict[int, int] = {}
        # kept, so that no address is given out twice
        self._kept: list[Tensor] = []

    def __enter__(self) -> "_Recorder":
        # on a CPU these pass no dispatcher
        self._reads = {name: getattr(Tensor, name) for name in HOST_READS}
        for name, read in self._reads.items():
            setattr(Tensor, name, self._guarded(name, read))
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for name, read in self._reads.items():
            setattr(Tensor, name, read)

    def _guarded(self, name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(tensor: Tensor, *args: object) -> Any:
            assert self._inside_kernel, f"{name} needs the host"
            return read(tensor, *args)

        return guarded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        assert not {name, name.partition(".")[0]} & HOST_OPS, f"{name} needs the host"
        arguments = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        if name.startswith("index"):
            booleans = [leaf for leaf in arguments if isinstance(leaf, Tensor) and leaf.dtype == torch.bool]
            assert not booleans, f"{name} counts a mask on the host"
        self.calls.append((str(func), *(self._identity(leaf) for leaf in arguments)))
        self._inside_kernel += 1
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self._inside_kernel -= 1
        before = {leaf.untyped_storage().data_ptr() for leaf in arguments if isinstance(leaf, Tensor)}
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in before:
                self._made.setdefault(leaf.untyped_storage().data_ptr(), len(self._made))
                self._kept.append(leaf)
        return result

    def _identity(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        address = leaf.untyped_storage().data_ptr()
        place = ("made", self._made[address]) if address in self._made else ("outside", address)
        return (*place, leaf.storage_offset(), leaf.dtype, tuple(leaf.shape), leaf.stride())
