"""Scratch memory: who owns it, and when it may no longer move."""

from contextlib import suppress

import pytest
import torch
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.workspace import Workspace, thread_workspace, using_workspace

CPU = torch.device("cpu")


def test_a_sealed_workspace_grows_no_more() -> None:
    workspace = Workspace()
    before = workspace.take("sums", (4, 8), torch.float32, CPU)
    workspace.seal()
    assert workspace.take("sums", (2, 32), torch.bfloat16, CPU).data_ptr() == before.data_ptr()
    with pytest.raises(KernelError, match=r"'sums' holds 128 bytes and 132 are asked for"):
        workspace.take("sums", (33,), torch.float32, CPU)
    with pytest.raises(KernelError, match=r"'other' holds 0 bytes"):
        workspace.take("other", (1,), torch.float32, CPU)


def test_kernels_take_from_the_workspace_of_the_innermost_block() -> None:
    own, outer, inner = thread_workspace(), Workspace(), Workspace()
    with using_workspace(outer):
        with suppress(ZeroDivisionError), using_workspace(inner):
            assert thread_workspace() is inner
            raise ZeroDivisionError
        assert thread_workspace() is outer
    assert thread_workspace() is own
