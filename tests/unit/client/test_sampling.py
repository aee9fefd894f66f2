"""Sampling, against transformers' own processors and against the laws of chance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bsns.client.sampling import SamplingOptions, distribution, logprobs, sample
from bsns.core.errors import BadOption, PeerFailed

torch.set_num_threads(1)


def twin(logits_V: torch.Tensor, history: list[int], options: SamplingOptions) -> torch.Tensor:
    """transformers' probabilities, of shape (V,), in float64."""
    steps = LogitsProcessorList()
    if options.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    steps.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        steps.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        steps.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        steps.append(MinPLogitsWarper(options.min_p))
    scores: torch.Tensor = steps(torch.tensor([history], dtype=torch.long), logits_V.float()[None].clone())
    return scores[0].double().softmax(0)


def whole(logits_V: torch.Tensor, history: list[int], options: SamplingOptions) -> torch.Tensor:
    ids_K, probabilities_K = distribution(logits_V, history, options)
    if ids_K is None:
        return probabilities_K
    assert bool((ids_K.diff() > 0).all())
    return torch.zeros(len(logits_V), dtype=torch.float64).index_put((ids_K,), probabilities_K)


choices = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.8, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 5, 50, 10_000]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
    }
)


@settings(max_examples=150)
@given(
    choices=choices,
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.1, 2.0, 8.0]),
    size=st.sampled_from([3, 100, 3000]),
    coarse=st.booleans(),
)
def test_same_distribution_as_transformers(
    choices: dict[str, Any], seed: int, spread: float, size: int, coarse: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(size, generator=draw) * spread
    if coarse:
        logits_V = logits_V.bfloat16()  # many ties
    history = torch.randint(size, (7,), generator=draw).tolist()
    options = SamplingOptions(**choices)
    before = logits_V.clone()
    ours, theirs = whole(logits_V, history, options), twin(logits_V, history, options)
    assert torch.equal(logits_V, before)
    only_ours, only_theirs = ours[(ours > 0) & (theirs == 0)], theirs[(theirs > 0) & (ours == 0)]
    if len(only_ours) and len(only_ours) == len(only_theirs):
        # The nucleus's edge falls among equals, and transformers' sort, which is not stable, takes others of them.
        torch.testing.assert_close(only_ours, only_theirs[:1].expand_as(only_ours), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.sort().values, theirs.sort().values, atol=1e-6, rtol=1e-5)
    elif not torch.equal(ours > 0, theirs > 0):
        # Only where transformers' float32 sums round across the nucleus's edge may the sets differ, by a sliver.
        edge = (ours - theirs).abs().sum()
        assert options.top_p < 1
        assert ((ours > 0) != (theirs > 0)).sum() <= 2 + size // 1000
        assert edge < 4 / max(1, int((theirs > 0).sum())) + 1e-4
    else:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@given(seed=st.integers(), position=st.integers(0, 10**6), spread=st.sampled_from([0.0, 3.0]))
@settings(max_examples=60)
def test_draws_inside_the_distribution_and_repeats(seed: int, position: int, spread: float) -> None:
    logits_V = torch.randn(500, generator=torch.Generator().manual_seed(1)) * spread
    logits_V[::3] = -math.inf
    options = SamplingOptions(temperature=0.7, top_p=0.9, seed=seed)
    token = sample(logits_V, [], options, position)
    assert whole(logits_V, [], options)[token] > 0
    assert sample(logits_V.clone(), [], options, position) == token


@pytest.mark.parametrize("filters", [{}, {"top_k": 12}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05}])
def test_frequencies(filters: dict[str, Any]) -> None:
    from scipy.stats import chisquare

    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 1.5
    options = SamplingOptions(temperature=0.9, seed=11, **filters)
    expected = whole(logits_V, [], options)
    draws = 8000
    seen = torch.bincount(
        torch.tensor([sample(logits_V, [], options, position) for position in range(draws)]), minlength=40
    )
    assert int(seen[expected == 0].sum()) == 0
    common = expected * draws >= 5
    observed = torch.cat([seen[common], seen[~common].sum()[None]]).double()
    hoped = torch.cat([expected[common], expected[~common].sum()[None]]) * draws
    kept = hoped > 0
    assert chisquare(observed[kept], hoped[kept]).pvalue > 0.001


def test_seeds_and_positions_differ() -> None:
    flat_V = torch.zeros(1000)
    by_seed = [sample(flat_V, [], SamplingOptions(temperature=1, seed=seed), 0) for seed in range(50)]
    by_position = [sample(flat_V, [], SamplingOptions(temperature=1), position) for position in range(50)]
    assert len(set(by_seed)) > 40
    assert len(set(by_position)) > 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy(dtype: torch.dtype) -> None:
    logits_V = torch.tensor([0.0, 3.0, 2.5, -1.0], dtype=dtype)
    assert sample(logits_V, [], SamplingOptions(), 0) == 1
    assert sample(logits_V, [1], SamplingOptions(repetition_penalty=1.5), 0) == 2
    assert sample(logits_V, torch.tensor([1]), SamplingOptions(repetition_penalty=1.5), 0) == 2
    assert float(logits_V[1]) == 3.0


@pytest.mark.parametrize(
    ("options", "history", "prompt_tokens", "expected"),
    [
        ({"logit_bias": ((0, 3.5),)}, [], 0, 0),
        ({"logit_bias": ((1, -100.0), (2, -100.0))}, [], 0, 0),
        ({"presence_penalty": 1.0}, [1], 0, 2),
        ({"presence_penalty": 1.0}, [1], 1, 1),  # the prompt's
        ({"presence_penalty": 0.4}, [1, 1, 1], 0, 1),  # once, however often
        ({"frequency_penalty": 0.4}, [1, 1], 0, 2),
        ({"frequency_penalty": 0.4}, [1, 1], 1, 1),
        ({"frequency_penalty": -2.0}, [0, 0], 0, 0),
        ({"logit_bias": ((0, 4.0),), "presence_penalty": 2.0}, [0], 0, 1),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_bias_and_penalties(
    options: dict[str, Any], history: list[int], prompt_tokens: int, expected: int, temperature: float
) -> None:
    logits_V = torch.tensor([0.0, 3.0, 2.5, -1.0])
    before = logits_V.clone()
    assert sample(logits_V, history, SamplingOptions(temperature, **options), 7, prompt_tokens) == expected
    assert torch.equal(logits_V, before)


def test_logprobs_are_the_models_own() -> None:
    logits_V = torch.tensor([0.0, 3.0, 2.5, -1.0], dtype=torch.bfloat16)
    own_V = logits_V.float().log_softmax(0)
    told = logprobs(logits_V, 0, 2)
    assert told.chosen == pytest.approx(float(own_V[0]))
    assert [token for token, _ in told.top] == [1, 2]
    assert [logprob for _, logprob in told.top] == pytest.approx([float(own_V[1]), float(own_V[2])])
    assert logprobs(logits_V, 3, 0).top == ()
    assert len(logprobs(logits_V, 3, 99).top) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(temperature=1, top_k=2)])
def test_logits_that_are_no_numbers(bad: float, options: SamplingOptions) -> None:
    with pytest.raises(PeerFailed):
        sample(torch.tensor([0.0, bad, 1.0]), [], options, 0)
    with pytest.raises(PeerFailed):
        sample(torch.full((3,), -math.inf), [], options, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"stop": "word"},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((1, 1.0), (1, 2.0))},
        {"logit_bias": ((1, math.nan),)},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"logprobs": -1},
    ],
)
def test_bad_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=next(iter(wrong))) as caught:
        SamplingOptions(**wrong)
    assert "\n" not in caught.value.message
