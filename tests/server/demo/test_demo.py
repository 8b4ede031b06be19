"""The whole demo against a fake server program, over real gRPC."""

import io
import json
import os
import signal
import sys

import pytest
from lorasrv import embedded
from lorasrv.cli import main as main_module
from lorasrv.demo import app
from lorasrv.demo.display import LiveDisplay, print_report
from lorasrv.demo.errors import ServerEndedError
from lorasrv.demo.session import PROMPTS, Answer, Question, Report, Voice
from lorasrv_client.errors import ClientError
from rich.console import Console
from rich.live import Live

BASE = Voice(adapter_id="", kind="base", ranks=())
POET = Voice(adapter_id="poet", kind="dora", ranks=(2, 8))


def answer(voice, prompt, text):
    return Answer(
        adapter_id=voice.adapter_id,
        kind=voice.kind,
        ranks=voice.ranks,
        prompt=prompt,
        text=text,
        token_ids=(1, 2, 3),
        ttft_seconds=0.0125,
    )


def test_every_prompt_is_answered_by_the_base_and_every_adapter(demo):
    (report,) = demo().reports
    asked = [(answer.prompt, answer.adapter_id) for answer in report.answers]
    assert asked == [(prompt, voice) for prompt in PROMPTS for voice in ("", "adalora", "dora", "lora")]
    assert len(asked) >= 12
    assert {answer.adapter_id: (answer.kind, answer.ranks) for answer in report.answers} == {
        "": ("base", ()),
        "adalora": ("adalora", (2, 8)),
        "dora": ("dora", (2, 8)),
        "lora": ("lora", (2, 8)),
    }
    for each in report.answers:
        assert each.text.startswith(f"{each.adapter_id} one ")
        assert each.token_ids
        assert 0 < each.ttft_seconds < 30
    assert report.max_adapters_in_one_step == 3


def test_the_json_is_what_is_promised(demo):
    (report,) = demo().reports
    document = json.loads(json.dumps(report.as_json()))
    assert sorted(document) == ["answers", "max_adapters_in_one_step"]
    for each in document["answers"]:
        fields = ["adapter_id", "kind", "prompt", "ranks", "text", "token_ids", "ttft_seconds"]
        assert sorted(each) == fields


def test_progress_is_told_and_adapters_are_loaded_while_the_server_runs(demo, capsys):
    said = demo().said
    assert said[0] == "starting a server on the embedded base model"
    assert said[1].startswith("the server listens on 127.0.0.1:")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("loaded adalora (adalora, ranks 2-8) in ")
    assert lines[3] == "asking 16 questions of 4 voices at once"
    assert len(lines) == 4 + 16


def test_a_server_that_dies_at_start_is_told_with_its_log(demo):
    with pytest.raises(ServerEndedError, match="no such model: nowhere") as caught:
        demo("die-at-start")
    assert caught.value.status == 3


def test_a_server_that_dies_while_asked_is_told_with_its_log(demo):
    with pytest.raises(ServerEndedError, match="engine fell over") as caught:
        demo("die-when-asked")
    assert caught.value.status == 9


def test_a_refusal_of_a_living_server_stays_what_it_is(demo, monkeypatch):
    monkeypatch.setattr("lorasrv.demo.session.PROMPTS", ("x",))
    monkeypatch.setattr("lorasrv.demo.session.SAMPLING", {"max_new_tokens": 2})
    monkeypatch.setattr("lorasrv.demo.session.AsyncClient.load_adapter", refuse)
    with pytest.raises(ClientError, match="no"):
        demo()


async def refuse(self, adapter_id, source):
    del self, adapter_id, source
    raise ClientError("no", code=None)


def test_keep_leaves_the_server_until_ctrl_c(demo):
    outcome = demo(keep=True, show_report=lambda: signal.setitimer(signal.ITIMER_REAL, 0.2))
    assert outcome.said[-1] == "stopping the server"
    assert outcome.said[-3].startswith("  lorasrv generate --server 127.0.0.1:")


