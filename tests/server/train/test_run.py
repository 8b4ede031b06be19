"""A run: cut or whole, alone or together, interrupted or not, it ends with the same tensors."""

import itertools
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lorasrv.errors import NonFiniteLossError
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.loader import load_model
from lorasrv.train.batches import share_out, token_batches
from lorasrv.train.checkpoint import CheckpointFolder
from lorasrv.train.config import JobConfig
from lorasrv.train.data.examples import Example
from lorasrv.train.job import TrainingJob
from lorasrv.train.network import TrainableModel
from lorasrv.train.observer import StepReport
from lorasrv.train.run import TrainingRun
from lorasrv_kernels.nf4 import NF4Weight

STEPS = 6


def new_examples(count: int = 9) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 25, (count,), generator=generator).tolist()
    return [
        Example(
            token_ids=array("i", torch.randint(250, (length,), generator=generator).tolist()),
            supervised=b"\0" + bytes(torch.randint(2, (length - 2,), generator=generator).tolist()) + b"\1",
            place=f"data:{n}",
        )
        for n, length in enumerate(lengths)
    ]


def new_job(model: DecoderModel, *, name: str = "one", held_out: int = 2, **options: Any) -> TrainingJob:
    values: dict[str, Any] = {"rank": 3, "batch_size": 4, "learning_rate": 1e-2, **options}
    config = JobConfig(out=Path("/none"), data=(Path("/none"),), **values)
    examples = new_examples()
    return TrainingJob(
        name,
        config,
        base=model.base,
        base_name="base",
        examples=examples,
        held_out=examples[:held_out],
        max_steps=STEPS,
        seed=1,
    )


def train(
    model: DecoderModel,
    jobs: list[TrainingJob],
    *,
    steps: range = range(STEPS),
    tokens: int = 200,
    save: Callable[[int], None] = lambda _: None,
) -> list[StepReport]:
    reports: list[StepReport] = []
    run = TrainingRun(TrainableModel(model, checkpoint_layers=False), jobs, micro_batch_tokens=tokens)
    run.train(steps, eval_every=2, report=reports.append, save=save)
    return reports


def tensors_of(job: TrainingJob) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in job.adapter.parameters.tensors.items()}


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """What every step that is finished from now on takes into the tensors, by role."""
    found: list[dict[str, torch.Tensor]] = []
    finish_step = TrainingJob.finish_step

    def remembered(self: TrainingJob, step: int, *, loss: float) -> Any:
        buffers = self.adapter.parameters.buffers.items()
        found.append({role: buffer.grad.clone() for role, buffer in buffers if buffer.grad is not None})
        return finish_step(self, step, loss=loss)

    monkeypatch.setattr(TrainingJob, "finish_step", remembered)
    return found


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_micro_batches_change_nothing_but_rounding(
    load_base: Callable[[], DecoderModel], gradients: list[dict[str, torch.Tensor]], method: str
) -> None:
    model = load_base()
    whole, cut = (new_job(model, method=method) for _ in range(2))
    batches = token_batches(share_out([cut.examples(0)]), num_adapters=1, max_tokens=25)
    # so that a mean of means would be another loss
    assert len({int((batch.weights > 0).sum()) for batch in batches}) == len(batches) > 2
    first = train(model, [whole], steps=range(1))
    second = train(model, [cut], steps=range(1), tokens=25)
    assert first[0].jobs["one"].loss == pytest.approx(second[0].jobs["one"].loss, rel=1e-6)
    assert first[0].jobs["one"].gradient_norm == pytest.approx(second[0].jobs["one"].gradient_norm, rel=1e-6)
    for role, gradient in gradients[0].items():
        assert (gradients[1][role] - gradient).norm() <= 1e-6 * gradient.norm()


