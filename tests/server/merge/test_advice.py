"""What people are told about a merge, and the page that shows it."""

from typing import Any

import pytest
from lorasrv.merge.advice import advice
from lorasrv.merge.report import render_report

VERIFICATION = {
    "tokens": 80,
    "max_difference": 0.04,
    "deviation": 2.7,
    "kl": 8e-6,
    "max_kl": 7e-5,
    "agreement": 1.0,
    "effect": 0.9,
    "relative_difference": 0.015,
    "lost": 9e-6,
    "tolerance": {"measure": "relative_difference", "limit": 0.15},
    "holds": True,
}
MODULE = {"module": "model.layers.0.mlp.up_proj", "size": 0.2, "kept": 1.0, "error": 0.01, "rounded": False}
RECORD: dict[str, Any] = {
    "base": "<org>/base",
    "base_digest": "a" * 64,
    "weights": "dequantized",
    "adapters": [{"digest": "b" * 64, "kind": "dora", "weight": 0.7}],
    "dtype": "bfloat16",
    "quantize": "none",
    "untied": False,
    "num_bytes": 10**6,
    "modules": [MODULE],
    "verification": VERIFICATION,
}


def test_a_good_merge_needs_one_sentence():
    (line,) = advice(RECORD)
    assert line.startswith("verified at 80 positions: logits differ by at most 0.04 ")
    assert line.endswith("same greedy token at 100.0 %")


def test_small_updates_in_16_bits_are_warned_of():
    lines = list(advice({**RECORD, "modules": [MODULE, {**MODULE, "module": "lm_head", "rounded": True}]}))
    assert len(lines) == 2
    assert lines[1].startswith("warning: in 1 of 2 weights, lm_head among them")
    assert "--dtype float32" in lines[1]


def test_4_bits_are_set_against_the_unmerged_adapter():
    forced = {**VERIFICATION, "holds": False, "lost": 0.97}
    lines = list(advice({**RECORD, "quantize": "nf4", "verification": forced}))
    assert "beyond the tolerance of 0.15; it was written by --force" in lines[1]
    assert lines[2].startswith("4 bits lose 97.0 % of what the adapter does; the NF4 base with the adapter unmerged")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"modules": []},
        {"modules": [{**MODULE, "module": "lm_head", "size": 0.0, "error": 0.0}]},
        {"modules": [{**MODULE, "size": float("inf")}, {**MODULE, "module": "model.norm"}]},
        {"verification": {**VERIFICATION, "kl": 0.0, "effect": 0.0, "lost": 0.0}},
        {"untied": True, "quantize": "nf4"},
    ],
    ids=str,
)
def test_the_page_shows_every_module_and_stands_alone(changes):
    record = {**RECORD, **changes}
    page = render_report(record)
    assert page.startswith("<!doctype html>")
    assert "&lt;org&gt;/base" in page
    assert "weight 0.7" in page
    assert ("layer 0" in page) == any("layers.0" in one["module"] for one in record["modules"])
    assert all(one["module"] in page for one in record["modules"] if "layers" not in one["module"])
    assert all(word not in page for word in ("http", "src=", "nan"))
