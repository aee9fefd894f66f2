"""Where each family keeps what the kernels compute with, as data: a row is all a further family needs.

Names that are as in Llama are left out. A key of the configuration that neither a row nor every row knows must be as
the model library has it by itself; see architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RMS_NORM, LAYER_NORM = 0, 1
ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 1,
    "gelu": 2,
}
"""By the model library's names, as library.Shape counts them."""


@dataclass(frozen=True, slots=True)
class Row:
    """A family. Parts are names within a block, without `.weight`; configuration keys are the library's."""

    query_key_value: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three parts, or one that holds all of them."""
    by_head: bool = False
    """Whether the one part keeps query, key and value of a head together."""
    out: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Gate and up; or one part, which holds both where the MLP is gated. Of experts: with `{}` for their number."""
    down: str = "mlp.down_proj"
    gated: bool = True
    transposed: bool = False
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    after_attention_norm: str | None = None
    after_mlp_norm: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    norm: int = RMS_NORM
    norm_plus: float = 0.0
    """What norms add to their weights."""
    epsilon: str = "rms_norm_eps"
    activation: str = "hidden_act"
    qkv_bias: str | bool = False
    """A configuration key, or what is so in every model of the family."""
    out_bias: str | bool = False
    mlp_bias: str | bool = False
    parallel: str | bool = False
    """Whether attention and MLP read the same input."""
    rotary: bool = True
    partial_rotary: bool = False
    """Whether the default rotation heeds `partial_rotary_factor`."""
    attention_scale: str | None = None
    """The key whose inverse root scales attention; else the head size's does."""
    window: str | None = None
    """The key of the sliding window; it is for all blocks where the configuration has no `layer_types`."""
    router: str | None = None
    experts: str = "num_local_experts"
    normalize_experts: str | bool = True
    handled: frozenset[str] = frozenset()
    """Further configuration keys that may have any value."""
    ignored: tuple[str, ...] = ()
    """Further tensors that old checkpoints hold and nobody reads."""


_LLAMA = Row(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
_MISTRAL = Row(window="sliding_window")
_QWEN = frozenset({"use_sliding_window", "max_window_layers", "layer_types"})
_QWEN3: dict[str, Any] = {
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "qkv_bias": "attention_bias",
    "out_bias": "attention_bias",
    "window": "sliding_window",
    "handled": _QWEN,
}
_SCALARS = frozenset({"resid_pdrop", "embd_pdrop", "attn_pdrop"})

FAMILIES: dict[str, Row] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": Row(qkv_bias=True, window="sliding_window", handled=_QWEN),
    "qwen3": Row(**_QWEN3),
    "phi3": Row(
        query_key_value=("self_attn.qkv_proj",),
        up=("mlp.gate_up_proj",),
        partial_rotary=True,
        window="sliding_window",
        handled=_SCALARS | {"original_max_position_embeddings"},
    ),
    "gemma3_text": Row(
        mlp_norm="pre_feedforward_layernorm",
        after_attention_norm="post_attention_layernorm",
        after_mlp_norm="post_feedforward_layernorm",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        norm_plus=1.0,
        activation="hidden_activation",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        attention_scale="query_pre_attn_scalar",
        window="sliding_window",
        handled=frozenset({"layer_types", "sliding_window_pattern", "cache_implementation"}),
    ),
    "mixtral": Row(
        up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
        down="block_sparse_moe.experts.{}.w2",
        router="block_sparse_moe.gate",
        window="sliding_window",
    ),
    "qwen3_moe": Row(
        **_QWEN3,
        up=("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
        down="mlp.experts.{}.down_proj",
        router="mlp.gate",
        normalize_experts="norm_topk_prob",
    ),
    "gpt2": Row(
        query_key_value=("attn.c_attn",),
        out="attn.c_proj",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        gated=False,
        transposed=True,
        attention_norm="ln_1",
        mlp_norm="ln_2",
        norm=LAYER_NORM,
        epsilon="layer_norm_epsilon",
        activation="activation_function",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        rotary=False,
        handled=_SCALARS
        | {"n_inner", "n_ctx", "reorder_and_upcast_attn", "task_specific_params"}
        | {f"summary_{key}" for key in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")},
        ignored=("attn.bias", "attn.masked_bias"),
    ),
    "gpt_neox": Row(
        query_key_value=("attention.query_key_value",),
        by_head=True,
        out="attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        gated=False,
        norm=LAYER_NORM,
        epsilon="layer_norm_eps",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias=True,
        parallel="use_parallel_residual",
        partial_rotary=True,
        handled=frozenset({"hidden_dropout", "classifier_dropout"}),
        ignored=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    ),
}

KNOWN = frozenset(
    {
        *("hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "rope_parameters", "rope_theta", "rope_scaling", "num_experts_per_tok"),
        *("n_embd", "n_layer", "n_head", "n_positions", "vocab_size", "max_position_embeddings", "model_type"),
        *("tie_word_embeddings", "attention_dropout", "initializer_range", "use_cache", "pretraining_tp"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "architectures", "dtype", "torch_dtype"),
        *("transformers_version", "id2label", "label2id", "problem_type", "return_dict", "output_attentions"),
        *("output_hidden_states", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "auto_map"),
        *("is_llama_config", "transformers.js_config", "name_or_path", "chunk_size_feed_forward"),
    }
)
"""Keys that every row reads, that the tensors are checked against, or that are of no consequence to a block."""
