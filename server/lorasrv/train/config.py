"""What a training run may be told: a run over one base, and in it one job for each adapter.

It knows no command line and no file (see `lorasrv.cli.layers`), no tensor and no model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorasrv.errors import ConfigError
from lorasrv.settings import by_pattern, choice, folder, integer, number, setting, switch, text

Method = Literal["lora", "rslora", "dora", "adalora"]
Initialization = Literal["default", "gaussian", "pissa"]
Schedule = Literal["constant", "linear", "cosine"]
OptimizerName = Literal["auto", "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
OverLong = Literal["drop", "truncate", "refuse"]
SaveDtype = Literal["float32", "bfloat16"]


DEFAULTS_OVER_THE_EMBEDDED_BASE: Mapping[str, object] = {"learning_rate": 4e-3}
"""What a job over the embedded base begins from: the smaller a model, the faster it may learn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What all adapters of a run share.

    Raises:
        ConfigError: values that cannot work, all of them listed.
    """

    base: str | None = setting(
        None,
        text,
        "The base model: a folder or a Hub id, org/name@revision. Default: the embedded tiny model.",
        metavar="BASE",
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", choice("auto", "cpu", "cuda"), "Where the model runs.", metavar="auto|cpu|cuda"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto",
        choice("auto", "bfloat16", "float32"),
        "The type of activations; adapters, losses and optimizer states are float32.",
        metavar="auto|bfloat16|float32",
    )
    quantize: bool = setting(True, switch, "Hold the base's linear layers in NF4, double quantized.")
    max_steps: int = setting(200, integer, "Optimizer steps.", metavar="N")
    max_tokens: int | None = setting(
        None, integer, "The longest example, in tokens. Default: what the model allows, 2048 at most.", metavar="N"
    )
    micro_batch_tokens: int = setting(
        4096, integer, "The most tokens that go through the model at a time; it bounds the memory.", metavar="N"
    )
    checkpoint_layers: bool | None = setting(
        None,
        switch,
        "Keep one tensor a layer and compute the rest again on the way back: less memory, a third slower. Default: "
        "where the run would else take more than half of the memory.",
    )
    save_every: int = setting(100, integer, "Steps between checkpoints; 0: none.", metavar="N")
    resume: bool = setting(False, switch, "Go on from the newest checkpoint, as if the run had never stopped.")
    eval_every: int = setting(50, integer, "Steps between evaluations; 0: only at the end.", metavar="N")
    seed: int = setting(0, integer, "Of initial weights, order of the data and dropout.", metavar="N")
    publish: str | None = setting(
        None,
        text,
        "A running server that loads the finished adapters as new versions: of the job's name, or where there is only "
        "one, of its folder's.",
        metavar="HOST:PORT",
    )
    metrics_port: int = setting(
        0, integer, "The port of a Prometheus page about the run; 0: there is none.", metavar="PORT"
    )
    metrics_host: str = setting("127.0.0.1", text, "The address that page listens on.", metavar="HOST")

    def __post_init__(self) -> None:
        reasons = tuple(_range_reasons(self, _RUN_LIMITS))
        if reasons:
            raise ConfigError(reasons)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """One adapter: its data, its method, how it learns, where it goes.

    Raises:
        ConfigError: values that cannot work, all of them listed.
    """

    out: Path = setting(None, folder, "The new adapter folder.", metavar="DIR")
    save_dtype: SaveDtype = setting(
        "float32",
        choice("float32", "bfloat16"),
        "The type of what is written; the last evaluation is of the rounded tensors.",
        metavar="float32|bfloat16",
    )
    data: tuple[Path, ...] = setting(
        (),
        folder,
        "Training data: .jsonl, .json, .csv, .parquet or .txt. Repeatable.",
        metavar="FILE",
        repeated=True,
    )
    eval_data: tuple[Path, ...] = setting(
        (), folder, "Data for evaluation. Repeatable. Default: a part of --data.", metavar="FILE", repeated=True
    )
    eval_fraction: float = setting(
        0.05, number, "The part of --data kept for evaluation where --eval-data is not given.", metavar="F"
    )
    over_long: OverLong = setting(
        "truncate",
        choice("drop", "truncate", "refuse"),
        "What happens to samples longer than --max-tokens; running text is cut into windows instead.",
        metavar="drop|truncate|refuse",
    )
    chat_template: Path | None = setting(
        None, folder, "A jinja2 file for messages. Default: the base's own.", metavar="FILE"
    )
    method: Method = setting(
        "lora", choice("lora", "rslora", "dora", "adalora"), "What is trained.", metavar="lora|rslora|dora|adalora"
    )
    rank: int = setting(16, integer, "The rank; for AdaLoRA what ranks come down to on average.", metavar="R")
    init_rank: int | None = setting(
        None, integer, "AdaLoRA's rank at the start. Default: one and a half times --rank, rounded up.", metavar="R"
    )
    alpha: float | None = setting(
        None, number, "The scale's numerator. Default: twice the (initial) rank; for rsLoRA the rank.", metavar="A"
    )
    dropout: float = setting(0.0, number, "How much of a low-rank branch's input is dropped.", metavar="P")
    target_modules: tuple[str, ...] = setting(
        ("all-linear",),
        text,
        "Modules to adapt, by the ends of their names; all-linear: every linear layer but the head. Repeatable.",
        metavar="NAME",
        repeated=True,
    )
    rank_pattern: tuple[tuple[str, int], ...] = setting(
        (),
        by_pattern(integer),
        "Another rank where a regular expression matches the end of a module's name; the first that does counts. "
        "Repeatable; not for AdaLoRA.",
        metavar="REGEX=R",
        repeated=True,
    )
    alpha_pattern: tuple[tuple[str, float], ...] = setting(
        (),
        by_pattern(number),
        "Another alpha, likewise. Repeatable; not for AdaLoRA.",
        metavar="REGEX=A",
        repeated=True,
    )
    modules_to_save: tuple[str, ...] = setting(
        (),
        text,
        "Modules of which a copy is trained as a whole and saved: lm_head, embed_tokens or norms. Repeatable.",
        metavar="NAME",
        repeated=True,
    )
    ensure_weight_tying: bool = setting(
        False, switch, "Train one copy of embedding and head where the base has one and --modules-to-save names either."
    )
    initialization: Initialization = setting(
        "default",
        choice("default", "gaussian", "pissa"),
        "How A and B begin; pissa: from the base's largest singular vectors, written as a LoRA of twice the rank.",
        metavar="default|gaussian|pissa",
    )
    init_from: Path | None = setting(
        None, folder, "An adapter to go on from, of any kind that the method can express.", metavar="ADAPTER"
    )
    batch_size: int = setting(16, integer, "Examples in a step.", metavar="N")
    learning_rate: float = setting(
        2e-4,
        number,
        "The highest learning rate. Default: 2e-4; over the embedded base, which is tiny, 4e-3.",
        metavar="LR",
    )
    lora_plus_ratio: float = setting(
        1.0, number, "How many times faster B learns than A (LoRA+); 1: the same.", metavar="X"
    )
    schedule: Schedule = setting(
        "cosine",
        choice("constant", "linear", "cosine"),
        "How the learning rate goes down after the warm-up.",
        metavar="constant|linear|cosine",
    )
    warmup: float = setting(0.03, number, "The part of all steps in which the learning rate rises.", metavar="F")
    optimizer: OptimizerName = setting(
        "auto",
        choice("auto", "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"),
        "auto is paged_adamw on a GPU whose memory can be paged, else adamw.",
        metavar="auto|adamw|adamw_8bit|paged_adamw|paged_adamw_8bit",
    )
    weight_decay: float = setting(0.0, number, "Decoupled weight decay.", metavar="W")
    beta1: float = setting(0.9, number, "Adam's average of gradients.", metavar="B")
    beta2: float = setting(0.999, number, "Adam's average of squared gradients.", metavar="B")
    clip: float = setting(1.0, number, "The largest gradient norm; 0: any.", metavar="G")
    patience: int = setting(
        0, integer, "Stop after so many evaluations without a lower held-out loss; 0: never.", metavar="N"
    )
    orthogonality: float = setting(0.1, number, "AdaLoRA: weight of the orthogonal regularizer.", metavar="G")
    allocate_from: float = setting(0.1, number, "AdaLoRA: the part of all steps before ranks go down.", metavar="F")
    allocate_until: float = setting(0.7, number, "AdaLoRA: the part of all steps after which ranks stay.", metavar="F")
    allocate_every: int = setting(5, integer, "AdaLoRA: steps between allocations.", metavar="N")
    sensitivity_beta: float = setting(0.85, number, "AdaLoRA: average of sensitivity and of uncertainty.", metavar="B")

    def __post_init__(self) -> None:
        reasons = tuple(_job_reasons(self))
        if reasons:
            raise ConfigError(reasons)

    @property
    def start_rank(self) -> int:
        """The rank training begins with."""
        if self.method != "adalora":
            return self.rank
        return -(-3 * self.rank // 2) if self.init_rank is None else self.init_rank

    @property
    def effective_alpha(self) -> float:
        """The scale's numerator, its default resolved."""
        if self.alpha is not None:
            return self.alpha
        return float(self.rank) if self.method == "rslora" else 2.0 * self.start_rank

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied by: alpha over the rank, or over its square root for rsLoRA."""
        if self.method == "adalora":
            return self.effective_alpha / (self.start_rank + 1e-5)
        return self.effective_alpha / (self.rank**0.5 if self.method == "rslora" else self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A run and its jobs, at least one, by name."""

    run: RunConfig
    jobs: dict[str, JobConfig]

    def __post_init__(self) -> None:
        outs = [job.out for job in self.jobs.values()]
        reasons = [f"{out} is the folder of {outs.count(out)} jobs" for out in sorted(set(outs)) if outs.count(out) > 1]
        if not self.jobs:
            reasons.append("there is no job: give out and data")
        if reasons:
            raise ConfigError(reasons)


