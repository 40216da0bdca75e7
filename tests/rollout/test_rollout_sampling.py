"""The draw follows its distribution, and its uniforms belong to one sample."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.rollout.sampling import BLOCK, draw, uniforms

words = st.integers(-(2**63), 2**64 - 1)


@settings(deadline=None, max_examples=50)
@given(words, words, st.integers(0, 10**6), st.integers(1, 40))
def test_a_longer_stream_starts_with_the_shorter(seed: int, key: int, number: int, count: int) -> None:
    long = uniforms(seed, key, number, count + 9)
    assert torch.equal(uniforms(seed, key, number, count), long[:count])
    assert not torch.equal(uniforms(seed, key, number + 1, count), long[:count])
    assert not torch.equal(uniforms(seed + 1, key, number, count), long[:count])
    assert not torch.equal(uniforms(seed, key + 1, number, count), long[:count])
    assert bool(((long >= 0) & (long < 1)).all())


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 3 * BLOCK + 5), st.integers(0, 2**31), st.sampled_from([0.5, 1.0, 1.7]))
def test_the_draw_is_the_inverse_of_the_cumulative_distribution(size: int, seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(6, size, generator=generator)
    uniform = torch.rand(6, generator=generator, dtype=torch.float64)
    tokens, logprobs = draw(logits, uniform, temperature)
    expected = (logits.double() / temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), expected.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=0)
    upto = expected.exp().cumsum(-1)
    for row, token in enumerate(tokens.tolist()):
        assert uniform[row] < upto[row, token] + 1e-5
        assert token == 0 or uniform[row] > upto[row, token - 1] - 1e-5


def test_counts_follow_the_probabilities() -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).expand(20_000, 40)
    tokens, _ = draw(logits, uniforms(1, 2, 3, 20_000), 1.0)
    seen = torch.bincount(tokens, minlength=40) / 20_000
    expected = logits[0].softmax(-1)
    assert bool(((seen - expected).abs() < 5 * (expected / 20_000).sqrt()).all())


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((3, 2 * BLOCK + 7), float("-inf"))
    logits[:, 5] = 0.0
    logits[1:, BLOCK + 3] = 1.0
    for value in (0.0, 0.5, 1 - 2**-53):
        tokens, logprobs = draw(logits, torch.full((3,), value, dtype=torch.float64), 1.0)
        assert tokens[0] == 5 and bool(torch.isfinite(logprobs).all())


def test_greedy_takes_the_largest() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = draw(logits, torch.zeros(5, dtype=torch.float64), 0.0)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1), atol=1e-5, rtol=0)
