"""What others have for fewer bits, as `bsns bench compress` compares it: codecs, and linear layers.

None of them is a dependency. Each is imported as it is made, which raises whatever it raises where a package is missing
or does not work here: `why_not` says it in a line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, cast

import numpy as np
import torch

from bsns.model.linear import replace_linears
from bsns.model.tensors import to_memory
from bsns.protocol.frames import Buffer

Codec = Callable[[bytearray, tuple[int, int]], tuple[int, Buffer]]
"""Bytes and shape of bfloat16 rows to the bytes they were encoded in, and those that come back."""
Step = Callable[[list[torch.Tensor]], list[torch.Tensor]]
"""Inputs (rows, columns) of some linear layers, each its own, to their outputs."""

BLOCK = 256
"""Numbers that share a scale in bitsandbytes' codec; hivemind's, which stands on it, takes 4,096."""


def why_not(error: Exception) -> str:
    """Why a rival is left out, in one line."""
    if isinstance(error, ImportError) and error.name:
        return f"needs {error.name}"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:160]


# ---- on the wire ----------------------------------------------------------------------------------------------------


def _hivemind() -> Codec:
    """Its blockwise 8-bit codec, whose map travels with every tensor."""
    import bitsandbytes  # noqa: F401  which it stands on
    from hivemind.compression import BlockwiseQuantization, CompressionInfo, quantization

    # 1.1.12 takes int() of arrays of one number, which numpy 2.4 refuses
    quantization.int = lambda found: found.item() if isinstance(found, np.ndarray) else int(found)
    codec = BlockwiseQuantization()

    def there_and_back(data: bytearray, shape: tuple[int, int]) -> tuple[int, Buffer]:
        tensor = torch.frombuffer(data, dtype=torch.bfloat16).reshape(shape)
        coded = codec.compress(tensor, CompressionInfo.from_tensor(tensor))
        return len(coded.buffer), to_memory(codec.extract(coded))

    return there_and_back


def _bitsandbytes() -> Codec:
    """Its quantiser on plain bytes, the scales and then the codes; both sides know the map."""
    from bitsandbytes.functional import QuantState, create_dynamic_map, dequantize_blockwise, quantize_blockwise

    known = create_dynamic_map()

    def there_and_back(data: bytearray, shape: tuple[int, int]) -> tuple[int, Buffer]:
        codes, state = quantize_blockwise(
            torch.frombuffer(data, dtype=torch.bfloat16).reshape(shape), code=known, blocksize=BLOCK
        )
        coded = bytearray().join((to_memory(state.absmax), to_memory(codes)))
        scales = 4 * state.absmax.numel()
        back = dequantize_blockwise(
            torch.frombuffer(coded, dtype=torch.uint8, offset=scales).reshape(shape),
            QuantState(
                torch.frombuffer(coded, dtype=torch.float32, count=scales // 4),
                code=known,
                blocksize=BLOCK,
                dtype=torch.bfloat16,
            ),
        )
        return len(coded), to_memory(back)

    return there_and_back


CODECS = {"hivemind": _hivemind, "bitsandbytes": _bitsandbytes}


# ---- linear layers --------------------------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    """Linear layers without biases, side by side: weights (outputs, inputs), which are not copied."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for weight in weights:
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.layers.append(layer)
        self.eval()

    def forward(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]

    @property
    def nbytes(self) -> int:
        """Of all that the layers keep; not of copies that a compiler makes."""
        return sum(_nbytes(kept) for kept in self.state_dict().values() if isinstance(kept, torch.Tensor))


def _nbytes(tensor: Any) -> int:
    """Of a tensor, or of those that a quantised one consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def _torchao(config: str, where: str = "torchao.quantization", **options: int) -> Callable[[Layers], Step]:
    def made(layers: Layers) -> Step:
        ours = getattr(import_module(where), config)(**options)
        import_module("torchao.quantization").quantize_(layers, ours)
        # compiled, as torchao is meant: as they are, its layers unpack all weights in every step
        return cast(Step, torch.compile(layers, dynamic=False, options={"freezing": True}))

    return made


def _quanto(weights: str) -> Callable[[Layers], Step]:
    def made(layers: Layers) -> Step:
        quanto = import_module("optimum.quanto")
        quanto.quantize(layers, weights=getattr(quanto, weights))
        quanto.freeze(layers)
        return layers

    return made


def _bitsandbytes_layers(kind: str, **options: Any) -> Callable[[Layers], Step]:
    def made(layers: Layers) -> Step:
        kind_of_layer = getattr(import_module("bitsandbytes.nn"), kind)

        def quantised(weight: torch.Tensor, _: torch.Tensor | None) -> torch.nn.Module:
            layer: torch.nn.Module = kind_of_layer(weight.shape[1], weight.shape[0], bias=False, **options)
            layer.load_state_dict({"weight": weight})
            return layer.to("cpu")  # which is when it quantises

        replace_linears(layers, quantised)
        return layers

    return made


LINEARS: dict[str, tuple[str, Callable[[Layers], Step]]] = {
    "torch_bf16": ("none", lambda layers: layers),
    "torchao_int8": ("int8", _torchao("Int8WeightOnlyConfig")),
    "torchao_int8_dyn": ("int8", _torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao_int4": (
        "int4",
        _torchao("PrototypeInt4WeightOnlyConfig", "torchao.prototype.quantization.int4", group_size=32),
    ),
    "quanto_int8": ("int8", _quanto("qint8")),
    "quanto_int4": ("int4", _quanto("qint4")),
    "bitsandbytes_int8": ("int8", _bitsandbytes_layers("Linear8bitLt", has_fp16_weights=False, threshold=6.0)),
    "bitsandbytes_nf4": (
        "int4",
        _bitsandbytes_layers("Linear4bit", compute_dtype=torch.bfloat16, quant_type="nf4"),
    ),
}
"""Which of our formats each is compared with, and how bfloat16 layers become it."""
