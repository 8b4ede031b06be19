"""Tiny bases with their oracles, and PEFT adapters merged into them."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lorasrv.merge.app import Outcome, merge
from lorasrv.merge.config import MergeConfig
from peft import PeftModel
from peft_options import Option, save_option
from tiny_peft import new_base, save_base
from transformers import PreTrainedModel

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 24}


@dataclass(frozen=True, slots=True)
class Base:
    """A folder, and its model in transformers."""

    folder: Path
    model: PreTrainedModel

    def save_adapter(self, folder: Path, *, kind: str, option: Option) -> Path:
        """Writes a PEFT folder of random weights."""
        save_option(copy.deepcopy(self.model), folder, kind=kind, option=option)
        return folder

    def with_adapter(self, folder: Path) -> PeftModel:
        """The model in transformers with PEFT's adapter on it, unmerged."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(copy.deepcopy(self.model), folder).eval()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Base]:
    """Makes a base of a family, once for the same arguments."""
    made: dict[str, Base] = {}

    def make(family: str = "llama", **options: Any) -> Base:
        key = f"{family} {options}"
        if key not in made:
            sizes = {name: SIZES[name] for name in SIZES if name != "head_dim" or family == "qwen3"} | options
            folder = save_base(tmp_path_factory.mktemp(family), family, **sizes)
            made[key] = Base(folder, new_base(family, **sizes))
        return made[key]

    return make


@pytest.fixture
def merged(tmp_path: Path) -> Callable[..., Outcome]:
    """Merges an adapter into a base, by default into the folder's own weights."""

    def run(base: Path, adapter: Path, **options: Any) -> Outcome:
        values: dict[str, Any] = {"weights": "original", "out": tmp_path / "merged", **options}
        return merge(MergeConfig(base=str(base), adapters=((str(adapter), 1.0),), **values))

    return run
