"""The bookkeeping and the kernels agree on the size of a block."""

import lorasrv_kernels.attention
from lorasrv.engine import kv_cache


def test_block_tokens_agree() -> None:
    assert kv_cache.BLOCK_TOKENS == lorasrv_kernels.attention.BLOCK_TOKENS
