"""`albor export --to hf`: what it writes, what transformers makes of it, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import runpy
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from export_cases import make_source
from run_cases import Result, call, tree
from safetensors.torch import load_file

from albor import checkpoint
from albor.checkpoint import find_latest
from albor.errors import AlborError
from albor.export import card, command, directory, hf
from albor.export.format import CannotCarry, Source
from albor.export.gate import AlborRuntime, compare
from albor.export.weights import hf_tensors, layout, read_hf_tensors

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def run(config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished run, seen from the directory that it was started in, and without an export."""
    monkeypatch.chdir(config.parent)
    shutil.rmtree(Path("runs/tiny/export"), ignore_errors=True)
    return Path("runs/tiny")


def export(*arguments: object) -> Result:
    return call("export", *arguments)


def content(path: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(path.read_text())
    return parsed


def written(source: Source, path: Path, dtype: str = "fp32") -> Path:
    path.mkdir()
    hf.FORMAT.write(source, path, dtype, lambda *_: None)
    return path


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


@pytest.mark.parametrize("dtype", TORCH)
def test_a_run_becomes_what_transformers_loads(run: Path, dtype: str, tmp_path: Path):
    """The command, the gate, the files, and each tensor's bits."""
    result = export(run, "--to", "hf", "--dtype", dtype, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "MISMATCH" not in result.out
    assert f"hf, {dtype}: albor and transformers " in result.out
    out = tmp_path / "out"
    assert names(out) >= {
        "README.md", "config.json", "gate.json", "generation_config.json", "loss.png", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    gate = content(out / "gate.json")
    assert gate["passed"] is True
    checks = ["tokens of texts", "logits", "greedy tokens", "stop"]
    assert [row["check"] for row in gate["checks"]] == checks + ["rounding"] * (dtype != "fp32")

    step = find_latest(run / "checkpoints")
    assert step is not None
    trained = load_file(step / "weights.safetensors")
    source = command.open_source(run)
    for name, tensor in hf_tensors(source.loaded.arena, source.architecture):
        assert torch.equal(load_file(out / "model.safetensors")[name], tensor.to(TORCH[dtype])), name
    embedding = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding, trained["embedding.tokens"].to(TORCH[dtype]))


def test_every_key_that_a_reader_may_have_another_default_for_is_there(run: Path, tmp_path: Path):
    assert export(run, "--to", "hf", "--out", tmp_path / "out").code == 0
    assert content(tmp_path / "out" / "config.json") == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 360, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 64, "initializer_range": 0.02,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True,
        "use_cache": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "dtype": "float32",
    }  # fmt: skip
    generation = content(tmp_path / "out" / "generation_config.json")
    assert generation["eos_token_id"] == [0, 3]
    assert "suppress_tokens" not in generation


def check(source: Source, path: Path) -> None:
    own = AlborRuntime(source.loaded, source.stop_ids)
    context = source.architecture.max_position_embeddings
    found = compare(own, "it", lambda: hf.Transformers(path), context, hf.FORMAT.tolerance("fp32"))
    assert found.passed is True, found.rows


MODELS = {
    "untied": {"tie_word_embeddings": False},
    "one-kv-head": {"num_key_value_heads": 1},
    "no-grouping": {"num_key_value_heads": 4},
    "one-head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "other-numbers": {
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-3,
        "hidden_size": 40,
        "intermediate_size": 51,
    },
    "padded-vocabulary": {"vocab_size": 448},
    "padded-and-untied": {"vocab_size": 448, "tie_word_embeddings": False},
    "eleven-layers": {"num_hidden_layers": 11},
    "muP": {"mup_base_width": 36},
    "muP-untied": {"mup_base_width": 12, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS)
def test_every_kind_of_model_computes_the_same_in_transformers(keys: dict[str, Any], tmp_path: Path):
    source = make_source(tmp_path, **keys)
    out = written(source, tmp_path / "out")
    check(source, out)
    stored = content(out / "config.json")
    assert stored["rope_theta"] == stored["rope_parameters"]["rope_theta"] == source.architecture.rope_theta
    assert stored["tie_word_embeddings"] is source.architecture.tie_word_embeddings
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not stored["tie_word_embeddings"]


def test_large_weights_are_in_shards(tmp_path: Path):
    """As transformers reads them, and as our own reader does."""
    source = make_source(tmp_path)
    out, limit = written(source, tmp_path / "out"), 40_000
    whole = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    hf.write_weights(source, out, "fp32", lambda *_: None, limit)
    index = content(out / "model.safetensors.index.json")
    shards = sorted(path.name for path in out.glob("model-*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 3
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for shard in shards:
        tensors = load_file(out / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == tensors.keys()
        assert sum(tensor.nbytes for tensor in tensors.values()) <= limit or len(tensors) == 1
    check(source, out)
    flat = torch.zeros_like(source.loaded.arena["weights"])
    pairs = (pair for shard in shards for pair in load_file(out / shard).items())
    read_hf_tensors(pairs, flat, source.architecture)
    for piece in layout(source.architecture):
        assert torch.equal(piece.of(flat), whole[piece.name])


def test_fp16_refuses_what_it_cannot_hold(tmp_path: Path):
    source = make_source(tmp_path)
    source.loaded.arena["weights"][5] = 70000.0
    with pytest.raises(CannotCarry, match=r"embed_tokens\.weight has values that fp16 cannot hold"):
        written(source, tmp_path / "out", "fp16")
    assert CannotCarry.exit_code == 2


def test_without_out_the_run_holds_it_and_keeps_it(run: Path):
    assert export(run, "--to", "hf").code == 0
    before = tree(run / "export" / "hf")
    assert "config.json" in before
    again = export(run, "--to", "hf")
    assert again.code == 2
    assert "export/hf exists, and is not an empty directory; give another name" in again.err
    assert tree(run / "export" / "hf") == before


def test_an_empty_directory_is_taken_and_a_file_is_not(run: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert export(run, "--to", "hf", "--out", tmp_path / "empty", "--no-check").code == 0
    (tmp_path / "file").write_text("mine")
    result = export(run, "--to", "hf", "--out", tmp_path / "file")
    assert result.code == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_is_exported_as_it_was(run: Path, tmp_path: Path):
    """An earlier one than the newest; the loss is told up to its step."""
    result = export(run / "checkpoints" / "step-00000020", "--to", "hf", "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    (line,) = result.out.splitlines()
    told = json.loads(line)
    assert (told["step"], told["planned_steps"], told["tokens"]) == (20, 24, 1920)
    assert "This is step 20 of the 24 that the run is to have." in result.err
    (one,) = told["exports"]
    assert (one["format"], one["dtype"], one["path"]) == ("hf", "fp32", str(tmp_path / "out"))
    assert one["files"] == {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}
    assert one["bytes"] == sum(one["files"].values())
    assert one["gate"]["passed"] is True
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| 1,920 |" in text
    assert "2,304" not in text
    assert "None were stored with the run" in text  # eval/final.json is of step 24
    assert "| Steps | 20 of the 24 that the run is to have, of 96 tokens each |" in text


# What stands in the way


def test_a_gate_that_finds_something_keeps_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    real = hf.config_json
    monkeypatch.setattr(hf, "config_json", lambda *given: real(*given) | {"rms_norm_eps": 1e-4})
    result = export(run, "--to", "hf", "--out", tmp_path / "deep" / "out")
    assert result.code == 1
    assert "MISMATCH" in result.out
    assert "hf: the gate found a mismatch, shown above, and nothing of that export is kept" in result.err
    assert list(tmp_path.iterdir()) == []
    told = json.loads(export(run, "--to", "hf", "--out", tmp_path / "out", "--json").out)
    assert told["exports"][0]["path"] is None
    assert told["exports"][0]["gate"]["passed"] is False


@pytest.mark.parametrize("arguments", [(), ("--no-check",)])
def test_what_is_not_checked_says_so(
    arguments: tuple[str, ...], run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    if not arguments:
        monkeypatch.setattr(hf, "find_spec", lambda name: None)
    result = export(run, "--to", "hf", "--out", tmp_path / "out", *arguments)
    assert result.code == 0
    why = (
        "--no-check was given" if arguments else "transformers is not installed; run: pip install 'albor[hf]'"
    )
    assert f"hf, fp32: NOT CHECKED: {why}" in result.out
    gate = content(tmp_path / "out" / "gate.json")
    assert gate["passed"] is None
    assert gate["unchecked"] == why


def test_usage_is_checked_before_anything_is_read(run: Path, tmp_path: Path):
    for arguments, said in (
        (("--to", "pickle"), "--to: pickle is no format; use hf, gguf, onnx"),
        (("--to", ","), "--to: names no format"),
        (("--to", "hf", "--dtype", "q8_0"), "--dtype: hf has no q8_0; use bf16, fp16, fp32"),
    ):
        result = export(run, *arguments, "--out", tmp_path / "out")
        assert result.code == 2
        assert said in result.err
        assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_is_named(run: Path, tmp_path: Path):
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    result = export(tmp_path / "unfinished", "--to", "hf")
    assert result.code == 1
    assert "unfinished" in result.err
    assert names(tmp_path / "unfinished") == {"checkpoints"}
    result = export(tmp_path / "nothing", "--to", "hf")
    assert result.code == 1
    assert len(result.err.splitlines()) == 1


def test_a_corrupt_checkpoint_is_named_and_leaves_nothing(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step-00000024"
    weights = bytearray((step / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (step / "weights.safetensors").write_bytes(weights)
    before = tree(tmp_path)
    result = export(step, "--to", "hf")
    assert result.code == 1
    assert "weights.safetensors: content differs from what was saved" in result.err
    assert tree(tmp_path) == before
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize("arguments", [("hf",), ("gguf", "--dtype", "q8_0"), ("onnx", "--no-check")])
def test_weights_that_are_no_numbers_are_not_exported(arguments: tuple[str, ...], run: Path, tmp_path: Path):
    newest = find_latest(run / "checkpoints")
    assert newest is not None
    weights = load_file(newest / "weights.safetensors")
    weights["blocks.01.mlp.down"][3, 5] = torch.nan
    files = {path.name: path.read_bytes() for path in newest.iterdir() if path.suffix in (".yaml", ".model")}
    saved = tmp_path / "run" / "checkpoints"
    state = checkpoint.read_state(newest)
    checkpoint.save(saved, 24, {"weights": weights}, state, files, checkpoint.Retention(keep_last=1))
    result = export(tmp_path / "run", "--to", *arguments, "--out", tmp_path / "out")
    assert result.code == 1
    assert "model.layers.1.mlp.down_proj.weight has values that are NaN or infinite" in result.err
    assert names(tmp_path) == {"run"}


def test_a_full_disk_is_seen_before_anything_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    result = export(run, "--to", "hf", "--out", tmp_path / "out")
    assert result.code == 1
    assert "and 0.0 MB are free on that disk; make room, or give another place with --out" in result.err
    assert list(tmp_path.iterdir()) == []


def test_what_is_needed_is_not_told_too_low(run: Path, tmp_path: Path):
    out = written(make_source(tmp_path), tmp_path / "out")
    source = command.open_source(run)
    for dtype, bound in (("fp32", 4), ("bf16", 2)):
        assert hf.FORMAT.needed_bytes(source, dtype) > bound * source.architecture.parameter_count
    total = sum(path.stat().st_size for path in out.iterdir())
    assert total < hf.FORMAT.needed_bytes(make_source(tmp_path), "fp32")


class Ends:
    """What an end in the middle of an export comes from: called in place of the card's writing."""

    @staticmethod
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @staticmethod
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    @staticmethod
    def terminated(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    @staticmethod
    def refused(*_: object) -> None:
        raise CannotCarry("this vocabulary is too strange")


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (Ends.full, 1, "out cannot be written: No space left on device; nothing of the export is kept"),
        (Ends.interrupted, 130, "interrupted"),
        (Ends.terminated, 143, "interrupted"),
        (Ends.refused, 2, "this vocabulary is too strange"),
    ],
)
def test_an_end_in_the_middle_leaves_nothing(
    end: Any, code: int, said: str, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    seen: list[set[str]] = []

    def stop(*given: object) -> None:
        seen.append(names(tmp_path / "a" / "b"))
        end()

    monkeypatch.setattr(hf, "write_card", stop)
    result = export(run, "--to", "hf", "--out", tmp_path / "a" / "b" / "out")
    assert seen == [{f".out.tmp-{os.getpid()}"}], "nothing had been begun"
    assert result.code == code
    assert said in result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_what_an_instant_death_left_is_cleared(run: Path, tmp_path: Path):
    dead, alive = tmp_path / ".out.tmp-999999999", tmp_path / f".out.tmp-{os.getppid()}"
    for leftover in (dead, alive):
        leftover.mkdir()
        (leftover / "model.safetensors").write_text("a part")
    assert export(run, "--to", "hf", "--out", tmp_path / "out", "--no-check").code == 0
    assert names(tmp_path) == {"out", alive.name}


def test_a_failing_rename_is_no_partial_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(directory.os, "rename", fail)
    with (
        pytest.raises(AlborError, match="Input/output error"),
        directory.new_directory(tmp_path / "out") as path,
    ):
        (path / "file").write_text("whole")
    assert list(tmp_path.iterdir()) == []


# The model card


def front_matter(text: str) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return parsed


@pytest.fixture
def text(run: Path, tmp_path: Path) -> str:
    out = tmp_path / "out"
    assert export(run, "--to", "hf", "--out", out, "--license", "apache-2.0", "--no-check").code == 0
    return (out / "README.md").read_text()


def test_the_card_says_what_the_run_recorded(text: str, config: Path):
    head = front_matter(text)
    assert (head["license"], head["library_name"]) == ("apache-2.0", "transformers")
    assert "albor" in head["tags"]
    for said in (
        "| Parameters | 30,112 |", "| Tokens | 2,304 |",
        "| Steps | 24, of 96 tokens each |", "0.0765, which is 0.4% of the 20", "![", "loss.png",
        "| Local files (files): corpus | 100.0% | 2,304 |", "| held-out documents | perplexity |",
        "AutoModelForCausalLM", "--to gguf", "mlx_lm", "The weights: apache-2.0",
    ):  # fmt: skip
        assert said in text, said
    assert str(config.parent) not in text, "a path of this machine"


def test_the_card_has_what_albor_eval_stored_of_this_step(run: Path, tmp_path: Path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    found = {
        "step": 24,
        "limit": None,
        "results": {
            "piqa": {"acc": {"value": 0.625, "stderr": 0.0112}, "items": 1838, "chance": 0.5},
            "lambada_openai": {"perplexity": {"value": 30.5, "stderr": None}, "items": 5153},
        },
    }
    for name, content in {
        "all-step-00000024": found,
        "all-step-00000020": found
        | {"step": 20, "results": {"boolq": {"acc": {"value": 1.0, "stderr": None}}}},
        "piqa-first-9": found | {"limit": 9, "results": {"piqa": {"acc": {"value": 0.1, "stderr": None}}}},
        "text-x": {"step": 24, "text": {"path": "/home/somebody/x.txt", "bits_per_byte": 1.25}},
    }.items():
        (copy / "eval" / f"{name}.json").write_text(json.dumps(content))
    (copy / "eval" / "damaged.json").write_text('{"step": 24,')
    assert export(copy, "--to", "hf", "--out", tmp_path / "out", "--no-check").code == 0
    text = (tmp_path / "out" / "README.md").read_text()
    for row in (
        "| piqa | acc | 62.50% ± 1.12% |", "| lambada_openai | perplexity | 30.50 |",
        "| piqa, its first 9 items only | acc | 10.00% |", "| x.txt | bits per byte | 1.2500 |",
    ):  # fmt: skip
        assert row in text, row
    assert "boolq" not in text, "it was measured on another checkpoint"
    assert "somebody" not in text


def test_the_code_in_the_card_runs(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As it stands there, beside a directory with the model's name."""
    assert export(run, "--to", "hf", "--out", tmp_path / "tiny", "--no-check").code == 0
    text = (tmp_path / "tiny" / "README.md").read_text()
    (tmp_path / "card.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    monkeypatch.chdir(tmp_path)
    called = runpy.run_path("card.py")
    assert called["inputs"]["input_ids"][0, 0] == 0, "the text does not begin a document"
    assert capsys.readouterr().out.startswith("<|endoftext|>Once upon")


def test_the_picture_is_one(run: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    assert export(run, "--to", "hf", "--out", tmp_path / "out", "--no-check").code == 0
    data = (tmp_path / "out" / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert len(data) > 5000


def test_without_matplotlib_the_card_has_the_table_and_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(card, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert export(run, "--to", "hf", "--out", tmp_path / "out", "--no-check").code == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "loss.png").exists()
    assert "![" not in text
    assert "There is no picture, because matplotlib was not installed" in text
    assert "| Tokens | Training loss | Validation loss |" in text
    assert "| 2,304 |" in text


def test_a_checkpoint_alone_has_a_card_that_claims_nothing(run: Path, tmp_path: Path):
    shutil.copytree(run / "checkpoints" / "step-00000024", tmp_path / "a" / "b" / "step-00000024")
    out = tmp_path / "out"
    assert export(tmp_path / "a" / "b" / "step-00000024", "--to", "hf", "--out", out, "--no-check").code == 0
    text = (out / "README.md").read_text()
    assert front_matter(text)["license"] == "unknown"
    assert "The run's record of its loss was not there" in text
    assert "None were stored with the run" in text
    assert "named none (`albor export --license`)" in text


def test_the_card_names_data_sets_of_the_hub(tmp_path: Path):
    source = make_source(tmp_path)
    data = {
        "sources": [
            {"kind": "hf", "path": "owner/set", "subset": "small", "weight": 3.0},
            {"kind": "files", "path": "/home/somebody/private/notes.txt"},
        ]
    }
    config = source.config.model_copy(
        update={"data": type(source.config.data).model_validate({"sequence_length": 16, **data})}
    )
    other = Source(
        source.run, source.checkpoint,
        source.state | {"loader": {"per_source": [3, 1]}},
        source.loaded._replace(config=config), None,
    )  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    card.write_card(other, out, "hf", "bf16")
    text = (out / "README.md").read_text()
    assert front_matter(text)["datasets"] == ["owner/set"]
    link = "[owner/set](https://huggingface.co/datasets/owner/set), small, split train"
    assert f"| {link} | 75.0% | 48 |" in text
    assert "| Local files (files): notes.txt | 25.0% | 16 |" in text
    assert "somebody" not in text
