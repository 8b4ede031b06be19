"""Whether a merged model answers as base and adapter do: the logits of some prompts, both ways, compared.

The unmerged model is computed as it is served, with the adapter beside the base; where adapters were combined to an
update that no adapter can express, with the update added in float32. Letters: T token rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from lorasrv_adapters.image import pack_image
from torch import Tensor

from lorasrv.errors import MergeError, MergeVerificationError
from lorasrv.merge.folded_model import FoldedModel
from lorasrv.merge.inputs import Inputs
from lorasrv.merge.logits import compute_logits
from lorasrv.merge.result import ResultPlan
from lorasrv.model.checkpoint import Checkpoint
from lorasrv.model.config import ModelConfig
from lorasrv.model.folder import open_model_folder
from lorasrv.model.loader import LayerReader
from lorasrv.model.tokenizer import Tokenizer

PROMPTS = (
    "The sea was calm that morning, and the old man",
    "Write a short letter to a friend about the weather.",
    "1, 2, 4, 8, 16,",
    "def add(a, b):\n    return",
    "It is often said that the law",
    "Question: What is the capital of France?\nAnswer:",
)
"""What is verified with where no prompts are given."""

_MAX_PROMPT_TOKENS = 256
# rounding each weight moves the logits of six layers by 2e-6, 0.002 and 0.015 of their standard deviations; more layers
# move them more
_LIMITS = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.5}
_LOST = 0.5
# what the rounding of 16 bits may do where an adapter does next to nothing, in nats
_ROUNDING_KL = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How near two models' logits are, over all positions of all prompts.

    Attributes:
        tokens: positions compared.
        max_difference: the largest between two logits.
        deviation: standard deviation of the unmerged model's logits, over the vocabulary.
        kl: mean Kullback-Leibler divergence of the merged model's next token from the unmerged one's, in nats.
        max_kl: the largest.
        agreement: the share of positions with the same most likely token.
        effect: the mean divergence of the base's next token from the unmerged model's: what the adapter does.
    """

    tokens: int
    max_difference: float
    deviation: float
    kl: float
    max_kl: float
    agreement: float
    effect: float

    @property
    def relative_difference(self) -> float:
        """The largest difference in standard deviations."""
        return self.max_difference / self.deviation if self.deviation else self.max_difference

    @property
    def lost(self) -> float:
        """The divergence as a share of what the adapter does: 1 where the merged model is as far off as the base."""
        if self.effect == 0:
            return math.inf if self.kl else 0.0
        return self.kl / self.effect


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """What an agreement is held to.

    Attributes:
        measure: which of its figures.
        limit: the largest it may be.
    """

    measure: Literal["relative_difference", "lost"]
    limit: float

    @classmethod
    def of(cls, dtype: torch.dtype, *, in_nf4: bool, limit: float | None) -> "Tolerance":
        """The one for weights of a dtype, or with their matrices in 4 bits; `limit` in place of the usual one."""
        if in_nf4:
            # 4 bits move the base's logits more than 16 do; a merge is of use while it is nearer to the adapter
            return cls(measure="lost", limit=_LOST if limit is None else limit)
        return cls(measure="relative_difference", limit=_LIMITS[dtype] if limit is None else limit)

    def holds(self, agreement: Agreement) -> bool:
        """Whether the figure is within the limit, and the result nearer to what was merged than to the base."""
        return self._is_within(agreement) and self._is_nearer(agreement)

    def check(self, agreement: Agreement) -> None:
        """Raises MergeVerificationError if it does not hold."""
        if self.holds(agreement):
            return
        what = {
            "relative_difference": f"logits differ by up to {agreement.relative_difference:.3g} of their standard "
            f"deviations, beyond the tolerance of {self.limit:g}",
            "lost": f"the answers diverge by {agreement.lost:.3g} of what the adapter does, beyond the tolerance of "
            f"{_LOST if self._is_within(agreement) else self.limit:g}",
        }["lost" if self._is_within(agreement) else self.measure]
        raise MergeVerificationError(
            [
                f"merged, {what} (KL divergence {agreement.kl:.3g} nats, same greedy token at "
                f"{100 * agreement.agreement:.1f} % of {agreement.tokens} positions); nothing was kept"
            ]
        )

    def _is_within(self, agreement: Agreement) -> bool:
        return bool(getattr(agreement, self.measure) <= self.limit)

    def _is_nearer(self, agreement: Agreement) -> bool:
        # a small update that is missing as a whole may move no logit by more than 16 bits do
        return self.measure == "lost" or agreement.kl <= max(_LOST * agreement.effect, _ROUNDING_KL)

    def record(self, agreement: Agreement) -> dict[str, object]:
        """All figures, what they are held to, and whether they hold."""
        return {
            **asdict(agreement),
            "relative_difference": agreement.relative_difference,
            "lost": agreement.lost,
            "tolerance": asdict(self),
            "holds": self.holds(agreement),
        }


