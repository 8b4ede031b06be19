"""The base that is read a matrix at a time is the one that is served."""

import pytest
import torch
from lorasrv.errors import ModelLoadError
from lorasrv.merge.base import StreamedBase
from lorasrv.model.folder import open_model_folder
from lorasrv.model.loader import load_model
from lorasrv.model.quantize_folder import quantize_folder

FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {"tied": True}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("weights", "quantize"), [("dequantized", True), ("original", False)])
def test_it_has_the_weights_and_the_digest_of_the_loaded_model(base, family, weights, quantize):
    folder = base(family, **FAMILIES[family]).folder
    served = load_model(folder, dtype=torch.float32, quantize=quantize).base
    config, checkpoint = open_model_folder(folder)
    with checkpoint:
        streamed = StreamedBase(config, checkpoint, weights=weights, trained_on=weights)
        assert streamed.digest == served.digest
        assert list(streamed.modules) == list(served.modules)
        for name, module in served.modules.items():
            ours = streamed.modules[name]
            assert (ours.kind, ours.weight_shape) == (module.kind, module.weight_shape)
            assert (ours.bias is None) == (module.bias is None)
            assert ours.bias is None or torch.equal(ours.bias, module.bias)
            if module.kind != "other":
                rows = module.weight_shape[0]
                assert torch.equal(streamed.weight(name), served.weight_rows(name, 0, rows))


def test_a_quantized_folder_has_no_original_weights(base, tmp_path):
    quantize_folder(base().folder, tmp_path / "nf4")
    config, checkpoint = open_model_folder(tmp_path / "nf4")
    with checkpoint:
        with pytest.raises(ModelLoadError, match=r"14 of 14 matrices in 4 bits only.*q_proj"):
            StreamedBase(config, checkpoint, weights="original")
        streamed = StreamedBase(config, checkpoint, weights="dequantized")
        assert streamed.digest == load_model(base().folder, dtype=torch.float32).base.digest
