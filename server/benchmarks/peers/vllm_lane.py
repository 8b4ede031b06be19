"""vLLM as a lane, in a process of its own environment, which is stopped while others take their turns."""

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

WORKER = Path(__file__).with_name("vllm_worker.py")


class VllmError(Exception):
    """It does not run here; the text says why, in one line."""


class VllmProcess:
    """One engine of vLLM. A context manager: it ends its process.

    Args:
        python: the interpreter of an environment that has vLLM.
        base: folder of the model.
        adapters: their folders; the engine is told of adapters only if there are any.
        max_rank: of the adapters.
        threads: which it binds to the first cores.
        log: what it prints goes there.

    Raises:
        VllmError: it does not start.
    """

    def __init__(
        self, python: str, base: Path, *, adapters: Sequence[Path] = (), max_rank: int, threads: int, log: IO[str]
    ) -> None:
        command = [python, str(WORKER), str(base), "--max-rank", str(max_rank), "--threads", str(threads)]
        command += [word for folder in adapters for word in ("--adapter", str(folder))]
        own = ("PYTHONPATH", "OMP_NUM_THREADS")
        environment = {name: value for name, value in os.environ.items() if name not in own}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        except OSError as error:
            raise VllmError(f"{python}: {error.strerror}") from error
        self.version = self._answer()["version"]
        os.kill(self._process.pid, signal.SIGSTOP)

    def __enter__(self) -> "VllmProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, request: Mapping[str, Any]) -> Any:
        """The answer to one request of `vllm_worker.py`."""
        assert self._process.stdin is not None
        os.kill(self._process.pid, signal.SIGCONT)
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._answer()
        # its threads would spin for a while after their work, in others' turns
        os.kill(self._process.pid, signal.SIGSTOP)
        return answer

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise VllmError(f"its process ended with status {self._process.wait()}")
        return json.loads(line)


class VllmLane:
    """A batch that is prefilled and then decoded, step by step; with adapters, sequence i has the i-th."""

    def __init__(self, process: VllmProcess, prompts: Sequence[Sequence[int]], *, adapters: bool) -> None:
        self._process = process
        names = [f"a{index}" if adapters else None for index in range(len(prompts))]
        self._request = {"prompts": [list(prompt) for prompt in prompts], "adapters": names}
        self.tokens: list[list[int]] = []

    def prefill(self) -> None:
        """Starts the batch anew."""
        self.tokens = self._process.ask(self._request)["tokens"]

    def step(self) -> None:
        """One decode step."""
        self.tokens = self._process.ask({})["tokens"]
