"""Loads in a process of its own: what comes back is what was loaded, or raised, and the server outlives its end."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lorasrv_adapters.checkpoint import write_checkpoint
from lorasrv_adapters.errors import AdapterIncompatibleError, SlotsExhaustedError, SourceNotFoundError
from lorasrv_adapters.image import AdapterImage
from lorasrv_adapters.loader import CheckpointLoader
from lorasrv_adapters.loader_process import LoaderProcess
from lorasrv_adapters.records import LoadedAdapter, RankSummary


def told(text: str) -> LoadedAdapter:
    """An adapter that says something in its kind."""
    image = AdapterImage(flat=torch.zeros(0), table=torch.zeros(0, 8, dtype=torch.int64))
    return LoadedAdapter(digest="0" * 64, kind=text, ranks=RankSummary(min=0, max=0, sum=0), num_modules=0, image=image)


@pytest.fixture
def new_loader() -> Iterator[Callable[[Callable[[Path], LoadedAdapter]], LoaderProcess]]:
    loaders: list[LoaderProcess] = []

    def new(read: Callable[[Path], LoadedAdapter]) -> LoaderProcess:
        loaders.append(LoaderProcess(Path, read))
        return loaders[-1]

    yield new
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_brings_what_loading_here_brings(
    tmp_path: Path, base, lora_config, lora_tensors, dtype: torch.dtype
) -> None:
    for name, module in base.modules.items():
        if f"base_model.model.{name}.lora_A.weight" in lora_tensors:
            lora_tensors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.rand(module.out_features) + 0.5
    write_checkpoint(tmp_path / "a", lora_config | {"use_dora": True}, lora_tensors)
    direct = CheckpointLoader(base=base, dtype=dtype, max_rank=4, max_bytes=1 << 20, roots=[tmp_path])
    ours, theirs = direct.load("a"), LoaderProcess(direct.locate, direct.read).load("a")
    assert (theirs.digest, theirs.kind, theirs.ranks, theirs.num_modules) == (
        ours.digest,
        ours.kind,
        ours.ranks,
        ours.num_modules,
    )
    assert theirs.image.flat.dtype == dtype
    assert torch.equal(theirs.image.flat.view(torch.uint8), ours.image.flat.view(torch.uint8))
    assert torch.equal(theirs.image.table, ours.image.table)


def test_errors_come_back_as_they_were_raised(tmp_path: Path, base, lora_config, lora_tensors, new_loader) -> None:
    direct = CheckpointLoader(base=base, dtype=torch.float32, max_rank=3, max_bytes=1 << 20, roots=[tmp_path])
    loader = LoaderProcess(direct.locate, direct.read)
    with pytest.raises(SourceNotFoundError):
        loader.load("nothing")
    write_checkpoint(tmp_path / "a", lora_config, lora_tensors)
    with pytest.raises(AdapterIncompatibleError) as here:
        direct.load("a")
    with pytest.raises(AdapterIncompatibleError) as there:
        loader.load("a")
    assert there.value.reasons == here.value.reasons
    assert str(there.value) == str(here.value)
    loader.close()

    def too_large(_: Path) -> LoadedAdapter:
        raise SlotsExhaustedError(num_bytes=7, limit_bytes=5)

    with pytest.raises(SlotsExhaustedError) as caught:
        new_loader(too_large).load("a")
    assert (caught.value.num_bytes, caught.value.limit_bytes) == (7, 5)


def test_it_works_when_nobody_else_wants_to_and_in_another_process(new_loader) -> None:
    loader = new_loader(lambda folder: told(f"{os.sched_getscheduler(0)} {os.getpid()} {folder}"))
    policy, pid, folder = loader.load("/some/where").kind.split()
    assert (int(policy), folder) == (os.SCHED_IDLE, "/some/where")
    assert int(pid) != os.getpid()
    # every load begins with the same memory
    assert loader.load("/some/where").kind.split()[1] != pid


def test_a_load_may_use_every_core_after_the_fork(new_loader) -> None:
    torch.randn(600, 600) @ torch.randn(600, 600)
    loader = new_loader(lambda _: told(str(float((torch.ones(600, 600) @ torch.ones(600, 600))[0, 0]))))
    assert loader.load("/").kind == "600.0"


def test_a_load_that_dies_is_an_error_and_the_next_one_works(new_loader) -> None:
    def read(folder: Path) -> LoadedAdapter:
        if folder.name == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if folder.name == "bug":
            raise KeyError("secret")
        return told("well")

    loader = new_loader(read)
    with pytest.raises(RuntimeError, match="was ended by signal 9"):
        loader.load("/crash")
    with pytest.raises(RuntimeError, match="failed"):
        loader.load("/bug")
    assert loader.load("/fine").kind == "well"


def test_without_the_process_it_loads_here(new_loader, caplog: pytest.LogCaptureFixture) -> None:
    loader = new_loader(lambda _: told(str(os.getpid())))
    os.kill(loader._pid, signal.SIGKILL)
    assert loader.load("/").kind == str(os.getpid())
    assert "loader process is gone" in caplog.text


def test_its_end_leaves_no_process(new_loader) -> None:
    loader = new_loader(lambda _: told(""))
    loader.load("/")
    loader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(loader._pid, 0)
    loader.close()


def test_one_ends_while_a_later_one_runs(new_loader) -> None:
    first, second = (new_loader(lambda folder: told(folder.name)) for _ in range(2))
    first.close()
    with pytest.raises(ProcessLookupError):
        os.kill(first._pid, 0)
    assert second.load("/well").kind == "well"


def test_many_threads_take_turns(new_loader) -> None:
    loader = new_loader(lambda folder: told(folder.name))
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda index=index: found.update({index: loader.load(f"/{index}").kind}))
        for index in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: str(index) for index in range(12)}
