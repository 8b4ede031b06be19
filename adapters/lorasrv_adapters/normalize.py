r"""Every method reduced to one formula per linear layer: y = d * (W x) + B (A x).

Here methods end: nothing after this module knows which one an adapter used. It knows PEFT's tensor names and each
method's mathematics; of the base it knows names, shapes and rows.
Letters: R rank, I in-features, O out-features.

    LoRA, rsLoRA    A = lora_A            B = s lora_B                       (arXiv 2106.09685, 2312.03732)
    DoRA            A = lora_A            B = d * s lora_B, d = m / |W + s B A|, row norms (arXiv 2402.09353, 4.1)
    AdaLoRA         A = rows of lora_A    B = s lora_B diag(lora_E), columns with lora_E != 0 (arXiv 2303.10512, 3.1)
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lorasrv_adapters.config import AdapterConfig, Kind
from lorasrv_adapters.errors import AdapterIncompatibleError
from lorasrv_adapters.tensors import ModuleTensors, group_tensors

NORM_CHUNK_ELEMENTS = 1 << 22
"""Elements of the base that are widened to float32 at a time while a DoRA norm is taken."""


class BaseModules(Protocol):
    """What an adapter has to know of a base model."""

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Every linear layer an adapter may target: its name in the Hugging Face model -> (O, I)."""

    @property
    def digest(self) -> str:
        """What identifies the weights as served."""

    def weight_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a weight as served (dequantized): [stop - start, I], fp32, CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizedModule:
    """One linear layer's part of an adapter, every factor folded in.

    Attributes:
        a: [R, I], fp32, CPU.
        b: [O, R], fp32, CPU.
        d: [O], fp32, CPU, or None where the base's output is not scaled.
    """

    a: Tensor
    b: Tensor
    d: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return self.a.nbytes + self.b.nbytes + (0 if self.d is None else self.d.nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizedAdapter:
    """An adapter in the normal form.

    Attributes:
        digest: 64 hexadecimal digits over everything that changes the result.
        kind: The method it was trained with, for information only.
        base_model: The base named in its config, for information only.
        modules: By module name; a module pruned to rank 0 is there, with R = 0.
    """

    digest: str
    kind: Kind
    base_model: str
    modules: Mapping[str, NormalizedModule]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module name."""
        return {name: module.rank for name, module in self.modules.items()}

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max(self.ranks.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(module.num_bytes for module in self.modules.values())


def normalize(config: AdapterConfig, tensors: Mapping[str, Tensor], base: BaseModules) -> NormalizedAdapter:
    """Check an adapter against its base completely, and bring it into the normal form.

    Args:
        config: What the tensors mean.
        tensors: Every tensor of the adapter by its name in the file, on the CPU.
        base: The base as it is served.

    Raises:
        AdapterIncompatibleError: Anything does not fit; all of it is listed.
    """
    groups, reasons = group_tensors(config, tensors, base.modules)
    if reasons:
        raise AdapterIncompatibleError(reasons)
    modules: dict[str, NormalizedModule] = {}
    for name, group in groups.items():
        try:
            modules[name] = _normalize_module(config, name, group, base)
        except _UnusableModuleError as error:
            reasons.append(f"{name}: {error}")
    if reasons:
        raise AdapterIncompatibleError(reasons)
    return NormalizedAdapter(
        digest=adapter_digest(config, tensors), kind=config.kind, base_model=config.base_model, modules=modules
    )


def adapter_digest(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over the canonical config and all tensors: name, dtype, shape and bytes of each."""
    digest = hashlib.sha256(b"lorasrv-adapter-1\n" + config.canonical() + b"\n")
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        heading = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(heading, separators=(",", ":")).encode() + b"\n")
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _UnusableModuleError(Exception):
    pass


def _normalize_module(config: AdapterConfig, name: str, group: ModuleTensors, base: BaseModules) -> NormalizedModule:
    a, b = group.a.float(), group.b.float() * config.scale(group.configured_rank, group.alpha)
    d = None
    if group.e is not None:
        keep = group.surviving_rows()
        a, b = a[keep], b[:, keep] * group.e.float().reshape(-1)[keep]
    if group.magnitude is not None:
        norm = _row_norms(name, a, b, base)
        if not bool((norm > 0).all()):
            raise _UnusableModuleError("a row of W + s B A has norm zero, which DoRA divides by")
        d = group.magnitude.float() / norm
        b = d[:, None] * b
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (b, d) if tensor is not None):
        raise _UnusableModuleError("scaled values are beyond float32")
    return NormalizedModule(a=a.contiguous(), b=b.contiguous(), d=d)


def _row_norms(name: str, a: Tensor, b: Tensor, base: BaseModules) -> Tensor:
    """Row norms of W + B A, directly and in row chunks: the expanded form cancels digits away. [O], fp32."""
    out_features, in_features = base.modules[name]
    norms = torch.empty(out_features, dtype=torch.float32)
    chunk_rows = max(1, NORM_CHUNK_ELEMENTS // max(in_features, 1))
    for start in range(0, out_features, chunk_rows):
        stop = min(start + chunk_rows, out_features)
        rows = torch.addmm(base.weight_rows(name, start, stop), b[start:stop], a)
        torch.linalg.vector_norm(rows, dim=1, out=norms[start:stop])
    return norms
