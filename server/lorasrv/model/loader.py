"""From a folder of safetensors to a served model: checked as a whole first, then read one decoder layer at a time.

Linear layers are quantized from the memory map in chunks of rows; no wide copy of the base is ever made. What was
quantized before stays where it is on a CPU: the model is then a view of the mapped files, which processes share.
Knows file layouts; does not know where the folder came from.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.nf4 import quantize
from torch import Tensor

from lorasrv.errors import ModelLoadError
from lorasrv.model import prequantized
from lorasrv.model.adapted_linear import Weight
from lorasrv.model.checkpoint import Checkpoint
from lorasrv.model.config import ModelConfig
from lorasrv.model.decoder import DecoderLayer, DecoderModel
from lorasrv.model.folder import open_model_folder
from lorasrv.model.tensors import EMBEDDING, FINAL_NORM, HEAD, MODULES, layer_norms, layer_prefix, linear_shapes

# where PyTorch's own tensors begin
_BORDER_BYTES = 64


def load_model(
    source: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantize: bool = True,
    max_positions: int | None = None,
) -> DecoderModel:
    """Loads a model folder; blocks, for large models for minutes.

    On a CPU, a folder that is quantized already must stay unchanged for as long as the model is in use (see
    `lorasrv.model.checkpoint`); any other is not looked at again.

    Args:
        source: folder with `config.json` and safetensors files, 16 or 32 bit or quantized by bitsandbytes.
        dtype: of everything that is not quantized, and of the activations.
        device: where the model is kept.
        quantize: hold the linear layers in NF4; a checkpoint that has quantized tensors stays as it is.
        max_positions: positions to serve; the model's own limit by default, and at most.

    Raises:
        ModelLoadError: the folder cannot be served; lists everything that is wrong.
    """
    config, checkpoint = open_model_folder(source)
    with checkpoint:
        reader = LayerReader(config, checkpoint, dtype=dtype, device=torch.device(device), quantize=quantize)
        layers = [reader.layer(index) for index in range(config.num_layers)]
        return DecoderModel(
            config,
            embedding=reader.wide(EMBEDDING),
            layers=layers,
            final_norm=reader.wide(FINAL_NORM),
            head=None if config.tie_word_embeddings else reader.wide(HEAD),
            max_positions=min(max_positions or config.max_position_embeddings, config.max_position_embeddings),
        )


class LayerReader:
    """Reads a model's parts from its open checkpoint, in any order."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantize: bool = True,
    ) -> None:
        """Reads nothing yet.

        Args:
            config: the model's.
            checkpoint: has the tensors that `config` asks for.
            dtype: of what is not quantized.
            device: where the parts are kept.
            quantize: hold the linear layers in NF4; a checkpoint that has quantized tensors stays as it is.
        """
        quantized = any(prequantized.is_quantized(checkpoint, name) for name in linear_shapes(config))
        self._config = config
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._quantize = quantize and not quantized
        self._copy = not quantized

    def layer(self, index: int) -> DecoderLayer:
        """One decoder layer.

        Raises:
            ModelLoadError: its weights cannot be quantized.
        """
        return build_layer(self._config, index, wide=self.wide, linear=self._linear)

    def wide(self, name: str) -> Tensor:
        """A tensor that is never quantized."""
        stored = self._checkpoint.tensor(name)
        # the sums of a product may depend on where its rows begin
        copy = self._copy or stored.data_ptr() % _BORDER_BYTES != 0
        return stored.to(device=self._device, dtype=self._dtype, copy=copy)

    def _linear(self, name: str) -> Weight:
        if prequantized.is_quantized(self._checkpoint, name):
            return prequantized.read(self._checkpoint, name).to(self._device)
        if not self._quantize:
            return self.wide(name)
        try:
            return quantize(self._checkpoint.tensor(name)).to(self._device)
        except KernelError as error:
            raise ModelLoadError([f"tensor {name}: {error}"]) from error


def build_layer(
    config: ModelConfig, index: int, *, wide: Callable[[str], Tensor], linear: Callable[[str], Weight]
) -> DecoderLayer:
    """One decoder layer, of tensors that two functions give by their names in a checkpoint.

    Args:
        config: the model's.
        index: of the layer.
        wide: gives norms and biases.
        linear: gives the weights of linear layers.
    """
    prefix = layer_prefix(index)
    norms = {norm: wide(f"{prefix}.{norm}.weight") for norm in layer_norms(config)}
    weights = [linear(f"{prefix}.{module}.weight") for module in MODULES]
    biases = {module: wide(f"{prefix}.{module}.bias") for module in config.biased_modules}
    return DecoderLayer(config, norms=norms, weights=weights, biases=biases, layer=index)
