"""Everything a server has below its services: model, adapters, device memory, metrics.

Knows how they depend on the configuration and on each other; touches no tensor, no message and no connection.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants
from lorasrv_adapters.host_cache import HostCache
from lorasrv_adapters.hub import HubSource
from lorasrv_adapters.loader import CheckpointLoader
from lorasrv_adapters.loader_process import LoaderProcess
from lorasrv_adapters.records import AdapterLoader, LoadedAdapter
from lorasrv_adapters.registry import AdapterRegistry
from lorasrv_kernels.cpu import library

from lorasrv import __version__
from lorasrv.config import HUB_PREFIX, ServeConfig
from lorasrv.embedded import embedded_base
from lorasrv.engine.decode_graphs import cuda_graphs
from lorasrv.engine.device import beside_steps, choose_cpu_isa, default_adapter_bytes, default_kv_bytes, resolve_exact
from lorasrv.engine.engine import Engine
from lorasrv.engine.kv_cache import BlockAllocator
from lorasrv.engine.memory import DeviceMemory
from lorasrv.engine.observer import EngineStats
from lorasrv.engine.own_thread import in_own_thread
from lorasrv.engine.request import RequestOutput, SamplingParams
from lorasrv.engine.runner import ModelRunner
from lorasrv.engine.scheduler import Scheduler, SchedulerLimits
from lorasrv.metrics import LevelState, ServerMetrics, ServerState
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.device import resolve_device, resolve_dtype
from lorasrv.model.folder import check_model_folder
from lorasrv.model.generation import read_generation_defaults
from lorasrv.model.hub import model_folder
from lorasrv.model.loader import load_model
from lorasrv.model.merged import is_merged
from lorasrv.model.tokenizer import Tokenizer
from lorasrv.rpc.convert.generation import RequestLimits
from lorasrv.rpc.convert.server import ServerFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What the services stand on, loaded and ready, except for the engine, which needs the event loop.

    Attributes:
        config: as it was given.
        facts: what the server says of itself.
        model: the base.
        tokenizer: the base's.
        memory: KV cache and resident adapters.
        registry: the adapters.
        cache: the registry's; only looked at here.
        metrics: everything that is counted.
    """

    config: ServeConfig
    facts: ServerFacts
    model: DecoderModel
    tokenizer: Tokenizer
    memory: DeviceMemory
    registry: AdapterRegistry
    cache: HostCache
    metrics: ServerMetrics

    @classmethod
    def load(cls, config: ServeConfig) -> "Backend":
        """Loads the base and the adapters named at start; blocks, for large models for minutes.

        Raises:
            ConfigError: the machine does not have what is asked for.
            ModelLoadError: the base cannot be served.
            AdapterError: an adapter cannot be served.
        """
        device = resolve_device(config.device)
        choose_cpu_isa(config.cpu_isa)
        dtype = resolve_dtype(config.dtype, device)
        folder = _base_folder(config)
        # before the weights are read, which takes long
        tokenizer = check_model_folder(folder)
        quantize = config.quantize_base == "on" or (config.quantize_base == "auto" and not is_merged(folder))
        model = load_model(folder, dtype=dtype, device=device, quantize=quantize, max_positions=config.max_model_len)
        metrics = ServerMetrics(base_model=config.base or folder.name)
        cache = HostCache(config.host_cache_bytes)
        memory = _memory(config, model, metrics)
        # the digest first, so that no load has to find it out anew
        facts = _facts(config, model, memory, folder=folder)
        registry = AdapterRegistry(_beside_the_engine(_loader(config, model, memory), model), cache, observer=metrics)
        for adapter_id, source in config.adapters:
            registry.load(adapter_id, _source(source))
        return cls(
            config=config,
            facts=facts,
            model=model,
            tokenizer=tokenizer,
            memory=memory,
            registry=registry,
            cache=cache,
            metrics=metrics,
        )

    def engine(self, on_outputs: Callable[[list[RequestOutput]], None]) -> Engine:
        """Returns an engine over this backend, not started; there is one at a time. On a GPU it captures first."""
        limits = SchedulerLimits(
            max_num_seqs=self.config.max_num_seqs,
            max_batched_tokens=self.config.max_batched_tokens,
            max_model_len=self.model.max_positions,
        )
        graphs = None
        if self.config.cuda_graphs == "on":
            graphs = cuda_graphs(self.model, self.memory, max_num_seqs=self.config.max_num_seqs)
        return Engine(
            ModelRunner(self.model, self.memory, graphs=graphs),
            Scheduler(limits, BlockAllocator(self.memory.layout.num_blocks), self.memory),
            self.tokenizer,
            max_queue=self.config.max_queue,
            on_outputs=on_outputs,
            metrics=self.metrics,
        )

    def state(self, stats: EngineStats) -> ServerState:
        """Returns what gauges show; any thread."""
        resident = set(self.memory.slots.resident())
        records = self.registry.list()
        return ServerState(
            engine=stats,
            levels={
                "device": LevelState(
                    num_adapters=len(resident),
                    num_slots=self.config.max_adapters,
                    num_bytes=sum(
                        {record.digest: record.num_bytes for record in records if record.digest in resident}.values()
                    ),
                ),
                "host": LevelState(
                    num_adapters=len(self.cache.digests()), num_slots=None, num_bytes=self.cache.num_bytes
                ),
            },
            adapter_ids=frozenset(record.adapter_id for record in records),
            resident_adapter_ids=frozenset(record.adapter_id for record in records if record.digest in resident),
            waiting_adapter_ids=frozenset(),
        )


