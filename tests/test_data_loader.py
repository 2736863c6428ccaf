"""The loader: each window once per epoch, exact shares, and a position that is a few integers."""

import json
import time
from collections import Counter

import numpy as np
import pytest

from albor.data.loader import Loader, Permutation, validation_batches
from albor.data.shards import ShardWriter, TokenStream
from albor.errors import DataError

T = 8


@pytest.fixture
def make_stream(tmp_path):
    def make(tokens, first=0, shard_tokens=37):
        """A stream that counts upwards, so that a token tells where it came from."""
        directory = tmp_path / f"stream-{first}-{tokens}"
        writer = ShardWriter(directory, 1 << 20, "t" * 64, shard_tokens)
        writer.add(np.arange(first, first + tokens), text_bytes=tokens)
        writer.close()
        return TokenStream.open(directory)

    return make


def draw(loader, batches, batch_size=4, length=T):
    """(batches * B, T) tokens; checks that targets are the tokens one further."""
    tokens, targets = (np.full((batch_size, length), -7, dtype=np.int64) for _ in range(2))
    drawn = []
    for _ in range(batches):
        loader.next(tokens, targets)
        np.testing.assert_array_equal(targets, tokens + 1)
        drawn.append(tokens.copy())
    return np.concatenate(drawn)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_permutation_is_one(n):
    order = Permutation(n, 1, 2, 3)
    assert sorted(order(i) for i in range(n)) == list(range(n))


def test_permutations_differ_by_every_part_of_the_key_and_look_random():
    n = 1000
    orders = [
        [Permutation(n, *key)(i) for i in range(n)]
        for key in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (0, 1, 0))
    ]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert sum(a == b for a, b in zip(first, second, strict=True)) < 10
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.1
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.1


def test_the_order_never_changes():
    """A change here would make every saved position point to other tokens."""
    assert [Permutation(1000, 1337, 0, 0)(i) for i in range(8)] == [83, 591, 986, 913, 735, 195, 90, 689]


def test_each_window_once_per_epoch_in_another_order_each_time(make_stream):
    stream = make_stream(T * 24 + 3)  # the last three tokens fill no window
    loader = Loader([stream], [1.0], T, 4, seed=5)
    epochs = [draw(loader, 6)[:, 0] // T for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(24))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert loader.epochs() == [3.0]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_out_arrays_are_filled_in_place(make_stream, dtype):
    tokens, targets = (np.full((2, T), -7, dtype=dtype) for _ in range(2))
    Loader([make_stream(100)], [1.0], T, 2, seed=0).next(tokens, targets)
    np.testing.assert_array_equal(tokens, tokens[:, :1] + np.arange(T))
    np.testing.assert_array_equal(targets, tokens + 1)


def test_the_same_seed_gives_the_same_stream_and_another_seed_another(make_stream):
    stream = make_stream(1000)
    first, again, other = (draw(Loader([stream], [1.0], T, 4, seed=seed), 20) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_stream_that_is_split_anywhere_is_the_unsplit_one(make_stream):
    streams, weights = (
        [make_stream(100), make_stream(333, first=1000), make_stream(50, first=9000)],
        [0.5, 0.3, 0.2],
    )
    whole = draw(Loader(streams, weights, T, 3, seed=9), 30, 3)
    for split in range(31):
        before = Loader(streams, weights, T, 3, seed=9)
        first = draw(before, split, 3) if split else whole[:0]
        state = json.loads(json.dumps(before.state()))
        after = Loader(streams, weights, T, 3, seed=9, state=state)
        second = draw(after, 30 - split, 3) if split < 30 else whole[:0]
        np.testing.assert_array_equal(np.concatenate([first, second]), whole)


def test_the_micro_batch_size_does_not_change_the_order(make_stream):
    streams = [make_stream(200), make_stream(300, first=1000)]
    one = draw(Loader(streams, [1, 2], T, 1, seed=3), 24, 1)
    eight = draw(Loader(streams, [1, 2], T, 8, seed=3), 3, 8)
    np.testing.assert_array_equal(one, eight)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.2, 0.1], [1, 1, 1, 5], [1e-3, 1.0], [3.3]])
