"""Configuration: what may be set, what it means, and which values make sense together.

It does not know the command line, the environment or files (see `lorasrv.cli.layers`), and it never looks at a device
or a model: "auto" and None are resolved where those are known.
"""

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorasrv.errors import ConfigError
from lorasrv.settings import choice, folder, integer, pair, seconds, setting, size, switch, text

HUB_PREFIX = "hf:"
"""A source that starts with this is a Hub repository, `hf:org/name@revision`; every other source is a folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything `lorasrv serve` can be told; the second argument of each field is its meaning and unit.

    Raises:
        ConfigError: Values that cannot work, all of them listed.
    """

    base: str | None = setting(
        None,
        text,
        "The base model: a folder or a Hub id, org/name@revision. Default: the embedded tiny model.",
        metavar="BASE",
        positional=True,
    )
    adapters: tuple[tuple[str, str], ...] = setting(
        (),
        pair,
        "An adapter to load at start: its id, and its folder or hf:org/name@revision. Repeatable.",
        key="adapter",
        metavar="ID=SOURCE",
        repeated=True,
    )
    adapter_roots: tuple[Path, ...] = setting(
        (),
        folder,
        "A folder below which LoadAdapter may read adapters. Repeatable; folders named by --adapter count too.",
        key="adapter_root",
        metavar="DIR",
        repeated=True,
    )
    allowed_repositories: tuple[str, ...] = setting(
        (),
        text,
        "A Hub repository, org/name, that LoadAdapter may download. Repeatable.",
        key="allow_repository",
        metavar="REPO",
        repeated=True,
    )
    host: str = setting("127.0.0.1", text, "The address to listen on.", metavar="HOST")
    port: int = setting(50051, integer, "The gRPC port; 0 takes a free one, printed at start.", metavar="PORT")
    metrics_port: int = setting(9464, integer, "The port of the Prometheus page; 0 turns it off.", metavar="PORT")
    insecure: bool = setting(
        False, switch, "Listen on an address other machines can reach, without encryption or authentication."
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", choice("auto", "cpu", "cuda"), "Where the model runs.", metavar="auto|cpu|cuda"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto",
        choice("auto", "bfloat16", "float16", "float32"),
        "The type of activations and of the KV cache.",
        metavar="auto|bfloat16|float16|float32",
    )
    quantize_base: Literal["auto", "on", "off"] = setting(
        "auto",
        choice("auto", "on", "off"),
        "Hold the base's linear layers in NF4, which takes a quarter of the memory; auto: unless `lorasrv merge` wrote "
        "the base in 16 or 32 bits, for NF4 could erase what was merged.",
        metavar="auto|on|off",
    )
    exact: Literal["auto", "on", "off"] = setting(
        "auto",
        choice("auto", "on", "off"),
        "Answers that do not depend, bit for bit, on other requests; auto is on for the CPU and off for a GPU.",
        metavar="auto|on|off",
    )
    cpu_isa: Literal["auto", "portable", "avx2", "avx512", "avx512_bf16", "amx"] = setting(
        "auto",
        choice("auto", "portable", "avx2", "avx512", "avx512_bf16", "amx"),
        "The instruction set of native kernels on a CPU; auto takes the widest there is, others are for comparing.",
        metavar="auto|portable|avx2|avx512|avx512_bf16|amx",
    )
    cuda_graphs: Literal["on", "off"] = setting(
        "on",
        choice("on", "off"),
        "Capture decode steps at start and replay them, on a GPU; off is for comparing.",
        metavar="on|off",
    )
    max_model_len: int | None = setting(
        None, integer, "The longest prompt plus answer, in tokens. Default: what the model allows.", metavar="N"
    )
    max_num_seqs: int = setting(64, integer, "The most sequences in one step.", metavar="N")
    max_batched_tokens: int = setting(1024, integer, "The most tokens in one step.", metavar="N")
    kv_bytes: int | None = setting(
        None,
        size,
        "Device memory for the KV cache, in bytes. Default: sized at start.",
        metavar="SIZE",
    )
    adapter_bytes: int | None = setting(
        None,
        size,
        "Device memory for adapters, in bytes. Default: eight of the highest rank.",
        metavar="SIZE",
    )
    max_rank: int = setting(128, integer, "The highest rank an adapter may have in one module.", metavar="R")
    max_adapters: int = setting(64, integer, "The most adapters on the device at a time.", metavar="N")
    max_queue: int = setting(1024, integer, "The most requests that wait; a further one is refused.", metavar="N")
    host_cache_bytes: int = setting(
        2 * 1024**3, size, "Host memory for adapters that are loaded but not on the device, in bytes.", metavar="SIZE"
    )
    drain_timeout_seconds: float = setting(
        30.0,
        seconds,
        "How long running requests may finish after SIGTERM, in seconds.",
        key="drain_timeout",
        metavar="S",
    )
    log_level: str = setting(
        "info",
        choice("debug", "info", "warning", "error"),
        "The lowest level of messages on stderr.",
        metavar="debug|info|warning|error",
    )
    log_format: Literal["text", "json"] = setting(
        "text", choice("text", "json"), "Log lines for people or for machines.", metavar="text|json"
    )

    def __post_init__(self) -> None:
        reasons = tuple(_reasons(self))
        if reasons:
            raise ConfigError(reasons)

    @property
    def allowed_roots(self) -> tuple[Path, ...]:
        """The folders below which adapters may be read: `adapter_roots` and the folders that `adapters` names."""
        named = [folder(source) for _, source in self.adapters if not source.startswith(HUB_PREFIX)]
        return tuple(dict.fromkeys((*self.adapter_roots, *named)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectConfig:
    """Which server a command talks to.

    Raises:
        ConfigError: Values that cannot work.
    """

    server: str = setting("127.0.0.1:50051", text, "The server to talk to.", metavar="HOST:PORT")
    timeout_seconds: float | None = setting(
        None, seconds, "Give up after this many seconds. Default: wait.", key="timeout", metavar="S"
    )

    def __post_init__(self) -> None:
        if self.timeout_seconds is not None and self.timeout_seconds <= 0:
            raise ConfigError([f"timeout is {self.timeout_seconds}: it must be above 0"])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _reasons(config: ServeConfig) -> Iterator[str]:
    yield from _range_reasons(config)
    if config.port and config.port == config.metrics_port:
        yield f"port and metrics_port are both {config.port}: they must differ"
    if config.max_batched_tokens < config.max_num_seqs:
        yield (
            f"max_batched_tokens is {config.max_batched_tokens}, less than max_num_seqs {config.max_num_seqs}: "
            "a step must hold one token of every running sequence"
        )
    if not is_loopback(config.host) and not config.insecure:
        yield f"host {config.host} can be reached from other machines: add insecure to serve it without encryption"
    ids = [adapter_id for adapter_id, _ in config.adapters]
    for adapter_id in sorted({name for name in ids if ids.count(name) > 1}):
        yield f"adapter {adapter_id} is given {ids.count(adapter_id)} times: ids must differ"


_LIMITS: tuple[tuple[str, int, int | None], ...] = (
    ("port", 0, 65535),
    ("metrics_port", 0, 65535),
    ("max_model_len", 1, None),
    ("max_num_seqs", 1, None),
    ("max_batched_tokens", 1, None),
    ("kv_bytes", 1, None),
    ("adapter_bytes", 1, None),
    ("max_rank", 1, None),
    ("max_adapters", 1, None),
    ("max_queue", 1, None),
    ("host_cache_bytes", 0, None),
    ("drain_timeout_seconds", 0, None),
)


def _range_reasons(config: ServeConfig) -> Iterator[str]:
    for name, lowest, highest in _LIMITS:
        value = getattr(config, name)
        if value is not None and (value < lowest or (highest is not None and value > highest)):
            yield f"{name} is {value}: it must be " + (
                f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
            )
