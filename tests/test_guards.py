"""Every guard that the fault matrix names is dropped once, and something then fails (docs/reliability.md).

What takes a process of its own is in mutations.py. Here are the guards whose tests do not: one is taken out
of the function that has it, and the test that rests on it is called, and must fail for the stated reason. And
here the page is held against all of them: no row without a guard, no guard that nobody drops.
"""

from __future__ import annotations

import errno
import inspect
import re
import textwrap
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import pytest
import test_background_save
import test_checkpoint
import test_data_shards
import test_disk
import test_divergence
import test_faults
import test_hostile_checkpoint
import test_hostile_input
import test_power_cut
import test_preemption
import test_resume_policy
import test_trainer
from mutations import MUTATIONS
from test_tensorfile import HOSTILE

from albor import checkpoint, tensorfile
from albor.errors import DamagedCheckpoint
from albor.manifest import Manifest
from albor.memory.plan import STATE_BUFFERS
from albor.strictjson import LARGEST
from albor.tensorfile import tensor_specs
from albor.train.saver import Saver
from albor.train.step import Accumulated, Trainer, TrainState
from albor.train.time_limit import TimeLimit

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
ROWS = range(1, 27)
Patch = pytest.MonkeyPatch
Test = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)


# Two tests that other guards rest on


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_fits_no_tensors_is_refused(tmp_path: Path, name: str):
    """Of itself, whatever the manifest beside it says."""
    (tmp_path / "t.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(DamagedCheckpoint, match=r"t\.safetensors"):
        tensor_specs(tmp_path / "t.safetensors")


def test_a_header_that_is_too_large_is_not_read(tmp_path: Path):
    path, size = tmp_path / "t.safetensors", LARGEST + 1
    with open(path, "wb") as file:
        file.write(size.to_bytes(8, "little"))
        file.truncate(8 + size)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedCheckpoint):
            tensor_specs(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20, "it was read"
    finally:
        tracemalloc.stop()


# Guards that are dropped here


def edited(function: FunctionType | MethodType, guard: str, instead: str) -> CodeType:
    """The code of `function` with one piece of its source replaced, which must be there just once."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(guard) == 1, f"{function.__qualname__} has {guard!r} {source.count(guard)} times"
    made: dict[str, Any] = {}
    code = compile(source.replace(guard, instead), inspect.getfile(function), "exec")
    exec(code, dict(function.__globals__), made)
    new = made[function.__name__]
    return getattr(new, "__func__", new).__code__


def edit(function: Any, guard: str, instead: str, patch: Patch) -> None:
    code = edited(function, guard, instead)
    patch.setattr(getattr(function, "__func__", function), "__code__", code)


def without(function: Any, guard: str, instead: str = "if False:") -> Callable[[Patch], None]:
    """Takes `guard` out of `function` wherever that is already known."""
    return partial(edit, function, guard, instead)


def a_skipped_step_moves(*names: str) -> Callable[[Patch], None]:
    """These buffers are updated all the same."""

    def drop(patch: Patch) -> None:
        edit(Trainer.update, "if verdict.updates:", "if True:", patch)
        update = Trainer.update

        def only(self: Trainer, sums: Accumulated, state: TrainState) -> Any:
            kept = [name for name in STATE_BUFFERS if name in self.arena and name not in names]
            before = {name: self.arena[name].clone() for name in kept}
            result, after = update(self, sums, state)
            for name in () if result.updated else kept:
                self.arena[name].copy_(before[name])
            return result, after

        patch.setattr(Trainer, "update", only)

    return drop


def keep(margin: Callable[[TimeLimit], float]) -> Callable[[Patch], None]:
    """Only that much time before the limit."""
    return lambda patch: patch.setattr(TimeLimit, "margin", property(margin))


class Drop(NamedTuple):
    """A row's guard, how it is taken away, which test then fails, of which parameters, and with what."""

    row: int
    drop: Callable[[Patch], None]
    test: Test
    given: Mapping[str, Any]
    shows: str


VERIFY, HEADER = checkpoint.verify, tensorfile._parse_header
DAMAGE = test_checkpoint.test_random_damage_is_always_found_and_the_previous_checkpoint_is_used
STRANGE = test_checkpoint.test_missing_unexpected_linked_and_renamed_are_found
SKIPPED = test_trainer.test_a_non_finite_value_never_reaches_a_weight
POISON = {"dtype": "float32", "poke": test_trainer.poke_gradient, "value": float("nan")}
NOT_REFUSED = "DID NOT RAISE"

DROPS: dict[str, Drop] = {
    # 5: the disk refuses
    "a save is tried again": Drop(
        5,
        without(Saver._try_to_write, "self.session.config.checkpoint.retries", "0"),
        test_disk.test_a_disk_that_recovers_costs_a_pause,
        {"point": "save.begin", "number": errno.ENOSPC},
        r"\(1, 1\) == \(0, 3\)",
    ),
    "the pauses of a stopped run are few": Drop(
        5,
        without(Saver._try_to_write, "math.inf if asked is None else _STOPPING", "math.inf"),
        test_disk.test_the_pauses_of_a_run_that_was_stopped_before_are_bounded,
        {},
        r"diff: 8\.0 != 3",
    ),
    # 6: what is not what was saved
    "every file's hash is compared": Drop(
        6, without(VERIFY, "if hashed and _sha256(path / name) != expected.sha256:"), DAMAGE, {}, "at \\d+ of"
    ),
    "every file's size is compared": Drop(
        6,
        without(VERIFY, "if present[name].st_size != expected.size:"),
        test_checkpoint.test_a_file_that_was_cut_off_is_said_to_be,
        {},
        "content differs",
    ),
    "there is no file more, and none less": Drop(
        6,
        without(VERIFY, "sorted(present.keys() - {MANIFEST} ^ manifest.files.keys())", "()"),
        STRANGE,
        {},
        NOT_REFUSED,
    ),
    "a directory has the manifest's step": Drop(
        6, without(VERIFY, "if named and int(named[1]) != manifest.step:"), STRANGE, {}, NOT_REFUSED
    ),
    "a manifest vouches for itself": Drop(
        6, without(Manifest.from_bytes, "if manifest.to_bytes() != raw:"), DAMAGE, {}, r"of manifest\.json"
    ),
    # 9: the time is up
    "time is kept for saving": Drop(
        9,
        keep(lambda limit: limit._longest_step),
        test_preemption.test_a_run_stops_in_time_and_goes_on,
        {},
        ">= 100",
    ),
    "it is that of two of the longest saves": Drop(
        9,
        keep(lambda limit: limit._longest_save + limit._longest_step),
        test_preemption.test_the_margin_is_two_of_the_longest_saves_and_the_longest_step,
        {},
        r"2 \* 250",
    ),
    "a save in the background has its own time": Drop(
        9,
        without(TimeLimit.set, "3 if config.checkpoint.background else 2", "2"),
        test_preemption.test_a_save_in_the_background_may_be_under_way,
        {},
        r"3 \* 250",
    ),
    # 10: a skipped step
    "a skipped step leaves the weights": Drop(
        10, a_skipped_step_moves("weights", "master"), SKIPPED, POISON, "same_bits"
    ),
    "a skipped step leaves the moments": Drop(
        10, a_skipped_step_moves("moments.first", "moments.second"), SKIPPED, POISON, "same_bits"
    ),
    "a skipped step leaves the bias correction's count": Drop(
        10,
        without(Trainer.update, "int(verdict.updates)", "1"),
        SKIPPED,
        POISON,
        r"\(2, 2, 1\) == \(2, 1, 1\)",
    ),
    # 26: what a stranger made
    "tensors lie one behind the other": Drop(
        26,
        without(HEADER, "if start != place:"),
        test_a_header_that_fits_no_tensors_is_refused,
        {"name": "overlapping tensors"},
        NOT_REFUSED,
    ),
    "tensors fill the file": Drop(
        26,
        without(HEADER, "if place != data_bytes:"),
        test_a_header_that_fits_no_tensors_is_refused,
        {"name": "data left over"},
        NOT_REFUSED,
    ),
    "a tensor's shape is that of its bytes": Drop(
        26,
        without(HEADER, "!= end - start:", "is None:"),
        test_a_header_that_fits_no_tensors_is_refused,
        {"name": "shape larger than the data"},
        NOT_REFUSED,
    ),
    "the header's size is bounded": Drop(
        26,
        without(tensorfile._read_header, "min(size - _LENGTH_BYTES, LARGEST)", "size - _LENGTH_BYTES"),
        test_a_header_that_is_too_large_is_not_read,
        {},
        "it was read",
    ),
    "a manifest's names are the directory's": Drop(
        26,
        without(VERIFY, "sorted(present.keys() - {MANIFEST} ^ manifest.files.keys())", "()"),
        test_hostile_checkpoint.test_names_that_lead_out,
        {"name": "../../x"},
        "^KeyError: '../../x'",
    ),
    "a linked checkpoint is none": Drop(
        26,
        without(VERIFY, "if _STEP_NAME.fullmatch(path.name) and path.is_symlink():"),
        test_hostile_checkpoint.test_links_and_pipes,
        {},
        NOT_REFUSED,
    ),
    "all files are regular ones": Drop(
        26,
        without(VERIFY, "if not stat.S_ISREG(status.st_mode):"),
        test_hostile_checkpoint.test_links_and_pipes,
        {},
        "instead of",
    ),
}


@pytest.mark.parametrize("guard", DROPS)
def test_a_test_fails_without_its_guard(guard: str, request: pytest.FixtureRequest):
    _, drop, test, given, shows = DROPS[guard]
    fixtures = [name for name in inspect.signature(test).parameters if name not in given]
    arguments = {**given, **{name: request.getfixturevalue(name) for name in fixtures}}
    with pytest.MonkeyPatch.context() as patch:
        drop(patch)
        with pytest.raises(BaseException) as failed:  # noqa: PT011  # pytest.fail raises no Exception
            test(**arguments)
    said = f"{failed.type.__name__}: {failed.value}"
    assert re.search(shows, said), said


# Tests that drop a guard themselves, and show what then happens

ELSEWHERE: dict[str, tuple[int, Test]] = {
    "the new one before the old ones go": (
        4, test_power_cut.test_without_the_new_one_first_a_power_cut_shows,
    ),
    "what was written is read back": (5, test_disk.test_without_reading_back_such_a_disk_is_believed),
    "the room is looked at first": (
        5, test_disk.test_a_run_without_room_for_two_checkpoints_does_not_begin,
    ),
    "a signal in an attempt is heeded": (5, test_disk.test_a_signal_in_an_attempt_leaves_one_more),
    "a monotonic clock": (9, test_preemption.test_a_jump_of_the_clock_is_no_reason_to_stop),
    "a read that fails is tried again": (
        14, test_data_shards.test_without_trying_again_a_moment_ends_the_run,
    ),
    "a shard's hash is compared": (15, test_data_shards.test_without_its_guard_damage_would_be_read),
    "ids are compared when they are read": (
        16, test_data_shards.test_without_its_guard_damage_would_be_read,
    ),
    "ids are compared before they are narrowed": (
        16, test_data_shards.test_without_its_guard_a_wide_id_would_wrap_around,
    ),
    "the data's hash is compared": (
        17, test_hostile_input.test_another_tokenizer_than_the_checkpoints_is_refused,
    ),
    "the table's refusals": (18, test_resume_policy.test_what_is_refused_would_make_another_run),
    "auto takes no GPU's run to the CPU": (
        18, test_resume_policy.test_a_gpus_run_goes_on_on_the_cpu_only_where_that_is_written,
    ),
    "the number of values is bounded": (19, test_hostile_input.test_without_its_guard_it_would_explode),
    "the depth is bounded": (19, test_hostile_input.test_without_its_guard_it_would_explode),
    "the loss is averaged over the whole batch": (20, test_faults.test_row_20),
    "the mask": (21, test_faults.test_row_21),
    "a copy of each buffer": (
        23, test_background_save.test_without_a_copy_of_its_own_it_is_a_later_state,
    ),
    "a copy of the state": (
        23, test_background_save.test_without_a_copy_of_its_own_the_state_is_a_later_one,
    ),
    "the wait for the one under way": (
        23, test_background_save.test_without_waiting_for_the_one_under_way_it_is_a_later_state,
    ),
    "the update that waits for the copies": (
        23, test_background_save.test_an_update_waits_for_copies_that_come_late,
    ),
    "the step, not the name or the time": (
        24, test_checkpoint.test_neither_the_clock_nor_the_order_of_names_says_which_is_newest,
    ),
    "nothing is unpickled": (26, test_hostile_checkpoint.test_the_payload_runs_where_it_is_unpickled),
    "the depth of JSON is bounded": (
        26, test_hostile_checkpoint.test_without_the_bound_deep_json_is_no_value_error,
    ),
    "a checkpoint's tokenizer is the data's": (
        26, test_hostile_checkpoint.test_a_tokenizer_that_is_not_the_datas,
    ),
    "shapes and memory are looked at first": (
        26,
        test_hostile_checkpoint.test_a_configuration_that_is_too_large_is_refused_before_anything_is_allocated,
    ),
}  # fmt: skip


# The page


def dropped() -> dict[int, set[str]]:
    """The guards that are dropped somewhere, by row."""
    found: dict[int, set[str]] = defaultdict(set)
    for guard, mutation in MUTATIONS.items():
        for case in mutation.cases:
            found[int(case.split()[0])].add(guard)
    for guard, drop in DROPS.items():
        found[drop.row].add(guard)
    for guard, (row, _) in ELSEWHERE.items():
        found[row].add(guard)
    for guard, (row, _) in test_divergence.GUARDS.items():
        found[int(re.findall(r"row_(\d+)", inspect.getsource(row))[0])].add(guard)
    found[4].update(test_power_cut.DROPPED)
    return found


def guards_on_the_page() -> dict[int, set[str]]:
    """By row; the last column has them, between semicolons."""
    cells = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    found: dict[int, set[str]] = defaultdict(set)
    for row, cell in cells:
        found[int(row)].update(cell.split("; "))
    return found


@pytest.mark.parametrize("row", ROWS)
def test_the_page_names_the_guards_that_are_dropped(row: int):
    """All of them in their row, and no other; and each row has one."""
    assert dropped()[row]
    assert guards_on_the_page()[row] == dropped()[row]


def test_there_is_no_other_row():
    assert guards_on_the_page().keys() == set(ROWS) == dropped().keys()


def test_the_tests_that_drop_a_guard_are_there():
    """By the names under which pytest finds them, and they speak of what they drop."""
    for guard, (_, test) in ELSEWHERE.items():
        assert test.__name__.startswith("test_"), guard
        assert Path(inspect.getfile(test)).name.startswith("test_"), guard
        assert re.search(r"without|guard|What cannot fail", inspect.getsource(test)), guard


def test_a_guard_that_is_no_longer_there_cannot_be_dropped():
    with pytest.raises(AssertionError, match="has 'if nothing:' 0 times"):
        edited(checkpoint.verify, "if nothing:", "if False:")
