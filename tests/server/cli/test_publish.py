"""`lorasrv train --publish`: a real server answers with what was trained a moment ago."""

import json
import socket
import threading
from contextlib import ExitStack

import pytest
from lorasrv.config import ServeConfig
from lorasrv.engine.runner import ModelRunner
from lorasrv.train.job import TrainingJob
from lorasrv_client import Client
from real_server import real_server
from tiny_peft import save_base

TEXTS = ["Of arms and the man I sing, ", "who first from the shores of Troy, ", "exiled by fate, came to Italy. "]
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def target(base, root):
    """A running server that may read adapters below `root`."""
    with real_server(ServeConfig(base=str(base), adapter_roots=(root,), max_rank=8, max_num_seqs=4)) as address:
        yield address


@pytest.fixture
def flags(base, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 2))
    steps = ("--max-steps", 2, "--batch-size", 2, "--rank", 2, "--learning-rate", 0.1, "--eval-fraction", 0)
    return ("--base", base, "--data", path, *steps)


@pytest.fixture
def steps_may_run(monkeypatch):
    """An event that every step of the server waits for."""
    event, execute = threading.Event(), ModelRunner.execute
    event.set()
    monkeypatch.setattr(ModelRunner, "execute", lambda self, step: event.wait() and execute(self, step))
    yield event
    event.set()


def test_a_running_server_answers_with_the_new_version(lorasrv, flags, target, root, steps_may_run):
    first = lorasrv("train", *flags, "--out", root / "1" / "poet", "--publish", target, "--json")
    assert first.code == 0, first.err
    published = first.json["adapter"]["published"]
    assert published == {
        "adapter_id": "poet",
        "digest": published["digest"],
        "replaced_digest": None,
        "error": None,
    }
    assert f"published poet@{published['digest'][:12]} at {target}\n" in first.err
    with Client(target) as client:
        alone = client.generate("Of arms", adapter_id="poet", max_new_tokens=300, **GREEDY)
        assert alone.adapter_digest == published["digest"]
        assert alone.text != client.generate("Of arms", max_new_tokens=300, **GREEDY).text
        with client.stream("Of arms", adapter_id="poet", max_new_tokens=300, **GREEDY) as stream:
            next(iter(stream))
            steps_may_run.clear()
            second = lorasrv("train", *flags, "--seed", 1, "--out", root / "2" / "poet", "--publish", target, "--json")
            assert second.code == 0, second.err
            newer = second.json["adapter"]["published"]
            assert newer["replaced_digest"] == published["digest"]
            assert newer["digest"] != published["digest"]
            assert f"in the place of {published['digest'][:12]}, on which running requests finish" in second.err
            assert client.server_info().num_running == 1
            steps_may_run.set()
            # it began before there was a second version
            assert (stream.result().text, stream.result().adapter_digest) == (alone.text, published["digest"])
        answer = client.generate("Of arms", adapter_id="poet", max_new_tokens=12, **GREEDY)
        assert answer.adapter_digest == newer["digest"]
        assert answer.text != alone.text[: len(answer.text)]


def test_several_jobs_answer_to_their_names(lorasrv, flags, target, root, tmp_path):
    file = tmp_path / "jobs.yaml"
    file.write_text("jobs:\n" + "".join(f"  {name}: {{out: {root / name}-1}}\n" for name in ("ann", "bob")))
    end = lorasrv("train", file, *flags, "--publish", target)
    assert end.code == 0, end.err
    with Client(target) as client:
        assert {client.get_adapter(name).source for name in ("ann", "bob")} == {
            str(root / name) + "-1" for name in ("ann", "bob")
        }


def test_what_the_server_would_refuse_is_said_before_the_first_step(lorasrv, flags, target, tmp_path):
    end = lorasrv(
        "train",
        *flags,
        "--rank-pattern",
        "q_proj=5",
        "--initialization",
        "pissa",
        "--publish",
        target,
        "--out",
        tmp_path / "a b",
    )
    assert (end.code, end.out) == (3, "")
    assert f"{target} would not take a b: its rank is 10, and the server's max_rank 8" in end.err
    assert f"{target} would not take a b: adapter_id: a segment starts with a letter or digit" in end.err
    assert "step" not in end.err
    outside = lorasrv("train", *flags, "--publish", target, "--out", tmp_path / "poet")
    assert outside.code == 3
    assert "it lies outside the adapter roots" in outside.err
    assert not list(tmp_path.glob("poet*"))


def test_a_server_of_another_base_is_left_alone(lorasrv, flags, target, root, tmp_path):
    (tmp_path / "other").mkdir()
    other = save_base(tmp_path / "other", "qwen2")
    end = lorasrv("train", *flags, "--base", other, "--publish", target, "--out", root / "other")
    assert end.code == 3
    assert "and no adapter fits both" in end.err
    assert not list(root.glob("other*"))


def test_without_a_server_nothing_is_trained(lorasrv, flags, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as unanswered:
        port = unanswered.getsockname()[1]
    end = lorasrv("train", *flags, "--publish", f"127.0.0.1:{port}", "--out", tmp_path / "poet")
    assert (end.code, end.out) == (5, "")
    assert "lorasrv: " in end.err
    assert not list(tmp_path.glob("poet*"))


def test_a_server_that_goes_away_meanwhile_leaves_the_folder(lorasrv, flags, base, tmp_path, monkeypatch):
    with ExitStack() as stack:
        target = stack.enter_context(real_server(ServeConfig(base=str(base), adapter_roots=(tmp_path,))))
        after_writing(monkeypatch, lambda _: stack.close())
        end = lorasrv("train", *flags, "--publish", target, "--out", tmp_path / "poet", "--json")
    assert end.code == 5
    assert end.json["adapter"]["published"]["digest"] is None
    assert end.json["adapter"]["published"]["error"]
    assert f"lorasrv adapters load --server {target} --replace poet={tmp_path / 'poet'}" in end.err
    assert lorasrv("check", tmp_path / "poet", "--base", base).code == 0


def test_an_adapter_that_fails_its_check_is_not_offered(lorasrv, flags, target, root, monkeypatch):
    after_writing(monkeypatch, lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"damaged"))
    offered, load = [], Client.load_adapter
    monkeypatch.setattr(
        Client, "load_adapter", lambda *args, **options: offered.append(args[2]) or load(*args, **options)
    )
    end = lorasrv("train", *flags, "--publish", target, "--out", root / "damaged")
    assert end.code == 3
    assert f"damaged is not published; what was trained is in {root / 'damaged'}" in end.err
    # asked for before the run, and never again
    assert offered == [str(root / "damaged" / ".not-trained-yet")]


def after_writing(monkeypatch, act):
    """Has something happen to every finished folder."""
    write = TrainingJob.write

    def write_and_act(self, provenance, *, beside):
        folder = write(self, provenance, beside=beside)
        act(folder)
        return folder

    monkeypatch.setattr(TrainingJob, "write", write_and_act)
