"""Where configuration comes from: flag over environment over YAML file over default.

Everything is derived from the settings a dataclass declares (`lorasrv.settings`); this module knows none of them by
name. The environment is handed in, so that reading it stays in one place (`lorasrv.cli.environment`).
"""

import argparse
import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lorasrv.errors import ConfigError
from lorasrv.settings import Setting, settings_of, switch

Config = TypeVar("Config")

_PREFIX = "LORASRV_"

# what Kubernetes sets in every pod when a service is called lorasrv
_SERVICE_LINK = re.compile(r"LORASRV_(SERVICE_.*|PORT_\d+_.*)")


def add_flags(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add one flag, or positional argument, for each setting; what is not given is absent from the namespace."""
    for setting in settings_of(config_class):
        text = setting.help.replace("%", "%%") + _default_note(setting)
        options: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if setting.parse is switch:
            parser.add_argument(setting.flag, dest=setting.name, action=argparse.BooleanOptionalAction, **options)
            continue
        options |= {"metavar": setting.metavar, "type": _argument_type(setting)}
        if setting.positional:
            parser.add_argument(setting.name, nargs="?", **options)
        else:
            parser.add_argument(
                setting.flag, dest=setting.name, action="append" if setting.repeated else "store", **options
            )


def resolve(
    config_class: type[Config],
    *,
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    other_variables: Collection[str] = (),
    config_file: Path | None = None,
) -> Config:
    """The configuration that flags, environment and file make up together.

    Args:
        config_class: A dataclass whose fields are settings.
        flags: Parsed values by field name; names that are no field are left alone.
        environ: The process's environment.
        other_variables: Variables that are no setting of this configuration, and no mistake either.
        config_file: The YAML file, or None.

    Raises:
        ConfigError: Everything that cannot be read, or is unknown, or cannot work together.
    """
    settings = settings_of(config_class)
    content = read_yaml(config_file) if config_file else {}
    values = collect(
        settings,
        flags=flags,
        environ=environ,
        other_variables=other_variables,
        content=content,
        origin=str(config_file),
    )
    return config_class(**values)


def collect(
    settings: Sequence[Setting],
    *,
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    other_variables: Collection[str] = (),
    content: Mapping[object, object],
    origin: str,
) -> dict[str, object]:
    """The values of some settings, by field name; what is given nowhere is absent.

    Args:
        settings: which.
        flags, environ, other_variables: as `resolve` takes them.
        content: of a configuration file.
        origin: the file's name, for messages.

    Raises:
        ConfigError: Everything that cannot be read, or is unknown.
    """
    reasons: list[str] = []
    values = read_mapping(settings, content, origin, reasons)
    values |= _from_environment(settings, environ, other_variables, reasons)
    if reasons:
        raise ConfigError(reasons)
    for setting in settings:
        if setting.name in flags:
            value = flags[setting.name]
            values[setting.name] = tuple(value) if isinstance(value, list) else value
    return values


def read_mapping(
    settings: Iterable[Setting], content: Mapping[object, object], origin: str, reasons: list[str]
) -> dict[str, object]:
    """The values of some settings that a part of a file gives, by field name; what is wrong goes to `reasons`."""
    by_key = {setting.key: setting for setting in settings}
    values: dict[str, object] = {}
    for name, value in content.items():
        key = str(name).replace("-", "_")
        if key not in by_key:
            reasons.append(f"{origin}: unknown key {name}{suggestion(key, by_key)}")
        elif value is not None:
            _read(by_key[key], value, f"{origin}: {name}", values, reasons)
    return values


def read_yaml(path: Path) -> Mapping[object, object]:
    """The keys and values of a YAML file.

    Raises:
        ConfigError: It cannot be read, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not YAML: {' '.join(str(error).split())}"]) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError([f"{path}: expected keys and values, got {type(content).__name__}"])
    return content


def suggestion(word: str, known: Iterable[str], *, prefix: str = "") -> str:
    """`; did you mean ...?` if a known word is close, else nothing; `prefix` is put before the word proposed."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _from_environment(
    settings: Iterable[Setting], environ: Mapping[str, str], others: Collection[str], reasons: list[str]
) -> dict[str, object]:
    by_variable = {setting.variable: setting for setting in settings}
    values: dict[str, object] = {}
    for name in sorted(name for name in environ if name.startswith(_PREFIX)):
        value = environ[name]
        if not value or _is_service_link(name, value):
            continue
        if name in by_variable:
            _read(by_variable[name], value, f"environment: {name}", values, reasons)
        elif name not in others:
            known = {variable.removeprefix(_PREFIX) for variable in (*by_variable, *others)}
            hint = suggestion(name.removeprefix(_PREFIX), known, prefix=_PREFIX)
            reasons.append(f"environment: unknown variable {name}{hint}")
    return values


def _is_service_link(name: str, value: str) -> bool:
    return bool(_SERVICE_LINK.fullmatch(name)) or (name == "LORASRV_PORT" and "://" in value)


def _read(setting: Setting, value: object, origin: str, values: dict[str, object], reasons: list[str]) -> None:
    try:
        values[setting.name] = setting.read(value)
    except ValueError as error:
        reasons.append(f"{origin}: {error}")


def _argument_type(setting: Setting) -> Any:
    def parse(text: str) -> object:
        try:
            return setting.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _default_note(setting: Setting) -> str:
    if setting.default in (None, (), False) or "Default:" in setting.help:
        return ""
    return f" Default: {setting.default}."
