"""One base and eight adapters for all end-to-end tests."""

from pathlib import Path

import pytest
from tiny_peft import save_adapter, save_base


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with grouped heads, and a byte-level tokenizer."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter_folders(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight adapters: two of each kind, ranks from 2 to 24, on all linear layers or on some."""
    root = tmp_path_factory.mktemp("adapters")
    kinds = ["lora", "rslora", "dora", "adalora"]
    ranks = [8, 3, 16, 5, 24, 2, 12, 7]
    return {
        f"{kinds[i % 4]}-{i}": save_adapter(base_folder, root / str(i), kind=kinds[i % 4], rank=ranks[i], seed=i)
        for i in range(8)
    }
