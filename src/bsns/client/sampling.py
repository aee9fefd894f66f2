"""Sampling: from a row of logits to the next token, as a pure function of options, history, seed and position."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from bsns.core.errors import BadOption, PeerFailed

# Widths, in nats below the best logit, of the slices of the vocabulary in which top-p looks for its nucleus.
_SLICES_NATS = (6.0, 10.0, 14.0)


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are drawn. The default is greedy; `max_tokens` counts the answer's tokens. Raises BadOption."""

    temperature: float = 0.0
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    logit_bias: tuple[tuple[int, float], ...] = ()
    """What is added to the logits of these tokens, each named once."""
    presence_penalty: float = 0.0
    """What the logit of every token that the answer has loses, once; below 0 it gains."""
    frequency_penalty: float = 0.0
    """The same for each time that the answer has it."""
    logprobs: int | None = None
    """Tell each token's log-probability, and those of so many of the likeliest."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise BadOption(f"temperature is {self.temperature}; give 0 (greedy) or more, for example 0.8")
        if self.top_k < 0:
            raise BadOption(f"top_k is {self.top_k}; give a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise BadOption(f"top_p is {self.top_p}; give more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise BadOption(f"min_p is {self.min_p}; give 0 to 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise BadOption(f"repetition_penalty is {self.repetition_penalty}; give more than 0; 1 means none")
        if self.max_tokens < 1:
            raise BadOption(f"max_tokens is {self.max_tokens}; give at least 1")
        if not isinstance(self.stop, tuple) or any(not isinstance(s, str) or not s for s in self.stop):
            raise BadOption("stop must be non-empty strings")
        biased = [token for token, _ in self.logit_bias]
        if min(biased, default=0) < 0 or len(set(biased)) < len(biased):
            raise BadOption("logit_bias must name tokens by their ids, each once")
        if not all(math.isfinite(bias) for _, bias in self.logit_bias):
            raise BadOption("logit_bias must give numbers; -100 bans a token")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise BadOption(f"{name} is {getattr(self, name)}; give a number; 0 means none")
        if self.logprobs is not None and self.logprobs < 0:
            raise BadOption(f"logprobs is {self.logprobs}; give how many alternatives to tell, from 0 on")


class Constraint(Protocol):
    """Which tokens may come next in one answer, which it follows token by token.

    Called by one thread at a time, in a turn that other answers share: it may raise nothing but BsnsError.
    """

    def mask(self, logits_V: torch.Tensor) -> torch.Tensor:
        """The logits (V,) with -inf for what must not come next, as a tensor of its own; never -inf for all."""
        ...

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        ...


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities at one position by the model's own distribution: of the raw logits, before any option."""

    chosen: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens, best first."""


def logprobs(logits_V: torch.Tensor, token: int, count: int) -> Logprobs:
    """Of the chosen token and the `count` likeliest."""
    logprobs_V = logits_V.float().log_softmax(0)
    best = logprobs_V.topk(min(count, len(logprobs_V)))
    return Logprobs(float(logprobs_V[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def sample(
    logits_V: torch.Tensor,
    history: Sequence[int] | torch.Tensor,
    options: SamplingOptions,
    position: int,
    prompt_tokens: int = 0,
) -> int:
    """The token for `position`, from its logits of shape (V,), any floating dtype; they are left untouched.

    `history` holds the tokens before it, which only the penalties look at; the first `prompt_tokens` of them are no
    part of the answer. Equal arguments give equal tokens, so a resumed stream equals an undisturbed one. Raises
    PeerFailed for logits that are no numbers.
    """
    if options.temperature == 0:
        scores_V = _penalised(logits_V, history, options, prompt_tokens)
        token = int(scores_V.argmax())
        if not math.isfinite(scores_V[token]):
            raise _no_numbers()
        return token
    ids_K, probabilities_K = distribution(logits_V, history, options, prompt_tokens)
    cumulative_K = probabilities_K.cumsum(0)
    # Scaled by the sum so that rounding cannot push the draw past the last token.
    drawn = _uniform(options.seed, position) * float(cumulative_K[-1])
    at = min(int(torch.searchsorted(cumulative_K, drawn, right=True)), len(cumulative_K) - 1)
    return at if ids_K is None else int(ids_K[at])


def distribution(
    logits_V: torch.Tensor, history: Sequence[int] | torch.Tensor, options: SamplingOptions, prompt_tokens: int = 0
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What a positive temperature draws from: token ids of shape (K,), ascending, and their float64 probabilities.

    None for the ids means the whole vocabulary. Bias, penalties, temperature, top-k, top-p, min-p apply in this order,
    as in transformers and vLLM. Raises PeerFailed for logits that are no numbers.
    """
    scores_V = _penalised(logits_V, history, options, prompt_tokens).float() / options.temperature
    best = float(scores_V.max())
    if not math.isfinite(best):
        raise _no_numbers()
    ids_K: torch.Tensor | None = None
    scores_K = scores_V
    mass = None
    if 0 < options.top_k < len(scores_V):
        ids_K = (scores_V >= _kth_largest(scores_V, options.top_k)).nonzero()[:, 0]  # all that tie with the k-th
        scores_K = scores_V[ids_K]
    elif options.top_p < 1:
        mass = float((scores_V - best).exp_().sum(dtype=torch.float64))
        for nats in _SLICES_NATS:
            slice_K = (scores_V > best - nats).nonzero()[:, 0]
            kept_K = scores_V[slice_K]
            if float((kept_K - best).exp_().sum(dtype=torch.float64)) >= options.top_p * mass:
                ids_K, scores_K = slice_K, kept_K
                break
    weights_K = (scores_K - best).double().exp_()
    if options.top_p < 1:
        keep_N = _nucleus(scores_K, weights_K, options.top_p * (mass or float(weights_K.sum())))
        ids_K = keep_N if ids_K is None else ids_K[keep_N]
        weights_K = weights_K[keep_N]
    if options.min_p > 0:
        keep_N = (weights_K >= options.min_p).nonzero()[:, 0]  # the best token's weight is 1
        ids_K = keep_N if ids_K is None else ids_K[keep_N]
        weights_K = weights_K[keep_N]
    return ids_K, weights_K / weights_K.sum()