_Limits = tuple[tuple[str, float, float | None], ...]

_RUN_LIMITS: _Limits = (
    ("max_steps", 1, None),
    ("max_tokens", 2, None),
    ("micro_batch_tokens", 2, None),
    ("eval_every", 0, None),
    ("save_every", 0, None),
    ("metrics_port", 0, 65535),
)
_JOB_LIMITS: _Limits = (
    ("eval_fraction", 0, 0.9),
    ("rank", 1, None),
    ("init_rank", 1, None),
    ("dropout", 0, 0.95),
    ("batch_size", 1, None),
    ("learning_rate", 0, None),
    ("lora_plus_ratio", 0, None),
    ("warmup", 0, 1),
    ("weight_decay", 0, None),
    ("beta1", 0, 1),
    ("beta2", 0, 1),
    ("clip", 0, None),
    ("patience", 0, None),
    ("orthogonality", 0, None),
    ("allocate_from", 0, 1),
    ("allocate_until", 0, 1),
    ("allocate_every", 1, None),
    ("sensitivity_beta", 0, 1),
)


def _job_reasons(job: JobConfig) -> Iterator[str]:
    if job.out is None:
        yield "out is missing: name the new adapter folder"
    if not job.data:
        yield "data is missing: name at least one file"
    yield from _range_reasons(job, _JOB_LIMITS)
    if job.method == "adalora" and job.init_rank is not None and job.init_rank <= job.rank:
        yield f"init_rank is {job.init_rank}: it must be above rank {job.rank}, to which AdaLoRA comes down"
    if job.method != "adalora" and job.init_rank is not None:
        yield f"init_rank is for AdaLoRA; {job.method} keeps its rank"
    yield from _pattern_reasons(job)
    if job.ensure_weight_tying and not job.modules_to_save:
        yield "ensure_weight_tying is for embedding and head in modules_to_save, which names nothing"
    if job.initialization == "pissa" and job.method not in ("lora", "rslora"):
        yield f"initialization pissa is for lora and rslora, not {job.method}"
    if job.initialization == "pissa" and job.save_dtype != "float32":
        yield f"initialization pissa is a difference of two updates, which save_dtype {job.save_dtype} would blur"
    if job.initialization != "default" and job.init_from is not None:
        yield f"initialization {job.initialization} and init_from exclude each other"
    if job.allocate_from >= job.allocate_until:
        yield f"allocate_from {job.allocate_from} must be below allocate_until {job.allocate_until}"


def _pattern_reasons(job: JobConfig) -> Iterator[str]:
    tables: dict[str, tuple[tuple[str, float], ...]] = {
        "rank_pattern": job.rank_pattern,
        "alpha_pattern": job.alpha_pattern,
    }
    for key, table in tables.items():
        if table and job.method == "adalora":
            yield f"{key} is not for AdaLoRA, which begins with one rank and finds each module's own"
        patterns = [pattern for pattern, _ in table]
        yield from (f"{key} has {pattern!r} twice" for pattern in set(patterns) if patterns.count(pattern) > 1)
    yield from (
        f"rank_pattern gives {pattern!r} rank {rank}: it must be at least 1"
        for pattern, rank in job.rank_pattern
        if rank < 1
    )
    yield from (f"alpha_pattern gives {pattern!r} zero" for pattern, alpha in job.alpha_pattern if not alpha)


def _range_reasons(config: object, limits: _Limits) -> Iterator[str]:
    for name, lowest, highest in limits:
        value = getattr(config, name)
        if value is not None and (value < lowest or (highest is not None and value > highest)):
            wanted = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
            yield f"{name} is {value}: it must be {wanted}"
