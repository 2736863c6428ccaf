"""albor.kernels.cross_entropy: losses and gradients against torch's own cross-entropy in float64."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, Guarded, assert_close, empty, randn
from torch.nn import functional

from albor.kernels import cross_entropy
from albor.kernels.target import Target, assume

__all__ = ["empty"]

SHAPES = [(1, 37), (5, 24), (4, 1000), (3, 8192), (2, 20011)]
REGULARISERS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)]
SCALE = 0.37


def twin(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and SCALE times the gradient of their sum, by autograd in float64."""
    z = logits.detach().double().requires_grad_()
    losses = functional.cross_entropy(
        z, targets, ignore_index=-1, reduction="none", label_smoothing=label_smoothing
    )
    losses = losses + z_loss * z.logsumexp(-1).square() * (targets != -1)
    losses.sum().backward()
    assert z.grad is not None
    return losses.detach(), SCALE * z.grad


def draw(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a spread that a trained model has, and targets, the last column among them."""
    targets = torch.arange(rows, device=DEVICE) * 7919 % vocab
    targets[-1] = vocab - 1
    return 4 * randn(rows, vocab, seed=vocab, dtype=dtype), targets


def scale_of(value: float = SCALE) -> torch.Tensor:
    return torch.tensor([value], device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("label_smoothing", "z_loss"), REGULARISERS)
@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
def test_losses_and_gradients(
    rows: int, vocab: int, label_smoothing: float, z_loss: float, dtype: torch.dtype, empty: Guarded
):
    values, targets = draw(rows, vocab, dtype)
    logits, losses = empty.filled(values), empty(rows)
    cross_entropy.forward_backward(
        logits, targets, losses, scale_of(), label_smoothing=label_smoothing, z_loss=z_loss
    )
    exact_losses, exact_gradient = twin(values, targets, label_smoothing, z_loss)
    assert_close(losses, exact_losses)
    assert_close(logits, exact_gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("label_smoothing", "z_loss"), REGULARISERS)
def test_the_forward_gives_the_same_losses_and_leaves_the_logits(
    label_smoothing: float, z_loss: float, dtype: torch.dtype, empty: Guarded
):
    values, targets = draw(4, 1000, dtype)
    targets[1] = -1
    logits, losses, again = empty.filled(values), empty(4), empty(4)
    how = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    cross_entropy.forward(logits, targets, losses, **how)
    assert torch.equal(logits, values)
    cross_entropy.forward_backward(logits, targets, again, scale_of(), **how)
    # Two kernels, in which the compiler may contract different operations.
    torch.testing.assert_close(losses, again, rtol=1e-6, atol=1e-6)
    assert not torch.equal(logits, values)


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_every_choice_of_warps(capability: int, empty: Guarded):
    """A row of 80 KB: 16 warps, on sm_86 32."""
    values, targets = draw(1, 20011)
    logits, losses = empty.filled(values), empty(1)
    with assume(Target(capability)):
        cross_entropy.forward_backward(logits, targets, losses, scale_of())
    exact_losses, exact_gradient = twin(values, targets, 0.0, 0.0)
    assert_close(losses, exact_losses)
    assert_close(logits, exact_gradient)


@pytest.mark.parametrize("vocab", [37, 512, 1000])
def test_an_ignored_row_has_no_loss_and_no_gradient_whatever_it_holds(vocab: int, empty: Guarded):
    values, targets = draw(3, vocab)
    values[1] = math.nan
    targets[1] = -1
    logits, losses = empty.filled(values), empty(3)
    cross_entropy.forward_backward(logits, targets, losses, scale_of(), label_smoothing=0.1, z_loss=1e-3)
    assert losses[1] == 0
    assert torch.equal(logits[1], torch.zeros(vocab, device=DEVICE))
    exact_losses, exact_gradient = twin(values[[0, 2]], targets[[0, 2]], 0.1, 1e-3)
    assert_close(losses[[0, 2]], exact_losses)
    assert_close(logits[[0, 2]], exact_gradient)


def test_exact_where_probabilities_underflow(empty: Guarded):
    """Losses from 6e4 down to 2.5e-5, and logits far from zero."""
    values = torch.full((4, 600), -40.0, device=DEVICE)
    values[0, 5], values[1, 5], values[2] = 260.0, -23.0, -3e4
    values[2, 599], values[3] = 3e4, 3e4
    targets = torch.tensor([17, 5, 0, 599], device=DEVICE)
    logits, losses = empty.filled(values), empty(4)
    cross_entropy.forward_backward(logits, targets, losses, scale_of())
    exact_losses, exact_gradient = twin(values, targets, 0.0, 0.0)
    # Row by row; the smallest is log(1 + 599 exp(-17)), and fp32 has steps of 1.2e-7 there.
    torch.testing.assert_close(
        losses.double(), exact_losses, rtol=1e-6, atol=2 * torch.finfo(torch.float32).eps
    )
    assert_close(logits, exact_gradient)


def test_rows_of_a_wider_matrix(empty: Guarded):
    values, targets = draw(3, 100)
    wide, losses = empty.filled(torch.full((3, 128), 7.0, device=DEVICE)), empty(3)
    wide[:, :100] = values
    cross_entropy.forward_backward(wide[:, :100], targets, losses, scale_of())
    exact_losses, exact_gradient = twin(values, targets, 0.0, 0.0)
    assert_close(losses, exact_losses)
    assert_close(wide[:, :100], exact_gradient)
    assert bool((wide[:, 100:] == 7.0).all())


def test_the_scale_is_read_on_the_device(empty: Guarded):
    values, targets = draw(2, 100)
    once, thrice, losses = empty.filled(values), empty.filled(values), empty(2)
    scale = scale_of(1.0)
    cross_entropy.forward_backward(once, targets, losses, scale)
    scale.fill_(4.0)
    cross_entropy.forward_backward(thrice, targets, losses, scale)
    assert torch.equal(thrice, 4 * once)  # a power of two: exact


@pytest.mark.parametrize("target", [100, 127, -2])
def test_a_target_outside_the_vocabulary_makes_its_loss_nan(target: int, empty: Guarded):
    values, targets = draw(3, 100)
    targets[1] = target
    losses = empty(3)
    cross_entropy.forward(values, targets, losses)
    assert losses.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_shows_in_the_loss(bad: float, empty: Guarded):
    values, targets = draw(2, 100)
    values[1, 50] = bad
    losses = empty(2)
    cross_entropy.forward(values, targets, losses)
    assert losses.isnan().tolist() == [False, True]
