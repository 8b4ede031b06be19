"""An adapter that records the base it was trained on is served on that base alone."""

from pathlib import Path

import pytest
import torch
from lorasrv_adapters.checkpoint import read_checkpoint, write_checkpoint
from lorasrv_adapters.errors import AdapterCorruptError, AdapterIncompatibleError
from lorasrv_adapters.provenance import read_provenance


def test_what_was_written_is_read_and_compared(tmp_path: Path, base, lora_config, lora_tensors) -> None:
    record = {"base_digest": base.digest, "seed": 3}
    write_checkpoint(tmp_path / "a", lora_config, lora_tensors, provenance=record)
    assert read_provenance(tmp_path / "a") == record
    digest = read_checkpoint(tmp_path / "a", base).digest
    base.digest = "1" * 64
    with pytest.raises(AdapterIncompatibleError, match=r"provenance\.json: .* digest 000000000000; this one has 1111"):
        read_checkpoint(tmp_path / "a", base)
    write_checkpoint(tmp_path / "b", lora_config, lora_tensors)
    assert read_provenance(tmp_path / "b") == {}
    assert read_checkpoint(tmp_path / "b", base).digest == digest


def test_another_base_comes_with_the_other_reasons(tmp_path: Path, base, lora_config, lora_tensors) -> None:
    name = next(iter(lora_tensors))
    lora_tensors[name] = torch.full_like(lora_tensors[name], torch.nan)
    write_checkpoint(tmp_path / "a", lora_config, lora_tensors, provenance={"base_digest": "2" * 64})
    with pytest.raises(AdapterIncompatibleError) as caught:
        read_checkpoint(tmp_path / "a", base)
    assert len(caught.value.reasons) == 2


@pytest.mark.parametrize("content", [b"", b"[]", b'{"base_digest": 3}', b'{"base_digest": "abc"}', b"x" * (2 << 20)])
def test_a_damaged_record_is_refused(tmp_path: Path, base, lora_config, lora_tensors, content: bytes) -> None:
    write_checkpoint(tmp_path / "a", lora_config, lora_tensors)
    (tmp_path / "a" / "provenance.json").write_bytes(content)
    with pytest.raises(AdapterCorruptError, match=r"provenance\.json"):
        read_checkpoint(tmp_path / "a", base)


def test_a_link_is_refused(tmp_path: Path, base, lora_config, lora_tensors) -> None:
    write_checkpoint(tmp_path / "a", lora_config, lora_tensors)
    (tmp_path / "a" / "provenance.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterCorruptError, match="symbolic link"):
        read_checkpoint(tmp_path / "a", base)
