"""Downloading a base from a Hub on loopback: one commit, nothing but safetensors, JSON and templates."""

import logging

import pytest
from fake_hub import FakeHub
from lorasrv.errors import ModelLoadError
from lorasrv.model.hub import download_model, is_hub_reference

FILES = {
    "config.json": "{}",
    "model.safetensors": "weights",
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "pytorch_model.bin": "pickle",
    "modeling_custom.py": "code",
    "consolidated.safetensors": "again",
    "original/params.json": "{}",
}


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "published"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    with FakeHub() as hub:
        hub.add("org/tiny", folder)
        hub.add("org/closed", folder, gated=True)
        yield hub


@pytest.fixture
def download(hub, tmp_path):
    return lambda reference: download_model(reference, endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token="t")


def test_only_what_is_served_is_downloaded(hub, download):
    snapshot = download("org/tiny@main")
    names = {str(path.relative_to(snapshot.path)) for path in snapshot.path.rglob("*") if path.is_file()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert (snapshot.path / "model.safetensors").read_text() == "weights"
    assert snapshot.commit == hub.repositories["org/tiny"].commit
    assert not any("pytorch_model" in path for path in hub.requested)


@pytest.mark.parametrize("reference", ["org/tiny", "org/tiny@main"])
def test_a_moving_revision_is_resolved_and_named(hub, download, caplog, reference):
    with caplog.at_level(logging.WARNING):
        download(reference)
    assert f"org/tiny@{hub.repositories['org/tiny'].commit}" in caplog.text


def test_a_pinned_commit_is_silent_and_needs_no_network_again(hub, download, caplog):
    commit = hub.repositories["org/tiny"].commit
    first = download(f"org/tiny@{commit}")
    asked = len(hub.requested)
    assert download(f"org/tiny@{commit}") == first
    assert len(hub.requested) == asked
    assert not caplog.records


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("org/absent@main", "no model org/absent"),
        ("org/tiny@v9", "no revision 'v9'"),
        ("org/closed@main", "gated"),
        ("org/tiny@", "must be a folder or org/name"),
        ("../etc", "org/name"),
    ],
)
def test_refusals_say_what_to_do(download, reference, reason):
    with pytest.raises(ModelLoadError, match=reason):
        download(reference)


def test_an_unreachable_hub(tmp_path):
    with pytest.raises(ModelLoadError, match="could not be downloaded"):
        download_model("org/tiny@main", endpoint="http://127.0.0.1:9", cache_dir=tmp_path, token="t")


def test_folders_are_no_references(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_reference("org/tiny")
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert not is_hub_reference("org/tiny")
    assert not is_hub_reference("/models/tiny")