def test_shares_are_exact_at_every_moment(make_stream, weights):
    streams = [make_stream(200, first=1000 * i) for i in range(len(weights))]
    loader = Loader(streams, weights, T, 1, seed=0)
    shares = np.array(weights) / sum(weights)
    counts = Counter()
    for n in range(1, 400):
        counts[int(draw(loader, 1, 1)[0, 0]) // 1000] += 1
        drawn = np.array([counts[i] for i in range(len(weights))])
        bound = 1 if len(weights) <= 2 else 2
        assert (np.abs(drawn - n * shares) < bound).all()
    assert loader.state() == {"samples": 399, "per_source": drawn.tolist()}


@pytest.mark.parametrize(
    "state",
    [
        {"samples": 3, "per_source": [3]},
        {"samples": 4, "per_source": [1, 2]},
        {"samples": 1, "per_source": [2, -1]},
    ],
)
def test_a_position_of_other_sources_is_refused(make_stream, state):
    streams = [make_stream(100), make_stream(200)]
    with pytest.raises(DataError, match="does not belong"):
        Loader(streams, [1, 1], T, 4, seed=0, state=state)


def test_a_source_without_a_window_is_refused(make_stream):
    Loader([make_stream(T + 1)], [1], T, 4, seed=0)
    with pytest.raises(DataError, match="source 1 has no window of 8 tokens"):
        Loader([make_stream(T + 1), make_stream(T)], [1, 1], T, 4, seed=0)


def test_a_batch_takes_less_than_a_millisecond(make_stream):
    streams = [make_stream(100_000, shard_tokens=1 << 20), make_stream(90_000, shard_tokens=1 << 20)]
    loader = Loader(streams, [0.6, 0.4], 256, 8, seed=0)
    tokens, targets = np.empty((8, 256), dtype=np.int64), np.empty((8, 256), dtype=np.int64)
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        loader.next(tokens, targets)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3


@pytest.mark.parametrize("length", [2, T, T + 1, T + 2, 4 * T + 1, 100, 101])
def test_validation_covers_every_target_once(make_stream, length):
    batches = list(validation_batches(make_stream(length), T, sequences=1000, batch_size=4))
    seen = np.concatenate([targets[targets >= 0] for _, targets in batches])
    assert sorted(seen) == list(range(1, length))
    for tokens, targets in batches:
        assert tokens.shape == targets.shape == (4, T)
        assert tokens.dtype == targets.dtype == np.int64
        assert (targets >= -1).all()
        np.testing.assert_array_equal(targets[targets >= 0], tokens[targets >= 0] + 1)


def test_validation_that_is_bounded_is_spread_evenly_and_always_the_same(make_stream):
    stream = make_stream(T * 1000 + 5)
    first, second = (list(validation_batches(stream, T, sequences=20, batch_size=4)) for _ in range(2))
    assert len(first) == 5
    for (tokens, targets), (again, targets_again) in zip(first, second, strict=True):
        np.testing.assert_array_equal(tokens, again)
        np.testing.assert_array_equal(targets, targets_again)
    starts = np.concatenate([tokens[:, 0] for tokens, _ in first])
    assert len(starts) == 20
    assert starts[0] == 0
    assert set(np.diff(starts)) <= {T * 50, T * 51}


@pytest.mark.parametrize("sequences", [1, 7, 20, 1000])
def test_validation_reads_the_same_text_in_batches_of_any_size(make_stream, sequences):
    stream = make_stream(T * 50 + 5)

    def windows(batch_size):
        batches = list(validation_batches(stream, T, sequences, batch_size))
        assert all(tokens.shape == (batch_size, T) for tokens, _ in batches)
        rows = [row for batch in batches for row in zip(*batch, strict=True)]
        return [(tokens.tolist(), targets.tolist()) for tokens, targets in rows if (targets >= 0).any()]

    assert len(windows(1)) == min(sequences, 51)
    for batch_size in (2, 3, 8, 64):
        assert windows(batch_size) == windows(1)


def test_validation_of_nothing(make_stream):
    assert list(validation_batches(make_stream(1), T, sequences=5, batch_size=4)) == []
