"""`lorasrv train`: what is asked for by flags, environment and file, and the folders that come of it."""

import io
import json
import re
import socket
import sys
import urllib.request

import pytest
import torch
from lorasrv.cli.train import train_config
from lorasrv.embedded import embedded_adapters
from lorasrv.errors import ConfigError
from lorasrv.settings import settings_of
from lorasrv.train.config import JobConfig
from lorasrv.train.job import TrainingJob
from tiny_peft import save_base

TEXTS = ["Of arms and the man I sing, ", "who first from the shores of Troy, ", "exiled by fate, came to Italy. "]


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    return save_base(tmp_path / "base")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text * (1 + n % 2)}) + "\n" for n, text in enumerate(TEXTS * 4)))
    return path


def flags_of(base, data):
    return ("--base", base, "--data", data, "--max-steps", 3, "--batch-size", 4, "--rank", 2, "--learning-rate", 0.1)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "adalora"])
def test_an_adapter_of_every_kind_would_be_served(lorasrv, base, data, tmp_path, method):
    out = tmp_path / "adapter"
    end = lorasrv("train", *flags_of(base, data), "--method", method, "--out", out, "--json")
    assert end.code == 0, end.err
    (summary,) = end.json.values()
    assert summary["folder"] == str(out)
    # nearly all of a rank-2 adapter's modules keep a rank, whatever AdaLoRA prunes
    assert sum(summary["ranks"].values()) == 2 * len(summary["ranks"])
    assert summary["held_out_loss"] != summary["held_out_loss_before"]
    checked = lorasrv("check", out, "--base", base, "--json")
    assert checked.code == 0, checked.err
    assert json.loads((out / "provenance.json").read_text())["method"] == method
    page = (out / "report.html").read_text()
    assert "Training of adapter" in page
    assert "<dd>11 examples, and 1 held out; 97.9% of " in page
    assert "<dd>3 steps over " in page


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_whole_modules_and_patterns_would_be_served(lorasrv, base, data, tmp_path, method):
    out, config = tmp_path / "adapter", tmp_path / "train.yaml"
    saved = ("--modules-to-save", "lm_head", "--modules-to-save", "embed_tokens", "--modules-to-save", "norm")
    patterns = "rank_pattern: {'layers\\.0\\..*': 5, q_proj: 3}\n" if method != "adalora" else ""
    config.write_text(patterns)
    flags = (*flags_of(base, data), *saved, *(("--alpha-pattern", "v_proj=7.5") if patterns else ()))
    end = lorasrv("train", config, *flags, "--method", method, "--out", out, "--json")
    assert end.code == 0, end.err
    ranks = end.json["adapter"]["ranks"]
    assert not any("norm" in name or "lm_head" in name for name in ranks)
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["embed_tokens", "lm_head", "norm"]
    if patterns:
        assert (ranks["model.layers.0.mlp.up_proj"], ranks["model.layers.1.self_attn.q_proj"]) == (5, 3)
        assert written["rank_pattern"] == {r"layers\.0\..*": 5, "q_proj": 3}
        assert written["alpha_pattern"] == {"v_proj": 7.5}
    checked = lorasrv("check", out, "--base", base, "--json")
    assert checked.code == 0, checked.err


def test_patterns_are_read_from_everywhere(tmp_path, data):
    file = tmp_path / "train.yaml"

    def patterns(content="", environ=None, **flags):
        file.write_text(content)
        given = {"config": str(file), "data": (data,), "out": tmp_path / "x", **flags}
        return train_config(given, environ or {}).jobs["adapter"].rank_pattern

    both = (("q_proj", 3), (r"layers\.[01]\..*", 4))
    assert patterns("rank_pattern: {q_proj: 3, 'layers\\.[01]\\..*': 4}") == both
    assert patterns("rank_pattern: [q_proj=3, 'layers\\.[01]\\..*=4']") == both
    assert patterns(environ={"LORASRV_RANK_PATTERN": r"q_proj=3, layers\.[01]\..*=4"}) == both
    assert patterns(rank_pattern=[("a=b", 5)]) == (("a=b", 5),)
    (setting,) = (setting for setting in settings_of(JobConfig) if setting.name == "rank_pattern")
    # the last sign is the one between
    assert setting.parse("a=b=5") == ("a=b", 5)
    for wrong in ("q_proj", "=3", 7):
        with pytest.raises(ValueError, match="expected REGEX=VALUE"):
            setting.parse(wrong)
    with pytest.raises(ValueError, match="expected a whole number"):
        setting.parse("q_proj=x")


