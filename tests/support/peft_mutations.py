"""Every way in which an adapter folder can be changed by one key of its config or one tensor of its weights."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Tensors = list[tuple[str, Tensor]]
"""Names and tensors in the file's order; a list, because a file can hold a name twice."""

REMOVED = "(removed)"
"""Stands for a key that is not there."""

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int8: "I8",
}


def read_folder(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Read an adapter's config and tensors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, list(load_file(folder / "adapter_model.safetensors").items())


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Path:
    """Write an adapter's config and tensors without any check; names may stand twice."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    entries, end = [], 0
    for name, tensor in tensors:
        fields = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        entries.append(f"{json.dumps(name)}:{json.dumps(fields)}")
        end += tensor.nbytes
    header = ("{" + ",".join(['"__metadata__":{"format":"pt"}', *entries]) + "}").encode()
    data = b"".join(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for _, tensor in tensors)
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder


# --- one tensor -------------------------------------------------------------------------------------------------------

TensorChange = Callable[[str, Tensor], Tensors]
"""What takes the place of one tensor."""


def _value(value: float) -> TensorChange:
    def change(name: str, tensor: Tensor) -> Tensors:
        changed = tensor.clone()
        changed.view(-1)[changed.numel() // 2] = value
        return [(name, changed)]

    return change


def _renamed(old: str, new: str) -> TensorChange:
    return lambda name, tensor: [(name.replace(old, new, 1), tensor)]


def _as(change: Callable[[Tensor], Tensor]) -> TensorChange:
    return lambda name, tensor: [(name, change(tensor).contiguous())]


def _beside(rename: Callable[[str], str]) -> TensorChange:
    """A second, different tensor under another spelling."""
    return lambda name, tensor: [(name, tensor), (rename(name), tensor * 2 + 0.1)]


def _flip_weight(name: str) -> str:
    return name.removesuffix(".weight") if name.endswith(".weight") else f"{name}.weight"


def _named(name: str) -> str:
    """With the adapter's name where a state dict has it."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.default.{last}" if last in ("weight", "bias") else f"{name}.default"


TENSOR_CHANGES: dict[str, TensorChange] = {
    "dropped": lambda _, __: [],
    "renamed-without-prefix": _renamed("base_model.model.", ""),
    "renamed-without-base_model": _renamed("base_model.", ""),
    "renamed-with-prefix-twice": _renamed("base_model.model.", "base_model.model.base_model.model."),
    "renamed-in-capitals": lambda name, tensor: [(name.upper(), tensor)],
    "renamed-with-space": lambda name, tensor: [(f"{name} ", tensor)],
    "renamed-weights": lambda name, tensor: [(f"{name}s", tensor)],
    "renamed-weight": lambda name, tensor: [(_flip_weight(name), tensor)],
    "renamed-default": lambda name, tensor: [(_named(name), tensor)],
    "renamed-other": lambda name, tensor: [(_named(name).replace(".default", ".other"), tensor)],
    "renamed-layer-9": _renamed("layers.1.", "layers.9."),
    "renamed-layer-01": _renamed("layers.1.", "layers.01."),
    "renamed-k_proj": _renamed("q_proj", "k_proj"),
    "renamed-c_attn": _renamed("q_proj", "c_attn"),
    "renamed-A-for-B": lambda name, tensor: [
        (name.replace("_A", "_#").replace("_B", "_A").replace("_#", "_B"), tensor)
    ],
    "renamed-lora_C": _renamed("lora_", "lora_x_"),
    "renamed-base_layer": _renamed(".lora_", ".base_layer.lora_"),
    "duplicated-key": lambda name, tensor: [(name, tensor), (name, tensor * 2 + 0.1)],
    "duplicated-key-same": lambda name, tensor: [(name, tensor), (name, tensor)],
    "duplicated-without-prefix": _beside(lambda name: name.removeprefix("base_model.model.")),
    "duplicated-weight": _beside(_flip_weight),
    "duplicated-default": _beside(_named),
    "duplicated-layer-9": _beside(lambda name: name.replace("layers.1.", "layers.9.") + " "),
    "reshaped-flat": _as(lambda tensor: tensor.reshape(-1)),
    "reshaped-column": _as(lambda tensor: tensor.reshape(-1, 1)),
    "reshaped-row": _as(lambda tensor: tensor.reshape(1, -1)),
    "reshaped-3d": _as(lambda tensor: tensor.reshape(1, *tensor.shape)),
    "reshaped-two-rows": _as(lambda tensor: tensor.reshape(-1)[: tensor.numel() // 2 * 2].reshape(2, -1)),
    "reshaped-longer": _as(lambda tensor: torch.cat([tensor, tensor[:1]])),
    "reshaped-shorter": _as(lambda tensor: tensor[:-1]),
    "reshaped-wider": _as(lambda tensor: torch.cat([tensor, tensor[..., :1]], dim=-1)),
    "reshaped-narrower": _as(lambda tensor: tensor[..., :-1]),
    "reshaped-empty": _as(lambda tensor: tensor[:0]),
    "reshaped-scalar": _as(lambda tensor: tensor.reshape(-1)[0]),
    "transposed": _as(lambda tensor: tensor.T if tensor.ndim == 2 else tensor.flip(0)),
    "poisoned-nan": _value(math.nan),
    "poisoned-inf": _value(math.inf),
    "poisoned-minus-inf": _value(-math.inf),
    "poisoned-subnormal": _value(1e-40),
    "poisoned-large": _value(10.0),
    "zeroed": _as(torch.zeros_like),
    "negated": _as(torch.neg),
    **{
        f"dtype-{name}": _as(lambda tensor, dtype=dtype: tensor.to(dtype))
        for name, dtype in {
            "float16": torch.float16,
            "bfloat16": torch.bfloat16,
            "float64": torch.float64,
            "int8": torch.int8,
        }.items()
    },
}


def change_tensor(tensors: Tensors, name: str, change: TensorChange) -> Tensors:
    """Put what a change makes of one tensor in its place."""
    return [
        item for other, tensor in tensors for item in (change(other, tensor) if other == name else [(other, tensor)])
    ]


# --- one key of the config --------------------------------------------------------------------------------------------

Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"

OFF: list[Any] = [None, False, [], {}, ""]
"""Values that switch a key off, or would seem to."""

CONFIG_VALUES: dict[str, list[Any]] = {
    "task_type": [
        "CAUSAL_LM",
        "SEQ_CLS",
        "TOKEN_CLS",
        "QUESTION_ANS",
        "FEATURE_EXTRACTION",
        "SEQ_2_SEQ_LM",
        "OTHER",
        3,
    ],
    "peft_type": ["LORA", "ADALORA", "IA3", "LOHA", "VERA", "lora", 3],
    "auto_mapping": ["x", {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama"}],
    "peft_version": ["0.1.0", "99.0.0", 3],
    "base_model_name_or_path": ["another/base"],
    "revision": ["main", "no-such-revision"],
    "inference_mode": [False, True, "x"],
    "r": [1, 3, 5, 64, 0, -1, "4", 4.0, True],
    "target_modules": [
        ["q_proj"],
        ["q_proj", "v_proj", "o_proj"],
        ["q_proj", "v_proj", "c_attn"],
        ["q_proj", "v_proj", "lm_head"],
        ["q_proj", "v_proj", "norm"],
        ["self_attn.q_proj", "layers.1.self_attn.v_proj", "v_proj"],
        ["q_proj", "q_proj", "v_proj"],
        ["proj"],
        [""],
        "all-linear",
        "All-Linear",
        r".*\.(q|v)_proj",
        r".*\.q_proj",
        r"model\.layers\.[01]\.self_attn\.[qv]_proj",
        r"(?:.*)(q|v)_proj|nothing",
        r"(?!x).*\.[qv]_proj",
        r".*[[:alpha:]]_proj",
        r".*\.[qv]_pro{,2}j",
        "q_proj",
        "(",
        3,
    ],
    "exclude_modules": [
        ["q_proj"],
        ["layers.0.self_attn.q_proj"],
        ["o_proj"],
        ["c_attn"],
        [V1],
        r".*layers\.0.*q_proj",
        ".*o_proj",
        "(",
        3,
    ],
    "lora_alpha": [1, 3.5, 8, 0, -4, 1e30, "8", True],
    "lora_dropout": [0.5, 1.0, 2.0, -1.0, "x", True],
    "fan_in_fan_out": [True, "yes"],
    "bias": ["all", "lora_only", "some", True],
    "use_rslora": [True, 1, "true"],
    "modules_to_save": [
        ["lm_head"],
        ["norm"],
        ["embed_tokens"],
        ["q_proj"],
        ["score"],
        ["no_such"],
        "lm_head",
        [""],
    ],
    "init_lora_weights": [
        True,
        "gaussian",
        "eva",
        "orthogonal",
        "olora",
        "pissa",
        "pissa_niter_4",
        "corda",
        "loftq",
        "lora_ga",
        "mica",
        "nonsense",
        3,
    ],
    "layers_to_transform": [0, [1], [0, 1], [0, 0, 1], [7], -1, [0.5], "0", True],
    "layers_pattern": ["layers", ["layers", "h"], "h", ["h"], "("],
    "rank_pattern": [
        {"q_proj": 4},
        {"q_proj": 3},
        {V1: 2},
        {"no_such": 3},
        {f"{Q0}.lora_E": [True, False, True, True, False]},
        {f"{Q0}.lora_E": [True] * 5},
        {f"{Q0}.lora_E": [True] * 4},
        {f"{Q0}.lora_E.default": [True] * 5},
        {f"base_model.model.{Q0}.lora_E": [True] * 5},
        {f"{Q0}.lora_E": [1] * 5},
        {"(": 3},
        {"q_proj": 0},
        {"q_proj": "4"},
        ["q_proj"],
    ],
    "alpha_pattern": [
        {"q_proj": 3},
        {r".*\.v_proj": 2.5, "q_proj": 1},
        {"^model.layers.0.self_attn.q_proj": 2, "q_proj": 9},
        {r"q_pro{,2}j": 5},
        {"no_such": 3},
        {"q_proj": 0},
        {"q_proj": -2},
        {"q_proj": "3"},
    ],
    "megatron_config": [{"tensor_model_parallel_size": 1}],
    "megatron_core": ["os"],
    "trainable_token_indices": [[7, 66], {"embed_tokens": [7]}, {"lm_head": [7]}, 7, {"no_such": [1]}, [999]],
    "loftq_config": [{"loftq_bits": 4}],
    "eva_config": [{"rho": 2.0}],
    "corda_config": [{"corda_method": "kpm"}],
    "lora_ga_config": [{"direction": "ArB2r"}],
    "use_dora": [True, 1],
    "velora_config": [{"num_groups": 2}],
    "alora_invocation_tokens": [[7], [1, 2]],
    "use_qalora": [True, 1],
    "qalora_group_size": [2, 32, "x"],
    "monteclora_config": [{"num_samples": 2}],
    "layer_replication": [[[0, 2], [0, 2]], [[0, 2]]],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "lora_bias": [True, 1],
    "target_parameters": [["mlp.up_proj.weight"]],
    "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 2}],
    "kasa_config": [{"beta": 0.1}],
    "ensure_weight_tying": [True, 1],
    "target_r": [1, 8, 0, "x"],
    "init_r": [4, 5, 6, 0, -1, "5"],
    "tinit": [1, 9, 10, 200, -5, "x"],
    "tfinal": [1, 9, 10, 200, -5, "x"],
    "deltaT": [5, 0, "x"],
    "beta1": [0.5, 2, "x"],
    "beta2": [0.5, -1, "x"],
    "orth_reg_weight": [0.1, 0, -1, "x"],
    "total_step": [100, 1, 0, -1, 10.5, "x"],
    "no_such_key": [True, 1, 0, "x", [1], {"a": 1}],
}
"""Per key: values that PEFT takes and values that it does not; `OFF` are tried for every key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Specimen:
    """An adapter to change.

    Attributes:
        base: The base it is for.
        kind: Its method.
        option: What its config says beside that.
        tensors: Endings of the tensors that are changed, one of each kind; names of layer 1 where there is a choice.
        config: Values that are tried for keys of its config.
    """

    base: str
    kind: str
    option: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[str, ...]
    config: Mapping[str, list[Any]] = field(default_factory=dict)
