"""The three parsers of untrusted bytes against generated input; `make fuzz` runs the same properties under atheris."""

import json

import config_property
import pattern_property
import pytest
import weights_property
from hypothesis import event, given, settings
from hypothesis import strategies as st
from lorasrv_adapters.keys import HONOURED, INERT, INERT_ADALORA, UNSUPPORTED

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def spoiled(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with a few bytes replaced, removed, doubled, or taken from another seed."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(start + draw(st.integers(0, 8)), len(content))
        donor = draw(st.sampled_from(seeds))
        place = draw(st.integers(0, len(donor)))
        content[start:stop] = draw(
            st.binary(max_size=4) | st.just(bytes(content[start:stop]) * 2) | st.just(donor[place : place + 12])
        )
    return bytes(content)


sizes = st.integers(0, 4) | st.sampled_from([-1, 1 << 40, 1 << 48, 1 << 63, 10**20, True, None, 1.0, "1"])
odd_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "F4", "", None]),
        "shape": st.lists(sizes, max_size=3) | sizes,
        "data_offsets": st.lists(sizes, max_size=3),
    },
    optional={"extra": st.none()},
)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Files whose tensors follow one another, of which some have one field made up."""
    names = st.sampled_from(["a", "b", "c.weight", "__metadata__"]) | st.text(max_size=3)
    header: dict[str, object] = {}
    end = 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype, size = draw(st.sampled_from([("F32", 4), ("F16", 2), ("BF16", 2)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        num_bytes = size
        for length in shape:
            num_bytes *= length
        fields = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + num_bytes]}
        if draw(st.integers(0, 4)) == 0:
            odd = draw(odd_entries)
            fields |= {key: odd[key] for key in draw(st.sets(st.sampled_from(sorted(odd)), max_size=2))}
        else:
            end += num_bytes
        header[name] = fields
    if draw(st.booleans()):
        header["__metadata__"] = draw(
            st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2) | json_values
        )
    content = json.dumps(header, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    return weights_property.pack(content, draw(st.binary(min_size=end, max_size=end)))


@settings(deadline=None, max_examples=400)
@given(spoiled(weights_property.SEEDS) | headers())
def test_weights_files_are_refused_or_read_as_the_library_reads_them(content: bytes) -> None:
    event("read" if weights_property.check_weights_file(content) else "refused")


known_keys = sorted(HONOURED | INERT | INERT_ADALORA | UNSUPPORTED.keys() | {"bias"})
methods = st.sampled_from(["LORA", "ADALORA", "IA3"])
configs = st.builds(
    lambda method, changes, targets: json.dumps({"peft_type": method, "target_modules": targets} | changes).encode(),
    methods,
    st.dictionaries(st.sampled_from(known_keys) | st.text(max_size=4), json_values, max_size=4),
    st.sampled_from(["all-linear", "q|up", ["q_proj"], ["model.layers.0.self_attn.q_proj", ""]]),
)


@settings(deadline=None, max_examples=400)
@given(spoiled(config_property.SEEDS) | configs)
def test_configs_are_refused_or_mean_one_thing(content: bytes) -> None:
    event("read" if config_property.check_config(content) else "refused")


@settings(deadline=None, max_examples=400)
@given(st.lists(st.sampled_from(pattern_property.TOKENS), max_size=6).map("".join) | st.text(max_size=6))
def test_patterns_are_refused_or_read_as_python_reads_them(source: str) -> None:
    event("accepted" if pattern_property.check_pattern(source) else "refused")


@pytest.mark.parametrize("source", pattern_property.TOKENS)
def test_every_piece_of_a_pattern_is_refused_or_read_as_python_reads_it(source: str) -> None:
    for around in ("{}", "({})", "q{}", "{}|a", "a.{}", "[{}]", "(?:{})*", r"\{}"):
        pattern_property.check_pattern(around.replace("{}", source))


@pytest.mark.parametrize(
    ("seeds", "check"),
    [
        pytest.param(weights_property.SEEDS, weights_property.check_weights_file, id="weights"),
        pytest.param(config_property.SEEDS, config_property.check_config, id="config"),
        pytest.param(pattern_property.SEEDS, lambda seed: pattern_property.check_pattern(seed.decode()), id="patterns"),
    ],
)
def test_seeds_are_of_both_kinds(seeds: list[bytes], check) -> None:
    assert {check(seed) for seed in seeds} == {True, False}