def test_patterns_that_cannot_be(tmp_path, data):
    def reasons(**values):
        with pytest.raises(ConfigError) as caught:
            JobConfig(out=tmp_path / "x", data=(data,), **values)
        return caught.value.reasons

    tables = {"rank_pattern": (("a", 0), ("a", 2)), "alpha_pattern": (("b", 0.0),)}
    assert reasons(**tables) == (
        "rank_pattern has 'a' twice",
        "rank_pattern gives 'a' rank 0: it must be at least 1",
        "alpha_pattern gives 'b' zero",
    )
    assert [reason.partition(",")[0] for reason in reasons(method="adalora", rank_pattern=(("a", 3),))] == [
        "rank_pattern is not for AdaLoRA"
    ]
    assert reasons(ensure_weight_tying=True)[0].startswith("ensure_weight_tying is for embedding and head")


def test_a_file_of_several_jobs(lorasrv, base, data, tmp_path):
    config = tmp_path / "jobs.yaml"
    config.write_text(
        f"base: {base}\ndata: [{data}]\nmax_steps: 2\nbatch_size: 2\neval_fraction: 0\nlearning-rate: 1e-3\n"
        f"jobs:\n  a: {{out: {tmp_path / 'a'}, rank: 3}}\n  b: {{out: {tmp_path / 'b'}, method: dora}}\n"
    )
    end = lorasrv("train", config, "--rank", 5, "--json")
    assert end.code == 0, end.err
    assert {name: set(job["ranks"].values()) for name, job in end.json.items()} == {"a": {5}, "b": {5}}
    first, *_, shown, about_a, about_b, serve = end.err.splitlines()
    assert first == "training a, b for 2 steps"
    line = r"step 2/2: loss a=\S+ b=\S+, lr \S+, \d+ tokens/s, \d+\.\d\d GiB, 0:00 left"
    assert re.fullmatch(line, shown)
    assert about_a == f"a: rank 5; {tmp_path / 'a' / 'report.html'} tells how it went"
    assert about_b.startswith("b: rank 5; ")
    assert serve == f"to serve them: lorasrv serve {base} --adapter a={tmp_path / 'a'} --adapter b={tmp_path / 'b'}"


def test_trained_alone_or_together_an_adapter_is_the_same(lorasrv, base, data, tmp_path):
    from safetensors.torch import load_file

    shared = f"base: {base}\ndata: [{data}]\nmax_steps: 2\nbatch_size: 2\nrank: 2\ndtype: float32\neval_fraction: 0\n"
    (tmp_path / "one.yaml").write_text(shared + f"out: {tmp_path / 'one'}\n")
    jobs = "".join(f"  {name}: {{out: {tmp_path / name}, method: {name}}}\n" for name in ("lora", "dora"))
    (tmp_path / "both.yaml").write_text(shared + "jobs:\n" + jobs)
    for name in ("one", "both"):
        assert lorasrv("train", tmp_path / f"{name}.yaml").code == 0
    alone, together = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "lora"))
    for name, tensor in alone.items():
        # float32 sums over other rows in the same batch; Adam's first steps divide by gradients' own size
        assert (tensor - together[name]).abs().max() < 1e-5, name


def test_what_is_written_in_bfloat16_is_what_was_evaluated(lorasrv, base, data, tmp_path):
    from safetensors.torch import load_file

    held = [
        lorasrv("train", *flags_of(base, data), "--out", tmp_path / dtype, "--save-dtype", dtype, "--json").json
        for dtype in ("float32", "bfloat16")
    ]
    wide, narrow = (load_file(tmp_path / dtype / "adapter_model.safetensors") for dtype in ("float32", "bfloat16"))
    assert all(torch.equal(narrow[name], tensor.to(torch.bfloat16)) for name, tensor in wide.items())
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}
    losses = [summary["adapter"]["held_out_loss"] for summary in held]
    assert losses[0] != losses[1]
    # three decimal digits of bfloat16
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    with pytest.raises(ConfigError, match="difference of two updates"):
        JobConfig(out=tmp_path / "x", data=(data,), initialization="pissa", save_dtype="bfloat16")


