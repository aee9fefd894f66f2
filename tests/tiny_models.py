"""Tiny models of many families, with random weights large enough that their logits are not flat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY = 128
CONTEXT = 256

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": 7, "head_dim": 8}),
    "qwen2": ("qwen2", {**_LLAMA_LIKE}),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 16}),
    # Five sliding layers, then a full one: of seven layers, one sees everything.
    "gemma3": ("gemma3_text", {**_LLAMA_LIKE, "num_hidden_layers": 7, "head_dim": 8, "sliding_window": 6}),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 5, "n_head": 4},
    ),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    "phi3": ("phi3", {**_LLAMA_LIKE}),
    "mixtral": ("mixtral", {**_LLAMA_LIKE, **_EXPERTS, "num_local_experts": 4}),
    # Not asked for from the first day: the proof that another family needs no code.
    "olmo2": ("olmo2", {**_LLAMA_LIKE}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_LLAMA_LIKE, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    ),
}

UNSUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "granite, scaled embeddings": ("granite", {**_LLAMA_LIKE, "embedding_multiplier": 6.0}),
    "granite, scaled logits": ("granite", {**_LLAMA_LIKE, "logits_scaling": 8.0}),
    "gemma2, soft-capped attention": ("gemma2", {**_LLAMA_LIKE, "head_dim": 8}),
    "falcon, own attention": (
        "falcon",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4},
    ),
    "cohere, scaled logits": ("cohere", {**_LLAMA_LIKE, "logit_scale": 0.25}),
    "opt, decoder inside a decoder": (
        "opt",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "word_embed_proj_dim": 32,
        },
    ),
    "bloom, alibi": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 5, "n_head": 4}),
    "mamba, no attention": (
        "mamba",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 5, "state_size": 4},
    ),
}


def make_model(path: Path, model_type: str, options: dict[str, Any], seed: int = 1) -> Path:
    """Save a model of the type to `path`, as a checkpoint from the hub would lie there."""
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = CONFIG_MAPPING[model_type](**options, **special)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw) * 0.15
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(parameter + noise if is_scale else noise)
    model.save_pretrained(path)
    return path


def reference(path: Path) -> Any:
    """The library's own model, whole, in float32, with its plainest attention."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def prompt(length: int, seed: int = 7) -> list[int]:
    """Random tokens."""
    tokens: list[int] = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens
