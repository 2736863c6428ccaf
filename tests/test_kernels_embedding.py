"""The embedding's kernels against indexing and float64 sums."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, Guarded, assert_close, empty, randn

from albor.kernels import embedding

__all__ = ["empty"]

VOCABULARY = 37


def draw(count: int, seed: int = 0) -> torch.Tensor:
    """Tokens from 3 on; 0, which pads the list of distinct ones, is not among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator)


def frequent(count: int) -> torch.Tensor:
    """One token owns most of the batch, as a newline may."""
    tokens = draw(count)
    tokens[torch.arange(count) % 5 != 0] = 11
    return tokens


TOKENS = {
    "one": torch.tensor([5]),
    "some twice": draw(50),
    "one frequent": frequent(90),
    "all the same": torch.full((65,), 36),
    "all different": torch.arange(VOCABULARY).flip(0),
    "token 0": torch.tensor([0, 4, 0, 0, 36, 4]),
}


def index(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """unique_tokens (N,), segment_starts (N + 1,) and token_order (N,) of tokens (N,)."""
    count = tokens.shape[0]
    unique, counts = tokens.unique(return_counts=True)
    padded = torch.zeros(count, dtype=torch.int64)
    padded[: unique.shape[0]] = unique
    starts = torch.full((count + 1,), count, dtype=torch.int64)
    starts[0] = 0
    starts[1 : unique.shape[0] + 1] = counts.cumsum(0)
    order = torch.argsort(tokens, stable=True)
    return padded.to(DEVICE), starts.to(DEVICE), order.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(1, 24), (7, 257), (150, 24), (9, 1030)])
def test_forward_copies_rows(empty: Guarded, count: int, width: int, dtype: torch.dtype):
    tokens, weight = draw(count).to(DEVICE), randn(VOCABULARY, width, dtype=dtype)
    out = empty(count, width, dtype=dtype)
    embedding.forward(tokens, weight, out)
    assert torch.equal(out, weight[tokens])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("width", [24, 300])
@pytest.mark.parametrize("case", list(TOKENS))
def test_backward_adds_every_row_to_its_token(
    empty: Guarded, case: str, width: int, wide: bool, dtype: torch.dtype
):
    tokens = TOKENS[case].to(DEVICE)
    d_out = randn(tokens.shape[0], width, seed=1, dtype=dtype)
    before = randn(VOCABULARY, width, seed=2, dtype=torch.float32 if wide else dtype)
    d_weight = empty.filled(before)
    embedding.backward(d_out, *index(TOKENS[case]), d_weight)
    assert_close(d_weight, before.double().index_add(0, tokens, d_out.double()))
    absent = torch.ones(VOCABULARY, dtype=torch.bool, device=DEVICE)
    absent[tokens] = False
    assert torch.equal(d_weight[absent], before[absent])


def test_the_sum_is_rounded_once(empty: Guarded):
    """1 + (2048 + 0.75 + 0.75) is 2050 in fp16, 2052 if the sum is rounded too, 2048 if each step is."""
    tokens = torch.tensor([4, 9, 4, 4])
    d_out = torch.full((4, 8), 0.75, dtype=torch.float16, device=DEVICE)
    d_out[0] = 2048.0
    d_weight = empty.filled(torch.ones(VOCABULARY, 8, dtype=torch.float16, device=DEVICE))
    embedding.backward(d_out, *index(tokens), d_weight)
    assert d_weight[4].tolist() == [2050.0] * 8
    assert d_weight[9].tolist() == [1.75] * 8


def test_empty_segments_read_and_write_nothing(empty: Guarded):
    """Padding names token 0, whose own segment may be at work elsewhere: even adding zero could lose a sum.
    Minus zero would show it.
    """
    tokens = torch.tensor([7] * 9)
    unique, starts, order = index(tokens)
    d_out, d_weight = randn(9, 24), empty.filled(torch.full((VOCABULARY, 24), -0.0, device=DEVICE))
    embedding.backward(d_out, unique, starts, order, d_weight)
    assert_close(d_weight[7], d_out.double().sum(0))
    others = d_weight[torch.arange(VOCABULARY) != 7]
    assert not bool(others.any())
    assert bool(others.signbit().all())