@dataclass(frozen=True, slots=True)
class _OwnThreadLoader:
    """Loads adapters without leaving OpenMP workers in the threads that ask for them, and beside a GPU's steps."""

    loader: CheckpointLoader
    beside: Callable[[], AbstractContextManager[object]]

    def load(self, source: str) -> LoadedAdapter:
        return self.read(self.loader.locate(source))

    def read(self, folder: Path) -> LoadedAdapter:
        return in_own_thread(lambda: self._read(folder))

    def _read(self, folder: Path) -> LoadedAdapter:
        with self.beside():
            return self.loader.read(folder)


def _beside_the_engine(loader: CheckpointLoader, model: DecoderModel) -> AdapterLoader:
    """A loader that takes as little from the engine as it can: on a CPU none of its cores."""
    beside = _OwnThreadLoader(loader, lambda: beside_steps(model.device))
    # a process could not read a base that lies on another device
    return LoaderProcess(loader.locate, beside.read) if model.device.type == "cpu" else beside


def _base_folder(config: ServeConfig) -> Path:
    return embedded_base() if config.base is None else model_folder(config.base)


def _loader(config: ServeConfig, model: DecoderModel, memory: DeviceMemory) -> CheckpointLoader:
    downloads = Path(huggingface_hub.constants.HF_HOME) / "lorasrv-adapters"
    hub = HubSource(allowed=_allowed_repositories(config), folder=downloads)
    return CheckpointLoader(
        base=model.base,
        dtype=model.dtype,
        max_rank=config.max_rank,
        max_bytes=memory.adapter_bytes,
        roots=config.allowed_roots,
        hub=hub if hub.allowed else None,
        pins=model.device.type == "cuda",
    )


def _allowed_repositories(config: ServeConfig) -> tuple[str, ...]:
    """The allow-list, and the repositories that the operator names as adapters himself."""
    named = (source for _, source in config.adapters if source.startswith(HUB_PREFIX))
    return (*config.allowed_repositories, *(source.removeprefix(HUB_PREFIX).partition("@")[0] for source in named))


def _source(source: str) -> str:
    return source if source.startswith(HUB_PREFIX) else str(Path(source).expanduser().absolute())


def _memory(config: ServeConfig, model: DecoderModel, metrics: ServerMetrics) -> DeviceMemory:
    return DeviceMemory(
        model.config,
        model.base,
        dtype=model.dtype,
        device=model.device,
        kv_bytes=config.kv_bytes or default_kv_bytes(model, max_num_seqs=config.max_num_seqs),
        adapter_bytes=config.adapter_bytes or default_adapter_bytes(model, max_rank=config.max_rank),
        max_rank=config.max_rank,
        max_adapters=config.max_adapters,
        exact=resolve_exact(config.exact, model.device),
        observer=metrics,
    )


def _facts(config: ServeConfig, model: DecoderModel, memory: DeviceMemory, *, folder: Path) -> ServerFacts:
    return ServerFacts(
        version=__version__,
        base_model=config.base or folder.name,
        base_digest=model.base.digest,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        exact=memory.exact,
        native_kernels=model.device.type == "cpu" and library.load() is not None,
        limits=RequestLimits(max_model_len=model.max_positions, vocab_size=model.config.vocab_size),
        defaults=_sampling_defaults(folder),
        max_num_seqs=config.max_num_seqs,
        max_batched_tokens=config.max_batched_tokens,
        max_queue=config.max_queue,
        max_rank=config.max_rank,
        max_adapters=config.max_adapters,
    )


def _sampling_defaults(folder: Path) -> SamplingParams:
    """What the model's makers recommend, and the field's convention where they say nothing."""
    stated, usual = read_generation_defaults(folder), SamplingParams()
    return SamplingParams(
        temperature=usual.temperature if stated.temperature is None else stated.temperature,
        top_k=usual.top_k if stated.top_k is None else stated.top_k,
        top_p=usual.top_p if stated.top_p is None else stated.top_p,
    )
