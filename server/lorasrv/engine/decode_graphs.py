"""Decode steps captured once per batch size and replayed, so that a step costs no launches by the host.

A captured step reads and writes fixed addresses. What differs between steps (tokens, block tables, which row uses which
slot, where an adapter lies) are numbers behind these addresses: adapters come, go and move, and no graph is captured
anew. Batch sizes are powers of two; the rows a step leaves over do nothing.

Two graphs a size: one without adapters, and one that applies them to every linear layer. Steps whose adapters change
norms, embedding or head read the table on the host and are not for graphs, nor is anything but decoding.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from lorasrv_adapters.base import table_order
from lorasrv_kernels.attention import tile_tokens
from lorasrv_kernels.workspace import Workspace, using_workspace
from torch import Tensor

from lorasrv.engine.decode_inputs import DecodeInputs
from lorasrv.engine.memory import DeviceMemory
from lorasrv.engine.sampler import most_probable
from lorasrv.engine.sequence import ScheduledSequence
from lorasrv.model.decoder import DecoderModel

WAITS = "called a synchronizing CUDA operation"
"""How PyTorch's message begins for a call that waits for the device, which no graph can hold."""

_log = logging.getLogger(__name__)


class Graph(Protocol):
    """Work of a device that is recorded once and done again and again."""

    def capture(self, run: Callable[[], None]) -> None:
        """Records what `run` has the device do; whether it is also done now is left open.

        Everything `run` reads and writes must stay where it is, and it must not wait for the device.
        """

    def replay(self) -> None:
        """Does it on the current stream."""


class CudaGraph:
    """A CUDA graph.

    Args:
        pool: of the memory for what is computed in between; graphs that never run at the same time may share one.
    """

    def __init__(self, pool: "torch.cuda._POOL_HANDLE") -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, run: Callable[[], None]) -> None:
        """See `Graph`.

        Raises:
            RuntimeError: `run` waits for the device; the message begins with `WAITS`.
        """
        mode = torch.cuda.get_sync_debug_mode()
        # names the call that waits, where a capture would only say that it failed
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        # other threads may load adapters meanwhile
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            run()

    def replay(self) -> None:
        """See `Graph`."""
        self._graph.replay()


class Decoded(NamedTuple):
    """The outcome of a decode step, one row per sequence; good until the next step."""

    logits: Tensor  # [N, V] float32
    most_probable: Tensor  # [N] int64
    """As `lorasrv.engine.sampler.most_probable` returns it."""


class DecodeGraphs:
    """Captures decode steps of up to `max_num_seqs` sequences; belongs to the thread that runs the steps from then on.

    Args:
        model: the base.
        memory: cache and adapters.
        max_num_seqs: the most sequences of one step.
        new_graph: makes an empty graph.
    """

    def __init__(
        self, model: DecoderModel, memory: DeviceMemory, *, max_num_seqs: int, new_graph: Callable[[], Graph]
    ) -> None:
        self._model = model
        self._memory = memory
        kinds = [model.base.modules[name].kind for name in table_order(model.base)]
        self._linear = frozenset(place for place, kind in enumerate(kinds) if kind == "linear")
        self._inputs = [self._new_inputs(size) for size in batch_sizes(max_num_seqs)]
        largest = self._inputs[-1].num_rows
        # shared by all graphs: a step's outcome is read before the next one runs
        self._logits = torch.zeros(largest, model.config.vocab_size, device=model.device)
        self._most_probable = torch.zeros(largest, dtype=torch.int64, device=model.device)
        self._workspace = Workspace()
        self._graphs = self._capture(new_graph)

    @torch.inference_mode()
    def run(self, parts: Sequence[ScheduledSequence]) -> Decoded | None:
        """Runs a step, without waiting for it; None, and nothing is done, if it is none that was captured.

        Args:
            parts: everything that the step consists of.
        """
        num_rows = len(parts)
        if num_rows > self._inputs[-1].num_rows or any(part.num_tokens > 1 or not part.samples for part in parts):
            return None
        touched = self._memory.slots.touched(part.sequence.slot for part in parts)
        if not touched <= self._linear:
            return None
        inputs = self._inputs[(num_rows - 1).bit_length()]
        inputs.write(parts)
        self._graphs[inputs.num_rows, bool(touched)].replay()
        return Decoded(self._logits[:num_rows], self._most_probable[:num_rows])

    def _new_inputs(self, num_rows: int) -> DecodeInputs:
        config = self._model.config
        return DecodeInputs(
            num_rows,
            num_positions=self._model.max_positions,
            tile_tokens=tile_tokens(config.num_heads, config.num_kv_heads),
            memory=self._memory,
        )

    @torch.inference_mode()
    def _capture(self, new_graph: Callable[[], Graph]) -> dict[tuple[int, bool], Graph]:
        start, free = time.monotonic(), _free_bytes(self._model.device)
        steps = {
            (inputs.num_rows, adapted): self._step(inputs, adapted=adapted)
            for inputs in self._inputs
            for adapted in (False, True)
        }
        with using_workspace(self._workspace):
            # compiles what is compiled at first use, and lets the scratch memory grow to its largest
            for step in steps.values():
                step()
            self._workspace.seal()
            graphs = {key: new_graph() for key in steps}
            for key, graph in graphs.items():
                graph.capture(steps[key])
        _log.info(
            "captured %d decode graphs for batches of up to %d in %.1f s, %.0f MiB",
            len(graphs),
            self._inputs[-1].num_rows,
            time.monotonic() - start,
            (free - _free_bytes(self._model.device)) / 2**20,
        )
        return graphs

    def _step(self, inputs: DecodeInputs, *, adapted: bool) -> Callable[[], None]:
        batch = inputs.batch(self._linear if adapted else ())
        rows = inputs.num_rows

        def step() -> None:
            hidden = self._model.forward(inputs.tokens, batch)
            self._logits[:rows].copy_(self._model.logits(hidden, batch.adapters))
            self._most_probable[:rows].copy_(most_probable(self._logits[:rows]))

        return step


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Powers of two, the last one the first that is not below `max_num_seqs`."""
    return [1 << exponent for exponent in range((max_num_seqs - 1).bit_length() + 1)]


def cuda_graphs(model: DecoderModel, memory: DeviceMemory, *, max_num_seqs: int) -> DecodeGraphs | None:
    """Captures the decode steps of a model on CUDA.

    Returns:
        None where there are no graphs: on another device, or, with a warning, where the model's steps wait for the
        device, as the PyTorch path of some kernels does that serves without Triton.
    """
    if model.device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.device(model.device):
            return DecodeGraphs(model, memory, max_num_seqs=max_num_seqs, new_graph=lambda: CudaGraph(pool))
    except RuntimeError as error:
        if not str(error).startswith(WAITS):
            raise
        _log.warning("decode steps are not captured: %s", error)
        return None


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
