"""The commands that talk to a server, against a fake one over real gRPC."""

import io
import json
import sys

import pytest


def test_generate_writes_the_text_alone(lorasrv, server):
    end = lorasrv("generate", "The sea", "--max-new-tokens", 3, "--server", server.target)
    assert (end.code, end.out, end.err) == (0, " one two \n", "")
    (request,) = server.requests
    assert sorted(field.name for field, _ in request.ListFields()) == ["max_new_tokens", "prompt"]


def test_generate_sends_every_option(lorasrv, server):
    lorasrv("adapters", "load", "a=/x")
    lorasrv(
        *(
            "generate",
            "x",
            "--adapter",
            "a",
            "--max-new-tokens",
            2,
            "--temperature",
            0.5,
            "--top-k",
            3,
            "--top-p",
            0.75,
        ),
        *("--seed", 9, "--stop", "\n", "--stop", "END", "--stop-token-id", 4, "--ignore-eos", "--logprobs", 1),
    )
    request = server.requests[-1]
    assert (request.adapter_id, request.max_new_tokens, request.temperature) == ("a", 2, 0.5)
    assert (request.top_k, request.top_p, request.seed, request.logprobs) == (3, 0.75, 9, 1)
    assert (list(request.stop), list(request.stop_token_ids), request.ignore_eos) == (["\n", "END"], [4], True)


@pytest.mark.usefixtures("server")
def test_generate_json_has_the_fields_of_the_response(lorasrv):
    answer = lorasrv("generate", "x", "--json", "--seed", 5, "--max-new-tokens", 5).json
    assert answer == {
        "text": " one two three för ",
        "token_ids": [0, 1, 2, 3, 4],
        "finish_reason": "length",
        "usage": {"prompt_tokens": 5, "generated_tokens": 5},
        "adapter_digest": "",
        "logprobs": [],
        "timings": {"queue_seconds": 0.25, "time_to_first_token_seconds": 0.5},
        "seed": 5,
        "stop_string": None,
        "stop_token_id": None,
    }


@pytest.mark.usefixtures("server")
def test_generate_streams_the_same_text(lorasrv):
    assert lorasrv("generate", "x", "--stream", "--max-new-tokens", 5).out == " one two three för \n"
    end = lorasrv("generate", "x", "--stream", "--json", "--max-new-tokens", 2)
    lines = [json.loads(line) for line in end.out.splitlines()]
    assert [list(line) for line in lines] == [["chunk"], ["chunk"], ["finish"]]
    assert lines[-1]["finish"]["text"] == lines[0]["chunk"]["text"] + lines[1]["chunk"]["text"]


