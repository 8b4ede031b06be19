"""`lorasrv train`: one adapter, or several together, from data files to PEFT folders."""

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lorasrv.cli.console import print_json, say
from lorasrv.cli.environment import known_variables
from lorasrv.cli.exit_codes import ExitCode
from lorasrv.cli.layers import Config, add_flags, collect, read_mapping, read_yaml
from lorasrv.cli.recommend import show_recommendation
from lorasrv.cli.training_display import describe_outcome, show_audits, show_memory, training_display
from lorasrv.embedded import embedded_base_name
from lorasrv.errors import ConfigError
from lorasrv.settings import settings_of, size
from lorasrv.train.config import DEFAULTS_OVER_THE_EMBEDDED_BASE, JobConfig, RunConfig, TrainConfig
from lorasrv.train.observer import RunObserver

_JOBS = "jobs"
_ONLY_JOB = "adapter"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "train",
        help="train a LoRA, rsLoRA, DoRA or AdaLoRA adapter",
        description="Train an adapter over the base held in 4 bits, and write it as a PEFT folder. A YAML file may ask "
        "for several: under jobs, by name, what differs from the keys above it; they are trained together.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="A YAML file whose keys are these flags.")
    add_flags(parser, RunConfig)
    add_flags(parser, JobConfig)
    parser.add_argument(
        "--audit",
        metavar="N",
        type=int,
        nargs="?",
        const=3,
        help="Train nothing; show N samples (default 3) with what is learned marked, and how much there is.",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Train nothing; show how much memory it would take, by part."
    )
    parser.add_argument(
        "--recommend",
        metavar="SIZE",
        type=_size,
        nargs="?",
        const=0,
        help="Train nothing; write a configuration file for the base and a GPU of this memory, e.g. 48GB (default: "
        "this machine), around what other flags decide.",
    )
    parser.add_argument(
        "--recommend-by",
        choices=("qlora", "size"),
        default="qlora",
        help="qlora: the paper's settings. size: ranks that fall as models grow, as popular write-ups have it. "
        "Default: qlora.",
    )
    parser.add_argument("--json", action="store_true", help="Write the outcome as JSON.")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, and report where the adapters are."""
    if arguments.recommend is not None:
        return _recommend(arguments)
    config = train_config(vars(arguments), os.environ)
    if not arguments.dry_run and arguments.audit is None:
        return _train(config, as_json=arguments.json)
    # torch comes with this
    from lorasrv.train.app import audit_data, estimate

    if arguments.dry_run:
        show_memory(estimate(config), as_json=arguments.json)
    else:
        show_audits(audit_data(config, num_samples=arguments.audit), as_json=arguments.json)
    return ExitCode.OK


def _recommend(arguments: argparse.Namespace) -> int:
    run, jobs = _values(vars(arguments), os.environ)
    if len(jobs) > 1:
        raise ConfigError([f"{arguments.config} has {len(jobs)} jobs; recommend is for one"])
    # torch comes with this
    from lorasrv.train.recommend import recommend_for_base

    (job,) = jobs.values()
    found = recommend_for_base({**run, **job}, memory_bytes=arguments.recommend or None, policy=arguments.recommend_by)
    show_recommendation(found, as_json=arguments.json)
    return ExitCode.OK


def _train(config: TrainConfig, *, as_json: bool) -> int:
    publisher = None
    if config.run.publish:
        # grpc comes with this
        from lorasrv.cli.publish import Publisher

        publisher = Publisher(config.run.publish, config)
        publisher.probe()
    with _metrics_page(config.run) as metrics:
        # torch comes with this; a server or a port that is not to be had should not wait for it
        from lorasrv.train.app import train

        with training_display(config) as display:
            outcomes = train(config, observers=[*filter(None, (publisher, metrics)), display])
    for outcome in outcomes.values():
        say(f"{outcome.folder.name}: {describe_outcome(outcome)}")
    folders = {name: outcome.folder for name, outcome in outcomes.items()}
    summaries = {name: outcome.summary() for name, outcome in outcomes.items()}
    code = ExitCode.OK
    if publisher is None:
        base = f"{config.run.base} " if config.run.base else ""
        named = " ".join(f"--adapter {folder.name}={folder}" for folder in folders.values())
        say(f"to serve {'it' if len(folders) == 1 else 'them'}: lorasrv serve {base}{named}")
    else:
        publications = publisher.publish(folders)
        code = publisher.show(publications, folders)
        for name, publication in publications.items():
            summaries[name]["published"] = publication.summary()
    if as_json:
        print_json(summaries)
    return code


@contextmanager
def _metrics_page(run: RunConfig) -> Iterator[RunObserver | None]:
    """Serves metrics of the run while the body runs, if that is asked for; gives what is to be told of it."""
    if not run.metrics_port:
        yield None
        return
    from lorasrv.metrics.endpoint import MetricsServer
    from lorasrv.metrics.training import TrainingMetrics

    metrics = TrainingMetrics(base_model=run.base or embedded_base_name())
    try:
        page = MetricsServer(metrics.registry, host=run.metrics_host, port=run.metrics_port)
    except OSError as error:
        raise ConfigError([f"cannot listen on {run.metrics_host}:{run.metrics_port}: {error.strerror}"]) from error
    with page:
        say(f"metrics are at http://{run.metrics_host}:{page.port}/metrics")
        yield metrics


def train_config(flags: Mapping[str, object], environ: Mapping[str, str]) -> TrainConfig:
    """What flags, environment and the file that `flags["config"]` names ask for together.

    A flag holds for every job.

    Raises:
        ConfigError: Everything that cannot be read, is unknown, or cannot work together.
    """
    run, jobs = _values(flags, environ)
    defaults: Mapping[str, object] = {} if "base" in run else DEFAULTS_OVER_THE_EMBEDDED_BASE
    return _checked(run, {name: {**defaults, **job} for name, job in jobs.items()})


def _values(
    flags: Mapping[str, object], environ: Mapping[str, str]
) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """What is given for the run, and for every job by name."""
    path = flags.get("config")
    content = dict(read_yaml(Path(str(path)))) if path else {}
    jobs = content.pop(_JOBS, None)
    run_settings, job_settings = settings_of(RunConfig), settings_of(JobConfig)
    shared = collect(
        (*run_settings, *job_settings),
        flags=flags,
        environ=environ,
        other_variables=known_variables(),
        content=content,
        origin=str(path),
    )
    reasons: list[str] = []
    own = _own_values(jobs, str(path), reasons)
    if reasons:
        raise ConfigError(reasons)
    given = {setting.name for setting in job_settings if setting.name in flags}
    run_values = {setting.name: shared.pop(setting.name) for setting in run_settings if setting.name in shared}
    return run_values, {
        name: shared | {key: value for key, value in job.items() if key not in given} for name, job in own.items()
    }


def _size(text: str) -> int:
    try:
        return size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _own_values(jobs: object, origin: str, reasons: list[str]) -> dict[str, dict[str, object]]:
    """What each job says of its own; one job without a word where there is no list of jobs."""
    if jobs is None:
        return {_ONLY_JOB: {}}
    if not isinstance(jobs, dict):
        reasons.append(f"{origin}: {_JOBS} must be names with keys and values below each, got {type(jobs).__name__}")
        return {}
    settings = settings_of(JobConfig)
    shared = [setting.key for setting in settings_of(RunConfig)]
    found: dict[str, dict[str, object]] = {}
    for name, content in jobs.items():
        place = f"{origin}: {_JOBS}: {name}"
        if not isinstance(content, dict):
            reasons.append(f"{place}: expected keys and values, got {type(content).__name__}")
            continue
        reasons += [f"{place}: {key} is one for all jobs; give it above them" for key in content if key in shared]
        own = {key: value for key, value in content.items() if key not in shared}
        found[str(name)] = read_mapping(settings, own, place, reasons)
    return found


def _checked(run_values: Mapping[str, object], jobs: Mapping[str, Mapping[str, object]]) -> TrainConfig:
    reasons: list[str] = []
    run = _attempt(RunConfig, run_values, "", reasons)
    found = {
        name: _attempt(JobConfig, values, f"job {name}: " if len(jobs) > 1 else "", reasons)
        for name, values in jobs.items()
    }
    if run is None or reasons:
        raise ConfigError(reasons)
    return TrainConfig(run=run, jobs={name: job for name, job in found.items() if job is not None})


def _attempt(kind: type[Config], values: Mapping[str, object], place: str, reasons: list[str]) -> Config | None:
    try:
        return kind(**values)
    except ConfigError as error:
        reasons += [place + reason for reason in error.reasons]
        return None
