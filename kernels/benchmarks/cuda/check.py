"""Checks the CUDA kernels on this machine: tests, then times of whole steps and of kernels. `make gpu-check` runs it.

    python kernels/benchmarks/cuda/check.py [--small] [--seconds 460] [--results results]

Needs PyTorch, Triton and, for the tests, pytest; no network and no installation. Prints one table last and writes it
with all else as JSON. `--small` does the same at tiny sizes through Triton's interpreter, to test itself; its times
mean nothing. Without a CUDA device it says so and ends well.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
TOLERANCE = 1e-2  # bfloat16 results against float32
TESTS_SHARE = 0.5  # of the time; compiling is most of it
STEPS_SECONDS = 150
STEPS_GRACE_SECONDS = 30  # for the case that is under way

Row = dict[str, Any]


def main() -> int:
    """Returns 1 if a test failed or a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=460)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    if arguments.small:
        # Triton reads it when it is imported
        os.environ["TRITON_INTERPRET"] = "1"
    reason = missing(small=arguments.small)
    if reason:
        print(f"skipped: {reason}")
        return 0
    tests = run_tests(small=arguments.small, seconds=TESTS_SHARE * arguments.seconds)
    steps = run_steps(small=arguments.small, seconds=min(STEPS_SECONDS, deadline - time.monotonic()))
    kernels, bandwidth = run_benchmarks(small=arguments.small, deadline=deadline)
    rows = [with_floor(row, bandwidth) for row in steps] + kernels
    report = {"machine": machine(small=arguments.small), "tests": tests, "bytes_per_second": bandwidth, "rows": rows}
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = "gpu-check-small" if arguments.small else time.strftime("gpu-check-%Y%m%d-%H%M%S")
    path = arguments.results / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print_report(report, path)
    return int(tests["outcome"] == "failed" or any(row["outcome"].startswith(("wrong", "failed")) for row in rows))


def missing(*, small: bool) -> str | None:
    """Why nothing can be done here."""
    absent = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed"
    import torch

    if not small and not torch.cuda.is_available():
        return f"no CUDA device (torch {torch.__version__}); SMALL=1 runs through Triton's interpreter"
    return None


def run_tests(*, small: bool, seconds: float) -> Row:
    """The tests of the Triton kernels and of CUDA graphs; `small`: a few of them, as `make test` runs all."""
    if importlib.util.find_spec("pytest") is None:
        return {"outcome": "not run", "summary": "pytest is not installed"}
    files = sorted(str(path) for path in (ROOT / "tests/kernels").glob("test_*_triton.py"))
    files.append(str(ROOT / "tests/server/engine/test_cuda_graphs.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    if small:
        command += ["-k", "every_dtype or any_dtype"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return {
            "outcome": "failed",
            "summary": f"not finished after {seconds:.0f} s",
            "output": output.decode()[-2000:],
        }
    print(done.stdout)
    summary = re.findall(r"\d+ (?:passed|failed|skipped|error).*", done.stdout)
    outcome = "passed" if done.returncode == 0 else "failed"
    return {"outcome": outcome, "summary": summary[-1] if summary else done.stderr[-2000:]}


def run_steps(*, small: bool, seconds: float) -> list[Row]:
    """One row a case of `steps.py`, in a process of its own: whatever it does to the device, the kernels are timed."""
    head: Row = {"kernel": "steps", "shape": "", "size": ""}
    if seconds <= 0:
        return [{**head, "outcome": "not run: no time left"}]
    command = [sys.executable, str(Path(__file__).with_name("steps.py")), "--seconds", str(seconds)]
    command += ["--small"] * small
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + STEPS_GRACE_SECONDS)
        output, wrong = done.stdout, done.stderr[-300:] if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        output, wrong = (error.stdout or b"").decode(), f"not finished after {seconds:.0f} s"
    print(output, end="", flush=True)
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [*rows, {**head, "outcome": f"failed: {wrong}"}] if wrong else rows


def with_floor(row: Row, bandwidth: float) -> Row:
    """The row of a step, with the seconds its bytes take at a copy's pace."""
    return {**row, "floor_seconds": row["num_bytes"] / bandwidth} if "num_bytes" in row else row


def run_benchmarks(*, small: bool, deadline: float) -> tuple[list[Row], float]:
    """One row a case; what there was no time for is not run."""
    import cases
    import timing
    import torch
    import training_cases

    device = torch.device("cpu" if small else "cuda")
    torch.manual_seed(0)
    bandwidth = timing.bytes_per_second(device, (1 if small else 1024) << 20)
    rows: list[Row] = []
    left_out = 0
    with torch.inference_mode():
        for build in chain(cases.cases(device, small=small), training_cases.cases(device, small=small)):
            if time.monotonic() > deadline:
                left_out += 1
                continue
            rows.append(measure(build, device, bandwidth))
            print(json.dumps(rows[-1]), flush=True)
    if left_out:
        rows.append({"kernel": f"{left_out} more", "shape": "", "size": "", "outcome": "not run: no time left"})
    return rows, bandwidth


def measure(build: Any, device: Any, bandwidth: float) -> Row:
    """The times of a case in seconds; whatever one case does, the others are still measured."""
    import timing

    try:
        case = build()
        row: Row = {"kernel": case.kernel, "shape": case.shape, "size": case.size}
        error = case.error()
        if not error < TOLERANCE:
            return {**row, "outcome": f"wrong: relative error {error:.1e}"}
    except Exception as failure:
        return {"kernel": "?", "shape": "", "size": "", "outcome": f"failed: {failure!r}"[:300]}
    seconds: dict[str, float | str] = {}
    outcome = "right"
    for name, contestant in case.contestants.items():
        try:
            seconds[name] = contestant.not_run or timing.seconds_per_call(contestant.run, contestant.copies, device)
        except Exception as failure:
            seconds[name] = f"failed: {failure!r}"[:300]
            outcome = seconds[name] if name == "ours" else outcome
    floor = case.num_bytes / bandwidth
    return {**row, "outcome": outcome, "error": error, "floor_seconds": floor, "seconds": seconds}


def machine(*, small: bool) -> Row:
    """Where and what this was."""
    import torch
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    device = "Triton's interpreter: the times mean nothing" if small else torch.cuda.get_device_name()
    return {
        "device": device,
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def print_report(report: Row, path: Path) -> None:
    """The table, last of all."""
    print("\n" + ", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(f"tests {report['tests']['outcome']}: {report['tests']['summary']}")
    print(f"a copy moves {report['bytes_per_second'] / 1e9:.0f} GB/s; written to {path}\n")
    print("| kernel | shape | T or N | us | over the byte floor | over each baseline |")
    print("|---|---|---|---|---|---|")
    for row in report["rows"]:
        head = f"| {row['kernel']} | {row['shape']} | {row['size']} |"
        ours = row.get("seconds", {}).get("ours")
        if not isinstance(ours, float):
            print(f"{head} {row['outcome']} | | |")
            continue
        others = [
            f"{name} {ours / value:.2f}" if isinstance(value, float) else f"{name}: {value}"
            for name, value in row["seconds"].items()
            if name != "ours"
        ]
        print(f"{head} {ours * 1e6:.1f} | {ours / row['floor_seconds']:.2f} | {'; '.join(others)} |")


if __name__ == "__main__":
    sys.exit(main())
