"""The child process: found when it listens, told of when it dies, and never left behind."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from lorasrv.demo import process
from lorasrv.demo.errors import ServerEndedError
from lorasrv.demo.process import ServerProcess, signals_unwind


def script(*lines):
    return (sys.executable, "-u", "-c", "\n".join(("import os, signal, sys, time", *lines)))


LISTEN = "print('x listening on 127.0.0.1:4711', file=sys.stderr)"


def test_the_address_is_read_from_the_log_and_the_server_is_ended():
    with ServerProcess(script("print('starting', file=sys.stderr)", LISTEN, "time.sleep(60)"), environ={}) as server:
        assert server.target == "127.0.0.1:4711"
        child = server._process
    assert child.returncode == -signal.SIGTERM


def test_a_server_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr(process, "_STOP_TIMEOUT_SECONDS", 0.2)
    deaf = script("signal.signal(signal.SIGTERM, signal.SIG_IGN)", LISTEN, "time.sleep(60)")
    with ServerProcess(deaf, environ={}) as server:
        child = server._process
    assert child.returncode == -signal.SIGKILL


def test_it_is_ended_when_the_block_raises():
    server = ServerProcess(script(LISTEN, "time.sleep(60)"), environ={})
    with pytest.raises(ZeroDivisionError), server:
        raise ZeroDivisionError
    assert server._process.poll() is not None


def test_a_server_that_dies_at_start_is_told_with_its_last_lines():
    lines = "[print('line', number, file=sys.stderr) for number in range(50)]"
    with pytest.raises(ServerEndedError) as caught:
        ServerProcess(script(lines, "sys.exit(3)"), environ={}).__enter__()
    assert caught.value.status == 3
    assert caught.value.log_tail == tuple(f"line {number}" for number in range(30, 50))
    assert str(caught.value).startswith("the server ended with status 3; the last it wrote:\n  line 30\n")


def test_a_server_that_never_listens_is_ended_and_told():
    silent = ServerProcess(script("time.sleep(60)"), environ={}, start_timeout_seconds=0.2)
    with pytest.raises(ServerEndedError, match="did not start in time; the last it wrote: nothing"):
        silent.__enter__()
    assert silent._process.poll() is not None


def test_the_environment_is_the_one_given():
    program = script("print(f'listening on {os.environ[\"WHERE\"]}', file=sys.stderr)", "time.sleep(60)")
    with ServerProcess(program, environ={"WHERE": "h:1"}) as server:
        assert server.target == "h:1"


def test_waiting_for_a_server_that_dies_tells_how():
    server = ServerProcess(script(LISTEN, "time.sleep(0.1)", "os._exit(9)"), environ={})
    with server, pytest.raises(ServerEndedError, match="ended with status 9"):
        server.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds_the_block_and_the_old_handler_returns(number):
    before = signal.getsignal(number)
    unwound = []

    def body():
        with signals_unwind():
            try:
                os.kill(os.getpid(), number)
                time.sleep(10)
            finally:
                unwound.append(number)

    with pytest.raises(SystemExit) as caught:
        body()
    assert (caught.value.code, unwound, signal.getsignal(number)) == (128 + number, [number], before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells children of their parent's death")
def test_the_server_goes_when_its_parent_is_killed():
    child = f"[sys.executable, '-u', '-c', {' '.join(('import os, sys, time;', LISTEN, '; time.sleep(60)'))!r}]"
    program = script(
        f"sys.path[:0] = {sys.path!r}",
        "from lorasrv.demo.process import ServerProcess",
        f"server = ServerProcess({child}, environ={{}}).__enter__()",
        "print(server._process.pid)",
        "time.sleep(60)",
    )
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        watched = os.pidfd_open(pid)
        parent.kill()
    gone = threading.Event()
    threading.Thread(target=lambda: (wait_for_end(watched), gone.set()), daemon=True).start()
    assert gone.wait(10)


def wait_for_end(pidfd):
    import select

    select.select([pidfd], [], [], 10)
    os.close(pidfd)
