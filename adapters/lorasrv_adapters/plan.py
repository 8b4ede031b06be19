"""What an adapter must bring for each module of its base, as its config says: which tensors, of which shapes.

Here PEFT's rules about targets, tied embeddings and fully trained modules are kept. It knows config and base; it sees
no tensor. Letters: R rank, I in-features, O out-features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorasrv_adapters.base import BaseModel, BaseModule, find_kind
from lorasrv_adapters.config import AdapterConfig
from lorasrv_adapters.naming import Role
from lorasrv_adapters.patterns import PatternTable


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """What an adapter must bring for one module.

    Attributes:
        base: The module.
        rank: R, if the module has a low-rank update: the rank that scales it; else None.
        alpha: The numerator of its scale.
        replaced: The whole weight comes with the adapter.
        row_ids: These rows of the weight come with the adapter, in this order.
        bias: A bias in place of the base's comes with the adapter.
        follows: The module whose tensors this one shares, if it is tied: the embedding, of the head.
    """

    base: BaseModule
    rank: int | None = None
    alpha: float = 1.0
    replaced: bool = False
    row_ids: tuple[int, ...] = ()
    bias: bool = False
    follows: str = ""

    @property
    def targeted(self) -> bool:
        """Whether it has a low-rank update."""
        return self.rank is not None


def make_plan(config: AdapterConfig, base: BaseModel) -> tuple[dict[str, ModulePlan], list[str]]:
    """Work out what the config demands of a base.

    Returns:
        A plan for every module that the adapter touches, in the base's order, and every reason to refuse the adapter.
    """
    planner = _Planner(config, base)
    return planner.plans(), planner.reasons


class _Planner:
    def __init__(self, config: AdapterConfig, base: BaseModel) -> None:
        self._config = config
        self._base = base
        self._embedding, self._head = find_kind(base, "embedding"), find_kind(base, "head")
        self._ranks, self._alphas = PatternTable(config.rank_pattern), PatternTable(config.alpha_pattern)
        self.reasons: list[str] = []

    def plans(self) -> dict[str, ModulePlan]:
        targeted, replaced, row_ids = self._targeted(), self._replaced(), self._row_ids()
        tied = self._tie(targeted, replaced, row_ids)
        self._check_patterns(targeted)
        self._check_conflicts(targeted, replaced, row_ids)
        plans = {}
        for name, module in self._base.modules.items():
            plan = ModulePlan(
                base=module,
                rank=self._ranks.find(name, self._config.rank) if name in targeted else None,
                alpha=self._alphas.find(name, self._config.alpha) if name in targeted else 1.0,
                replaced=name in replaced,
                row_ids=row_ids.get(name, ()),
                bias=module.bias is not None and self._brings_bias(name, targeted),
                follows=self._embedding if tied and name == self._head else "",
            )
            self._check_rank(name, plan)
            if plan.targeted or plan.replaced or plan.row_ids or plan.bias:
                plans[name] = plan
        return plans

    def _brings_bias(self, name: str, targeted: set[str]) -> bool:
        return self._config.bias == "all" or (self._config.bias == "lora_only" and name in targeted)

    def _targeted(self) -> set[str]:
        linear = [name for name, module in self._base.modules.items() if module.kind == "linear"]
        targets = self._config.targets
        named = targets.select(self._base.modules, all_linear=linear)
        if targets.exclude and not targets.excluded(self._base.modules):
            self.reasons.append("exclude_modules names no module of the base")
        adaptable = {"linear", "head", "embedding"}
        if self._config.kind == "adalora" or self._config.lora_bias:
            adaptable.remove("embedding")
        wrong = {name for name in named if self._base.modules[name].kind not in adaptable}
        self.reasons += [f"target_modules matches {name}, which this adapter cannot adapt" for name in sorted(wrong)]
        return set(named - wrong)

    def _replaced(self) -> set[str]:
        targets = self._config.targets
        named = targets.replaced(self._base.modules)
        for ending in targets.saved:
            if not any(name.endswith(ending) for name in self._base.modules):
                self.reasons.append(f"modules_to_save names {ending[:200]!r}, which is no module of the base")
        replaceable = {name for name in named if self._base.modules[name].kind in ("head", "embedding", "norm")}
        self.reasons += [
            f"modules_to_save names {name}; only the output head, the embedding and norms can be replaced"
            for name in sorted(named - replaceable)
        ]
        return replaceable

    def _row_ids(self) -> dict[str, tuple[int, ...]]:
        key = "trainable_token_indices"
        row_ids: dict[str, tuple[int, ...]] = {}
        for ending, ids in self._config.token_ids:
            names = [name for name in self._base.modules if name.endswith(ending)] if ending else [self._embedding]
            wrong = [name for name in names if name not in (self._embedding, self._head)]
            if wrong or not names:
                self.reasons.append(f"{key} names {ending[:200]!r}, which is neither the embedding nor the output head")
                continue
            for name in names:
                num_rows = self._base.modules[name].weight_shape[0]
                if name in row_ids:
                    self.reasons.append(f"{key} names {name} twice")
                if max(ids, default=0) >= num_rows:
                    self.reasons.append(f"{key}: id {max(ids)} of {name} is beyond its {num_rows} rows")
                row_ids[name] = ids
        return row_ids

    def _tie(self, targeted: set[str], replaced: set[str], row_ids: dict[str, tuple[int, ...]]) -> bool:
        """Add the head to what is done to a tied embedding; whether head and embedding share their tensors."""
        if not self._base.tied:
            if self._config.tie:
                self.reasons.append("ensure_weight_tying: the base does not tie its output head to the embedding")
            return False
        if self._embedding in row_ids:
            own = row_ids.setdefault(self._head, row_ids[self._embedding])
            if own == row_ids[self._embedding]:
                return True
            if self._config.tie:
                self.reasons.append("ensure_weight_tying: trainable_token_indices has different ids for each")
        if not self._config.tie:
            return False
        names = tuple(name.rpartition(".")[2] for name in (self._embedding, self._head))
        if any(saved.rpartition(".")[2] in names for saved in self._config.targets.saved):
            replaced.update((self._embedding, self._head))
        elif self._config.targets.names_one_of(names):
            targeted.update((self._embedding, self._head))
        elif not row_ids:
            self.reasons.append("ensure_weight_tying: neither the output head nor the embedding is adapted")
        return True

    def _check_rank(self, name: str, plan: ModulePlan) -> None:
        init, rank = self._config.init, plan.rank or 0
        if init == "orthogonal" and plan.base.kind != "embedding" and rank % 2:
            self.reasons.append(f"{name}: init_lora_weights=orthogonal has even ranks only, not {rank}")
        if init == "mica" and rank > min(plan.base.weight_shape):
            self.reasons.append(f"{name}: init_lora_weights=mica has ranks up to {min(plan.base.weight_shape)}")

    def _check_patterns(self, targeted: Iterable[str]) -> None:
        for key, table in (("rank_pattern", self._ranks), ("alpha_pattern", self._alphas)):
            unmatched = table.unmatched(targeted)
            self.reasons += [f"{key} names {pattern[:200]!r}, which matches no adapted module" for pattern in unmatched]

    def _check_conflicts(self, targeted: set[str], replaced: set[str], row_ids: Mapping[str, object]) -> None:
        if not targeted:
            self.reasons.append("no module of the base is adapted")
        # PEFT has one combination: a tied head that follows the embedding's rows may have a low-rank update, not DoRA's
        follows = self._base.tied and self._embedding in row_ids and self._config.kind != "dora"
        low_rank = targeted - ({self._head} if follows else set())
        for name in sorted(replaced & row_ids.keys()):
            self.reasons.append(f"modules_to_save and trainable_token_indices both replace rows of {name}")
        for name in sorted(low_rank & row_ids.keys()):
            self.reasons.append(f"target_modules and trainable_token_indices both name {name}")
        for name in sorted(targeted & replaced):
            self.reasons.append(f"target_modules and modules_to_save both name {name}")


def expected_shapes(
    config: AdapterConfig, plan: ModulePlan, rows: int
) -> tuple[dict[Role, tuple[int, ...]], frozenset[Role]]:
    """Return the tensors a module must have, with their shapes, and those it may have beside them.

    Args:
        config: The adapter's config.
        plan: What the config demands of it.
        rows: R, as the tensors have it.
    """
    base = plan.base
    shapes: dict[Role, tuple[int, ...]] = {}
    optional: set[Role] = set()
    if plan.targeted:
        shapes |= _low_rank_shapes(config, base, rows)
        optional |= {"base_weight"} if base.kind in ("head", "embedding") else set()
    elif base.kind in ("head", "embedding") and not plan.replaced and not plan.row_ids:
        optional |= {"weight"}
    if plan.replaced:
        shapes["weight"] = base.weight_shape
    if plan.row_ids and not plan.follows:
        shapes["rows"] = (len(plan.row_ids), base.weight_shape[1])
    if plan.bias:
        shapes["base_bias" if plan.targeted else "bias"] = (base.out_features,)
    return shapes, frozenset(optional)


def _low_rank_shapes(config: AdapterConfig, base: BaseModule, rows: int) -> dict[Role, tuple[int, ...]]:
    inner, outer = (rows, base.in_features), (base.out_features, rows)
    if base.kind == "embedding":
        shapes: dict[Role, tuple[int, ...]] = {"embedding_a": inner, "embedding_b": outer}
    else:
        shapes = {"a": inner, "b": outer}
    if config.kind == "adalora":
        shapes["e"] = (rows, 1)
    if config.kind == "dora":
        shapes["magnitude"] = (base.out_features,)
    if config.lora_bias:
        shapes["b_bias"] = (base.out_features,)
    return shapes