@pytest.mark.parametrize(
    ("method", "optimizer", "options"),
    [
        ("lora", "adamw", {}),
        ("lora", "adamw_8bit", {}),
        ("dora", "paged_adamw", {"modules_to_save": ("lm_head", "norm"), "rank_pattern": (("q_proj", 2),)}),
        ("adalora", "auto", {"modules_to_save": ("embed_tokens",)}),
    ],
)
def test_an_interrupted_run_ends_bit_for_bit_as_another(
    load_base: Callable[[], DecoderModel], tmp_path: Path, method: str, optimizer: str, options: dict[str, Any]
) -> None:
    model = load_base()
    options = {"method": method, "optimizer": optimizer, "dropout": 0.2, "allocate_every": 1, **options}
    whole = new_job(model, **options)
    train(model, [whole])
    folder = CheckpointFolder(tmp_path / "checkpoints")
    stopped = new_job(model, **options)
    train(model, [stopped], steps=range(STEPS), save=lambda step: folder.save(stopped.state(step)))
    assert folder.steps() == [STEPS - 1, STEPS]
    goes_on = new_job(model, **options)
    goes_on.load_state(folder.load(STEPS - 1))
    train(model, [goes_on], steps=range(STEPS - 1, STEPS))
    expected, found = tensors_of(whole), tensors_of(goes_on)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert goes_on.best is not None
    assert whole.best is not None
    assert (goes_on.best.step, goes_on.best.loss) == (whole.best.step, whole.best.loss)
    assert goes_on.ranks() == whole.ranks()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_an_evaluation_between_steps_leaves_the_gradients_as_they_would_be(
    base_folder: Path, gradients: list[dict[str, torch.Tensor]], method: str, dtype: torch.dtype
) -> None:
    model = load_model(base_folder, dtype=dtype)
    assert any(isinstance(weight, NF4Weight) for _, weight in model.stored())
    jobs = [new_job(model, method=method, held_out=held_out) for held_out in (2, 0)]
    for job in jobs:
        run = TrainingRun(TrainableModel(model, checkpoint_layers=True), [job], micro_batch_tokens=200)
        run.train(range(4), eval_every=1, report=lambda _: None, save=lambda _: None)
    with_evaluations, without = gradients[:4], gradients[4:]
    for step, (found, expected) in enumerate(zip(with_evaluations, without, strict=True)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[role], gradient) for role, gradient in expected.items())
        # what begins at zero leaves the other factor without a gradient in the first step
        assert any(gradient.any() for gradient in found.values()) if step == 0 else all(map(torch.any, found.values()))


def test_dropout_is_for_learning_alone(load_base: Callable[[], DecoderModel]) -> None:
    model = load_base()
    with_dropout, without = new_job(model, dropout=0.5), new_job(model)
    run = TrainingRun(TrainableModel(model, checkpoint_layers=False), [with_dropout], micro_batch_tokens=200)
    for job in (with_dropout, without):
        for tensor in job.adapter.parameters.tensors.values():
            tensor.data.fill_(0.01)
    assert run.evaluate(with_dropout) == run.evaluate(without)
    losses = [train(model, [job], steps=range(1))[0].jobs["one"].loss for job in (with_dropout, without)]
    assert losses[0] != losses[1]


def test_a_loss_that_is_not_finite_stops_the_run_with_its_examples(load_base: Callable[[], DecoderModel]) -> None:
    model = load_base()
    fine, broken = new_job(model, name="fine"), new_job(model, name="broken")
    next(iter(broken.adapter.parameters.tensors.values())).data.fill_(float("inf"))
    before = tensors_of(fine)
    with pytest.raises(NonFiniteLossError) as caught:
        train(model, [fine, broken])
    assert (caught.value.step, caught.value.jobs) == (1, ("broken",))
    assert all(place.startswith("data:") for place in caught.value.places)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(fine).items())


def test_a_job_without_progress_stops_and_the_best_is_kept(load_base: Callable[[], DecoderModel]) -> None:
    model = load_base()
    # so large a rate makes everything worse
    job, other = new_job(model, learning_rate=500.0, patience=1, clip=0.0), new_job(model, name="other")
    reports = train(model, [job, other])
    assert [sorted(report.jobs) for report in reports] == [["one", "other"]] * 4 + [["other"]] * 2
    assert job.best is not None
    assert job.best.step == 2
    last = tensors_of(job)
    job.take_best()
    assert any(not torch.equal(tensor, last[name]) for name, tensor in tensors_of(job).items())


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(
    load_base: Callable[[], DecoderModel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_base()
    expected = train(model, [new_job(model)], steps=range(1))
    losses = TrainableModel.losses

    def limited(self: TrainableModel, batch: Any, adapters: Any) -> torch.Tensor:
        if len(batch.token_ids) > 40:
            raise torch.OutOfMemoryError
        return losses(self, batch, adapters)

    monkeypatch.setattr(TrainableModel, "losses", limited)
    job = new_job(model, held_out=0)
    found = train(model, [job], steps=range(2))
    # layers are computed again; then from 200 tokens over 100 and 50 to 25, and the next step begins there
    assert [report.num_shrinks for report in found] == [4, 0]
    assert found[0].jobs["one"].gradient_norm == pytest.approx(expected[0].jobs["one"].gradient_norm, rel=1e-6)
    assert "computed again" in caplog.text
    assert "tokens at a time" in caplog.text
    monkeypatch.setattr(TrainableModel, "losses", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        train(model, [job], steps=range(1))


def test_a_step_says_what_memory_it_took_and_what_is_left(
    load_base: Callable[[], DecoderModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(step=10)
    monkeypatch.setattr("lorasrv.train.run.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    job = new_job(load_base(), method="adalora", held_out=0)
    first, second, last = train(load_base(), [job], steps=range(1, 4))
    assert (first.step, last.step) == (2, 4)
    # three looks at the clock a step: before it, after it, and for what is left
    assert [report.seconds_left for report in (first, second, last)] == [60.0, 30.0, 0.0]
    assert first.memory_bytes > 2**20
    assert first.jobs["one"].ranks.keys() == job.ranks().keys()
