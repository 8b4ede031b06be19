"""The embedded base and its adapters: what the package carries is what the README says of it."""

import json

import pytest
import torch
from lorasrv.embedded import embedded_adapter_root, embedded_adapters, embedded_base
from lorasrv.model.loader import load_model
from lorasrv_adapters.checkpoint import read_checkpoint

KINDS = {"devils_dictionary": "adalora", "federalist": "rslora", "shakespeare": "lora", "whitman": "dora"}


def test_the_package_stays_small() -> None:
    base = sum(path.stat().st_size for path in embedded_base().iterdir())
    adapters = sum(path.stat().st_size for path in embedded_adapter_root().rglob("*") if path.is_file())
    assert base <= 12_000_000
    assert adapters <= 1_500_000


def test_every_adapter_would_be_served() -> None:
    base = load_model(embedded_base(), dtype=torch.bfloat16, device="cpu").base
    adapters = {name: read_checkpoint(folder, base) for name, folder in embedded_adapters().items()}
    assert {name: adapter.kind for name, adapter in adapters.items()} == KINDS
    for name, folder in embedded_adapters().items():
        provenance = json.loads((folder / "provenance.json").read_text())
        assert (provenance["method"], provenance["base_digest"]) == (KINDS[name], base.digest)
    ranks = set(adapters["devils_dictionary"].ranks.values())
    assert len(ranks) > 1
    assert max(ranks) <= 8


def test_the_base_writes_english() -> None:
    training = json.loads((embedded_base() / "training.json").read_text())
    assert training["held_out_bits_per_byte"] <= 1.62


@pytest.mark.parametrize("adapter_id", KINDS)
def test_each_adapter_is_best_on_its_own_style(adapter_id: str) -> None:
    rows = json.loads((embedded_base().parent / "voices.json").read_text())["rows"]
    own = rows[adapter_id][adapter_id]
    assert own <= rows["base"][adapter_id] - 0.1
    assert own == min(row[adapter_id] for row in rows.values())
    assert rows["base"]["base"] == min(row["base"] for row in rows.values())