def test_the_embedded_base_learns_faster_unless_told_otherwise(data, tmp_path):
    flags = {"data": [data], "out": tmp_path / "adapter"}
    config = tmp_path / "rate.yaml"
    config.write_text("learning_rate: 1e-3\n")

    def rate(**more):
        return train_config({**flags, **more}, {}).jobs["adapter"].learning_rate

    assert rate() == 4e-3
    assert rate(learning_rate=1e-5) == 1e-5
    assert rate(config=str(config)) == 1e-3
    assert rate(base="/srv/models/some") == JobConfig.__dataclass_fields__["learning_rate"].default == 2e-4


def test_adalora_begins_exactly_where_the_lora_ended(lorasrv, base, data, tmp_path):
    flags = (*flags_of(base, data), "--dtype", "float32", "--eval-fraction", 0.3)
    (first,) = lorasrv("train", *flags, "--out", tmp_path / "lora", "--json").json.values()
    two_stages = ("--method", "adalora", "--init-from", tmp_path / "lora", "--out", tmp_path / "adalora", "--json")
    (then,) = lorasrv("train", *flags, *two_stages).json.values()
    # QR and SVD in float32
    assert then["held_out_loss_before"] == pytest.approx(first["held_out_loss"], rel=1e-5)
    assert then["held_out_loss"] != pytest.approx(first["held_out_loss"], rel=1e-5)


