"""Folders below the roots, repositories on the allow-list, and nothing else."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from lorasrv_adapters.checkpoint import write_checkpoint
from lorasrv_adapters.config import parse_adapter_config
from lorasrv_adapters.errors import (
    AdapterIncompatibleError,
    HubAccessDeniedError,
    HubUnreachableError,
    SlotsExhaustedError,
    SourceNotAllowedError,
    SourceNotFoundError,
)
from lorasrv_adapters.hub import HubSource
from lorasrv_adapters.loader import CheckpointLoader
from lorasrv_adapters.normalize import adapter_digest
from lorasrv_adapters.source import resolve
from lorasrv_adapters.weights import WeightLimits

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "team" / "poet").mkdir(parents=True)
    (tmp_path / "outside" / "secret").mkdir(parents=True)
    (tmp_path / "root-but-longer").mkdir()
    return tmp_path / "root"


def test_folders_below_a_root_are_found(root: Path) -> None:
    poet = root / "team" / "poet"
    other = root.parent / "outside"
    for source in (str(poet), "team/poet", "team/../team/poet", str(root / "team" / ".." / "team" / "poet")):
        assert resolve(source, roots=[other, root], hub=None) == poet.resolve()
    assert resolve(str(root), roots=[root], hub=None) == root.resolve()


def test_links_inside_a_root_are_followed(root: Path) -> None:
    (root / "alias").symlink_to(root / "team")
    assert resolve("alias/poet", roots=[root], hub=None) == (root / "team" / "poet").resolve()


OUTSIDE = [
    *("/etc", "../outside/secret", "team/../../outside", "escape", "escape/secret", "../root-but-longer"),
    *("", "a\0b", "../outside/missing", "/no/such/folder"),
]


@pytest.mark.parametrize("source", OUTSIDE)
def test_what_lies_outside_is_refused_whether_it_exists_or_not(root: Path, source: str) -> None:
    (root / "escape").symlink_to(root.parent / "outside")
    with pytest.raises(SourceNotAllowedError):
        resolve(source, roots=[root], hub=None)


def test_without_roots_nothing_is_allowed(root: Path) -> None:
    with pytest.raises(SourceNotAllowedError):
        resolve(str(root), roots=[], hub=None)


def test_missing_folders_and_files_are_not_found(root: Path) -> None:
    (root / "file").write_text("")
    for source in ("missing", "file", "~", str(root / "team" / "missing")):
        with pytest.raises(SourceNotFoundError):
            resolve(source, roots=[root], hub=None)


def test_the_hub_is_off_unless_given(root: Path) -> None:
    with pytest.raises(SourceNotAllowedError, match="Hub"):
        resolve("hf:org/name@main", roots=[root], hub=None)


def test_an_adapter_that_can_never_fit_is_refused_when_it_is_loaded(
    tmp_path: Path, base, lora_config, lora_tensors
) -> None:
    whole = {"base_model.model.lm_head.weight": torch.ones(50, 16)}
    write_checkpoint(tmp_path / "a", lora_config | {"modules_to_save": ["lm_head"]}, lora_tensors | whole)
    fits = CheckpointLoader(base=base, dtype=torch.bfloat16, max_rank=4, max_bytes=4096, roots=[tmp_path]).load("a")
    num_bytes = fits.image.flat.nbytes
    assert num_bytes > 50 * 16 * 2
    loader = CheckpointLoader(base=base, dtype=torch.bfloat16, max_rank=4, max_bytes=num_bytes - 1, roots=[tmp_path])
    with pytest.raises(SlotsExhaustedError, match=f"{num_bytes} bytes on the device; there are {num_bytes - 1}"):
        loader.load("a")


def test_the_loader_brings_an_image(tmp_path: Path, base, lora_config, lora_tensors) -> None:
    write_checkpoint(tmp_path / "a", lora_config, lora_tensors)
    loader = CheckpointLoader(base=base, dtype=torch.float32, max_rank=4, max_bytes=1 << 20, roots=[tmp_path])
    loaded = loader.load("a")
    assert loaded.digest == adapter_digest(parse_adapter_config(lora_config), lora_tensors)
    assert (loaded.kind, loaded.num_modules) == ("lora", 2)
    assert (loaded.ranks.min, loaded.ranks.max, loaded.ranks.sum) == (4, 4, 8)
    assert loaded.image.table[:, 3].tolist() == [4, 4, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("pins", [False, True])
def test_images_for_a_gpu_lie_in_pinned_memory(
    pins: bool, tmp_path: Path, base, lora_config, lora_tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    # the real one needs CUDA
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    write_checkpoint(tmp_path / "a", lora_config, lora_tensors)
    options = {"dtype": torch.float32, "max_rank": 4, "max_bytes": 1 << 20, "roots": [tmp_path], "pins": pins}
    image = CheckpointLoader(base=base, **options).load("a").image
    assert [tensor is image.flat for tensor in pinned] == [True] * pins
    assert image.table[0, 3] == 4


def test_the_loader_refuses_ranks_beyond_the_scratch(tmp_path: Path, base, lora_config, lora_tensors) -> None:
    write_checkpoint(tmp_path / "a", lora_config, lora_tensors)
    loader = CheckpointLoader(base=base, dtype=torch.float32, max_rank=3, max_bytes=1 << 20, roots=[tmp_path])
    with pytest.raises(AdapterIncompatibleError, match="rank 4 exceeds the server's limit of 3") as caught:
        loader.load("a")
    assert len(caught.value.reasons) == 2


class FakeHub:
    """Enough of the Hub's interface for one repository; remembers what it was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.status = 200
        self.headers: dict[str, str] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        if self.status != 200:
            return self.status, self.headers, b"{}"
        if path.startswith("/api/models/org/poet/revision/main"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            return 200, {}, json.dumps({"id": "org/poet", "sha": COMMIT, "siblings": siblings}).encode()
        if path.startswith("/api/models/org/poet/revision/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        name = path.removeprefix(f"/org/poet/resolve/{COMMIT}/")
        if name in self.files:
            return 200, {"ETag": f'"{hash(self.files[name]):x}"', "X-Repo-Commit": COMMIT}, self.files[name]
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"


@pytest.fixture
def fake_hub(lora_config, lora_tensors, tmp_path: Path) -> FakeHub:
    write_checkpoint(tmp_path / "upload", lora_config, lora_tensors)
    files = {path.name: path.read_bytes() for path in (tmp_path / "upload").iterdir()}
    return FakeHub(files | {"README.md": b"# poet", "training_args.bin": b"pickle"})


@pytest.fixture
def endpoint(fake_hub: FakeHub) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake_hub.tokens.add(self.headers.get("authorization"))
            status, headers, body = fake_hub.answer(self.path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub(endpoint: str, tmp_path: Path) -> HubSource:
    return HubSource(allowed=("org/*", "other/exact"), folder=tmp_path / "downloads", endpoint=endpoint)


def test_a_repository_is_downloaded_once_and_only_its_two_files(hub: HubSource, fake_hub: FakeHub, base) -> None:
    folder = resolve("hf:org/poet@main", roots=[], hub=hub)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(path.read_bytes() == fake_hub.files[path.name] for path in folder.iterdir())
    assert not any("README" in path or "bin" in path for path in fake_hub.asked)
    assert fake_hub.tokens == {None}
    num_asked = len(fake_hub.asked)
    assert hub.fetch("org/poet@main") == folder
    assert len(fake_hub.asked) == num_asked + 1
    assert hub.fetch(f"org/poet@{COMMIT}") == folder
    assert len(fake_hub.asked) == num_asked + 1
    assert list(folder.parent.iterdir()) == [folder]
    loader = CheckpointLoader(base=base, dtype=torch.float32, max_rank=8, max_bytes=1 << 20, roots=[], hub=hub)
    assert loader.load("hf:org/poet@main").num_modules == 2


def test_a_token_of_the_machine_is_not_sent(hub: HubSource, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_machine")
    hub.fetch("org/poet@main")
    assert fake_hub.tokens == {None}


def test_the_token_is_the_given_one(endpoint: str, fake_hub: FakeHub, tmp_path: Path) -> None:
    hub = HubSource(allowed=("org/poet",), folder=tmp_path / "downloads", endpoint=endpoint, token="hf_secret")
    hub.fetch("org/poet@main")
    assert fake_hub.tokens == {"Bearer hf_secret"}
    assert "hf_secret" not in repr(hub)


OFF_THE_LIST = [
    *("org/poet", "org/poet@", "poet@main", "evil/poet@main", "other/exactly@main", "org/a/b@main", "org/../x@main"),
    *("org/poet@../x", "org/poet@main@main", "", "http://x/y@main", "org/poet@main\n"),
]


@pytest.mark.parametrize("reference", OFF_THE_LIST)
def test_references_off_the_allow_list_are_never_asked_for(hub: HubSource, fake_hub: FakeHub, reference: str) -> None:
    with pytest.raises(SourceNotAllowedError):
        hub.fetch(reference)
    assert fake_hub.asked == []


@pytest.mark.parametrize(
    ("status", "headers", "error"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, HubAccessDeniedError),
        (403, {}, HubAccessDeniedError),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, HubAccessDeniedError),
        (404, {"X-Error-Code": "RepoNotFound"}, SourceNotFoundError),
        (404, {}, SourceNotFoundError),
        (500, {}, HubUnreachableError),
        (503, {}, HubUnreachableError),
    ],
)
def test_the_hubs_refusals_are_told_apart(
    hub: HubSource, fake_hub: FakeHub, status: int, headers: dict[str, str], error: type[Exception]
) -> None:
    fake_hub.status, fake_hub.headers = status, headers
    with pytest.raises(error):
        hub.fetch("org/poet@main")
    assert not hub.folder.exists()


def test_an_unknown_revision_is_not_found(hub: HubSource) -> None:
    with pytest.raises(SourceNotFoundError, match="no such revision"):
        hub.fetch("org/poet@v9")


def test_a_hub_that_does_not_answer_is_unreachable(tmp_path: Path) -> None:
    hub = HubSource(allowed=("org/*",), folder=tmp_path, endpoint="http://127.0.0.1:9")
    with pytest.raises(HubUnreachableError):
        hub.fetch("org/poet@main")


def test_pickled_and_oversized_repositories_are_refused_before_a_download(
    hub: HubSource, fake_hub: FakeHub, endpoint: str, tmp_path: Path
) -> None:
    small = HubSource(
        allowed=("org/*",),
        folder=tmp_path / "downloads",
        endpoint=endpoint,
        limits=WeightLimits(total_bytes=10, header_bytes=10),
    )
    with pytest.raises(AdapterIncompatibleError, match="beyond the limit"):
        small.fetch("org/poet@main")
    fake_hub.files["adapter_model.bin"] = fake_hub.files.pop("adapter_model.safetensors")
    with pytest.raises(AdapterIncompatibleError, match="pickle"):
        hub.fetch("org/poet@main")
    del fake_hub.files["adapter_model.bin"]
    with pytest.raises(SourceNotFoundError, match=r"no adapter_model\.safetensors"):
        hub.fetch("org/poet@main")
    assert not hub.folder.exists()
