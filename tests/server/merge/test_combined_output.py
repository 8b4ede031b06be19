"""Several adapters merged at once, into a model or into one more adapter, against what each of them does alone."""

import json

import peft.utils.merge_utils as peft_merge
import pytest
import torch
from lorasrv.errors import ConfigError, MergeError
from lorasrv.merge.app import merge
from lorasrv.merge.config import MergeConfig
from lorasrv_adapters.provenance import PROVENANCE_NAME
from peft_options import OPTIONS, Option
from safetensors.torch import load_file

ALL_LINEAR = Option(config={"target_modules": "all-linear"})
WEIGHTS = {"lora": 0.7, "dora": 0.5, "adalora": -0.4}
# fp32; the weights are below 4, three products of rank 40 at most are added in another order
TOLERANCE = 2e-5


@pytest.fixture
def adapters(base, tmp_path):
    llama = base()
    return {kind: llama.save_adapter(tmp_path / kind, kind=kind, option=ALL_LINEAR) for kind in WEIGHTS}


@pytest.fixture
def combined(base, tmp_path):
    def run(weighted, name="combined", **options):
        pairs = tuple((str(folder), weight) for folder, weight in weighted)
        return merge(MergeConfig(base=str(base().folder), adapters=pairs, out=tmp_path / name, **options))

    return run


def state(outcome):
    return load_file(outcome.folder / "model.safetensors")


@pytest.fixture
def alone(adapters, combined):
    """The weights of the base, and of each adapter merged alone with weight 1."""
    nothing = {**state(combined([(adapters["lora"], 1e-30)], "nothing"))}
    return nothing, {kind: state(combined([(folder, 1.0)], f"only-{kind}")) for kind, folder in adapters.items()}


def test_the_sum_is_that_of_the_updates(adapters, combined, alone):
    found = state(combined([(adapters[kind], weight) for kind, weight in WEIGHTS.items()]))
    nothing, others = alone
    for name, weight in found.items():
        expected = nothing[name] + sum(w * (others[kind][name] - nothing[name]) for kind, w in WEIGHTS.items())
        assert (weight - expected).abs().max() < TOLERANCE, name


@pytest.mark.parametrize("kind", WEIGHTS)
def test_an_adapter_of_weight_1_beside_none_is_itself(adapters, combined, alone, kind):
    found = combined([(adapters[kind], 1.0)], "one", output="adapter")
    assert {figures["energy"] for figures in found.record["modules"]} == {1.0}
    _, others = alone
    for name, weight in state(combined([(found.folder, 1.0)], "again")).items():
        assert (weight - others[kind][name]).abs().max() < TOLERANCE, name


def test_an_adapter_of_the_sum_merges_into_the_same_model(adapters, combined):
    weighted = [(adapters[kind], weight) for kind, weight in WEIGHTS.items()]
    adapter = combined(weighted, "sum", output="adapter")
    assert adapter.record["kind"] == "dora"
    model = state(combined(weighted, "model"))
    for name, weight in state(combined([(adapter.folder, 1.0)], "again")).items():
        assert (weight - model[name]).abs().max() < TOLERANCE, name


def test_ties_of_whole_updates_are_those_of_peft(adapters, combined, alone):
    found = state(combined([(adapters[kind], w) for kind, w in WEIGHTS.items()], combine="ties", density=0.3))
    nothing, others = alone
    changed = 0
    for name, weight in found.items():
        if "proj" in name:
            updates = [others[kind][name] - nothing[name] for kind in WEIGHTS]
            expected = nothing[name] + peft_merge.ties(updates, torch.tensor([*WEIGHTS.values()]), density=0.3)
            # where two elements at the edge are equal but for rounding, another one may stay
            differs = (weight - expected).abs() > TOLERANCE
            assert differs.sum() <= 2, name
            changed += 1
        else:
            assert torch.equal(weight, nothing[name])
    assert changed == 14


