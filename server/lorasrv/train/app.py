"""A whole training run from its configuration: base and data in, adapter folders out.

Everything that can be wrong with base, data and targets is found before the first step. Knows no terminal.
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from lorasrv_adapters.provenance import BASE_DIGEST_KEY, BASE_QUANTIZATION_KEY

from lorasrv import __version__
from lorasrv.embedded import embedded_base, embedded_base_name
from lorasrv.errors import ConfigError
from lorasrv.model.config import ModelConfig, read_model_config
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.device import resolve_device, resolve_dtype, total_memory
from lorasrv.model.hub import model_folder
from lorasrv.model.loader import load_model
from lorasrv.model.tokenizer import Tokenizer
from lorasrv.train.audit import Audit, audit
from lorasrv.train.checkpoint import RunCheckpoints, checkpoint_folder
from lorasrv.train.config import TrainConfig
from lorasrv.train.data.examples import Tally
from lorasrv.train.data.files import JobData, read_jobs
from lorasrv.train.job import TrainingJob
from lorasrv.train.memory import MemoryPart, estimate_memory
from lorasrv.train.network import TrainableModel
from lorasrv.train.observer import Observers, RunObserver, RunStart
from lorasrv.train.run import TrainingRun
from lorasrv.train.run_histories import RunHistories, run_facts

_LONGEST_BY_DEFAULT = 2048
_OF_NO_CONSEQUENCE = (
    "base",
    "resume",
    "save_every",
    "out",
    "data",
    "eval_data",
    "chat_template",
    "publish",
    "metrics_port",
    "metrics_host",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a job.

    Attributes:
        folder: of the adapter.
        tally: of its data.
        ranks: by module.
        held_out_loss: in nats a token, before and after; None without held-out data.
    """

    folder: Path
    tally: Tally
    ranks: dict[str, int]
    held_out_loss: tuple[float, float] | None

    def summary(self) -> dict[str, object]:
        """For a report in JSON."""
        before, after = self.held_out_loss or (None, None)
        return {
            "folder": self.folder,
            "examples": self.tally.examples,
            "supervised_tokens": self.tally.supervised_tokens,
            "ranks": self.ranks,
            "held_out_loss_before": before,
            "held_out_loss": after,
        }


def train(config: TrainConfig, *, observers: Sequence[RunObserver] = ()) -> dict[str, Outcome]:
    """Trains all jobs of a run together, and writes each one's folder at the end; blocks for as long as that takes.

    Args:
        config: what to do.
        observers: told what the run does, each in turn.

    Raises:
        ConfigError: a folder exists already, or the device is not there.
        ModelLoadError: the base cannot be used.
        TrainingDataError: the data cannot; lists what is wrong in every job.
        AdapterIncompatibleError: the targets do not fit the base.
        NonFiniteLossError: a loss was NaN or infinite; nothing is written.
    """
    _check_folders(config)
    device = resolve_device(config.run.device)
    folder = _base_folder(config)
    run = config.run
    checkpoint_layers = _checkpoints_layers(config, read_model_config(folder), device)
    model = load_model(folder, dtype=resolve_dtype(run.dtype, device), device=device, quantize=run.quantize)
    data = read_jobs(config.jobs, folder, max_tokens=_max_tokens(config, model.max_positions))
    base_name = embedded_base_name() if run.base is None else run.base
    jobs = [_new_job(name, config, data[name], model=model, base_name=base_name) for name in config.jobs]
    training = TrainingRun(
        TrainableModel(model, checkpoint_layers=checkpoint_layers),
        jobs,
        micro_batch_tokens=run.micro_batch_tokens,
        seed=run.seed,
        device=device,
    )
    before = {job.name: training.evaluate(job) for job in jobs if job.held_out}
    checkpoints = RunCheckpoints(jobs, identities={name: _identity(config, name, data[name], model) for name in data})
    start = checkpoints.resume() if run.resume else 0
    histories = RunHistories(jobs)
    watching = Observers(*observers, histories)
    digest = model.base.digest
    watching.run_started(
        RunStart(base_digest=digest, jobs=tuple(config.jobs), first_step=start, max_steps=run.max_steps)
    )

    def save(step: int) -> None:
        if run.save_every and step % run.save_every == 0:
            began = time.monotonic()
            checkpoints.save(step)
            watching.checkpoint_written(step, time.monotonic() - began)

    training.train(range(start, run.max_steps), eval_every=run.eval_every, report=watching.step_finished, save=save)
    outcomes = {}
    for job in jobs:
        job.take_best()
        after = training.evaluate(job) if job.held_out else None
        provenance = _provenance(config, job.name, model)
        facts = run_facts(job, data[job.name], base_name, before.get(job.name), after)
        outcomes[job.name] = Outcome(
            folder=job.write(provenance, beside=histories.files(job.name, facts, held_out_before=before.get(job.name))),
            tally=data[job.name].tally,
            ranks=job.ranks(),
            held_out_loss=None if after is None else (before[job.name], after),
        )
    checkpoints.remove()
    return outcomes


