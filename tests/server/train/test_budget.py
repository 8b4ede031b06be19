"""AdaLoRA's allocator: PEFT's over a whole schedule, exactly the budget in the end, planted ranks found."""

import pytest
import torch
from lorasrv.train.budget import BudgetSchedule, RankAllocator, Triplets, orthogonality
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from torch import nn

MODULES = {"one": (6, 10), "two": (8, 5), "three": (4, 4)}
RANK, TARGET, STEPS = 4, 2, 40


def new_triplets(seed: int = 0) -> dict[str, Triplets]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    return {name: Triplets(p=draw(o, RANK), e=draw(RANK, 1), q=draw(RANK, i)) for name, (o, i) in MODULES.items()}


def fill_gradients(triplets: dict[str, Triplets], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for triplet in triplets.values():
        for part in (triplet.p, triplet.e, triplet.q):
            part.grad = torch.randn(part.shape, generator=generator)


class PeftSide(nn.Module):
    """The same tensors under PEFT's names."""

    def __init__(self, triplets: dict[str, Triplets]) -> None:
        super().__init__()
        for name, triplet in triplets.items():
            for kind, part in (("lora_A", triplet.q), ("lora_B", triplet.p), ("lora_E", triplet.e)):
                holder = nn.Module()
                holder.register_parameter("default", nn.Parameter(part.detach().clone()))
                module = getattr(self, name, None) or nn.Module()
                self.add_module(name, module)
                module.add_module(kind, holder)


def test_masks_are_those_of_peft_at_every_step() -> None:
    ours = new_triplets()
    config = AdaLoraConfig(
        init_r=RANK, target_r=TARGET, tinit=5, tfinal=10, deltaT=3, total_step=STEPS, beta1=0.85, beta2=0.85
    )
    model = PeftSide(ours)
    theirs = PeftAllocator(model, config, "default")
    schedule = BudgetSchedule(start=RANK * 3, target=TARGET * 3, first_step=5, last_step=STEPS - 10, every=3)
    allocator = RankAllocator(ours, schedule, beta=0.85)
    for step in range(1, STEPS - 10 + 1):
        fill_gradients(ours, step)
        for name, triplet in ours.items():
            module = model.get_submodule(name)
            for kind, part in (("lora_A", triplet.q), ("lora_B", triplet.p), ("lora_E", triplet.e)):
                parameter = module.get_submodule(kind).default
                parameter.data.copy_(part.detach())
                parameter.grad = part.grad.clone()
        allocator.update(step)
        last = step == STEPS - 10
        budget, masks = theirs.update_and_allocate(model, step, force_mask=last)
        if masks is None:
            continue
        assert budget == schedule.budget(step)
        assert {name: mask.tolist() for name, mask in allocator.masks.items()} == {
            key.split(".")[0]: value for key, value in masks.items()
        }, step
        for name, triplet in ours.items():
            assert torch.equal(triplet.e, model.get_submodule(name).lora_E.default)
    assert sum(allocator.ranks().values()) == TARGET * 3


def test_the_last_choice_stays_and_ties_do_not_over_prune() -> None:
    triplets = new_triplets()
    schedule = BudgetSchedule(start=12, target=5, first_step=1, last_step=4, every=1)
    allocator = RankAllocator(triplets, schedule, beta=0.85)
    for step in range(1, 8):
        for triplet in triplets.values():
            for part in (triplet.p, triplet.e, triplet.q):
                # every importance is the same
                part.grad = torch.zeros_like(part)
            triplet.e.data += 1
        allocator.update(step)
        if step >= 4:
            assert allocator.ranks() == {"one": 4, "two": 1, "three": 0}
            assert sum(int((triplet.e != 0).sum()) for triplet in triplets.values()) == 5


def test_a_step_with_broken_gradients_leaves_the_importance_alone() -> None:
    triplets = new_triplets()
    allocator = RankAllocator(
        triplets, BudgetSchedule(start=12, target=6, first_step=5, last_step=9, every=1), beta=0.85
    )
    fill_gradients(triplets, 1)
    allocator.update(1)
    before = {name: tensor.clone() for name, tensor in allocator.state().items()}
    fill_gradients(triplets, 2)
    triplets["two"].q.grad[0, 0] = float("nan")
    allocator.update(2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in allocator.state().items())


def test_state_goes_on_where_it_was() -> None:
    def run(stop: int | None) -> dict[str, list[bool]]:
        triplets = new_triplets()
        schedule = BudgetSchedule(start=12, target=6, first_step=2, last_step=12, every=2)
        allocator = RankAllocator(triplets, schedule, beta=0.85)
        for step in range(1, 15):
            if step == stop:
                state = {name: tensor.clone() for name, tensor in allocator.state().items()}
                allocator = RankAllocator(triplets, schedule, beta=0.85)
                allocator.load_state(state)
            fill_gradients(triplets, step)
            allocator.update(step)
        return {name: mask.tolist() for name, mask in allocator.masks.items()}

    assert run(7) == run(None)


@pytest.mark.parametrize(("step", "budget"), [(1, 24), (10, 24), (11, 21), (20, 10), (30, 8), (35, 8)])
def test_the_budget_falls_along_a_cubic(step: int, budget: int) -> None:
    schedule = BudgetSchedule(start=24, target=8, first_step=10, last_step=30, every=5)
    assert schedule.budget(step) == budget


def test_orthogonality_is_the_mean_distance_from_the_identity() -> None:
    triplets = new_triplets()
    expected = torch.stack(
        [
            part
            for triplet in triplets.values()
            for part in (
                torch.linalg.matrix_norm(triplet.p.T @ triplet.p - torch.eye(RANK)),
                torch.linalg.matrix_norm(triplet.q @ triplet.q.T - torch.eye(RANK)),
            )
        ]
    ).mean()
    torch.testing.assert_close(orthogonality(triplets), expected)
