"""Settings for a base and a memory: the QLoRA paper's, in pieces small enough that the run fits.

Every value comes with its source. What someone has decided already stays, and the rest is chosen around it. Knows the
base's sizes and no weight; reads no data.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lorasrv.embedded import embedded_base
from lorasrv.errors import ConfigError
from lorasrv.model.config import ModelConfig, read_model_config
from lorasrv.model.device import resolve_device, resolve_dtype, total_memory
from lorasrv.model.hub import model_folder
from lorasrv.model.tensors import linear_shapes, wide_shapes
from lorasrv.train.config import JobConfig, RunConfig
from lorasrv.train.memory import MemoryPart, estimate_memory

Policy = Literal["qlora", "size"]

GIVEN = "given"
"""The source of what was decided before."""

# of the memory; the rest is CUDA's own and what the allocator cannot use
_USABLE = 0.95
# what is tried in turn: tokens at a time, whether layers are computed again on the way back
_WAYS = ((4096, False), (2048, False), (4096, True), (2048, True), (1024, True), (512, True))
_LOWER_RANKS = (32, 16, 8, 4)
_LONGEST = 2048

# QLoRA's models have 7, 13, 33 and 65 billion parameters
_BETWEEN_13_AND_33 = 20e9
# nobody's models but those of examples
_TINY = 1e8


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One setting.

    Attributes:
        key: as a configuration file has it.
        value: recommended, or given.
        source: who says so.
    """

    key: str
    value: Any
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """What to train with.

    Attributes:
        settings: in the order of a configuration file.
        parts: the memory it is estimated to take.
        memory_bytes: what there is.
        num_parameters: of the base.
    """

    settings: tuple[Advice, ...]
    parts: tuple[MemoryPart, ...]
    memory_bytes: int
    num_parameters: int

    @property
    def resident_bytes(self) -> int:
        """What must be in that memory at a time."""
        return _resident(self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is to be trained on.

    Attributes:
        memory_bytes: of the device.
        is_gpu: whether it is one; a driver can then page optimizer states.
        dtype_bytes: of an activation.
    """

    memory_bytes: int
    is_gpu: bool
    dtype_bytes: int


def recommend_for_base(
    given: Mapping[str, object], *, memory_bytes: int | None, policy: Policy = "qlora"
) -> Recommendation:
    """Recommends settings for a base, read from its config.

    Args:
        given: settings of `RunConfig` and `JobConfig` that are decided, by name.
        memory_bytes: of the GPU to train on; None: what this machine has.
        policy: as `recommend` takes it.

    Raises:
        ConfigError: it does not fit, or the device is not there.
        ModelLoadError: the base cannot be used.
    """
    run = RunConfig(**_only(RunConfig, given))
    model = read_model_config(embedded_base() if run.base is None else model_folder(run.base))
    return recommend(model, given, machine=_machine(run, memory_bytes), policy=policy)


def recommend(
    model: ModelConfig, given: Mapping[str, object], *, machine: Machine, policy: Policy = "qlora"
) -> Recommendation:
    """Recommends settings for a base of these sizes.

    Args:
        model: the base.
        given: settings that are decided, by name.
        machine: to train on.
        policy: "qlora", the paper's; or "size", ranks that fall as models grow, as popular write-ups have it.

    Raises:
        ConfigError: nothing fits; says what takes how much.
    """
    num_parameters = _num_parameters(model)
    proposals = list(_proposals(num_parameters, machine, policy))
    settings = [Advice(key=name, value=value, source=GIVEN) for name, value in given.items()]
    settings += [advice for advice in proposals if advice.key not in given]
    chosen = {advice.key: advice.value for advice in settings}
    ways = [{"micro_batch_tokens": tokens, "checkpoint_layers": again, **given} for tokens, again in _WAYS]
    for way in ways:
        parts = _estimate(model, chosen | way, machine)
        if _resident(parts) <= _USABLE * machine.memory_bytes:
            source = f"estimated: {_gb(_resident(parts))} of {_gb(machine.memory_bytes)}"
            settings += [Advice(key=key, value=way[key], source=source) for key in way if key not in given]
            return Recommendation(
                settings=tuple(settings),
                parts=tuple(parts),
                memory_bytes=machine.memory_bytes,
                num_parameters=num_parameters,
            )
    raise ConfigError(list(_too_small(model, chosen | ways[-1], machine)))


def _proposals(num_parameters: int, machine: Machine, policy: Policy) -> Iterator[Advice]:
    if num_parameters < _TINY:
        yield from _tiny()
    elif policy == "size":
        yield from _by_size(num_parameters)
        yield from _of_qlora(num_parameters)
    else:
        yield from _whole_model()
        yield from _of_qlora(num_parameters)
    optimizer = "paged_adamw" if machine.is_gpu else "adamw"
    source = "QLoRA's scripts: paged_adamw_32bit" if machine.is_gpu else "a CPU has nothing to page from"
    yield Advice(key="optimizer", value=optimizer, source=source)


def _whole_model() -> Iterator[Advice]:
    yield Advice(key="rank", value=64, source="QLoRA: 64 at every size; it mattered little there")
    yield Advice(key="alpha", value=16.0, source="QLoRA: 16 at every size")
    source = "QLoRA: adapting every linear layer is what it took to be as good as full fine-tuning"
    yield Advice(key="target_modules", value=("all-linear",), source=source)


def _by_size(num_parameters: int) -> Iterator[Advice]:
    rank = 16 if num_parameters < _BETWEEN_13_AND_33 else 8 if num_parameters < 50e9 else 4
    source = "popular write-ups: lower ranks for larger models; QLoRA used 64 at every size"
    yield Advice(key="rank", value=rank, source=source)
    yield Advice(key="alpha", value=2.0 * rank, source="popular write-ups: twice the rank")
    source = "popular write-ups; QLoRA found that attention alone does not reach full fine-tuning"
    yield Advice(key="target_modules", value=("q_proj", "v_proj"), source=source)


def _of_qlora(num_parameters: int) -> Iterator[Advice]:
    small = num_parameters < _BETWEEN_13_AND_33
    source = "QLoRA: 2e-4 for 7 and 13 billion parameters, 1e-4 for 33 and 65"
    yield Advice(key="learning_rate", value=2e-4 if small else 1e-4, source=source)
    source = "QLoRA: 0.1 for 7 and 13 billion parameters, 0.05 for 33 and 65"
    yield Advice(key="dropout", value=0.1 if small else 0.05, source=source)
    yield Advice(key="batch_size", value=16, source="QLoRA: 16")
    yield Advice(key="schedule", value="constant", source="QLoRA: constant")
    yield Advice(key="warmup", value=0.03, source="QLoRA's scripts: 0.03")
    yield Advice(key="clip", value=0.3, source="QLoRA: 0.3")


def _tiny() -> Iterator[Advice]:
    source = "lorasrv's default; measured over its embedded base, as no paper has models this small"
    values = {"rank": 16, "alpha": 32.0, "target_modules": ("all-linear",), "learning_rate": 4e-3, "dropout": 0.0}
    values |= {"batch_size": 16, "schedule": "cosine", "warmup": 0.03, "clip": 1.0}
    for key, value in values.items():
        yield Advice(key=key, value=value, source=source)


def _estimate(model: ModelConfig, values: Mapping[str, object], machine: Machine) -> list[MemoryPart]:
    run = RunConfig(**_only(RunConfig, values))
    # where data and adapter lie takes no memory
    job = JobConfig(**{"out": Path("adapter"), "data": (Path("data"),), **_only(JobConfig, values)})
    longest = min(run.max_tokens or _LONGEST, run.micro_batch_tokens, model.max_position_embeddings)
    auto = "paged_adamw" if machine.is_gpu else "adamw"
    optimizer = auto if job.optimizer == "auto" else job.optimizer
    return estimate_memory(
        model,
        run,
        {"adapter": job},
        dtype_bytes=machine.dtype_bytes,
        optimizer=optimizer if machine.is_gpu else optimizer.removeprefix("paged_"),
        max_tokens=longest,
    )


def _too_small(model: ModelConfig, values: Mapping[str, object], machine: Machine) -> Iterator[str]:
    """What the smallest way takes, and what would fit instead."""
    parts = _estimate(model, values, machine)
    usable = f"{_gb(_USABLE * machine.memory_bytes)} of {_gb(machine.memory_bytes)} can be used"
    yield f"{values['micro_batch_tokens']} tokens at a time take {_gb(_resident(parts))}, and {usable}"
    for part in sorted(parts, key=lambda part: -part.num_bytes):
        if part.num_bytes and not part.paged:
            yield f"{part.name}: {_gb(part.num_bytes)}"
    lower = [rank for rank in _LOWER_RANKS if rank < int(str(values["rank"]))]
    for rank in lower:
        if _resident(_estimate(model, {**values, "rank": rank}, machine)) <= _USABLE * machine.memory_bytes:
            yield f"with rank {rank} it would fit"
            return
    yield "take a smaller base or a larger memory; no rank would make it fit"


def _machine(run: RunConfig, memory_bytes: int | None) -> Machine:
    """The machine that is meant: the GPU whose size is given, else this one."""
    if memory_bytes is not None and run.device != "cpu":
        return Machine(memory_bytes=memory_bytes, is_gpu=True, dtype_bytes=4 if run.dtype == "float32" else 2)
    device = resolve_device(run.device)
    if memory_bytes is None:
        memory_bytes = total_memory(device)
    return Machine(
        memory_bytes=memory_bytes,
        is_gpu=device.type == "cuda",
        dtype_bytes=resolve_dtype(run.dtype, device).itemsize,
    )


def _num_parameters(model: ModelConfig) -> int:
    linear = sum(rows * columns for rows, columns in linear_shapes(model).values())
    return linear + sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in wide_shapes(model).values())


def _only(config_class: type, values: Mapping[str, object]) -> dict[str, Any]:
    names = {field.name for field in fields(config_class)}
    return {name: value for name, value in values.items() if name in names}


def _resident(parts: "tuple[MemoryPart, ...] | list[MemoryPart]") -> int:
    return sum(part.num_bytes for part in parts if not part.paged)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
