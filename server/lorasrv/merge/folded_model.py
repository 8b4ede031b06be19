"""A base with its update added in float32, as a model that is computed a layer at a time and stored nowhere."""

from torch import Tensor

from lorasrv.merge.base import StreamedBase
from lorasrv.merge.fold import fold
from lorasrv.merge.result import ResultPlan, result_bias
from lorasrv.merge.update import UpdateSource
from lorasrv.model.config import parse_model_config
from lorasrv.model.decoder import DecoderLayer
from lorasrv.model.loader import build_layer


class FoldedModel:
    """What `lorasrv.merge.logits.ModelParts` asks of a model.

    Attributes:
        config: that of the merged model.
    """

    def __init__(self, base: StreamedBase, source: UpdateSource, plan: ResultPlan) -> None:
        """Computes nothing yet."""
        self.config = parse_model_config(plan.config)
        self._base = base
        self._source = source

    def layer(self, index: int) -> DecoderLayer:
        """One decoder layer."""
        return build_layer(self.config, index, wide=self.wide, linear=self.wide)

    def wide(self, name: str) -> Tensor:
        """A tensor of the merged model, float32."""
        if name.endswith(".bias"):
            return result_bias(name, self._base, self._source)
        return fold(self._base, self._source, name.removesuffix(".weight")).weight
