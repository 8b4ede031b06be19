"""The panels of the dashboard about training runs: what is asked of Prometheus, and what a reader is told about it.

Knows the metrics of `lorasrv.metrics.training` and PromQL.
"""

from lorasrv.monitoring.panels import Panel, Row, gauge, mean_p95, rate

_JOB = ("instance", "training_job")
_JOB_LEGEND = "{{instance}} {{training_job}}"

_LEARNING = (
    Panel(
        title="Loss",
        description="Of every step, in nats a token. One that stays level has nothing more to learn, or cannot.",
        unit="short",
        queries=((gauge("train_loss", *_JOB), _JOB_LEGEND),),
    ),
    Panel(
        title="Held-out loss",
        description="Of data that is not learned, after evaluations. Rising while the loss falls: it learns by heart.",
        unit="short",
        queries=((gauge("train_held_out_loss", *_JOB), _JOB_LEGEND),),
    ),
    Panel(
        title="Learning rate",
        description="The highest one of a job's groups of tensors.",
        unit="sci",
        queries=((gauge("train_learning_rate", *_JOB), _JOB_LEGEND),),
    ),
    Panel(
        title="Gradient norm",
        description="Before clipping. Peaks that grow: the learning rate is too high.",
        unit="short",
        queries=((gauge("train_gradient_norm", *_JOB), _JOB_LEGEND),),
    ),
)

_RANKS = (
    Panel(
        title="Total rank",
        description="The sum over all modules. AdaLoRA's comes down to its budget and stays there.",
        unit="short",
        queries=((gauge("train_total_rank", *_JOB), _JOB_LEGEND),),
    ),
    Panel(
        title="Rank by layer",
        description="The sum over a layer's modules: where in the depth of the model AdaLoRA spends its budget.",
        unit="short",
        queries=((gauge("train_module_rank", *_JOB, "layer"), "{{training_job}} layer {{layer}}"),),
    ),
    Panel(
        title="Rank by module",
        description="The sum over all layers: which kinds of modules AdaLoRA spends its budget on.",
        unit="short",
        queries=((gauge("train_module_rank", *_JOB, "module"), "{{training_job}} {{module}}"),),
    ),
)

_MACHINE = (
    Panel(
        title="Steps",
        description="Done, and how many there will be.",
        unit="short",
        queries=(
            (gauge("train_step", "instance"), "{{instance}} done"),
            (gauge("train_max_steps", "instance"), "{{instance}} all"),
        ),
    ),
    Panel(
        title="Time left",
        description="Until the last step, at the pace so far, evaluations and checkpoints included.",
        unit="s",
        queries=((gauge("train_time_left_seconds", "instance"), "{{instance}}"),),
    ),
    Panel(
        title="Tokens per second",
        description="Over the last step alone, and over all time, evaluations and checkpoints included.",
        unit="short",
        queries=(
            (gauge("train_tokens_per_second", "instance"), "{{instance}} last step"),
            (rate("train_tokens_total", "instance"), "{{instance}} over all"),
        ),
    ),
    Panel(
        title="Step duration",
        description="Without evaluation and checkpoint.",
        unit="s",
        queries=mean_p95("train_step_duration_seconds"),
    ),
    Panel(
        title="Memory",
        description="The most that was in use so far: of the device, or of the process on a CPU.",
        unit="bytes",
        queries=((gauge("train_memory_peak_bytes", "instance"), "{{instance}}"),),
    ),
    Panel(
        title="Checkpoints",
        description="Seconds to write one, of all jobs; the run waits for it.",
        unit="s",
        queries=mean_p95("train_checkpoint_duration_seconds"),
    ),
    Panel(
        title="Out of memory",
        description="Steps begun again in pieces half as large: the batch is the same, the pace is not.",
        unit="ops",
        queries=((rate("train_out_of_memory_halvings_total", "instance"), "{{instance}}"),),
    ),
)

ROWS = (
    Row(title="Learning", panels=_LEARNING),
    Row(title="Ranks", panels=_RANKS),
    Row(title="Machine", panels=_MACHINE),
)
