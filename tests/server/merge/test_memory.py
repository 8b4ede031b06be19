"""A merge holds one shard and one layer at most: counted in bytes of tensors, not measured."""

import weakref
from collections.abc import Mapping

import torch
from lorasrv.merge.app import merge
from lorasrv.merge.config import MergeConfig
from lorasrv_kernels.nf4 import quantize
from peft_options import Option
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation made, until its memory is given back."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs: Mapping[str, object] | None = None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf) and leaf.untyped_storage()._cdata not in given | self._known:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_it_counts():
    with LiveBytes() as live:
        kept = torch.ones(1000)
        view = kept[10:]
        torch.ones(2000) * 2
        del kept
    assert (live.peak, live.now) == (4000 + 16000, 4000)
    del view
    assert live.now == 0


def test_a_merge_holds_one_shard_and_one_layer_at_most(base, tmp_path):
    # makes its tables, which are kept
    quantize(torch.zeros(64, 64))
    deep = base(num_hidden_layers=8)
    shapes = {name: tuple(weight.shape) for name, weight in deep.model.state_dict().items()}
    layer_bytes = 4 * sum(torch.Size(shape).numel() for name, shape in shapes.items() if ".layers.0." in name)
    # a shard of one and a half layers; embedding and head are smaller
    shard_bytes = layer_bytes * 3 // 2
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    adapters = {
        kind: deep.save_adapter(
            tmp_path / kind, kind=kind, option=Option(config={"target_modules": "all-linear", "r": 1})
        )
        for kind in ("lora", "dora")
    }
    for (kind, adapter), weights in zip(adapters.items(), ("dequantized", "original"), strict=True):
        adapter_bytes = (adapter / "adapter_model.safetensors").stat().st_size
        config = MergeConfig(
            base=str(deep.folder),
            adapters=((str(adapter), 1.0),),
            out=tmp_path / f"merged {kind}",
            weights=weights,
            shard_bytes=shard_bytes,
            prompts=prompts,
        )
        with LiveBytes() as live:
            outcome = merge(config)
        assert outcome.record["verification"]["holds"]
        assert len(list(outcome.folder.glob("*.safetensors"))) > 5
        # the adapter is there in its normal form, and packed for the unmerged model
        assert live.peak <= shard_bytes + layer_bytes + 2 * adapter_bytes
    assert layer_bytes * 8 > 2 * (shard_bytes + layer_bytes)
