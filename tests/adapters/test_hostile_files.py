"""Files made to cost a server time or memory are refused within 100 ms of CPU time and 50 MB of memory."""

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from config_property import LONGEST_MESSAGE
from weights_property import entry, pack

MEASURE = Path(__file__).parents[1] / "support" / "measure_refusals.py"
Q = "model.layers.0.self_attn.q_proj"
A, B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
LORA: dict[str, object] = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2}
EMPTY = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
MIB = 1 << 20
FINE = pack({A: entry(0, 64, [2, 8]), B: entry(64, 128, [8, 2])}, bytes(128))


def many(count: int, item: bytes, *, name: bytes = b"") -> bytes:
    return pack(b"{" + b",".join(b'"%d%s":%s' % (index, name, item) for index in range(count)) + b"}")


def header_of(num_bytes: int) -> bytes:
    return pack({A: entry(0, num_bytes, [num_bytes >> 17, 1 << 15])})


def write(path: Path, content: bytes, size: int | None = None) -> None:
    path.write_bytes(content)
    if size is not None:
        os.truncate(path, size)


def poisoned(value: float) -> bytes:
    return FINE[:-4] + struct.pack("<f", value)


# name -> (content, size of the file if it is longer, a part of the refusal)
WEIGHTS: dict[str, tuple[Callable[[], bytes], int | None, str]] = {
    "empty": (lambda: b"", None, "shorter than its header"),
    "header-of-2^63-bytes": (lambda: struct.pack("<Q", 1 << 63) + b"{}", None, "shorter than its header"),
    "header-of-200-MB": (lambda: struct.pack("<Q", 200 * MIB) + b"{", 201 * MIB, "the limit is 8388608"),
    "truncated": (lambda: FINE[:-1], None, "its header describes 128"),
    "trailing-junk": (lambda: FINE + b"!", None, "its header describes 128"),
    "overlap": (lambda: pack({A: entry(0, 64, [2, 8]), B: entry(32, 96, [8, 2])}, bytes(96)), None, "an overlap"),
    "shape-overflow": (lambda: pack({A: entry(0, 4, [1 << 33, 1 << 33])}, bytes(4)), None, "do not match its shape"),
    "duplicate-keys": (lambda: pack(b'{"a":%s,"a":%s}' % (EMPTY, EMPTY)), None, "duplicate key 'a'"),
    "10000-dimensions": (lambda: pack({A: entry(0, 4, [1] * 10_000)}, bytes(4)), None, "has 10000 dimensions"),
    "empty-and-2^40-wide": (
        lambda: pack({A: entry(0, 0, [0, 1 << 40]), B: entry(0, 0, [8, 0])}),
        None,
        "[0, 1099511627776]",
    ),
    "nan": (lambda: poisoned(math.nan), None, "NaN or infinity"),
    "infinity": (lambda: poisoned(math.inf), None, "NaN or infinity"),
    "900000-tensors": (lambda: many(900_000, EMPTY, name=b"x" * 40), None, "the limit is 8388608"),
    "100000-tensors": (lambda: many(100_000, EMPTY), None, "more than 20000 tensors"),
    "wide-characters": (lambda: pack(b'{"' + b"x" * (7 * MIB) + "\U0001f600".encode() + b'":1}'), None, "beyond ASCII"),
    "wide-escapes": (lambda: pack(b'{"' + b"x" * (7 * MIB) + rb"\ud83d\ude00" + b'":1}'), None, "beyond ASCII"),
    "long-name": (lambda: pack(b'{"' + b"x" * (8 * MIB - 99) + b'":' + EMPTY + b"}"), None, "its name does not start"),
    "lists-of-lists": (lambda: pack(b"[" + b"[]," * 150_000 + b"[]]"), None, "more than 20000 tensors"),
    "deep": (lambda: pack(b"[" * 60_000), None, "not valid JSON"),
    "many-digits": (lambda: pack(b"[" + b",".join([b"9" * 4299] * 1900) + b"]"), None, "is no size"),
    "20-GB": (lambda: header_of(5 << 32), len(header_of(5 << 32)) + (5 << 32), "the limit is 4294967296"),
}


