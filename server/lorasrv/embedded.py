"""Where the embedded base model and its adapters lie inside the package."""

from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"


def embedded_base() -> Path:
    """The folder of the embedded base model, which serves when no other is named."""
    return _ASSETS / "base"


def embedded_base_name() -> str:
    """What the embedded adapters call the embedded base."""
    return "lorasrv/embedded"


def embedded_adapter_root() -> Path:
    """The folder below which the embedded adapters lie."""
    return _ASSETS / "adapters"


def embedded_adapters() -> dict[str, Path]:
    """The folder of each embedded adapter by its id, in order of the ids."""
    found = sorted(embedded_adapter_root().glob("*/adapter_config.json"))
    return {config.parent.name: config.parent for config in found}