def test_everything_wrong_is_said_at_once(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text("rank: 0\nbatch_sise: 3\njobs:\n  a: {seed: 1, rank: no}\n  b: 7\n")
    with pytest.raises(ConfigError) as caught:
        train_config({"config": str(file)}, {})
    assert len(caught.value.reasons) == 1
    assert "unknown key batch_sise; did you mean batch_size?" in caught.value.reasons[0]
    file.write_text("rank: 0\ndropout: 2\njobs:\n  a: {seed: 1, rank: no}\n  b: 7\n")
    with pytest.raises(ConfigError) as caught:
        train_config({"config": str(file)}, {})
    assert [reason.partition(": jobs: ")[2] for reason in caught.value.reasons] == [
        "a: seed is one for all jobs; give it above them",
        "a: rank: expected a whole number, got False",
        "b: expected keys and values, got int",
    ]
    file.write_text("rank: 0\ndropout: 2\nmax_steps: 0\njobs: {a: {}, b: {out: x}}\n")
    with pytest.raises(ConfigError) as caught:
        train_config({"config": str(file)}, {})
    assert caught.value.reasons[0] == "max_steps is 0: it must be at least 1"
    assert caught.value.reasons[1:3] == (
        "job a: out is missing: name the new adapter folder",
        "job a: data is missing: name at least one file",
    )
    assert len(caught.value.reasons) == 8


def test_two_jobs_in_one_folder(data, tmp_path):
    file = tmp_path / "same.yaml"
    file.write_text(f"out: {tmp_path / 'x'}\ndata: [{data}]\njobs: {{a: {{}}, b: {{}}}}\n")
    with pytest.raises(ConfigError, match="x is the folder of 2 jobs"):
        train_config({"config": str(file)}, {})


def test_an_existing_folder_is_left_alone(lorasrv, base, data):
    taken = next(iter(embedded_adapters().values()))
    before = {path.name: path.read_bytes() for path in taken.iterdir()}
    end = lorasrv("train", *flags_of(base, data), "--out", taken)
    assert (end.code, end.out) == (3, "")
    assert "exists; choose another folder" in end.err
    assert {path.name: path.read_bytes() for path in taken.iterdir()} == before


def test_wrong_data_leaves_nothing(lorasrv, base, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    end = lorasrv("train", *flags_of(base, tmp_path / "bad.jsonl"), "--out", tmp_path / "adapter")
    assert (end.code, end.out) == (3, "")
    assert "bad.jsonl:1: text must be text, got int" in end.err
    assert not (tmp_path / "adapter").exists()


def _written(folder):
    """Everything but how long it took."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files.pop("report.html").startswith(b"<!doctype html>")
    rows = [json.loads(line) for line in files.pop("metrics.jsonl").splitlines()]
    return files, [{**row, "seconds": None} for row in rows]


def test_a_killed_run_goes_on_to_the_same_adapters(lorasrv, base, data, tmp_path, monkeypatch):
    jobs = "".join(f"  {name}: {{out: {tmp_path / name}, method: {name}}}\n" for name in ("lora", "adalora"))
    config = tmp_path / "run.yaml"
    shared = f"base: {base}\ndata: [{data}]\nmax_steps: 6\nbatch_size: 3\nrank: 2\nsave_every: 2\ndropout: 0.1\n"
    config.write_text(shared + "jobs:\n" + jobs)
    assert lorasrv("train", config).code == 0
    expected = [_written(tmp_path / name) for name in ("lora", "adalora")]
    for name in ("lora", "adalora"):
        (tmp_path / name).rename(tmp_path / f"whole-{name}")

    steps = []
    finish_step = TrainingJob.finish_step

    def killed(self, step, *, loss):
        steps.append(step)
        if step == 5:
            raise KeyboardInterrupt
        return finish_step(self, step, loss=loss)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingJob, "finish_step", killed)
        assert lorasrv("train", config).code == 130
    assert sorted(path.name for path in (tmp_path / "lora.training").glob("step-*")) == [
        "step-000000002",
        "step-000000004",
    ]
    again = lorasrv("train", config)
    assert again.code == 3
    assert again.err.count("add --resume, or remove it") == 2
    other = lorasrv("train", config, "--resume", "--learning-rate", 1.0)
    assert other.code == 3
    assert "lora: learning_rate is 1.0, the run that was interrupted had 0.0002" in other.err
    with monkeypatch.context() as patch:
        steps.clear()
        patch.setattr(
            TrainingJob,
            "finish_step",
            lambda self, step, *, loss: (steps.append(step), finish_step(self, step, loss=loss))[1],
        )
        resumed = lorasrv("train", config, "--resume")
        assert resumed.code == 0
    assert set(steps) == {4, 5}
    assert "training lora, adalora for 6 steps, going on after step 4" in resumed.err
    assert [_written(tmp_path / name) for name in ("lora", "adalora")] == expected
    assert not (tmp_path / "lora.training").exists()


def test_an_audit_marks_what_is_learned_and_trains_nothing(lorasrv, base, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Question {n}?", "completion": f" Answer {n}."} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    end = lorasrv("train", *flags_of(base, data), "--out", tmp_path / "adapter", "--audit", 2)
    assert end.code == 0, end.err
    lines = end.out.splitlines()
    assert lines[0].startswith("-- adapter, data.jsonl:1: ")
    assert [line for line in lines if "[[" in line] == [
        "Question 0?[[ Answer 0.</s>]]",
        "Question 2?[[ Answer 2.</s>]]",
    ]
    assert "adapter: 4 samples, 4 examples of up to" in end.err
    assert not (tmp_path / "adapter").exists()
    as_json = lorasrv("train", *flags_of(base, data), "--out", tmp_path / "adapter", "--audit", "--json")
    assert as_json.json["adapter"]["samples"][0]["pieces"] == [["Question 0?", False], [" Answer 0.</s>", True]]


def test_a_dry_run_tells_the_memory_and_does_nothing(lorasrv, base, tmp_path):
    flags = ("--base", base, "--data", tmp_path / "none.jsonl", "--out", tmp_path / "adapter", "--dry-run")
    end = lorasrv("train", *flags)
    assert end.code == 0, end.err
    assert end.out.splitlines()[-1].startswith("together, without what is paged")
    parts = lorasrv("train", *flags, "--json").json
    assert parts["resident_bytes"] == sum(part["num_bytes"] for part in parts["parts"])
    more = lorasrv("train", *flags, "--rank", 64, "--json").json
    assert more["resident_bytes"] > parts["resident_bytes"]
    assert not (tmp_path / "adapter").exists()


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_a_run_has_a_page_of_metrics_until_it_ends(lorasrv, base, data, tmp_path, monkeypatch):
    port, pages, write = _free_port(), [], TrainingJob.write

    def read_and_write(self, provenance, *, beside):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            pages.append(page.read().decode())
        return write(self, provenance, beside=beside)

    monkeypatch.setattr(TrainingJob, "write", read_and_write)
    out, steps = tmp_path / "poet", ("--method", "adalora", "--save-every", 2)
    end = lorasrv("train", *flags_of(base, data), *steps, "--out", out, "--metrics-port", port)
    assert end.code == 0, end.err
    assert f"metrics are at http://127.0.0.1:{port}/metrics" in end.err
    (page,) = pages
    found = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("lorasrv_train_"))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    run, job = f'{{base_model="{base}"}}', f'{{base_model="{base}",training_job="adapter"}}'
    assert float(found[f"lorasrv_train_step{run}"]) == 3
    assert float(found[f"lorasrv_train_tokens_total{run}"]) == sum(row["tokens"] for row in rows)
    assert float(found[f"lorasrv_train_checkpoint_duration_seconds_count{run}"]) == 1
    assert float(found[f"lorasrv_train_held_out_loss{job}"]) == rows[-1]["held_out_loss"]
    ranks = [row["ranks"] for row in rows if "ranks" in row][-1]
    assert float(found[f"lorasrv_train_total_rank{job}"]) == sum(ranks.values())
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_port_that_is_taken_is_said_before_the_first_step(lorasrv, base, data, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        end = lorasrv("train", *flags_of(base, data), "--out", tmp_path / "poet", "--metrics-port", port)
    assert (end.code, end.out) == (3, "")
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in end.err
    assert not list(tmp_path.glob("poet*"))


def test_what_is_recommended_is_trained_unchanged(lorasrv, base, data, tmp_path):
    out = tmp_path / "poet"
    end = lorasrv("train", "--recommend", "--base", base, "--data", data, "--out", out, "--max-steps", 1, "--clip", 0.5)
    assert end.code == 0, end.err
    file = tmp_path / "recommended.yaml"
    file.write_text(end.out)
    as_json = lorasrv("train", "--recommend", "--json", "--base", base, "--data", data, "--out", out, "--max-steps", 1)
    found = train_config({"config": str(file)}, {})
    for advice in as_json.json["settings"]:
        key, value = advice["key"], 0.5 if advice["key"] == "clip" else advice["value"]
        held = getattr(found.run if hasattr(found.run, key) else found.jobs["adapter"], key)
        assert json.loads(json.dumps(held, default=str)) == value, key
    assert "clip: 0.5" in end.out
    assert lorasrv("train", file).code == 0
    assert (out / "adapter_model.safetensors").exists()


def test_recommended_settings_say_what_is_missing_and_what_does_not_fit(lorasrv, base, tmp_path):
    end = lorasrv("train", "--recommend", "48GB", "--base", base)
    assert "to train: lorasrv train THIS.yaml --data FILE --out DIR" in end.err
    small = lorasrv("train", "--recommend", "1MB", "--base", base)
    assert (small.code, small.out) == (3, "")
    assert "512 tokens at a time take" in small.err
    wrong = lorasrv("train", "--recommend", "much", "--base", base)
    assert wrong.code == 2
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text("jobs: {a: {}, b: {}}\n")
    assert "2 jobs; recommend is for one" in lorasrv("train", jobs, "--recommend").err


@pytest.mark.parametrize(("width", "has_bar"), [(80, False), (120, True)])
def test_a_terminal_shows_every_figure_in_one_line(lorasrv, base, data, tmp_path, monkeypatch, width, has_bar):
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    flags = [*flags_of(base, data), "--max-steps", 1500, "--learning-rate", 1e-3]
    monkeypatch.setattr(TrainingJob, "is_done", property(lambda self: self.best is not None))
    lorasrv("train", *flags, "--eval-every", 2, "--out", tmp_path / "poet")
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", sys.stderr.getvalue())
    words = r"loss \d\.\d{3}, lr \d\.\de-0\d, \d+ tokens/s, \d\.\d\d GiB, \d+:\d\d left"
    assert re.search(rf"step 2/1500 {'━*[╸╺]?━+' if has_bar else ''} ?{words}", shown), shown
    assert re.search(r"step 2: held out \d", shown)


class Terminal(io.StringIO):
    """What a terminal is to a program."""

    def isatty(self):
        return True
