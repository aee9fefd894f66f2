"""The two ends of a model, which stay with the client: tokens to activations, and activations to logits."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bsns.core.errors import UnsupportedModel
from bsns.model.attention import Ragged
from bsns.model.families import family_of
from bsns.model.linear import PackedLinear, can_pack
from bsns.model.stage import let_go_of_file, load_config, load_cut
from bsns.model.tensors import TORCH_DTYPES


class Ends:
    """Embedding, last norm and head of a model. May be called from several threads."""

    def __init__(self, path: Path, *, dtype: str = "bfloat16", device: str = "cpu") -> None:
        """Load the ends from a safetensors directory. Raises as `load_cut`."""
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
        self._check(model)
        if can_pack(self.device, self.dtype):
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
        logits_NV: torch.Tensor = self._head(self._norm(hidden_ND.to(self.device, self.dtype)))
        return logits_NV.float()

    @torch.inference_mode()
    def _check(self, model: torch.nn.Module) -> None:
        """Raises UnsupportedModel unless our ends are all the library's model does around its blocks."""
        tokens = torch.arange(4, device=self.device)
        expected = model(input_ids=tokens[None], position_ids=tokens[None], use_cache=False, ragged=Ragged([])).logits[
            0
        ]
        if not torch.equal(self.logits(self.embed(tokens, tokens)), expected):
            raise UnsupportedModel(
                f"{type(model).__name__} scales or caps what surrounds its blocks; it needs a row in model/families.py"
            )
