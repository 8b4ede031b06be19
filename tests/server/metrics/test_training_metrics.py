"""What a run does is what its page says."""

from lorasrv.metrics.training import TrainingMetrics
from lorasrv.train.observer import RunStart


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"lorasrv_train_{name}", {"base_model": "tiny", **labels})


def test_before_the_first_step_there_are_counters_and_the_steps_done_before(training_metrics):
    assert value(training_metrics, "tokens_total") == 0
    assert value(training_metrics, "step") is None
    training_metrics.run_started(RunStart(base_digest="ab", jobs=("poet",), first_step=40, max_steps=200))
    assert (value(training_metrics, "step"), value(training_metrics, "max_steps")) == (40, 200)
    assert value(training_metrics, "loss", training_job="poet") is None


def test_gauges_are_those_of_the_last_step_and_counters_add_up(exercised_training, training_step):
    exercised_training.step_finished(training_step(step=2, tokens=100, seconds=0.25, evaluations={}, num_shrinks=2))
    assert value(exercised_training, "step") == 2
    assert value(exercised_training, "tokens_total") == 700
    assert value(exercised_training, "tokens_per_second") == 400
    assert value(exercised_training, "out_of_memory_halvings_total") == 3
    assert value(exercised_training, "memory_peak_bytes") == 2**30
    assert value(exercised_training, "time_left_seconds") == 90
    assert value(exercised_training, "step_duration_seconds_sum") == 0.75
    assert value(exercised_training, "checkpoint_duration_seconds_sum") == 0.25
    for name, expected in (
        ("loss", 2.5),
        ("held_out_loss", 2.75),
        ("learning_rate", 1e-3),
        ("gradient_norm", 0.75),
        ("total_rank", 10),
    ):
        assert value(exercised_training, name, training_job="poet") == expected, name


def test_ranks_are_told_by_layer_and_module(exercised_training):
    ranks = {("0", "q_proj"): 3, ("11", "up_proj"): 5, ("", "lm_head"): 2}
    for (layer, module), rank in ranks.items():
        assert value(exercised_training, "module_rank", training_job="poet", layer=layer, module=module) == rank


def test_too_many_ranks_are_only_told_in_total(training_metrics, training_step):
    training_metrics.run_started(RunStart(base_digest="ab", jobs=("poet",), first_step=0, max_steps=200))
    one = training_step().jobs["poet"]
    training_metrics.step_finished(training_step(jobs={f"job-{n}": one for n in range(1667)}))
    (family,) = [one for one in training_metrics.registry.collect() if one.name == "lorasrv_train_module_rank"]
    assert family.samples == []
    assert value(training_metrics, "total_rank", training_job="job-0") == 10


def test_a_job_that_has_stopped_keeps_its_last_figures(exercised_training, training_step):
    other = training_step().jobs["poet"]
    exercised_training.step_finished(training_step(step=2, jobs={"other": other}, evaluations={}))
    assert value(exercised_training, "loss", training_job="poet") == 2.5


def test_runs_in_one_process_share_nothing(exercised_training):
    assert value(TrainingMetrics(base_model="tiny"), "tokens_total") == 0
    assert value(exercised_training, "tokens_total") == 600
