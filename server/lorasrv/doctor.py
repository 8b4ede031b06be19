"""What of lorasrv runs on this machine, on what, and why not faster; serves nothing and changes nothing.

Knows packages, the native library, processors and memory; knows no model and no adapter. Where packages are missing it
says so, so it imports none of them before it has looked.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasrv import __version__

REQUIRED = {
    "torch": "torch",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "re2": "google-re2",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "google.protobuf": "protobuf",
    "google.rpc": "googleapis-common-protos",
    "prometheus_client": "prometheus-client",
    "huggingface_hub": "huggingface-hub",
    "yaml": "PyYAML",
    "jinja2": "jinja2",
    "bitsandbytes": "bitsandbytes",
    "rich": "rich",
}
"""Modules that serving imports, and the packages that have them."""

OPTIONAL = ("triton", "peft", "transformers")

NATIVE_FUNCTIONS = {
    "nf4 linear": ("lorasrv_nf4_linear", "lorasrv_linear_scratch"),
    "nf4 dequantize": ("lorasrv_nf4_dequantize", "lorasrv_nf4_dequantize_columns"),
    "dense linear": ("lorasrv_dense_linear", "lorasrv_linear_scratch"),
    "lora": ("lorasrv_lora_apply",),
    "attention": ("lorasrv_paged_attention", "lorasrv_store_kv"),
    "norm, rope, activation": ("lorasrv_rms_norm", "lorasrv_rotate", "lorasrv_silu_mul"),
    "their gradients": ("lorasrv_rms_norm_grad", "lorasrv_silu_mul_grad"),
    "decoder layers": ("lorasrv_decoder_layers",),
    "instruction set": ("lorasrv_cpu_isa",),
}
"""What runs natively on a CPU, and the functions of the library it takes."""

_VECTOR_UNITS_ONLY = ("nf4 linear", "dense linear", "decoder layers")
_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16", "asimd")
# torch wheels have carried names with a hash, libgomp-1a2b3c.so.1
_OPENMP = re.compile(r"\S*/lib(?:gomp|iomp5|omp)[-.]\S*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that keeps this machine from serving, or from serving as fast as it could.

    Attributes:
        what: what is wrong.
        remedy: what to do about it, in one line.
        fatal: whether nothing can be served.
    """

    what: str
    remedy: str
    fatal: bool = False


@dataclass(slots=True, kw_only=True)
class Diagnosis:
    """What was found; `facts` are plain values, grouped by what they are about."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def serves(self) -> bool:
        """Whether a server can run here."""
        return not any(problem.fatal for problem in self.problems)


def diagnose() -> Diagnosis:
    """Looks at this process and its machine; loads PyTorch and the native library, if they are there."""
    found = Diagnosis()
    found.facts["versions"] = _versions()
    found.facts["memory"] = _memory()
    for module, package in REQUIRED.items():
        if not _has(module):
            found.problems.append(
                Problem(what=f"{package} is not installed", remedy=f"pip install {package}", fatal=True)
            )
    found.facts["cpu"] = {"model": _cpu_model(), "cores": len(os.sched_getaffinity(0)), "features": _cpu_features()}
    if not _has("torch"):
        return found
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:
        what = f"PyTorch cannot be loaded: {error}"
        found.problems.append(
            Problem(what=what, remedy="install it anew: pip install --force-reinstall torch", fatal=True)
        )
        return found
    _examine_native(found)
    _examine_openmp(found)
    _examine_cuda(found)
    return found


def _versions() -> dict[str, str | None]:
    packages = (*REQUIRED.values(), *OPTIONAL)
    own = {"lorasrv": __version__, "python": platform.python_version()}
    return own | {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _memory() -> dict[str, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(name) * page for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    return {"total_bytes": total, "free_bytes": free}


def _cpu_lines(key: str) -> Iterator[str]:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == key:
            yield value.strip()


def _cpu_model() -> str:
    return next(_cpu_lines("model name"), platform.processor() or platform.machine())


def _cpu_features() -> list[str]:
    flags = next(_cpu_lines("flags"), next(_cpu_lines("Features"), "")).split()
    return [feature for feature in _CPU_FEATURES if feature in flags]


def _examine_native(found: Diagnosis) -> None:
    """The native library, the instruction set, and what serves each kind of work on a CPU."""
    from lorasrv_kernels.cpu import library

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        native = library.load()
    missing = sorted({name for names in NATIVE_FUNCTIONS.values() for name in names if not hasattr(native, name)})
    state, problem = "loaded", None
    if native is None and library.PATH.exists():
        state = "broken"
        problem = Problem(
            what=str(warned[0].message) if warned else "native library not loaded", remedy="run `make native`"
        )
    elif native is None:
        state, problem = "absent", _absent()
    elif missing:
        state = "stale"
        what = f"the native library lacks {', '.join(missing)}; the slower PyTorch path serves in their place"
        problem = Problem(what=what, remedy="run `make native`")
    elif _older_than_sources(library.PATH):
        state = "stale"
        problem = Problem(what="the native library is older than its sources", remedy="run `make native`")
    found.facts["native_library"] = {"state": state, "path": str(library.PATH) if library.PATH.exists() else None}
    if problem is not None:
        found.problems.append(problem)
    _examine_kernels(found, missing=missing)


def _absent() -> Problem:
    what = "the native CPU kernels are not built; the slower PyTorch path serves"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    remedy = "run `make native`"
    if compiler is None:
        remedy = "install a C++ compiler (Debian, Ubuntu: apt-get install g++) and run `make native`"
    return Problem(what=what, remedy=remedy)


def _older_than_sources(native: Path) -> bool:
    """In a checkout; installed files have the times of their installation."""
    if not (native.parents[3] / "hatch_build.py").exists():
        return False
    sources = (path for pattern in ("*.cpp", "*.h") for path in native.parent.glob(pattern))
    return any(source.stat().st_mtime > native.stat().st_mtime for source in sources)


def _examine_kernels(found: Diagnosis, *, missing: list[str]) -> None:
    import torch
    from lorasrv_kernels.cpu.isa import Isa, widest_isa

    isa = None if "lorasrv_cpu_isa" in missing else widest_isa()
    name = None if isa is None else isa.name.lower()
    found.facts["cpu"] |= {"instruction_set": name, "threads": torch.get_num_threads()}
    found.facts["cpu_kernels"] = {
        work: "PyTorch"
        if isa is None or set(names) & set(missing) or (isa is Isa.PORTABLE and work in _VECTOR_UNITS_ONLY)
        else f"native, {name}"
        for work, names in NATIVE_FUNCTIONS.items()
        if work != "instruction set"
    }


def _examine_openmp(found: Diagnosis) -> None:
    maps = Path("/proc/self/maps")
    runtimes = sorted(set(_OPENMP.findall(maps.read_text()))) if maps.exists() else []
    found.facts["openmp"] = {"runtimes": runtimes}
    if len(runtimes) > 1:
        what = f"more than one OpenMP runtime, whose threads get in each other's way: {', '.join(runtimes)}"
        found.problems.append(Problem(what=what, remedy="unset LD_PRELOAD, or install one build of PyTorch alone"))


def _examine_cuda(found: Diagnosis) -> None:
    import torch

    facts: dict[str, Any] = {"built_for": torch.version.cuda, "devices": []}
    found.facts["cuda"] = facts
    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        facts["devices"].append(
            {"name": properties.name, "capability": capability, "memory_bytes": properties.total_memory}
        )
    if not _has("triton"):
        what = "Triton is not installed; the slower PyTorch path serves on CUDA"
        found.problems.append(Problem(what=what, remedy="pip install 'lorasrv[cuda]'"))
