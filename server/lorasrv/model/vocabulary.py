"""The two ends of a model, where tokens become vectors and vectors logits, each row with its own adapter.

Knows the weights and where the adapters' numbers are found; does not know which method an adapter used.
"""

from lorasrv_kernels.dense import dense_linear
from lorasrv_kernels.lora import lora_apply_, lora_embed_
from lorasrv_kernels.replacement import replaced_embedding, replaced_linear
from torch import Tensor

from lorasrv.model.batch import AdapterBatch


class TokenEmbedding:
    """A row of `weight` [V, I] for every token."""

    def __init__(self, weight: Tensor, *, module: int) -> None:
        """`module` is its place in the model's module order."""
        self.weight = weight
        self._module = module

    def forward(self, tokens: Tensor, adapters: AdapterBatch) -> Tensor:
        """tokens: [T] int64. Returns a new [T, I]."""
        if not adapters.touches((self._module,)):
            return self.weight.index_select(0, tokens)
        table = adapters.table[:, self._module]
        x = replaced_embedding(tokens, self.weight, adapters.arena, table, slots=adapters.slots)
        lora_embed_(x, tokens, adapters.arena, table, slots=adapters.slots)
        return x


class OutputHead:
    """The product with `weight` [V, I] that gives every token of the vocabulary its logit."""

    def __init__(self, weight: Tensor, *, module: int) -> None:
        """`module` is its place in the model's module order."""
        self.weight = weight
        self._module = module

    def forward(self, hidden: Tensor, adapters: AdapterBatch) -> Tensor:
        """hidden: [N, I]. Returns a new [N, V] float32."""
        if not adapters.touches((self._module,)):
            return dense_linear(hidden, self.weight, exact=adapters.slots.exact).float()
        table, slots = adapters.table[:, self._module], adapters.slots
        logits = replaced_linear(hidden, self.weight, adapters.arena, table, slots=slots)
        lora_apply_(
            logits,
            hidden,
            adapters.arena,
            table[:, None],
            out_features=(self.weight.shape[0],),
            slots=slots,
            max_rank=adapters.max_rank,
        )
        return logits.float()