def _nucleus(scores_K: torch.Tensor, weights_K: torch.Tensor, mass: float) -> torch.Tensor:
    """Indices, ascending, of the best tokens before which less than `mass` lies (Holtzman et al. 2020)."""
    # Among equals the later token goes first, which is what transformers' stable ascending sort amounts to.
    order_K = scores_K.flip(0).argsort(descending=True, stable=True).neg_().add_(len(scores_K) - 1)
    above_K = weights_K[order_K].cumsum(0)
    count = int(torch.searchsorted(above_K, mass)) + 1
    return order_K[:count].sort().values


def _kth_largest(scores_V: torch.Tensor, k: int) -> torch.Tensor:
    return scores_V.topk(k, sorted=False).values.min()


def _penalised(
    logits_V: torch.Tensor, history: Sequence[int] | torch.Tensor, options: SamplingOptions, prompt_tokens: int
) -> torch.Tensor:
    """Logits with their bias; those of tokens already in the history are moved away from being chosen (CTRL, Keskar et
    al. 2019), and those of the answer's own tokens lowered (OpenAI's presence and frequency penalties)."""
    repeats = options.repetition_penalty != 1 and len(history) > 0
    counts = (options.presence_penalty != 0 or options.frequency_penalty != 0) and len(history) > prompt_tokens
    if not (repeats or counts or options.logit_bias):
        return logits_V
    scores_V = logits_V.float() if logits_V.dtype != torch.float32 else logits_V.clone()
    if options.logit_bias:
        ids, biases = zip(*options.logit_bias, strict=True)
        scores_V[list(ids)] += torch.tensor(biases)
    if repeats:
        seen_N = torch.as_tensor(history, dtype=torch.long)
        seen = scores_V[seen_N]
        penalty = options.repetition_penalty
        scores_V[seen_N] = torch.where(seen < 0, seen * penalty, seen / penalty)
    if counts:
        times_V = torch.bincount(torch.as_tensor(history[prompt_tokens:]), minlength=len(scores_V))
        scores_V -= options.presence_penalty * (times_V > 0) + options.frequency_penalty * times_V
    return scores_V


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits that depends on seed and position alone."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _no_numbers() -> PeerFailed:
    return PeerFailed("the route returned hidden states whose logits are not numbers; try another route")
