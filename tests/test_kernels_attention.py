"""The attention kernels against float64 autograd: grouped heads, odd widths and lengths, documents."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, TOLERANCE, Guarded, assert_close, empty, randn  # noqa: F401

from albor.kernels import attention
from albor.kernels.attention import Blocks, blocks
from albor.kernels.target import Target

KERNELS = ("forward", "backward_q", "backward_kv")
CAPABILITIES = (80, 86, 89, 90, 100, 120)
Documents = tuple[torch.Tensor, torch.Tensor] | tuple[None, None]


def reference(
    qkv: torch.Tensor,
    d_out: torch.Tensor,
    length: int,
    kv_heads: int,
    head_dim: int,
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, d_qkv) in float64, with every score of a sequence in memory."""
    heads = d_out.shape[1] // head_dim
    qkv = qkv.double().requires_grad_()
    q, k, v = (
        part.transpose(1, 2)
        for part in qkv.view(-1, length, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], 2)
    )
    k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
    position = torch.arange(length, device=qkv.device)
    allowed = (position <= position[:, None]).expand(q.shape[0], 1, length, length)
    if start is not None:
        allowed = allowed & (position >= start.view(-1, 1, length, 1))
    scores = (q @ k.transpose(-1, -2) * head_dim**-0.5).masked_fill(~allowed, -float("inf"))
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, heads * head_dim)
    (d_qkv,) = torch.autograd.grad(out, qkv, d_out.double())
    return out.detach(), scores.logsumexp(-1).detach(), d_qkv


def documents(*sequences: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(document_start, document_end) of sequences given as the lengths of their documents."""
    start, end = [], []
    for lengths in sequences:
        position = 0
        for length in lengths:
            start += [position] * length
            end += [position + length] * length
            position += length
    return (
        torch.tensor(start, dtype=torch.int32, device=DEVICE),
        torch.tensor(end, dtype=torch.int32, device=DEVICE),
    )


def run(
    empty: Guarded,
    qkv: torch.Tensor,
    d_out: torch.Tensor,
    length: int,
    kv_heads: int,
    head_dim: int,
    bounds: Documents = (None, None),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, d_qkv) of the kernels, each written into NaN."""
    heads, batch = d_out.shape[1] // head_dim, len(qkv) // length
    out = empty(*d_out.shape, dtype=qkv.dtype)
    lse = empty(batch, heads, length)
    d_qkv = empty(*qkv.shape, dtype=qkv.dtype)
    delta = empty(batch, heads, length)
    # Behind the rows of the last sequence lies what must never be read into a result.
    qkv, d_out = empty.filled(qkv), empty.filled(d_out)
    attention.forward(qkv, out, lse, length, kv_heads, head_dim, bounds[0])
    attention.backward(d_out, qkv, out, lse, d_qkv, delta, length, kv_heads, head_dim, *bounds)
    return out, lse, d_qkv


def check(
    empty: Guarded,
    dtype: torch.dtype,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bounds: Documents = (None, None),
) -> None:
    """Everything that the kernels write, against `reference`."""
    qkv = randn(batch * length, (heads + 2 * kv_heads) * head_dim, seed=1, dtype=dtype)
    d_out = randn(batch * length, heads * head_dim, seed=2, dtype=dtype)
    exact = reference(qkv, d_out, length, kv_heads, head_dim, bounds[0])
    out, lse, d_qkv = run(empty, qkv, d_out, length, kv_heads, head_dim, bounds)
    assert_close(out, exact[0])
    # Scores are fp32 however the operands are stored.
    assert_close(lse, exact[1], 1e-5)
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    for ours, theirs in zip(d_qkv.split(sizes, 1), exact[2].split(sizes, 1), strict=True):
        assert_close(ours, theirs)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """use(queries, keys) or use(forward, backward_q, backward_kv) fixes the blocks that launchers take."""

    def fix(*choice: int | Blocks) -> None:
        if isinstance(choice[0], Blocks):
            table = dict(zip(KERNELS, choice, strict=True))
        else:
            table = dict.fromkeys(KERNELS, Blocks(*choice, warps=4, stages=2))
        monkeypatch.setattr(attention, "blocks", lambda kernel, *_: table[kernel])

    return fix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "head_dim", "queries", "keys"),
    [
        (1, 17, 1, 1, 6, 16, 16),
        (2, 40, 4, 1, 16, 16, 16),
        (1, 70, 8, 1, 6, 32, 16),
        (2, 33, 4, 4, 16, 16, 32),
        (1, 70, 6, 2, 64, 16, 32),
        (1, 64, 2, 1, 24, 16, 16),
        (1, 40, 2, 1, 128, 32, 16),
        (1, 2, 2, 1, 16, 16, 16),
    ],
)
def test_one_document(
    empty: Guarded,
    use: Callable[..., None],
    dtype: torch.dtype,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    queries: int,
    keys: int,
) -> None:
    use(queries, keys)
    check(empty, dtype, batch, length, heads, kv_heads, head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (32, 16), (16, 32)])
