"""The two ends of a model, which stay with the client: tokens to activations, and activations to logits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from bsns.core.errors import UnsupportedModel
from bsns.model.attention import Ragged
from bsns.model.families import family_of
from bsns.model.linear import PackedLinear, can_pack
from bsns.model.stage import let_go_of_file, load_config, load_cut
from bsns.model.tensors import TORCH_DTYPES, to_memory

Project = Callable[[memoryview], NDArray[np.float32]]
"""The bytes of activations (N, hidden) as logits (N, vocabulary), by one caller at a time."""
AGREEMENT = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 5e-2}
"""How far a projection that keeps its weights so may be from the library's logits, relative to the largest of them."""


class Ends:
    """Embedding, last norm and head of a model. May be called from several threads."""

    def __init__(
        self,
        path: Path,
        *,
        dtype: str = "bfloat16",
        device: str = "cpu",
        project: Project | None = None,
        weights: str | None = None,
    ) -> None:
        """Load the ends from a safetensors directory; `project` computes the last norm and the head where it gives
        what the library does, as nearly as can be with weights kept in `weights`. Raises as `load_cut`."""
        self._agreement = AGREEMENT.get(weights or dtype, 0.0)
        self.dtype = TORCH_DTYPES[dtype]
        self.device = torch.device(device)
        config = load_config(path)
        family = family_of(config.model_type)
        model = load_cut(path, config, AutoModelForCausalLM, None, self.dtype, keep_ends=True).to(self.device)
        if self.device.type == "cpu":
            let_go_of_file(model)
        self.hidden_size = int(config.hidden_size)
        self.vocab_size = int(config.vocab_size)
        self._embedding = model.get_input_embeddings()
        self._positions = getattr(model.base_model, family.learned_positions) if family.learned_positions else None
        self._norm = getattr(model.base_model, family.final_norm)
        self._head = model.get_output_embeddings()
        tokens = torch.arange(4, device=self.device)
        self._check(model, tokens)
        self._lock = threading.Lock()
        self._project = project if project is not None and self._agrees(project, self.embed(tokens, tokens)) else None
        if self._project is not None:
            self._norm = self._head = None
        elif can_pack(self.device, self.dtype):
            self._head = PackedLinear(self._head.weight, self._head.bias)

    @torch.inference_mode()
    def embed(self, tokens_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Token ids at their positions as activations (N, hidden)."""
        hidden_ND: torch.Tensor = self._embedding(tokens_N.to(self.device))
        if self._positions is not None:
            hidden_ND = hidden_ND + self._positions(positions_N.to(self.device))
        return hidden_ND

    @torch.inference_mode()
    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """The last block's activations (N, hidden) as float32 logits (N, vocabulary).

        float32 because that is what sampling computes in, and torch finds the greatest of 49,152 bfloat16 numbers in
        210 µs, of as many float32 in 10.
        """
        if self._project is not None:
            with self._lock:
                return torch.from_numpy(self._project(to_memory(hidden_ND)))
        return self._library_logits(hidden_ND)

    @torch.inference_mode()
    def _library_logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        logits_NV: torch.Tensor = self._head(self._norm(hidden_ND.to(self.device, self.dtype)))
        return logits_NV.float()

    def _agrees(self, project: Project, hidden_ND: torch.Tensor) -> bool:
        expected_NV, ours_NV = self._library_logits(hidden_ND), torch.from_numpy(project(to_memory(hidden_ND)))
        if ours_NV.shape != expected_NV.shape:
            return False
        return bool((ours_NV - expected_NV).abs().max() <= self._agreement * expected_NV.abs().max())

    @torch.inference_mode()
    def _check(self, model: torch.nn.Module, tokens: torch.Tensor) -> None:
        """Raises UnsupportedModel unless our ends are all the library's model does around its blocks."""
        expected = model(input_ids=tokens[None], position_ids=tokens[None], use_cache=False, ragged=Ragged([])).logits[
            0
        ]
        if not torch.equal(self._library_logits(self.embed(tokens, tokens)), expected):
            raise UnsupportedModel(
                f"{type(model).__name__} scales or caps what surrounds its blocks; it needs a row in model/families.py"
            )
