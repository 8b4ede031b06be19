"""What the kernels' tests share: the bitsandbytes oracle, poisoned scratch memory, a chosen number of threads."""

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from interpreter import INTERPRETING
from lorasrv_kernels.attention import native as attention_native
from lorasrv_kernels.cpu import decoder as native_decoder
from lorasrv_kernels.cpu import isa, library
from lorasrv_kernels.dense import native as dense_native
from lorasrv_kernels.lora import native as lora_native
from lorasrv_kernels.lora.training import native as lora_training_native
from lorasrv_kernels.nf4 import native as nf4_native
from lorasrv_kernels.rowwise import native as rowwise_native
from lorasrv_kernels.workspace import Workspace
from torch import Tensor


@pytest.fixture(scope="session")
def bitsandbytes() -> ModuleType:
    """`bitsandbytes.functional`; its import warns and logs about what it lacks on a CPU."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes.functional
    return bitsandbytes.functional


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scratch tensor and every new output is NaN until written."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: object, **kwargs: object) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.numel():
                tensor.view(-1).view(torch.uint8).fill_(0xFF)
            return tensor

        return wrapper

    monkeypatch.setattr(Workspace, "take", poisoned(Workspace.take))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch's number of threads during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton kernels run: the CUDA device, or the CPU in a process that interprets them."""
    pytest.importorskip("triton")
    if INTERPRETING:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("no CUDA device; the same test runs through the interpreter")


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without a compiler."""
    one = (native_decoder._function, dense_native._function, lora_native._function, nf4_native._function)
    functions = (*one, lora_training_native._function, attention_native._functions, rowwise_native._functions)
    monkeypatch.setattr(library, "PATH", Path("no-such-library.so"))
    for cached in (library.load, isa.widest_isa, *functions):
        cached.cache_clear()
    yield
    for cached in (library.load, isa.widest_isa, *functions):
        cached.cache_clear()


@pytest.fixture
def unforced_isa() -> Iterator[None]:
    """The choice of instruction set is taken back after the test."""
    yield
    isa.force_isa(None)
