"""Several adapters made one: by their updates, exactly where that is linear, and as PEFT does it where it is not."""

from pathlib import Path

import peft.utils.merge_utils as peft_merge
import pytest
import torch
from lorasrv.merge.adapter_folder import as_peft
from lorasrv.merge.linear import Weighted, linear
from lorasrv.merge.sparsify import dare, ties
from lorasrv.merge.truncate import truncate, truncate_product
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.loader import load_model
from lorasrv_adapters.checkpoint import read_checkpoint, write_checkpoint
from lorasrv_adapters.errors import AdapterIncompatibleError
from lorasrv_adapters.normalize import NormalizedAdapter, NormalizedModule, ReplacedRows
from peft import PeftModel
from served_base import as_served
from tiny_peft import VOCAB_SIZE, save_adapter, save_base
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

KINDS = ("lora", "rslora", "dora", "adalora")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base_folder: Path) -> DecoderModel:
    return load_model(base_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def adapters(
    base_folder: Path, model: DecoderModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, NormalizedAdapter]:
    """One of every kind; those of odd seeds adapt every linear layer, the others three of a layer's seven."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        kind: read_checkpoint(save_adapter(base_folder, folder / kind, kind=kind, rank=4, seed=seed), model.base)
        for seed, kind in enumerate(KINDS)
    }


def change(model: DecoderModel, name: str, module: NormalizedModule) -> Tensor:
    """What a module does to its weight: [O, I] float64."""
    weight = model.base.weight_rows(name, 0, model.base.modules[name].weight_shape[0]).double()
    scaled = weight if module.d is None else module.d.double()[:, None] * weight
    return scaled + module.b.double() @ module.a.double() - weight


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_of_weight_1_comes_back_bit_for_bit(
    adapters: dict[str, NormalizedAdapter], model: DecoderModel, kind: str
) -> None:
    adapter = adapters[kind]
    found = linear([Weighted(adapter=adapter, weight=1.0)], model.base)
    assert found.digest == adapter.digest
    assert found.modules.keys() == adapter.modules.keys()
    for name, module in adapter.modules.items():
        for field in ("a", "b", "d", "bias"):
            one, other = getattr(module, field), getattr(found.modules[name], field)
            assert (one is None and other is None) or torch.equal(one, other), (name, field)


def test_the_sum_does_what_the_adapters_do_together(
    adapters: dict[str, NormalizedAdapter], model: DecoderModel
) -> None:
    weights = (0.7, -0.3, 0.5, 1.25)
    found = linear(
        [Weighted(adapter=adapters[kind], weight=w) for kind, w in zip(KINDS, weights, strict=True)], model.base
    )
    for name, module in found.modules.items():
        parts = [(adapters[kind].modules.get(name), weight) for kind, weight in zip(KINDS, weights, strict=True)]
        expected = sum(weight * change(model, name, part) for part, weight in parts if part is not None)
        # factors and d are rounded to float32
        torch.testing.assert_close(change(model, name, module), expected, rtol=1e-5, atol=1e-6)


def test_rows_and_biases_are_averaged_with_the_base(model: DecoderModel) -> None:
    name = "lm_head"
    own = model.base.weight_rows(name, 0, VOCAB_SIZE)
    whole, some = torch.randn(own.shape), torch.randn(2, own.shape[1])
    ids = torch.tensor([3, 250])
    bias = torch.randn(VOCAB_SIZE)

    def adapter(rows: ReplacedRows, bias: Tensor | None = None) -> NormalizedAdapter:
        module = NormalizedModule(a=torch.empty(0, own.shape[1]), b=torch.empty(VOCAB_SIZE, 0), rows=rows, bias=bias)
        return NormalizedAdapter(digest="0" * 64, kind="lora", base_model="", modules={name: module})

    first, second = adapter(ReplacedRows(values=whole), bias), adapter(ReplacedRows(values=some, ids=ids))
    both = linear([Weighted(adapter=first, weight=0.25), Weighted(adapter=second, weight=0.5)], model.base)
    expected = own + 0.25 * (whole - own)
    expected[ids] += 0.5 * (some - own[ids])
    rows = both.modules[name].rows
    assert rows is not None
    assert rows.ids is None
    torch.testing.assert_close(rows.values, expected)
    torch.testing.assert_close(both.modules[name].bias, 0.25 * bias)
    few = linear([Weighted(adapter=second, weight=0.5), Weighted(adapter=second, weight=0.5)], model.base)
    rows = few.modules[name].rows
    assert rows is not None
    assert rows.ids is not None
    assert rows.ids.tolist() == ids.tolist()
    torch.testing.assert_close(rows.values, some)


def test_scaled_outputs_and_replaced_rows_of_one_module_are_refused(model: DecoderModel) -> None:
    name = "model.layers.0.mlp.down_proj"
    module = model.base.modules[name]
    empty = {"a": torch.empty(0, module.in_features), "b": torch.empty(module.out_features, 0)}
    scaled = NormalizedModule(d=torch.rand(module.out_features), **empty)
    replaced = NormalizedModule(rows=ReplacedRows(values=torch.rand(module.weight_shape)), **empty)
    parts = [
        Weighted(
            adapter=NormalizedAdapter(digest="0" * 64, kind="dora", base_model="", modules={name: one}), weight=0.5
        )
        for one in (scaled, replaced)
    ]
    with pytest.raises(AdapterIncompatibleError, match=name):
        linear(parts, model.base)


def test_ties_are_those_of_peft() -> None:
    torch.manual_seed(0)
    updates, weights = [torch.randn(12, 20) for _ in range(3)], [0.5, 1.0, -0.25]
    expected = peft_merge.ties(updates, torch.tensor(weights), density=0.3)
    torch.testing.assert_close(ties(updates, weights, density=0.3), expected)


def test_ties_of_one_update_in_full_are_that_update() -> None:
    update = torch.randn(5, 7)
    assert torch.equal(ties([update], [1.0], density=1.0), update)


def test_dare_keeps_the_mean_and_nothing_else_decides_what_is_dropped() -> None:
    ones = torch.ones(200, 200)
    found = dare([ones, ones], [0.5, 0.25], density=0.4, seed=1, name="x")
    # each element is 0, 1.25, 0.625 or both: four standard errors of the mean of 40 000
    assert abs(float(found.mean()) - 0.75) < 4 * (0.4 * 0.6 * (1.25**2 + 0.625**2) / 40_000) ** 0.5
    assert set(found.unique().tolist()) == {0.0, 0.625, 1.25, 1.875}
    assert torch.equal(found, dare([ones, ones], [0.5, 0.25], density=0.4, seed=1, name="x"))
    assert not torch.equal(found, dare([ones, ones], [0.5, 0.25], density=0.4, seed=2, name="x"))
    assert not torch.equal(found, dare([ones, ones], [0.5, 0.25], density=0.4, seed=1, name="y"))
    assert torch.equal(dare([ones], [1.0], density=1.0, seed=1, name="x"), ones)


def test_truncated_updates_are_the_nearest_of_their_rank_and_say_what_is_kept() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(6, 30), torch.randn(20, 6)
    sizes = torch.linalg.svdvals(b.double() @ a.double())
    for found in (truncate(b @ a, 4), truncate_product(a, b, 4)):
        assert found.a.shape == (4, 30)
        lost = (b @ a - found.b @ found.a).norm()
        torch.testing.assert_close(float(lost), float(sizes[4:6].norm()), rtol=1e-5, atol=0)
        assert found.energy == pytest.approx(float(sizes[:4].square().sum() / sizes.square().sum()), rel=1e-6)


def test_truncation_drops_no_rank_there_is_and_adds_none() -> None:
    a, b = torch.randn(3, 30), torch.randn(20, 3)
    for found in (truncate(b @ a, 8), truncate_product(a, b, 8)):
        assert len(found.a) == 3
        assert found.energy == pytest.approx(1.0)
        torch.testing.assert_close(found.b @ found.a, b @ a, rtol=1e-5, atol=1e-5)
    assert len(truncate(torch.zeros(4, 5), 2).a) == 0


@pytest.mark.parametrize("kinds", [("lora",), ("dora",), ("adalora",), ("lora", "rslora", "adalora"), KINDS])
def test_the_sum_as_a_folder_is_the_same_to_us_and_to_peft(
    adapters: dict[str, NormalizedAdapter],
    base_folder: Path,
    model: DecoderModel,
    tmp_path: Path,
    kinds: tuple[str, ...],
) -> None:
    found = linear([Weighted(adapter=adapters[kind], weight=1 / len(kinds)) for kind in kinds], model.base)
    write_checkpoint(tmp_path / "sum", *as_peft(found, model.base))
    read = read_checkpoint(tmp_path / "sum", model.base)
    merged = as_served(base_folder, model)
    for name, module in found.modules.items():
        expected = change(model, name, module)
        if name in read.modules:
            # the norm of DoRA is taken in float32, twice
            torch.testing.assert_close(change(model, name, read.modules[name]), expected, rtol=1e-4, atol=2e-6)
        merged.get_submodule(name).weight.data += expected.float()
    theirs = PeftModel.from_pretrained(as_served(base_folder, model), tmp_path / "sum").eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        one, other = theirs(tokens).logits, merged(tokens).logits
    # logits reach 30
    torch.testing.assert_close(one, other, rtol=1e-4, atol=3e-4)


def test_what_an_adapter_cannot_say_is_refused_completely(model: DecoderModel) -> None:
    linear_name, embedding = "model.layers.0.mlp.down_proj", "model.embed_tokens"
    shapes = {name: model.base.modules[name] for name in (linear_name, embedding)}
    modules = {
        linear_name: NormalizedModule(
            a=torch.ones(1, shapes[linear_name].in_features),
            b=torch.ones(shapes[linear_name].out_features, 1),
            d=torch.zeros(shapes[linear_name].out_features),
            bias=torch.ones(shapes[linear_name].out_features),
        ),
        embedding: NormalizedModule(
            a=torch.ones(1, shapes[embedding].in_features), b=torch.ones(shapes[embedding].out_features, 1)
        ),
    }
    adapter = NormalizedAdapter(digest="0" * 64, kind="dora", base_model="", modules=modules)
    with pytest.raises(AdapterIncompatibleError) as refusal:
        as_peft(adapter, model.base)
    assert len(refusal.value.reasons) == 3