@pytest.mark.parametrize(
    "lengths",
    [
        ([70], [70]),
        ([1, 15, 16, 32, 6], [64, 6]),
        ([1] * 20 + [50], [17, 31, 1, 21]),
    ],
    ids=["whole", "at block edges", "inside blocks"],
)
def test_documents(
    empty: Guarded,
    use: Callable[..., None],
    dtype: torch.dtype,
    queries: int,
    keys: int,
    lengths: tuple[list[int], list[int]],
) -> None:
    use(queries, keys)
    check(empty, dtype, 2, 70, 2, 1, 16, documents(*lengths))


@pytest.mark.skipif(DEVICE == "cuda", reason="a card has room for its own blocks only")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("head_dim", "document"), [(64, False), (64, True), (128, True)])
def test_shipped_blocks(
    empty: Guarded,
    use: Callable[..., None],
    capability: int,
    head_dim: int,
    document: bool,
) -> None:
    """The block sizes of every target, over several blocks of which the last is partial."""
    use(*(blocks(kernel, head_dim, torch.bfloat16, Target(capability)) for kernel in KERNELS))
    bounds = documents([20, 170, 10, 97]) if document else (None, None)
    check(empty, torch.float32, 1, 297, 2, 1, head_dim, bounds)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_this_device(empty: Guarded, dtype: torch.dtype) -> None:
    check(empty, dtype, 1, 200, 2, 1, 64)
    check(empty, dtype, 1, 150, 2, 1, 128, documents([20, 70, 60]))
    check(empty, dtype, 1, 70, 2, 2, 6, documents([30, 40]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_do_not_see_each_other(
    empty: Guarded,
    use: Callable[..., None],
    dtype: torch.dtype,
) -> None:
    """A sequence of three documents gives what the documents give alone."""
    use(16, 16)
    lengths, kv_heads, head_dim = [19, 1, 44], 2, 16
    qkv = randn(64, (4 + 2 * kv_heads) * head_dim, seed=3, dtype=dtype)
    d_out = randn(64, 4 * head_dim, seed=4, dtype=dtype)
    out, lse, d_qkv = run(empty, qkv, d_out, 64, kv_heads, head_dim, documents(lengths))
    first = 0
    for length in lengths:
        rows = slice(first, first + length)
        alone = run(empty, qkv[rows], d_out[rows], length, kv_heads, head_dim)
        assert_close(out[rows], alone[0].double(), TOLERANCE[dtype])
        assert_close(lse[:, :, rows], alone[1].double(), 1e-6)
        assert_close(d_qkv[rows], alone[2].double(), TOLERANCE[dtype])
        first += length


def test_large_scores_do_not_overflow(empty: Guarded, use: Callable[..., None]) -> None:
    """Scores up to hundreds, with rows whose first blocks are wholly masked."""
    use(16, 16)
    qkv = randn(48, 4 * 16, seed=5) * 12
    d_out = randn(48, 2 * 16, seed=6)
    bounds = documents([5, 30, 13])
    exact = reference(qkv, d_out, 48, 1, 16, bounds[0])
    assert float(exact[1].max()) > 300
    out, lse, d_qkv = run(empty, qkv, d_out, 48, 1, 16, bounds)
    assert_close(out, exact[0], 1e-4)
    assert_close(lse, exact[1], 1e-5)
    assert_close(d_qkv, exact[2], 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_again(empty: Guarded, dtype: torch.dtype) -> None:
    qkv = randn(160, 6 * 16, seed=7, dtype=dtype)
    d_out = randn(160, 4 * 16, seed=8, dtype=dtype)
    first, second = (run(empty, qkv, d_out, 80, 1, 16) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_boundaries_come_in_pairs(empty: Guarded) -> None:
    tensor, statistics = empty(16, 16), empty(1, 1, 16)
    start, _ = documents([16])
    with pytest.raises(ValueError, match="give both or neither"):
        attention.backward(tensor, tensor, tensor, statistics, tensor, statistics, 16, 1, 16, start, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_width_has_blocks(capability: int, dtype: torch.dtype) -> None:
    for kernel in KERNELS:
        for head_dim in range(2, 258, 2):
            choice = blocks(kernel, head_dim, dtype, Target(capability))
            assert choice.queries >= 16
            assert choice.keys >= 16