def test_what_dare_drops_is_the_seeds_choice_alone(adapters, combined):
    weighted = [(adapters["lora"], 0.5), (adapters["dora"], 0.5)]
    one, same, other = (
        state(combined(weighted, name, combine="dare", seed=seed))["model.layers.1.mlp.up_proj.weight"]
        for name, seed in (("one", 3), ("same", 3), ("other", 4))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_svd_comes_down_to_the_rank_and_says_what_that_keeps(adapters, combined, alone):
    found = combined([(adapters["lora"], 0.5), (adapters["adalora"], 0.5)], combine="svd", rank=3, output="adapter")
    nothing, others = alone
    update = load_file(found.folder / "adapter_model.safetensors")
    for figures in found.record["modules"]:
        name = f"{figures['module']}.weight"
        whole = sum(0.5 * (others[kind][name] - nothing[name]) for kind in ("lora", "adalora")).double()
        sizes = torch.linalg.svdvals(whole).square()
        assert figures["rank"] == 3
        assert figures["energy"] == pytest.approx(float(sizes[:3].sum() / sizes.sum()), abs=1e-5)
        a, b = (update[f"base_model.model.{figures['module']}.lora_{factor}.weight"] for factor in "AB")
        lost = (whole - b.double() @ a.double()).square().sum()
        assert float(lost / sizes.sum()) == pytest.approx(1 - figures["energy"], abs=1e-5)


def test_a_sparse_adapter_of_full_rank_is_the_sparse_model(adapters, combined):
    weighted = [(adapters[kind], weight) for kind, weight in WEIGHTS.items()]
    options = {"combine": "dare", "density": 0.5}
    adapter = combined(weighted, "adapter", output="adapter", rank=64, **options)
    model = state(combined(weighted, "model", **options))
    for name, weight in state(combined([(adapter.folder, 1.0)], "again")).items():
        # singular vectors are rounded to float32
        assert (weight - model[name]).abs().max() < 5 * TOLERANCE, name
    lower = combined(weighted, "lower", output="adapter", rank=5, **options)
    assert all(figures["rank"] == 5 and 0.1 < figures["energy"] < 0.9 for figures in lower.record["modules"])


def test_a_new_adapter_says_where_it_comes_from(base, adapters, combined):
    found = combined([(adapters["lora"], 0.5), (adapters["dora"], 0.25)], output="adapter", dtype="bfloat16")
    written = json.loads((found.folder / PROVENANCE_NAME).read_text())
    assert written["base_digest"] == found.record["base_digest"]
    assert [(one["kind"], one["weight"]) for one in written["merge"]["adapters"]] == [("lora", 0.5), ("dora", 0.25)]
    assert str(base().folder) not in json.dumps(written)
    tensors = load_file(found.folder / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if ".lora_A" in name} == {torch.bfloat16}
    assert all(figures["error"] < 0.01 for figures in found.record["modules"])


def test_what_no_adapter_can_say_leaves_nothing(base, combined, tmp_path):
    adapter = base().save_adapter(tmp_path / "head", kind="lora", option=OPTIONS["saved-some-norms"])
    with pytest.raises(Exception, match="write a model instead"):
        combined([(adapter, 1.0)], output="adapter")
    assert not [path for path in tmp_path.iterdir() if "combined" in path.name]


def test_adapters_for_different_weights_of_a_base_are_refused(adapters, combined):
    (adapters["lora"] / PROVENANCE_NAME).write_text(json.dumps({"base_quantization": "none"}))
    with pytest.raises(MergeError, match="lora: trained on the original weights"):
        combined([(adapters["lora"], 1.0), (adapters["dora"], 1.0)])


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"combine": "svd"}, 1),
        ({"combine": "ties", "output": "adapter"}, 1),
        ({"rank": 8}, 1),
        ({"output": "adapter", "quantize": "nf4", "weights": "original"}, 2),
        ({"density": 0.0, "rank": 0, "combine": "svd"}, 2),
    ],
)
def test_settings_that_do_not_go_together_are_all_named(tmp_path, options, count):
    with pytest.raises(ConfigError) as refusal:
        MergeConfig(adapters=(("a", 1.0),), out=tmp_path / "x", **options)
    assert len(refusal.value.reasons) == count
