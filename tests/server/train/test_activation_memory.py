"""What a forward and a backward pass hold beyond weights and gradients, against PEFT in a plain loop."""

from pathlib import Path

import pytest
import torch
from allocated import peak_bytes
from lorasrv.model.loader import load_model
from lorasrv.train.adapter import TrainableAdapter
from lorasrv.train.config import JobConfig
from lorasrv.train.job import adapter_config
from lorasrv.train.network import TokenBatch, TrainableModel
from lorasrv_adapters.checkpoint import write_checkpoint
from peft import PeftModel
from served_base import as_served
from tiny_peft import save_base

# PEFT asks transformers in the words of its version 4
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTH, SEQUENCES = 128, 4


@pytest.mark.parametrize(("checkpoint_layers", "most"), [(True, 0.4), (False, 0.7)])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peak_with_chunked_loss(tmp_path: Path, method: str, checkpoint_layers: bool, most: float) -> None:
    (tmp_path / "base").mkdir()
    base_folder = save_base(tmp_path / "base", num_hidden_layers=8)
    model = load_model(base_folder, dtype=torch.float32)
    job = JobConfig(out=Path("/none"), data=(Path("/none"),), method=method, rank=4)
    adapter = TrainableAdapter(adapter_config(job, base_name="base", max_steps=1), model.base, seed=0)
    network = TrainableModel(model, checkpoint_layers=checkpoint_layers)
    write_checkpoint(tmp_path / "adapter", *adapter.checkpoint({}))
    oracle = PeftModel.from_pretrained(as_served(base_folder, model), tmp_path / "adapter", is_trainable=True).train()
    tokens = torch.randint(model.config.vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(
        token_ids=tokens.flatten(),
        targets=tokens.roll(-1, dims=1).flatten(),
        weights=(torch.arange(LENGTH) < LENGTH - 1).float().repeat(SEQUENCES),
        lengths=(LENGTH,) * SEQUENCES,
        segments=(LENGTH * SEQUENCES,),
    )
    ours = peak_bytes(lambda: network.losses(batch, [adapter]).sum().backward())
    theirs = peak_bytes(lambda: oracle(input_ids=tokens, labels=tokens).loss.backward())
    assert 0 < ours <= most * theirs, ours / theirs
