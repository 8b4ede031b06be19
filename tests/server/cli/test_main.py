"""The command's frame: help, usage, how errors become exit statuses and words."""

import errno
import json
import subprocess
import sys

import lorasrv as package
import pytest
from lorasrv import errors
from lorasrv.cli import main as main_module
from lorasrv.cli.console import print_columns, print_error
from lorasrv.cli.exit_codes import ExitCode, exit_code_for
from lorasrv_adapters import errors as adapter_errors
from lorasrv_client import errors as client_errors


def run_python(program):
    program = f"import sys; sys.path[:0] = {sys.path!r}; {program}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_help_names_every_command_and_exit_status(lorasrv):
    page = lorasrv("--help")
    assert page.code == 0
    for word in (
        "serve",
        "demo",
        "generate",
        "adapters",
        "check",
        "convert",
        "quantize",
        "health",
        "doctor",
        "130 interrupted",
        "LORASRV_MAX_RANK",
    ):
        assert word in page.out


@pytest.mark.parametrize(
    "command",
    ["serve", "demo", "generate", "adapters", "adapters load", "check", "convert", "quantize", "health", "doctor"],
    ids=str,
)
def test_every_command_has_a_help_page(lorasrv, command):
    page = lorasrv(*command.split(), "--help")
    assert (page.code, page.err) == (0, "")
    assert "usage: lorasrv " + command in page.out


def test_version_goes_to_stdout(lorasrv):
    assert lorasrv("--version").out == f"lorasrv {package.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "required: COMMAND"),
        ("sreve", "did you mean serve?"),
        ("serve --max-ranks 3", "did you mean --max-rank?"),
        ("serve --max-rank=abc", "expected a whole number, got 'abc'"),
        ("serve --device tpu", "expected one of auto, cpu, cuda"),
        ("serve --adapter nothing", "expected ID=SOURCE"),
        ("generate", "required: PROMPT"),
        ("adapters load a", "expected ID=SOURCE, got 'a'"),
        ("adapters", "required: ACTION"),
        ("quantize base", "required: --out"),
        ("health --live --ready", "not allowed with"),
    ],
)
def test_wrong_usage_is_status_2_on_stderr(lorasrv, argv, message):
    end = lorasrv(*argv.split())
    assert (end.code, end.out) == (ExitCode.USAGE, "")
    assert message in end.err


CLIENT = {"code": client_errors.grpc.StatusCode.UNKNOWN}
CASES = [
    (errors.ConfigError(["x"]), ExitCode.INVALID),
    (errors.ModelLoadError(["x"]), ExitCode.INVALID),
    (errors.DrainingError(), ExitCode.UNAVAILABLE),
    (errors.NonFiniteOutputError(adapter_id="", position=0), ExitCode.FAILURE),
    (adapter_errors.AdapterIncompatibleError(["x"]), ExitCode.INVALID),
    (adapter_errors.AdapterCorruptError(["x"]), ExitCode.INVALID),
    (adapter_errors.AdapterConversionError(["x"]), ExitCode.INVALID),
    (adapter_errors.SourceNotFoundError("x", "y"), ExitCode.NOT_FOUND),
    (adapter_errors.SourceNotAllowedError("x", "y"), ExitCode.DENIED),
    (adapter_errors.HubUnreachableError("x", "y"), ExitCode.UNAVAILABLE),
    (adapter_errors.SlotsExhaustedError(num_bytes=2, limit_bytes=1), ExitCode.NO_RESOURCES),
    (client_errors.AdapterNotFoundError("x", **CLIENT), ExitCode.NOT_FOUND),
    (client_errors.PromptTooLongError("x", **CLIENT), ExitCode.INVALID),
    (client_errors.AdapterInvalidError("x", **CLIENT), ExitCode.INVALID),
    (client_errors.AdapterExistsError("x", **CLIENT), ExitCode.FAILURE),
    (client_errors.OverloadedError("x", **CLIENT), ExitCode.UNAVAILABLE),
    (client_errors.OutOfResourcesError("x", **CLIENT), ExitCode.NO_RESOURCES),
    (client_errors.UnavailableError("x", **CLIENT), ExitCode.UNAVAILABLE),
    (client_errors.DeadlineExceededError("x", **CLIENT), ExitCode.UNAVAILABLE),
    (client_errors.AuthenticationError("x", **CLIENT), ExitCode.DENIED),
    (client_errors.PermissionDeniedError("x", **CLIENT), ExitCode.DENIED),
    (client_errors.ServerError("x", **CLIENT), ExitCode.FAILURE),
    (MemoryError(), ExitCode.NO_RESOURCES),
    (type("OutOfMemoryError", (RuntimeError,), {})(), ExitCode.NO_RESOURCES),
    (OSError(errno.ENOSPC, "full"), ExitCode.NO_RESOURCES),
    (FileNotFoundError(errno.ENOENT, "none"), ExitCode.NOT_FOUND),
    (OSError(errno.EADDRINUSE, "taken"), ExitCode.FAILURE),
    (KeyboardInterrupt(), ExitCode.INTERRUPTED),
    (ZeroDivisionError(), None),
]


