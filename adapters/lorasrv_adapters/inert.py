"""What PEFT demands of keys that change nothing once an adapter is served: a folder it would not load is refused.

It knows PEFT's conditions; what the keys mean, nothing here needs.
"""

from collections.abc import Mapping

from lorasrv_adapters.fields import Fields

TASK_TYPES = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
"""Values of `task_type`."""

_SCHEDULE = {"total_step": None, "tinit": 0, "tfinal": 0}


def check_inert_values(fields: Fields) -> None:
    """Refuse values of inert keys with which PEFT does not load an adapter of any method."""
    task, eva = fields.raw.get("task_type"), fields.raw.get("eva_config")
    if not (task is None or task in TASK_TYPES):
        fields.refuse("task_type", f"must be one of {', '.join(TASK_TYPES)}")
    if not (eva is None or isinstance(eva, Mapping)):
        fields.refuse("eva_config", "must be an object")
    dropout = fields.raw.get("lora_dropout", 0)
    if not isinstance(dropout, int | float) or dropout > 1:
        fields.refuse("lora_dropout", "must be a number of at most 1")


def check_adalora_schedule(fields: Fields) -> None:
    """Refuse a training schedule with which PEFT does not load an AdaLoRA adapter."""
    total, start, end = (fields.raw.get(key, default) for key, default in _SCHEDULE.items())
    if isinstance(total, int) and isinstance(start, int) and isinstance(end, int):
        if total <= 0 or start >= total - end:
            fields.refuse("total_step", "must be more than tinit and tfinal together")
    else:
        for key, default in _SCHEDULE.items():
            if not isinstance(fields.raw.get(key, default), int):
                fields.refuse(key, "must be an integer")
    weight = fields.raw.get("orth_reg_weight", 0.5)
    if not isinstance(weight, int | float) or weight < 0:
        fields.refuse("orth_reg_weight", "must be a number of at least 0")
