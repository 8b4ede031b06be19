"""What PEFT makes of an adapter folder and what the server makes of it, so that the two can be compared."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import peft.peft_model
import torch
from lorasrv.engine.request import Request, SamplingParams
from lorasrv_adapters.checkpoint import read_checkpoint
from lorasrv_adapters.errors import AdapterError
from lorasrv_adapters.image import pack_image
from peft import PeftModel
from recorded_engine import Served, run_engine
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Bench:
    """One base, served and in transformers, the latter with the weights that the former decodes to."""

    served: Served
    oracle: PreTrainedModel


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a folder.

    Attributes:
        refusal: Why it was not loaded; empty if it was.
        complaints: What was said while it was loaded.
        model: PEFT's model.
        token_ids: The prompt and what the server answered.
        logits: Of the server, [N, V] for the N tokens of its answer.
    """

    refusal: str = ""
    complaints: frozenset[str] = frozenset()
    model: PeftModel | None = None
    token_ids: tuple[int, ...] = ()
    logits: Tensor | None = None


def outcome_of_peft(oracle: PreTrainedModel, folder: Path) -> Outcome:
    """Load a folder with PEFT on a copy of the base; warnings and tensors that nothing took are complaints."""
    results = []

    def remember(*args: object, **options: object) -> object:
        results.append(copy.deepcopy(load(*args, **options)))
        return results[-1]

    load = peft.peft_model.set_peft_model_state_dict
    with (
        warnings.catch_warnings(record=True) as caught,
        patch.object(peft.peft_model, "set_peft_model_state_dict", remember),
    ):
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(copy.deepcopy(oracle), folder).eval()
        except Exception as error:
            return Outcome(refusal=f"{type(error).__name__}: {error}")
    unused = {f"tensor {name} is not used" for result in results for name in result.unexpected_keys}
    return Outcome(complaints=frozenset({str(warning.message) for warning in caught} | unused), model=model)


def outcome_of_server(bench: Bench, folder: Path, prompt: Sequence[int], *, num_tokens: int) -> Outcome:
    """Load a folder as the server does, and let the engine answer the prompt with it."""
    model = bench.served.model
    try:
        adapter = read_checkpoint(folder, model.base)
    except AdapterError as error:
        return Outcome(refusal="\n".join(getattr(error, "reasons", [str(error)])))
    bench.served.images["tested"] = (adapter.digest, pack_image(adapter, model.base, torch.float32))
    request = Request(
        request_id="request",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_new_tokens=num_tokens, temperature=0.0, ignore_eos=True),
        lease=bench.served.lease("tested"),
    )
    run = run_engine(bench.served, [request], num_blocks=2, max_adapters=1, max_rank=64, adapter_bytes=1 << 20)
    return Outcome(
        token_ids=(*prompt, *run.token_ids("request")),
        logits=torch.stack([run.runner.rows["request", position] for position in range(num_tokens)]),
    )


@torch.inference_mode()
def logits_of(model: torch.nn.Module, token_ids: Sequence[int], num_tokens: int) -> Tensor:
    """The logits [num_tokens, V] that chose the last tokens."""
    rows: Tensor = model(torch.tensor([list(token_ids)])).logits[0]
    return rows[-num_tokens - 1 : -1]
