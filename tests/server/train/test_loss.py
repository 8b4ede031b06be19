"""The loss in chunks is PyTorch's own, and so are its gradients."""

import pytest
import torch
from lorasrv.train import loss
from lorasrv.train.loss import token_losses


@pytest.mark.parametrize("chunk_elements", [1, 40, 1 << 20])
def test_losses_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk_elements: int) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 6, requires_grad=True), torch.randn(13, 6, requires_grad=True)
    targets, weights = torch.randint(13, (9,)), torch.tensor([0.0, 1, 0.5, 2, 0, 0, 1, 1, 3])
    losses = token_losses(hidden, head, targets, weights)
    (losses.sum() * 0.7).backward()
    ours = [hidden.grad, head.grad]
    hidden.grad = head.grad = None
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none") * weights
    (expected.sum() * 0.7).backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(ours, [hidden.grad, head.grad])


def test_rows_without_weight_may_hold_anything() -> None:
    hidden = torch.full((3, 4), float("nan"))
    hidden[1] = 1
    hidden.requires_grad_()
    losses = token_losses(hidden, torch.ones(5, 4), torch.tensor([99, 2, -7]), torch.tensor([0.0, 1, 0]))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
