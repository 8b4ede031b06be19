"""What is packed into one batch stays apart: losses and gradients of a sample are those it has alone."""

from array import array
from pathlib import Path

import pytest
import torch
from lorasrv.model.loader import load_model
from lorasrv.train.adapter import TrainableAdapter
from lorasrv.train.batches import Share, token_batches
from lorasrv.train.config import JobConfig
from lorasrv.train.data.examples import Example
from lorasrv.train.job import adapter_config
from lorasrv.train.network import TrainableModel
from tiny_peft import save_base
from torch import Tensor

# beyond Mistral's window of 40 positions too
LENGTHS = (50, 7, 45)


@pytest.fixture(params=["llama", "mistral"])
def network(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[TrainableModel, TrainableAdapter]:
    """A model, and an adapter that changes everything in it."""
    model = load_model(save_base(tmp_path, request.param), dtype=torch.float32)
    job = JobConfig(out=Path("/none"), data=(Path("/none"),), method="dora", rank=3)
    adapter = TrainableAdapter(adapter_config(job, base_name="", max_steps=1), model.base, seed=0)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in adapter.parameters.tensors.items():
        if "magnitude" not in name:
            tensor.data.normal_(0, 0.2, generator=generator)
    return TrainableModel(model, checkpoint_layers=True), adapter


def new_share(length: int, *, seed: int, supervised: bool = True) -> Share:
    token_ids = torch.randint(250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    example = Example(token_ids=array("i", token_ids), supervised=bytes([supervised] * length), place="")
    return Share(place=0, example=example, weight=0.01)


def losses_and_gradients(
    network: tuple[TrainableModel, TrainableAdapter], shares: list[Share]
) -> tuple[Tensor, dict[str, Tensor]]:
    model, adapter = network
    (batch,) = token_batches(shares, num_adapters=1, max_tokens=1000)
    adapter.parameters.clear_gradients()
    losses = model.losses(batch, [adapter])
    losses.sum().backward()
    tensors = adapter.parameters.tensors
    return losses.detach(), {name: tensor.grad.clone() for name, tensor in tensors.items() if tensor.grad is not None}


@pytest.mark.parametrize("place", range(len(LENGTHS)))
def test_a_sample_learns_among_others_what_it_learns_alone(
    network: tuple[TrainableModel, TrainableAdapter], place: int
) -> None:
    shares = [new_share(length, seed=n, supervised=n == place) for n, length in enumerate(LENGTHS)]
    losses, gradients = losses_and_gradients(network, shares)
    expected_losses, expected = losses_and_gradients(network, [shares[place]])
    own = losses.split(LENGTHS)[place]
    # float32 products of another number of rows
    torch.testing.assert_close(own, expected_losses, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        assert largest > 0
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("place", range(len(LENGTHS)))
def test_other_neighbours_change_no_bit(network: tuple[TrainableModel, TrainableAdapter], place: int) -> None:
    found = []
    for seed in (0, 100):
        shares = [
            new_share(length, seed=n if n == place else n + seed, supervised=n == place)
            for n, length in enumerate(LENGTHS)
        ]
        losses, gradients = losses_and_gradients(network, shares)
        found.append((losses.split(LENGTHS)[place], gradients))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[1][1][name], gradient) for name, gradient in found[0][1].items())