def test_generate_reads_the_prompt_from_stdin(lorasrv, server, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert lorasrv("generate", "-").code == 0
    assert server.requests[0].prompt == "from a pipe\n"


@pytest.mark.parametrize(
    ("code", "reason", "status"),
    [
        ("NOT_FOUND", "ADAPTER_NOT_FOUND", 4),
        ("INVALID_ARGUMENT", "INVALID_REQUEST", 3),
        ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", 7),
        ("UNAUTHENTICATED", "", 6),
        ("INTERNAL", "INTERNAL", 1),
    ],
)
@pytest.mark.parametrize("argv", ["generate x", "adapters load a=/x", "adapters ls --json"])
def test_refusals_end_in_their_status(lorasrv, server, fake, argv, code, reason, status):
    # without pushback the client would wait before it tries an overloaded server again
    server.refusals.append(fake.Refusal(getattr(fake.grpc.StatusCode, code), "the text", reason, pushback_ms=-1))
    end = lorasrv(*argv.split())
    assert (end.code, end.out, end.err) == (status, "", "lorasrv: the text\n")


def test_no_server_is_status_5(lorasrv):
    for argv in (["generate", "x"], ["adapters", "ls"], ["health"]):
        assert lorasrv(*argv, "--server", "127.0.0.1:1", "--timeout", 0.3).code == 5


@pytest.mark.usefixtures("server")
def test_an_unknown_adapter_is_status_4(lorasrv):
    assert lorasrv("generate", "x", "--adapter", "nobody").code == 4
    assert lorasrv("adapters", "show", "nobody").code == 4
    assert lorasrv("adapters", "unload", "nobody").code == 4


def test_adapters_are_loaded_listed_shown_and_unloaded(lorasrv, server, tmp_path, monkeypatch):
    assert lorasrv("adapters", "ls", "--json").json == {"adapters": []}
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    loaded = lorasrv("adapters", "load", "dora=runs", "--replace", "--digest", "ab" * 6, "--json").json
    assert (server.requests[-1].replace, server.requests[-1].expected_digest) == (True, "ab" * 6)
    assert (loaded["adapter_id"], loaded["kind"], loaded["source"]) == ("dora", "dora", str(tmp_path / "runs"))
    assert loaded["load_time"].startswith("2023-11-14")
    assert lorasrv("adapters", "load", "a=elsewhere/x").code == 0
    assert server.requests[-1].source == "elsewhere/x"
    assert lorasrv("adapters", "load", "b=hf:org/b@main").code == 0
    assert server.requests[-1].source == "hf:org/b@main"

    listed = lorasrv("adapters", "ls").out.splitlines()
    assert listed[0].split() == ["adapter", "kind", "ranks", "modules", "size", "in", "use", "digest"]
    assert listed[3].split() == ["dora", "dora", "2-8", "7", "3.0", "MiB", "0", "646f7261646f"]
    assert [entry["adapter_id"] for entry in lorasrv("adapters", "ls", "--json").json["adapters"]] == ["a", "b", "dora"]
    assert lorasrv("adapters", "show", "dora", "--json").json == loaded
    assert "2023-11-14" in lorasrv("adapters", "show", "dora").out

    assert lorasrv("adapters", "unload", "dora", "--if-idle", "--json").json["state"] == "unloaded"
    assert server.requests[-1].mode == 2


def test_health_says_what_the_server_says(lorasrv, server, fake):
    assert lorasrv("health").out == "ready: serving\n"
    server.health.set("ready", fake.health_pb2.HealthCheckResponse.NOT_SERVING)
    end = lorasrv("health", "--ready", "--json")
    assert (end.code, end.json) == (5, {"service": "ready", "status": "not_serving", "detail": ""})
    assert lorasrv("health", "--live").code == 0


@pytest.mark.usefixtures("server")
def test_a_command_minds_a_misspelt_variable_but_not_those_of_other_commands(lorasrv, monkeypatch):
    monkeypatch.setenv("LORASRV_MAX_RANK", "9")
    assert lorasrv("health").code == 0
    monkeypatch.setenv("LORASRV_SEVRER", "x")
    end = lorasrv("health")
    assert (end.code, end.out) == (3, "")
    assert "did you mean LORASRV_SERVER?" in end.err


@pytest.fixture
def served(monkeypatch):
    """What `serve` was called with; the real one is not imported."""
    calls = []
    app = type(sys)("lorasrv.rpc.app")
    app.serve = lambda config: calls.append(config) or 130
    logs = type(sys)("lorasrv.logs")
    logs.configure_logging = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "lorasrv.rpc.app", app)
    monkeypatch.setitem(sys.modules, "lorasrv.logs", logs)
    return calls


def test_serve_hands_over_the_configuration(lorasrv, served, tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text("max_rank: 4\nlog_format: json\n")
    monkeypatch.setenv("LORASRV_CONFIG", str(file))
    assert lorasrv("serve", "models/x", "--port", 0, "--adapter", "a=/x").code == 130
    logging, config = served
    assert logging == {"format": "json", "level": "info"}
    assert (config.base, config.port, config.max_rank, config.adapters) == ("models/x", 0, 4, (("a", "/x"),))


def test_serve_refuses_a_bad_configuration_before_anything_is_loaded(lorasrv, served):
    end = lorasrv("serve", "--host", "0.0.0.0")
    assert (end.code, served) == (3, [])
    assert "add insecure" in end.err