def audit_data(config: TrainConfig, *, num_samples: int) -> dict[str, Audit]:
    """What every job of a run would learn; reads data and tokenizer, and no weight.

    Raises:
        ModelLoadError: the base cannot be used.
        TrainingDataError: the data cannot; lists what is wrong in every job.
    """
    folder = _base_folder(config)
    tokenizer, model = Tokenizer(folder), read_model_config(folder)
    data = read_jobs(config.jobs, folder, max_tokens=_max_tokens(config, model.max_position_embeddings))
    return {
        name: audit(
            found.examples,
            found.held_out,
            found.tally,
            tokenizer,
            batch_size=config.jobs[name].batch_size,
            num_samples=num_samples,
        )
        for name, found in data.items()
    }


def estimate(config: TrainConfig) -> list[MemoryPart]:
    """The memory a run will take, by part; reads the base's config, no weight and no data.

    Raises:
        ConfigError: the device is not there.
        ModelLoadError: the base cannot be used.
    """
    device = resolve_device(config.run.device)
    model = read_model_config(_base_folder(config))
    return _estimate(config, model, device, checkpoint_layers=_checkpoints_layers(config, model, device))


def _checkpoints_layers(config: TrainConfig, model: ModelConfig, device: torch.device) -> bool:
    """What the run says; by the memory there is where it says nothing."""
    if config.run.checkpoint_layers is not None:
        return config.run.checkpoint_layers
    parts = _estimate(config, model, device, checkpoint_layers=False)
    # half, for the estimate knows nothing of what else the machine does
    return 2 * sum(part.num_bytes for part in parts if not part.paged) > total_memory(device)


def _estimate(
    config: TrainConfig, model: ModelConfig, device: torch.device, *, checkpoint_layers: bool
) -> list[MemoryPart]:
    # the largest of what the jobs ask for
    asked = {job.optimizer for job in config.jobs.values()}
    optimizer = "adamw" if device.type == "cpu" or "adamw" in asked else min(asked)
    if optimizer == "auto":
        optimizer = "paged_adamw"
    return estimate_memory(
        model,
        replace(config.run, checkpoint_layers=checkpoint_layers),
        config.jobs,
        dtype_bytes=resolve_dtype(config.run.dtype, device).itemsize,
        optimizer=optimizer,
        max_tokens=_max_tokens(config, model.max_position_embeddings),
    )


def _base_folder(config: TrainConfig) -> Path:
    return embedded_base() if config.run.base is None else model_folder(config.run.base)


def _max_tokens(config: TrainConfig, max_positions: int) -> int:
    return min(config.run.max_tokens or _LONGEST_BY_DEFAULT, max_positions, config.run.micro_batch_tokens)


def _check_folders(config: TrainConfig) -> None:
    outs = [job.out for job in config.jobs.values()]
    reasons = [f"{out} exists; choose another folder or remove it" for out in outs if out.exists()]
    if not config.run.resume:
        started = [checkpoint_folder(out) for out in outs]
        reasons += [
            f"{path} holds a run that was interrupted; add --resume, or remove it" for path in started if path.exists()
        ]
    if reasons:
        raise ConfigError(reasons)


def _new_job(name: str, config: TrainConfig, data: JobData, *, model: DecoderModel, base_name: str) -> TrainingJob:
    return TrainingJob(
        name,
        config.jobs[name],
        base=model.base,
        base_name=base_name,
        examples=data.examples,
        held_out=data.held_out,
        max_steps=config.run.max_steps,
        seed=config.run.seed,
        device=model.device,
    )


def _identity(config: TrainConfig, name: str, data: JobData, model: DecoderModel) -> dict[str, object]:
    """What must be the same in a run that goes on: everything that changes a bit of the result."""
    run = {key: value for key, value in asdict(config.run).items() if key not in _OF_NO_CONSEQUENCE}
    job = {key: value for key, value in asdict(config.jobs[name]).items() if key not in _OF_NO_CONSEQUENCE}
    tokens = sha256()
    for example in (*data.examples, *data.held_out):
        tokens.update(example.token_ids.tobytes() + example.supervised)
    return {**run, **job, "jobs": sorted(config.jobs), "base": model.base.digest, "data": tokens.hexdigest()}


def _provenance(config: TrainConfig, name: str, model: DecoderModel) -> dict[str, object]:
    """Where an adapter comes from, without a path of the machine it was trained on."""
    job = config.jobs[name]
    return {
        BASE_DIGEST_KEY: model.base.digest,
        BASE_QUANTIZATION_KEY: "nf4" if config.run.quantize else "none",
        "data": {file.name: sha256(file.read_bytes()).hexdigest() for file in (*job.data, *job.eval_data)},
        "method": job.method,
        "max_steps": config.run.max_steps,
        "seed": config.run.seed,
        "versions": {
            "lorasrv": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
