"""What `albor vram-estimate` says: JSON, text, exit codes, and suggestions that hold what they promise."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import make_config
from rich.console import Console

from albor.config import RunConfig, check_algebra
from albor.configfile import load_config
from albor.errors import ConfigError, DoesNotFit
from albor.memory.cards import Hardware, find_gpu
from albor.memory.estimate import Estimate, check_fits, estimate, plan_for_training
from albor.memory.report import render, run_estimate
from albor.memory.suggest import apply, as_overrides
from albor.units import GIB, MIB

CONFIGS = Path(__file__).parent.parent / "configs"
KEYS = {
    *("calibrated", "outside_sources", "cost", "notes"),
    *("parameters", "flops_per_token", "tokens_per_step", "device_bytes", "pinned_bytes", "host_bytes"),
    *("capacity_bytes", "fits", "capacity_source", "groups", "outside", "holders", "buffers"),
    *("peak_phase", "phases", "device", "compute_dtype", "attention", "suggestions"),
}


def _config(name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("albor.memory.devices.installed_gpu", lambda: None)


def _run(
    config: RunConfig, gpu: str | None = None, vram: int | None = None, *, as_json: bool = False
) -> tuple[int, str]:
    out = io.StringIO()
    code = run_estimate(config, gpu, vram, as_json, Console(file=out, width=80))
    return code, out.getvalue()


def test_json_has_the_documented_keys() -> None:
    code, text = _run(_config("pretrain-350m"), "RTX 4090", as_json=True)
    answer = json.loads(text)
    assert code == 0
    assert set(answer) == KEYS
    assert (answer["parameters"], answer["tokens_per_step"]) == (398_509_056, 131_072)
    assert answer["fits"] is True
    assert answer["device_bytes"] == sum(answer["groups"].values())
    assert answer["suggestions"] == []
    assert set(answer["buffers"][0]) == {
        *("name", "shape", "dtype", "bytes", "place", "group", "first_phase", "last_phase", "offset"),
    }
    ends = [b["offset"] + b["bytes"] for b in answer["buffers"] if b["place"] == "device"]
    assert 0 <= answer["device_bytes"] - max(ends) < 256


@pytest.mark.usefixtures("no_gpu")
def test_exit_codes() -> None:
    config = _config("pretrain-350m")
    assert _run(config, "RTX 4090")[0] == 0
    assert _run(config, vram=8 * GIB)[0] == 4
    code, text = _run(config, as_json=True)
    assert code == 0
    assert json.loads(text)["fits"] is json.loads(text)["capacity_bytes"] is None
    assert "--gpu NAME" in _run(config)[1]
    with pytest.raises(ConfigError, match="did you mean RTX 4090"):
        _run(config, "RTX 4900")


def test_capacity_is_compared_with_everything() -> None:
    config = _config("pretrain-50m")
    needed = estimate(config, "L4").required_bytes
    assert needed == estimate(config, "L4").device_bytes + sum(estimate(config, "L4").outside.values())
    assert estimate(config, "L4", needed).fits is True
    assert estimate(config, "L4", needed - 1).fits is False


@pytest.mark.parametrize(
    ("overrides", "vram"),
    [
        ((), 8 * GIB + 900 * MIB),
        ((), 5 * GIB + 900 * MIB),
        (("train.accumulator=gpu",), 10 * GIB),
        (("train.micro_batch_size=32", "train.gradient_accumulation_steps=4"), 22 * GIB),
        (("data.sequence_length=2048", "train.micro_batch_size=64"), 9 * GIB),
        (("train.micro_batch_size=1", "train.head_chunk_tokens=1024"), 6 * GIB + 750 * MIB),
        (("train.micro_batch_size=1", "train.recompute=block", "train.head_chunk_tokens=256"), 6 * GIB),
    ],
)
def test_suggestions_fit_when_applied(overrides: tuple[str, ...], vram: int) -> None:
    before = estimate(_config("pretrain-350m", *overrides), vram=vram)
    assert before.fits is False
    assert len(before.suggestions) <= 5
    for suggestion in before.suggestions:
        config = _config("pretrain-350m", *overrides, *suggestion.overrides.split())
        after = estimate(config, vram=vram)
        assert check_algebra(config) == []
        assert after.fits is True
        assert after.required_bytes == suggestion.required_bytes < before.required_bytes
        assert config.tokens_per_step == before.config.tokens_per_step


def test_suggestions_are_the_smallest_changes() -> None:
    enough = estimate(_config("pretrain-350m")).required_bytes
    first, second, third = estimate(_config("pretrain-350m"), vram=enough - 165 * MIB).suggestions
    assert first.overrides.startswith("train.head_chunk_tokens=")
    assert second.overrides == "train.micro_batch_size=2 train.gradient_accumulation_steps=64"
    assert third.overrides == "train.recompute=cheap"


def test_a_suggestion_is_one_that_would_be_accepted() -> None:
    """One sequence at a time would take more micro-batches than a step can have."""
    most = 2**63 - 1
    overrides = (f"train.micro_batch_size={most}", "train.gradient_accumulation_steps=2")
    config = _config("pretrain-350m", *overrides)
    two = {"train.micro_batch_size": 2, "train.gradient_accumulation_steps": most}
    enough = estimate(apply(config, two)).required_bytes
    fitting, tight = (estimate(config, vram=size).suggestions for size in (enough, enough - 1))
    assert as_overrides(two) in [suggestion.overrides for suggestion in fitting]
    assert tight
    for suggestion in tight:
        _config("pretrain-350m", *overrides, *suggestion.overrides.split())


def test_every_setting_is_tried_where_a_smaller_one_needs_more() -> None:
    """One sequence of flash attention needs more than two: the others are tried too."""
    config = make_config(
        num_hidden_layers=1, hidden_size=512, num_attention_heads=4, num_key_value_heads=1,
        intermediate_size=256, vocab_size=512, max_position_embeddings=4096, sequence_length=4096,
        micro_batch_size=16, gradient_accumulation_steps=1, head_chunk_tokens=256, attention="flash",
    )  # fmt: skip
    two, one = (
        {"train.micro_batch_size": size, "train.gradient_accumulation_steps": 16 // size} for size in (2, 1)
    )
    enough, more = (estimate(apply(config, change), "RTX 4090").required_bytes for change in (two, one))
    assert more > enough
    card = find_gpu("RTX 4090")
    tight = Estimate.of(config, Hardware("cuda", card.name, card, enough))
    assert tight.fits is False
    assert as_overrides(two) in [suggestion.overrides for suggestion in tight.suggestions]


def test_a_model_that_is_too_large_is_said_to_be() -> None:
    code, text = _run(_config("pretrain-350m"), vram=2 * GIB)
    assert code == 4
    assert "take a smaller model" in text


def test_shorter_sequences_come_last() -> None:
    # One long sequence, everything else at its smallest already.
    config = make_config(
        sequence_length=1 << 16,
        max_position_embeddings=1 << 16,
        micro_batch_size=1,
        head_chunk_tokens=256,
        recompute="block",
    )
    tight = estimate(config, vram=estimate(config).required_bytes - MIB)
    (suggestion,) = tight.suggestions
    assert suggestion.overrides == "data.sequence_length=32768 train.gradient_accumulation_steps=2"


@pytest.mark.usefixtures("no_gpu")
def test_training_is_refused_in_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config("pretrain-350m", "device=cpu", "train.precision=fp32")
    monkeypatch.setattr("albor.memory.devices.host_capacity", lambda: 8 * GIB)
    target = plan_for_training(config)
    assert target.device == "cpu"
    with pytest.raises(DoesNotFit) as refusal:
        check_fits(target)
    shown = _run(config)[1]
    assert target.verdict[1:] in shown
    for line in target.advice:
        assert line in shown
        assert line in str(refusal.value)


def test_an_unknown_capacity_refuses_nothing() -> None:
    check_fits(Estimate.of(_config("pretrain-350m"), Hardware("cuda", "a card that does not say")))


def test_host_memory_counts_where_the_run_is_here() -> None:
    here = Hardware("cuda", "a card", capacity_bytes=80 * GIB, host_capacity_bytes=3 * GIB)
    target = Estimate.of(_config("pretrain-350m"), here)
    assert target.fits is False
    assert "of host memory" in target.verdict
    assert [s.overrides for s in target.suggestions] == ["train.accumulator=gpu"]
    assert replace(target, hardware=replace(here, host_capacity_bytes=64 * GIB)).fits is True


def test_on_the_cpu_all_places_are_one() -> None:
    target = estimate(_config("quickstart", "device=cpu"))
    plan = target.plan
    places = sum(plan.size(place) for place in ("device", "pinned", "host"))
    assert target.required_bytes == places + sum(target.outside.values())
    with pytest.raises(ConfigError, match="ask about a GPU"):
        estimate(target.config, gpu="L4")


def test_a_card_without_bf16_is_named() -> None:
    assert "use train.precision=fp16" in (estimate(_config("quickstart"), "T4").fallback or "")
    assert estimate(_config("quickstart", "train.precision=fp16"), "T4").fallback is None
    assert len(estimate(_config("quickstart"), "T4").notes) == 1
    half, shown = estimate(_config("quickstart", "train.precision=fp16"), "V100 16GB"), io.StringIO()
    assert half.notes == ["torch for CUDA 13 does not know V100 16GB: install one built for CUDA 12."]
    render(half, Console(file=shown, width=80))
    assert half.notes[0] in shown.getvalue()
    assert estimate(_config("quickstart"), "L4").peak_flops == 121e12
    assert estimate(_config("quickstart", "train.precision=fp32"), "L4").peak_flops is None


def test_text_is_plain_and_narrow_in_a_pipe() -> None:
    config = _config("pretrain-350m")
    arena = f"{estimate(config, 'RTX 4090').device_bytes:,} bytes"
    _, text = _run(config, "RTX 4090")
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    for expected in ("moments", "CUDA context (estimate)", "Peak     head", arena, "Fits"):
        assert expected in text


def test_a_terminal_gets_colour_and_bars() -> None:
    out = io.StringIO()
    terminal = Console(file=out, width=80, force_terminal=True)
    run_estimate(_config("pretrain-350m"), None, 8 * GIB, False, terminal)
    assert "\x1b[1;31mDoes not fit" in out.getvalue()
    assert "█" in out.getvalue()


def test_the_answer_takes_no_torch_little_memory_and_little_time() -> None:
    """40 MB and a quarter of a second on an idle machine; of the time the bound allows for a busy one."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom rich.console import Console\nimport albor.cli\n"
        "from albor.configfile import load_config\nfrom albor.memory.report import run_estimate\n"
        f"config = load_config(Path({str(CONFIGS / 'pretrain-350m.yaml')!r}))\n"
        "assert run_estimate(config, 'RTX 4090', None, False, Console()) == 0\n"
        "assert not {'torch', 'numpy', 'sentencepiece', 'matplotlib', 'pynvml'} & set(sys.modules)\n"
        "status = Path('/proc/self/status')\n"
        "if status.exists():  # of this program: what its parent held does not count\n"
        "    peak = next(row for row in status.read_text().splitlines() if row.startswith('VmHWM'))\n"
        "    assert int(peak.split()[1]) < 60_000, peak\n"
        "assert time.process_time() < 1, time.process_time()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