@pytest.mark.parametrize(("error", "code"), CASES, ids=lambda value: type(value).__name__)
def test_every_kind_of_error_has_its_exit_status(error, code):
    assert exit_code_for(error) is code


@pytest.mark.parametrize("module", [errors, adapter_errors, client_errors], ids=lambda module: module.__name__)
def test_no_error_of_ours_ends_in_a_traceback(module):
    kinds = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(kinds) > 5
    for kind in kinds:
        assert exit_code_for(kind.__new__(kind)) is not None, kind


def command_that_raises(monkeypatch, error):
    def run(arguments):
        del arguments
        raise error

    monkeypatch.setattr(main_module.health, "run", run)


def test_a_known_error_is_one_line_on_stderr(lorasrv, monkeypatch):
    command_that_raises(monkeypatch, errors.ConfigError(["port is -1"]))
    end = lorasrv("health")
    assert (end.code, end.out, end.err) == (3, "", "lorasrv: port is -1\n")


def test_an_unknown_error_keeps_its_traceback(monkeypatch):
    command_that_raises(monkeypatch, ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError, match="bug"):
        main_module.main(["health"])


def test_ctrl_c_is_status_130_without_words(lorasrv, monkeypatch):
    command_that_raises(monkeypatch, KeyboardInterrupt())
    end = lorasrv("health")
    assert (end.code, end.out, end.err) == (130, "", "")


def test_an_error_with_several_reasons_lists_them(capsys):
    print_error(errors.ConfigError(["first [bold]x", "second"]))
    assert capsys.readouterr().err == "lorasrv: 2 things are wrong:\n  - first [bold]x\n  - second\n"
    print_error(errors.InvalidRequestError([("a", "b"), ("c", "d")]))
    assert capsys.readouterr().err == "lorasrv: 2 things are wrong:\n  - a: b\n  - c: d\n"


def test_plain_columns_are_never_cut(capsys):
    print_columns(("a", "b"), [("x" * 300, "y"), ("z", "w")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "x" * 300 + "  y"
    assert lines[2].split() == ["z", "w"]


def test_a_reader_that_leaves_is_no_traceback():
    program = (
        "import os; from lorasrv.cli import main as m; r, w = os.pipe(); os.dup2(w, 1); os.close(r); "
        "m.health.run = lambda arguments: print('x' * 100000, flush=True); sys.exit(m.main(['health']))"
    )
    done = run_python(program)
    assert (done.returncode, done.stderr) == (1, "")


def test_help_and_client_commands_load_nothing_heavy():
    program = (
        "import json; from lorasrv.cli.main import main; code = main(['health', '--server', '127.0.0.1:1']); "
        "print(json.dumps([code, sorted({'torch', 'triton', 'numpy'} & sys.modules.keys())]))"
    )
    done = run_python(program)
    assert json.loads(done.stdout.splitlines()[-1]) == [5, []], done.stderr


def test_importing_the_package_loads_only_its_version():
    done = run_python("import lorasrv; print(sorted(name for name in sys.modules if name.startswith('lorasrv')))")
    assert done.stdout == "['lorasrv']\n"
