"""The optimizers over flat buffers: PyTorch's numbers, bitsandbytes' states, an honest fallback."""

import pytest
import torch
from lorasrv.train.optimizer import FlatOptimizer, can_page
from lorasrv.train.parameters import FlatParameters


def new_parameters() -> FlatParameters:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": {"x": (70, 90), "y": (3,)}, "b": {"z": (64, 80)}}
    drawn = {
        group: {name: torch.randn(shape, generator=generator) for name, shape in named.items()}
        for group, named in shapes.items()
    }
    return FlatParameters(drawn)


def fill_gradients(parameters: FlatParameters, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for tensor in parameters.tensors.values():
        assert tensor.grad is not None
        tensor.grad.copy_(torch.randn(tensor.shape, generator=generator))


def new_optimizer(parameters: FlatParameters, name: str) -> FlatOptimizer:
    rates = {"a": 1e-2, "b": 4e-2}
    return FlatOptimizer(parameters.buffers, rates, name=name, betas=(0.9, 0.99), weight_decay=0.1)  # type: ignore[arg-type]


def test_flat_buffers_learn_as_single_tensors_do() -> None:
    flat, single = new_parameters(), new_parameters()
    ours = new_optimizer(flat, "adamw")
    groups = [
        {"params": [single.tensors["x"], single.tensors["y"]], "lr": 1e-2},
        {"params": [single.tensors["z"]], "lr": 4e-2},
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(4):
        for parameters in (flat, single):
            fill_gradients(parameters, step)
        assert ours.step(1.0) == 4e-2
        theirs.step()
    for name, tensor in single.tensors.items():
        torch.testing.assert_close(flat.tensors[name], tensor)


def test_a_tensor_and_its_gradient_are_views_of_one_buffer() -> None:
    parameters = new_parameters()
    (parameters.tensors["x"].square().sum() + parameters.tensors["y"].sum()).backward()
    gradient = parameters.buffers["a"].grad
    assert gradient is not None
    torch.testing.assert_close(gradient.norm(), (4 * parameters.tensors["x"].square().sum() + 3).sqrt().detach())
    parameters.clear_gradients()
    assert not parameters.tensors["x"].grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "becomes"), [("auto", "adamw"), ("paged_adamw", "adamw"), ("paged_adamw_8bit", "adamw_8bit")]
)
def test_what_cannot_be_paged_says_so(caplog: pytest.LogCaptureFixture, name: str, becomes: str) -> None:
    assert not can_page(torch.device("cpu"))
    assert new_optimizer(new_parameters(), name).name == becomes
    assert ("cannot be paged" in caplog.text) == (name != "auto")


def test_states_in_8_bits_take_a_quarter_and_learn_nearly_the_same() -> None:
    wide, narrow = new_parameters(), new_parameters()
    optimizers = [new_optimizer(wide, "adamw"), new_optimizer(narrow, "adamw_8bit")]
    for step in range(4):
        for parameters, optimizer in zip((wide, narrow), optimizers, strict=True):
            fill_gradients(parameters, step)
            optimizer.step(1.0)
    sizes = [sum(tensor.nbytes for name, tensor in optimizer.state().items()) for optimizer in optimizers]
    assert sizes[1] < 0.27 * sizes[0]
    start = new_parameters().tensors["x"]
    moved, difference = (wide.tensors["x"] - start).norm(), (wide.tensors["x"] - narrow.tensors["x"]).norm()
    # 8-bit states are coarse, but they point the same way
    assert difference < 0.2 * moved


@pytest.mark.gpu
def test_states_on_a_gpu_are_paged() -> None:
    device = torch.device("cuda")
    if not can_page(device):
        pytest.skip("this device does not page")
    parameters = FlatParameters({"a": {"x": torch.randn(400, 400)}}, device=device)
    optimizer = FlatOptimizer(parameters.buffers, {"a": 1e-2}, name="auto", betas=(0.9, 0.99), weight_decay=0.0)
    parameters.tensors["x"].square().sum().backward()
    optimizer.step(1.0)
    assert optimizer.name == "paged_adamw"
    assert optimizer.state()["a/state1"].is_paged  # type: ignore[attr-defined]