@pytest.fixture(autouse=True)
def _alarm_is_ctrl_c():
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def assets(tmp_path, monkeypatch):
    for name in ("verse", "drama"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").write_text("{}")
    (tmp_path / "adapters" / "notes").mkdir()
    monkeypatch.setattr(embedded, "_ASSETS", tmp_path)
    return tmp_path


def test_the_command_starts_our_own_server_with_flags_alone(assets, command, monkeypatch, capsys):
    monkeypatch.setenv("LORASRV_BASE", "/somewhere/else")
    monkeypatch.setenv("LORASRV_MAX_RANK", "3")
    started = []

    class Recorded(app.ServerProcess):
        def __init__(self, words, *, environ):
            started.append((words, environ))
            super().__init__(command(), environ=environ)

    monkeypatch.setattr(app, "ServerProcess", Recorded)
    own = assets / "mine"
    own.mkdir()
    assert main_module.main(["demo", "--json", "--device", "cpu", "--adapter", f"poet={own}"]) == 0
    ((words, environ),) = started
    assert words[:4] == (sys.executable, "-m", "lorasrv", "serve")
    flags = list(zip(words[4::2], words[5::2], strict=True))
    roots = [("--adapter-root", str(assets / "adapters")), ("--adapter-root", str(own))]
    assert flags == [("--port", "0"), ("--metrics-port", "0"), ("--device", "cpu"), *roots]
    assert environ == {name: value for name, value in os.environ.items() if not name.startswith("LORASRV_")}
    document = json.loads(capsys.readouterr().out)
    assert {each["adapter_id"] for each in document["answers"]} == {"", "drama", "verse", "poet"}


@pytest.mark.parametrize(("word", "reason"), [("poet", "expected ID=SOURCE"), ("poet=/nowhere", "is not a folder")])
def test_an_adapter_that_is_no_folder_is_a_mistake_in_the_command(capsys, word, reason):
    with pytest.raises(SystemExit, match="2"):
        main_module.main(["demo", "--adapter", word])
    assert reason in capsys.readouterr().err


@pytest.mark.usefixtures("assets")
def test_a_failed_start_is_exit_status_1(command, monkeypatch, capsys):
    class Dying(app.ServerProcess):
        def __init__(self, words, *, environ):
            del words
            super().__init__(command("die-at-start"), environ=environ)

    monkeypatch.setattr(app, "ServerProcess", Dying)
    assert main_module.main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert (out, "no such model: nowhere" in err) == ("", True)


def test_without_adapters_there_is_no_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "_ASSETS", tmp_path)
    assert main_module.main(["demo"]) == 1
    assert "the installation is incomplete" in capsys.readouterr().err


def test_the_closing_table_has_every_column(capsys):
    answers = (answer(BASE, "The night", " was\ndark."), answer(POET, "The night", " [sings]"))
    print_report(Report(answers=answers, max_adapters_in_one_step=4))
    out = capsys.readouterr().out
    for word in ("adapter", "kind", "ranks", "text", "tokens", "first token", "(base)", "base", "poet", "dora", "2-8"):
        assert word in out
    assert "The night was dark." in out
    assert "The night [sings]" in out
    assert "12 ms" in out
    assert out.splitlines()[-1].endswith("counted by the engine: 4")
    assert "\x1b" not in out


def test_the_live_display_grows_each_answer_on_its_line():
    console = Console(record=True, width=80, force_terminal=True, file=io.StringIO())
    questions = [Question(voice=voice, prompt="The night", seed=0) for voice in (BASE, POET)]
    with Live(console=console, auto_refresh=False) as live:
        display = LiveDisplay(live)
        display.adapter_loaded(POET, took_seconds=0.5)
        display.asked(questions)
        display.text_came(0, " was")
        display.text_came(1, " sang [x]\n" + "la " * 100)
        display.text_came(0, " dark")
        display.answered(0, answer(BASE, "The night", " was dark"))
        live.refresh()
        text = console.export_text()
    assert "loaded poet (dora, ranks 2-8) in 0.50 s" in text
    assert "(base)  The night was dark" in text
    assert "la la la" in text
