"""Every key of adapter_config.json is honoured, known to change nothing, or refused by name."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lorasrv_adapters.config import AdapterConfig, parse_adapter_config
from lorasrv_adapters.errors import AdapterCorruptError, AdapterIncompatibleError
from lorasrv_adapters.keys import OFF_WHEN_EMPTY, UNSUPPORTED

LORA = {"peft_type": "LORA", "target_modules": ["q_proj"]}
ADALORA = {"peft_type": "ADALORA", "target_modules": ["q_proj"], "init_r": 2, "total_step": 10}

REFUSED = {
    "layer_replication": [[0, 2]],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "target_parameters": ["experts.weight"],
    "kasa_config": {"beta": 1},
    "arrow_config": {"top_k": 3},
    "monteclora_config": {"num": 2},
    "alora_invocation_tokens": [1, 2],
    "velora_config": {"num_groups": 2},
    "megatron_config": {"x": 1},
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"x": 1},
    "lora_ga_config": {"x": 1},
    "init_lora_weights": "pissa",
    "some_future_key": 7,
    "zero_is_alive": 0,
}
INITS = ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", 3]
INERT = {
    "lora_dropout": 0.1,
    "fan_in_fan_out": True,
    "task_type": "CAUSAL_LM",
    "inference_mode": False,
    "revision": "main",
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "os"},
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "eva_config": {"rho": 2},
    "peft_version": "0.21.2",
    "bias": "none",
    "unknown_but_off": False,
    "unknown_but_null": None,
    "unknown_but_empty": {},
}


def reasons(config: dict[str, object]) -> tuple[str, ...]:
    with pytest.raises(AdapterIncompatibleError) as caught:
        parse_adapter_config(config)
    return caught.value.reasons


@pytest.mark.parametrize("key", REFUSED)
def test_live_keys_without_support_are_refused_by_name(key: str) -> None:
    (reason,) = reasons(LORA | {key: REFUSED[key]})
    assert key in reason


def test_every_unsupported_key_has_its_row_above() -> None:
    assert UNSUPPORTED.keys() <= REFUSED.keys()


def test_all_reasons_come_at_once() -> None:
    assert {reason.split("=")[0] for reason in reasons(LORA | REFUSED)} == {
        f"adapter_config.json: {key}" for key in REFUSED
    }


@pytest.mark.parametrize("init", INITS)
def test_initializations_that_change_the_base_are_refused(init: object) -> None:
    (reason,) = reasons(LORA | {"init_lora_weights": init})
    assert "init_lora_weights" in reason


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "mica", "orthogonal"])
def test_initializations_that_leave_the_base_alone_are_accepted(init: object) -> None:
    parse_adapter_config(LORA | {"init_lora_weights": init})


def test_inert_keys_change_nothing() -> None:
    assert parse_adapter_config(LORA | INERT) == parse_adapter_config(LORA)


def test_off_switches_of_unsupported_features_change_nothing() -> None:
    empty = dict(zip(sorted(OFF_WHEN_EMPTY), [False, {}, [], {}, False], strict=True))
    off: dict[str, object] = dict.fromkeys(UNSUPPORTED) | empty
    assert parse_adapter_config(LORA | off) == parse_adapter_config(LORA)


@pytest.mark.parametrize("key", sorted(UNSUPPORTED.keys() - OFF_WHEN_EMPTY))
@pytest.mark.parametrize("value", [False, {}, [], ""])
def test_features_that_an_empty_value_switches_on_in_peft_are_refused(key: str, value: object) -> None:
    (reason,) = reasons(LORA | {key: value})
    assert key in reason


PEFT_REFUSES = [
    {"task_type": "OTHER"},
    {"lora_dropout": 1.5},
    {"lora_dropout": None},
    {"eva_config": []},
    {"rank_pattern": None},
    {"alpha_pattern": None},
    {"trainable_token_indices": []},
    {"init_lora_weights": "mica", "use_dora": True},
    {"lora_bias": True, "init_lora_weights": None},
]
SCHEDULES = [
    {"total_step": None},
    {"total_step": 0},
    {"total_step": 10, "tinit": 4, "tfinal": 6},
    {"tinit": "1"},
    {"tfinal": None},
    {"orth_reg_weight": -1},
]


@pytest.mark.parametrize(
    ("start", "change"), [*((LORA, change) for change in PEFT_REFUSES), *((ADALORA, change) for change in SCHEDULES)]
)
def test_inert_values_with_which_peft_loads_nothing_are_refused(
    start: dict[str, object], change: dict[str, object]
) -> None:
    (reason,) = reasons(start | change)
    assert next(iter(change)) in reason


@pytest.mark.parametrize("change", [{"use_dora": True}, {"init_lora_weights": "gaussian"}])
def test_a_bias_on_b_is_refused_where_peft_refuses_it(change: dict[str, object]) -> None:
    parse_adapter_config(LORA | {"lora_bias": True})
    assert any("lora_bias=" in reason for reason in reasons(LORA | {"lora_bias": True} | change))


def test_trained_rows_of_the_embedding_need_no_name() -> None:
    assert parse_adapter_config(LORA | {"trainable_token_indices": [7, 2]}).token_ids == (("", (7, 2)),)
    named = {"embed_tokens": [7, 2], "lm_head": [1]}
    config = parse_adapter_config(LORA | {"trainable_token_indices": named})
    assert config.token_ids == (("embed_tokens", (7, 2)), ("lm_head", (1,)))


def test_peft_defaults_hold() -> None:
    config = parse_adapter_config(LORA)
    assert (config.kind, config.rank, config.alpha) == ("lora", 8, 8.0)
    config = parse_adapter_config({"peft_type": "ADALORA", "target_modules": ["q_proj"], "total_step": 10})
    assert (config.kind, config.rank, config.alpha) == ("adalora", 12, 8.0)


@pytest.mark.parametrize("method", [None, "IA3", "lora", "LOHA", 3, ["LORA"]])
def test_other_methods_are_refused(method: object) -> None:
    (reason,) = reasons({"peft_type": method, "target_modules": ["q_proj"]})
    assert "peft_type" in reason


INVALID = {
    "r": [0, -1, 1.5, "8", True, 1 << 40, None],
    "lora_alpha": ["16", True, [1], 0, 10**400],
    "use_dora": [1, "yes"],
    "use_rslora": [1, "yes"],
    "rank_pattern": [[1], {"q": 0}, {"q": "3"}, {"q": True}, {"(": 3}, {r"(?=q)": 3}, {"[[:alpha:]]": 3}],
    "alpha_pattern": [[1], {"q": "3"}, {"q": 0}, {"a" * 2000: 1}],
    "target_modules": [None, [], "", 3, [3], "(", r"(q)\1"],
    "exclude_modules": [3, "("],
    "layers_to_transform": [-1, "0", [0.5], True],
    "layers_pattern": ["layers"],
    "base_model_name_or_path": [3, "x" * 5000],
    "init_r": [4],
    "bias": ["some", True, ["all"]],
    "lora_bias": [1, "yes"],
    "modules_to_save": ["lm_head", 3, [3], [""], ["("], [r"(?=q)"]],
    "trainable_token_indices": [3.5, [-1], ["1"], [True], [1, 1], {"lm_head": []}, {"lm_head": 3}, {"lm_head": [2, 2]}],
    "ensure_weight_tying": [1, "yes"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in INVALID.items() for value in values])
def test_values_out_of_range_are_refused_by_name(key: str, value: object) -> None:
    assert any(f"{key}=" in reason for reason in reasons(LORA | {key: value}))


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 0},
        {"lora_alpha": -4},
        {"use_dora": True},
        {"use_rslora": True},
        {"alpha_pattern": {"q": 2}},
        {"lora_bias": True},
        {"rank_pattern": {"model.q_proj.lora_E": [1, 0]}},
        {"rank_pattern": {"model.q_proj.lora_E": [True]}},
        {"rank_pattern": {"model.q_proj": [True, False]}},
        {"rank_pattern": {"model.q_proj.lora_E": 1}},
    ],
)
def test_adalora_values_out_of_range_are_refused_by_name(change: dict[str, object]) -> None:
    (key,) = change
    assert any(f"{key}=" in reason for reason in reasons(ADALORA | change))


def test_adalora_ignores_r_and_its_schedule() -> None:
    schedule = {"r": "anything", "tinit": 3, "tfinal": 4, "deltaT": 5, "beta1": 0.1, "total_step": 100, "target_r": 1}
    assert parse_adapter_config(ADALORA | schedule) == parse_adapter_config(ADALORA)


def test_a_lora_with_a_schedule_is_refused() -> None:
    assert any("total_step" in reason for reason in reasons(LORA | {"total_step": 100}))


def test_adalora_masks_lose_the_adapter_name() -> None:
    config = parse_adapter_config(
        ADALORA | {"rank_pattern": {"a.lora_E": [True, False], "b.lora_E.default": [False, False]}}
    )
    assert config.masks == {"a": (True, False), "b": (False, False)}


def digest_text(**change: object) -> bytes:
    return parse_adapter_config(LORA | change).canonical()


def test_the_canonical_form_changes_with_the_result_and_with_nothing_else() -> None:
    plain = digest_text(r=4, lora_alpha=16)
    assert digest_text(r=4, lora_alpha=16.0, lora_dropout=0.5, base_model_name_or_path="x") == plain
    different = [
        digest_text(r=4, lora_alpha=17),
        digest_text(r=5, lora_alpha=16),
        digest_text(r=4, lora_alpha=16, use_rslora=True),
        digest_text(r=4, lora_alpha=16, use_dora=True),
        digest_text(r=4, lora_alpha=16, use_dora=True, use_rslora=True),
        digest_text(r=4, lora_alpha=16, rank_pattern={"a": 1, "b": 2}),
        digest_text(r=4, lora_alpha=16, rank_pattern={"b": 2, "a": 1}),
        digest_text(r=4, lora_alpha=16, alpha_pattern={"a": 1}),
        digest_text(r=4, lora_alpha=16, trainable_token_indices=[1, 2]),
        digest_text(r=4, lora_alpha=16, trainable_token_indices=[2, 1]),
        digest_text(r=4, lora_alpha=16, trainable_token_indices={"lm_head": [1, 2]}),
    ]
    assert len({plain, *different}) == len(different) + 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1]",
        b"{",
        b"\xff",
        b'{"r": NaN}',
        b'{"r": 1, "r": 2}',
        b"[" * 100_000,
        b'{"a":' * 20 + b"1" + b"}" * 20,
        b'{"a": "' + b"x" * (1 << 20) + b'"}',
    ],
)
def test_bytes_that_are_no_bounded_json_object_are_corrupt(content: bytes) -> None:
    with pytest.raises(AdapterCorruptError, match=r"adapter_config\.json"):
        parse_adapter_config(content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*LORA, *ADALORA, *REFUSED, *INVALID]) | st.text(), json_values))
def test_any_object_is_parsed_or_refused(changes: dict[str, object]) -> None:
    for start in (LORA, ADALORA):
        try:
            config = parse_adapter_config(json.dumps(start | changes).encode())
        except (AdapterIncompatibleError, AdapterCorruptError):
            continue
        assert isinstance(config, AdapterConfig)
        assert config.canonical()
