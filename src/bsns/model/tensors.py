"""Between torch tensors and the bytes of a frame, without copies where torch allows it."""

from __future__ import annotations

import torch

from bsns.protocol.frames import Buffer

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
}


def to_tensor(data: Buffer, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The bytes as a tensor. Copies, because torch wants writable memory and a received frame's is not."""
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[dtype]).view(shape)


def to_memory(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, C order; shares memory with a contiguous CPU tensor."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
