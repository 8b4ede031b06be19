"""A tiny base, loaded as it is served and as transformers has it, with the same weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.loader import load_model
from tiny_peft import save_base


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return folder


@pytest.fixture
def load_base(base_folder: Path) -> Callable[[], DecoderModel]:
    return lambda: load_model(base_folder, dtype=torch.float32)
