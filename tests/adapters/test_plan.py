"""What a config demands of a base, and every way in which the two cannot go together."""

import pytest
import torch
from lorasrv_adapters.config import parse_adapter_config
from lorasrv_adapters.plan import make_plan

Q, V, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj"
EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
LORA = {"peft_type": "LORA", "target_modules": ["layers.0.self_attn.q_proj"], "r": 4}
ADALORA = {"peft_type": "ADALORA", "total_step": 10, "target_modules": ["layers.0.self_attn.q_proj"]}

REFUSED = {
    "target_modules matches model.norm, which": {"target_modules": [Q, "norm"]},
    "target_modules matches model.layers.0.mlp, which": {"target_modules": [Q, "mlp"]},
    "target_modules matches model.embed_tokens, which": {"target_modules": [Q, "embed_tokens"], "lora_bias": True},
    "no module of the base is adapted": {"target_modules": ["k_proj"]},
    "exclude_modules names no module": {"exclude_modules": ["k_proj"]},
    "rank_pattern names 'v_proj', which matches no adapted": {"rank_pattern": {"v_proj": 3}},
    "alpha_pattern names 'lm_head', which matches no adapted": {"alpha_pattern": {"lm_head": 3}},
    "modules_to_save names 'score', which is no module": {"modules_to_save": ["score"]},
    "modules_to_save names model.layers.0.mlp.down_proj; only": {"modules_to_save": ["down_proj"]},
    "modules_to_save names model.layers.0.mlp; only": {"modules_to_save": ["mlp"]},
    "target_modules and modules_to_save both name lm_head": {
        "modules_to_save": ["head"],
        "target_modules": [Q, "lm_head"],
    },
    "neither the embedding nor the output head": {"trainable_token_indices": {"q_proj": [1]}},
    "id 50 of model.embed_tokens is beyond its 50 rows": {"trainable_token_indices": [3, 50]},
    "trainable_token_indices names lm_head twice": {"trainable_token_indices": {"lm_head": [1], "head": [2]}},
    "both replace rows of lm_head": {"trainable_token_indices": {"lm_head": [1]}, "modules_to_save": ["lm_head"]},
    "trainable_token_indices both name model.embed_tokens": {
        "trainable_token_indices": [1],
        "target_modules": [Q, "embed_tokens"],
    },
    "init_lora_weights=orthogonal has even ranks only, not 3": {"init_lora_weights": "orthogonal", "r": 3},
    "init_lora_weights=mica has ranks up to": {"init_lora_weights": "mica", "r": 40},
    "does not tie its output head": {"ensure_weight_tying": True, "modules_to_save": ["lm_head"]},
}
REFUSED_TIED = {
    "neither the output head nor the embedding is adapted": {"ensure_weight_tying": True},
    "trainable_token_indices has different ids for each": {
        "ensure_weight_tying": True,
        "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]},
    },
    "both replace rows of lm_head": {"trainable_token_indices": [1], "modules_to_save": ["lm_head"]},
    "trainable_token_indices both name lm_head": {
        "trainable_token_indices": [1],
        "target_modules": [Q, "lm_head"],
        "use_dora": True,
    },
}


def reasons(base, config: dict[str, object]) -> list[str]:
    return make_plan(parse_adapter_config(config), base)[1]


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_fit_the_base_is_a_reason(reason: str, base) -> None:
    assert any(reason in found for found in reasons(base, LORA | REFUSED[reason])), reasons(
        base, LORA | REFUSED[reason]
    )


@pytest.mark.parametrize("reason", REFUSED_TIED)
def test_what_does_not_fit_a_tied_base_is_a_reason(reason: str, base) -> None:
    base.tied = True
    assert any(reason in found for found in reasons(base, LORA | REFUSED_TIED[reason]))


def test_adalora_adapts_no_embedding(base) -> None:
    (reason,) = reasons(base, ADALORA | {"target_modules": [Q, "embed_tokens"]})
    assert "target_modules matches model.embed_tokens" in reason


def test_a_plan_has_the_modules_that_the_adapter_touches_in_the_bases_order(base) -> None:
    more = {"bias": "all", "modules_to_save": ["norm"], "trainable_token_indices": {"lm_head": [7, 2]}}
    plans, found = make_plan(parse_adapter_config(LORA | more), base)
    assert found == []
    assert list(plans) == [Q, V, HEAD, "model.layers.0.input_layernorm", NORM]
    assert (plans[Q].rank, plans[Q].bias, plans[V].rank, plans[V].bias) == (4, True, None, True)
    assert plans[HEAD].row_ids == (7, 2)
    assert plans[NORM].replaced


def test_biases_of_targets_alone(base) -> None:
    plans, _ = make_plan(parse_adapter_config(LORA | {"bias": "lora_only"}), base)
    assert [name for name, plan in plans.items() if plan.bias] == [Q]


@pytest.mark.parametrize(
    ("change", "follows"),
    [
        ({"trainable_token_indices": [3, 1]}, True),
        ({"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [3, 1]}}, True),
        ({"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [1]}}, False),
        ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": [Q, "lm_head"], "ensure_weight_tying": True}, True),
        ({"target_modules": r".*q_proj|model\.embed_tokens", "ensure_weight_tying": True}, False),
        ({"target_modules": r".*(q_proj|embed_tokens)", "ensure_weight_tying": True}, True),
    ],
)
def test_a_tied_head_follows_the_embedding_as_in_peft(change: dict[str, object], follows: bool, base) -> None:
    base.tied = True
    plans, found = make_plan(parse_adapter_config(LORA | change), base)
    if "target_modules" in change and not follows:
        assert any("ensure_weight_tying" in reason for reason in found)
        return
    assert found == []
    assert plans[HEAD].follows == (EMBEDDING if follows else "")
    assert plans[EMBEDDING].targeted == plans[HEAD].targeted
    assert plans[EMBEDDING].replaced == plans[HEAD].replaced


def test_an_untied_head_is_left_alone(base) -> None:
    plans, found = make_plan(parse_adapter_config(LORA | {"trainable_token_indices": [3, 1]}), base)
    assert found == []
    assert HEAD not in plans
    assert torch.is_tensor(plans[Q].base.bias)
