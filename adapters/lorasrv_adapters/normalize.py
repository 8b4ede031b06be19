r"""Every method reduced to one formula per linear layer: y = d * (W' x) + B (A x) + bias.

Here methods end: nothing after this module knows which one an adapter used. It knows PEFT's tensors by role and each
method's mathematics; of the base it knows names, shapes and rows.
Letters: R rank, I in-features, O out-features, V vocabulary.

    LoRA, rsLoRA    A = lora_A            B = s lora_B                       (arXiv 2106.09685, 2312.03732)
    DoRA            A = lora_A            B = d * s lora_B, d = m / |W + s B A|, row norms (arXiv 2402.09353, 4.1)
    AdaLoRA         A = rows of lora_A    B = s lora_B diag(lora_E), columns with lora_E != 0 (arXiv 2303.10512, 3.1)

W' is the base's weight with the rows that the adapter brings in their place. The bias is the adapter's if it brings
one, else the base's, plus s times the bias on lora_B. An embedding is the linear layer of one-hot vectors: W is [O, V],
the transpose of how it is stored.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv_adapters.base import BaseModel
from lorasrv_adapters.config import AdapterConfig, Kind
from lorasrv_adapters.errors import AdapterIncompatibleError
from lorasrv_adapters.tensors import ModuleTensors, group_tensors

NORM_CHUNK_ELEMENTS = 1 << 22
"""Elements of the base that are widened to float32 at a time while a DoRA norm is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplacedRows:
    """Rows that stand in place of rows of the base's weight.

    Attributes:
        values: [n, width of the weight], in the file's dtype, CPU; of a norm [1, I].
        ids: [n], int64, ascending: the rows they replace; None for all.
    """

    values: Tensor
    ids: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizedModule:
    """One module's part of an adapter, every factor folded in.

    Attributes:
        a: [R, I], fp32, CPU.
        b: [O, R], fp32, CPU.
        d: [O], fp32, CPU, or None where the base's output is not scaled.
        bias: [O], fp32, CPU, in place of the base's, or None.
        rows: What stands in place of rows of the weight, or None.
        scale: The factor that the config puts on B A, for information only; None without a low-rank update.
    """

    a: Tensor
    b: Tensor
    d: Tensor | None = None
    bias: Tensor | None = None
    rows: ReplacedRows | None = None
    scale: float | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        rows = (None, None) if self.rows is None else (self.rows.values, self.rows.ids)
        return sum(tensor.nbytes for tensor in (self.a, self.b, self.d, self.bias, *rows) if tensor is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizedAdapter:
    """An adapter in the normal form.

    Attributes:
        digest: 64 hexadecimal digits over everything that changes the result.
        kind: The method it was trained with, for information only.
        base_model: The base named in its config, for information only.
        modules: By module name; a module pruned to rank 0 is there, with R = 0, and so is one that is only replaced.
    """

    digest: str
    kind: Kind
    base_model: str
    modules: Mapping[str, NormalizedModule]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every module with a low-rank update, by name."""
        return {name: module.rank for name, module in self.modules.items() if module.scale is not None}

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max(self.ranks.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(module.num_bytes for module in self.modules.values())


def normalize(config: AdapterConfig, tensors: Mapping[str, Tensor], base: BaseModel) -> NormalizedAdapter:
    """Check an adapter against its base completely, and bring it into the normal form.

    Args:
        config: What the tensors mean.
        tensors: Every tensor of the adapter by its name in the file, on the CPU.
        base: The base as it is served.

    Raises:
        AdapterIncompatibleError: Anything does not fit; all of it is listed.
    """
    groups, reasons = group_tensors(config, tensors, base)
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


def adapted_norms(name: str, a: Tensor, b: Tensor, base: BaseModel) -> Tensor:
    """Norms of the rows of W + B A, directly and in chunks: the expanded form cancels digits away.

    Args:
        name: Of the module.
        a: [R, I] fp32.
        b: [O, R] fp32.
        base: The base as it is served.

    Returns:
        [O] fp32, on the CPU.
    """
    module = base.modules[name]
    num_rows, width = module.weight_shape
    over_tokens = module.kind == "embedding"
    squares = torch.zeros(module.out_features, dtype=torch.float64)
    chunk_rows = max(1, NORM_CHUNK_ELEMENTS // max(width, 1))
    for start in range(0, num_rows, chunk_rows):
        stop = min(start + chunk_rows, num_rows)
        weight = base.weight_rows(name, start, stop)
        # to where the base is; done once
        a, b = a.to(weight), b.to(weight)
        if over_tokens:
            adapted = torch.addmm(weight, a[:, start:stop].T, b.T)
            squares += torch.linalg.vector_norm(adapted, dim=0).double().square().cpu()
        else:
            adapted = torch.addmm(weight, b[start:stop], a)
            squares[start:stop] = torch.linalg.vector_norm(adapted, dim=1).double().square().cpu()
    return squares.sqrt().float()


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


def _normalize_module(config: AdapterConfig, name: str, group: ModuleTensors, base: BaseModel) -> NormalizedModule:
    plan, rows = group.plan, _replaced_rows(group)
    if plan.rank is None:
        shapes = (0, plan.base.in_features), (plan.base.out_features, 0)
        a, b = (torch.empty(shape) for shape in shapes)
        return NormalizedModule(a=a, b=b, bias=_bias(group, scale=1.0), rows=rows)
    scale = config.scale(plan.rank, plan.alpha)
    a, b, d = group.a.float(), group.b.float() * scale, None
    if "e" in group.tensors:
        keep = group.surviving_rows()
        a, b = a[keep], b[:, keep] * group.tensors["e"].float().reshape(-1)[keep]
    if "magnitude" in group.tensors:
        norm = adapted_norms(name, a, b, base)
        if not bool((norm > 0).all()):
            raise _UnusableModuleError("a row of W + s B A has norm zero, which DoRA divides by")
        d = group.tensors["magnitude"].float() / norm
        b = d[:, None] * b
    bias = _bias(group, scale=scale)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (b, d, bias) if tensor is not None):
        raise _UnusableModuleError("scaled values are beyond float32")
    return NormalizedModule(a=a.contiguous(), b=b.contiguous(), d=d, bias=bias, rows=rows, scale=scale)


def _replaced_rows(group: ModuleTensors) -> ReplacedRows | None:
    if group.plan.replaced:
        weight = group.tensors["weight"]
        return ReplacedRows(values=weight[None] if group.plan.base.kind == "norm" else weight)
    if not group.plan.row_ids:
        return None
    ids, order = torch.tensor(group.plan.row_ids).sort()
    return ReplacedRows(values=group.tensors["rows"][order], ids=ids)


def _bias(group: ModuleTensors, *, scale: float) -> Tensor | None:
    """The bias of a module, or None where the adapter leaves the base's alone."""
    own = group.tensors.get("base_bias", group.tensors.get("bias"))
    on_b = group.tensors.get("b_bias")
    if on_b is None:
        return None if own is None else own.float()
    inherited = group.plan.base.bias if own is None else own.float()
    return on_b.float() * scale if inherited is None else inherited + on_b.float() * scale
