"""The one place that reads the process's environment."""

import argparse
import os
from pathlib import Path

from lorasrv.cli.layers import Config, resolve
from lorasrv.config import ConnectConfig, ServeConfig
from lorasrv.merge.config import MergeConfig
from lorasrv.settings import settings_of
from lorasrv.train.config import JobConfig, RunConfig

CONFIG_VARIABLE = "LORASRV_CONFIG"


def resolve_from_process(config_class: type[Config], arguments: argparse.Namespace) -> Config:
    """The configuration made of parsed arguments, this process's environment and the file `--config` names.

    Raises:
        ConfigError: Everything that is wrong with it.
    """
    config_file = None
    if "config" in arguments:
        config_file = arguments.config or os.environ.get(CONFIG_VARIABLE)
    return resolve(
        config_class,
        flags=vars(arguments),
        environ=os.environ,
        other_variables=known_variables(),
        config_file=Path(config_file) if config_file else None,
    )


def known_variables() -> frozenset[str]:
    """The variables that some command reads."""
    configs = (ServeConfig, ConnectConfig, RunConfig, JobConfig, MergeConfig)
    return frozenset({CONFIG_VARIABLE, *(setting.variable for config in configs for setting in settings_of(config))})


def environment_without_settings() -> dict[str, str]:
    """This process's environment without our own variables, for a server that is configured by flags alone."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LORASRV_")}