def patterns(count: int, source: str) -> dict[str, object]:
    return LORA | {"rank_pattern": {f"{source}{index}": 1 for index in range(count)}}


CONFIGS: dict[str, tuple[object, str]] = {
    "unknown-peft-type": (LORA | {"peft_type": "x" * 900_000}, "is not supported; LORA and ADALORA are"),
    "unsupported-options": (LORA | {"use_qalora": True, "layer_replication": [[0, 1]]}, "use_qalora"),
    "import-by-megatron-core": (
        LORA | {"megatron_config": {}, "megatron_core": "os.system", "r": 3},
        "lora_A has rank 2",
    ),
    "import-by-auto-mapping": (LORA | {"auto_mapping": {"parent_library": "antigravity"}, "r": 3}, "lora_A has rank 2"),
    "path": (LORA | {"base_model_name_or_path": "../" * 20_000}, "base_model_name_or_path"),
    "10-MB": (LORA | {"x": "y" * (10 * MIB)}, "at most 1048576"),
    "deep": (b'{"a":' * 9_000 + b"1" + b"}" * 9_000, "recursion"),
    "deeper-than-a-config": (LORA | {"x": [[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]}, "nested deeper"),
    "lists": (b"[" + b"[]," * 340_000 + b"1]", "more than 20000 lists"),
    "keys": (LORA | {f"k{index}": 1 for index in range(60_000)}, "at most 512"),
    "backtracking": (LORA | {"target_modules": r"(.*)*\.zz"}, "does not target it"),
    "backtracking-over-and-over": (LORA | {"target_modules": "(" * 300 + "z" + ")*" * 300}, "does not target it"),
    "long-pattern": (LORA | {"target_modules": "a" * 900_000}, "at most 1024"),
    "large-pattern": (LORA | {"target_modules": "((.{100}){10}){10}"}, "cannot be used"),
    "large-patterns": (patterns(2000, "((a?){10}){90}"), "too large together"),
    "many-patterns": (patterns(60_000, "q"), "at most 20000"),
    "2049-patterns": (patterns(2049, "q"), "at most 2048"),
    "case-folding": (LORA | {"target_modules": r"(?i:[\x00-\U0010ffff])" * 40}, "syntax that is not supported"),
    "large-layer-patterns": (
        LORA | {"layers_to_transform": [0], "layers_pattern": [f"((a?){{10}}){{90}}{index}" for index in range(2000)]},
        "too large together",
    ),
    "many-layers": (LORA | {"layers_to_transform": [7] * 300_000}, "at most 20000"),
}
WEIGHTS_BESIDE = {"unknown-peft-type": (lambda: header_of(3 << 30), len(header_of(3 << 30)) + (3 << 30), "")}
CASES = [f"weights-{name}" for name in WEIGHTS] + [f"config-{name}" for name in CONFIGS]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("hostile")
    for case in CASES:
        folder = root / case
        folder.mkdir()
        part, _, name = case.partition("-")
        config = CONFIGS[name][0] if part == "config" else LORA
        write(folder / "adapter_config.json", config if isinstance(config, bytes) else json.dumps(config).encode())
        content, size, _ = WEIGHTS[name] if part == "weights" else WEIGHTS_BESIDE.get(name, (lambda: FINE, None, ""))
        write(folder / "adapter_model.safetensors", content(), size)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(MEASURE), *(str(root / case) for case in CASES)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
@pytest.mark.parametrize("case", CASES)
def test_hostile_files_are_refused_cheaply(case: str, refusals: dict[str, dict]) -> None:
    part, _, name = case.partition("-")
    refusal = refusals[case]
    assert (CONFIGS[name][1] if part == "config" else WEIGHTS[name][2]) in refusal["message"]
    assert len(refusal["message"]) <= LONGEST_MESSAGE
    # processor time of the cheapest of three tries: what the limits allow takes a third of it on a slow machine
    assert refusal["seconds"] < 0.1
    assert refusal["bytes"] < 50_000_000