def read_prompts(file: Path | None, tokenizer: Tokenizer, config: ModelConfig) -> list[list[int]]:
    """Token ids of every prompt, cut to what the model and this module take; one prompt a line."""
    texts = (
        PROMPTS if file is None else [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    )
    longest = min(config.max_position_embeddings, _MAX_PROMPT_TOKENS)
    return [ids[:longest] for ids in map(tokenizer.encode, texts) if ids]


def verify(inputs: Inputs, plan: ResultPlan, result: Path, *, prompts: Path | None) -> Agreement:
    """Compares a written model with what was merged; blocks, for large models for minutes.

    Args:
        inputs: what was merged.
        plan: what it was to become.
        result: the folder that was written.
        prompts: one a line; None: those of this module.

    Raises:
        ModelLoadError: the folder that was written could not be served.
        MergeError: there is no prompt.
    """
    config = inputs.base.config
    asked = read_prompts(prompts, Tokenizer(inputs.folder, config=config), config)
    if not asked:
        raise MergeError([f"{prompts} holds no prompt to verify with"])
    unmerged, base = _unmerged(inputs, plan, asked)
    result_config, checkpoint = open_model_folder(result)
    with checkpoint:
        merged = compute_logits(result_config, _parts(result_config, checkpoint, quantize=False), asked)
    return compare(unmerged, merged, base)


def _unmerged(inputs: Inputs, plan: ResultPlan, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """The logits with what was merged, and those of the base: [T, V] each."""
    config = inputs.base.config
    parts = _parts(config, inputs.checkpoint, quantize=inputs.weights == "dequantized")
    if inputs.combined.adapter is None:
        folded = FoldedModel(inputs.base, inputs.combined.source, plan)
        return compute_logits(folded.config, folded, prompts), compute_logits(config, parts, prompts)
    image = pack_image(inputs.combined.adapter, inputs.base, torch.float32)
    # one pass for both, because every layer may have to be quantized
    both = compute_logits(config, parts, [*prompts, *prompts], adapter=image, num_adapted=len(prompts))
    adapted, base = both.chunk(2)
    return adapted, base


def _parts(config: ModelConfig, checkpoint: Checkpoint, *, quantize: bool) -> LayerReader:
    return LayerReader(config, checkpoint, dtype=torch.float32, device=torch.device("cpu"), quantize=quantize)


def compare(unmerged: Tensor, merged: Tensor, base: Tensor) -> Agreement:
    """The agreement of two models' logits, and the base's beside them: [T, V] float32 each."""
    log_p, log_q, log_base = (F.log_softmax(logits.double(), dim=1) for logits in (unmerged, merged, base))
    divergences = (log_p.exp() * (log_p - log_q)).sum(1).clamp_min_(0)
    effects = (log_p.exp() * (log_p - log_base)).sum(1).clamp_min_(0)
    return Agreement(
        tokens=len(unmerged),
        max_difference=float((unmerged - merged).abs().max()),
        deviation=float(unmerged.std(dim=1).mean()),
        kl=float(divergences.mean()),
        max_kl=float(divergences.max()),
        agreement=float((unmerged.argmax(1) == merged.argmax(1)).double().mean()),
        effect=float(effects.mean()),
    )
