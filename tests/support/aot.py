"""Compiles Triton kernels for CUDA devices that are not there, and reads what the compiler made of them.

The host code runs on meta tensors and what it would launch is recorded; the signature, the constants and the attributes
of each compilation (which pointers and integers are multiples of 16) come from the launcher's own functions.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10}
"""Most shared memory of one program, by compute capability times ten."""

MAX_REGISTERS = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of a kernel, recorded and not done."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.function.__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What a kernel takes on one device."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    spills: int
    """Instructions that load from or store to local memory."""
    sass: str

    def loop(self, containing: str) -> list[str]:
        """The instructions of the shortest loop that contains an instruction."""
        lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", self.sass)]
        loops = []
        for end, text in lines:
            branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
            if branch and (start := int(branch[1], 16)) < end:
                loops.append([re.sub(r"^@\S+ ", "", body) for at, body in lines if start <= at <= end])
        return min((body for body in loops if any(containing in line for line in body)), key=len)

    def check(self, capability: int) -> None:
        """Fails unless the kernel fits the device, and keeps everything in registers."""
        assert self.spills == 0
        assert self.stack_bytes == 0
        assert self.registers <= MAX_REGISTERS
        assert self.shared_bytes <= SHARED_LIMIT_BYTES[capability]


def record(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> list[Launch]:
    """What `call` launches, in order; its tensors are on the meta device."""
    launches: list[Launch] = []

    def run(function: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **keywords: Any) -> None:
        assert not warmup
        launches.append(Launch(function=function, arguments=arguments, keywords=keywords, grid=grid))

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        call()
    return launches


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles a launch for a device of compute capability `capability` / 10; skips the test without the compiler."""
    tools = {name: _tool(name) for name in ("ptxas", "cuobjdump")}
    if not all(tools.values()):
        pytest.skip(f"Triton's {' and '.join(name for name, path in tools.items() if not path)} not found")
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    function = launch.function
    binder = create_function_from_signature(function.signature, function.params, backend)
    keywords = {"debug": False, "instrumentation_mode": "", **launch.keywords}
    bound, specialization, options = binder(*launch.arguments, **keywords)
    options, signature, constants, attributes = function._pack_args(backend, keywords, bound, specialization, options)
    source = ASTSource(function, signature, constants, attributes)
    kernel = triton.compile(source, target=target, options=options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = _output(tools["cuobjdump"], "--dump-resource-usage", file.name)
        sass = _output(tools["cuobjdump"], "-sass", file.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert numbers is not None, usage
    registers, stack, shared, local = map(int, numbers.groups())
    return Compiled(
        registers=registers,
        stack_bytes=stack + local,
        shared_bytes=shared + kernel.metadata.shared,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        sass=sass,
    )


def _tool(name: str) -> str | None:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else shutil.which(name)


def _output(tool: str | None, *arguments: str) -> str:
    assert tool is not None
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
