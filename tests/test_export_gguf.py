"""`albor export --to gguf`: the file, what llama.cpp makes of it, and every way in which it may be wrong."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as library
import jinja2
import numpy as np
import pytest
import sentencepiece
import tokenizers
from export_cases import make_source
from run_cases import Result, call

from albor.data.tokenizer import Tokenizer
from albor.data.tokenizer_json import PRESETS
from albor.export import gguf, llama_cpp, rounding
from albor.export.command import _check as check_export
from albor.export.command import open_source
from albor.export.format import CannotCarry, Source
from albor.export.gate import CORPUS, AlborRuntime, Gate, NotInstalled, compare
from albor.export.gguf_types import BLOCKS, FILE_TYPES, MissingLibrary, decode, encode, stored_bytes
from albor.export.gguf_vocabulary import vocabulary
from albor.export.ollama import CHAT_TEMPLATE, modelfile
from albor.export.tokenizer_files import CHAT_TEMPLATE as JINJA
from albor.export.weights import hf_tensors
from albor.model.parameters import named_tensors

QUANTISABLE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}  # whole blocks of 256


def silent(stage: str, done: int, total: int | None) -> None:
    """No progress."""


def write(source: Source, directory: Path, dtype: str = "fp32") -> Path:
    """The export in `directory`, a new one; returns the weights' file."""
    directory.mkdir(parents=True)
    gguf.FORMAT.check(source, dtype)
    gguf.FORMAT.write(source, directory, dtype, silent)
    (path,) = directory.glob("*.gguf")
    return path


def judge(source: Source, path: Path, dtype: str = "fp32") -> Gate:
    """What the gate says of the export beside `path`; the source's weights are rounded."""
    return check_export(source, gguf.FORMAT, path.parent, dtype, True, silent)


def failed(found: Gate) -> list[str]:
    return [row.check for row in found.rows if not row.passed]


def keys_of(path: Path) -> dict[str, Any]:
    fields = library.GGUFReader(path).fields
    return {key: entry.contents() for key, entry in fields.items() if not key.startswith("GGUF.")}


# The command


@pytest.fixture
def run(config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished run, seen from the directory that it was started in, and without an export."""
    monkeypatch.chdir(config.parent)
    shutil.rmtree(Path("runs/tiny/export"), ignore_errors=True)
    return Path("runs/tiny")


def export(*arguments: object) -> Result:
    return call("export", *arguments)


@pytest.mark.parametrize("dtype", ["fp32", "q8_0"])
def test_a_run_becomes_what_llama_cpp_loads(run: Path, dtype: str, tmp_path: Path):
    out = tmp_path / "out"
    result = export(run, "--to", "gguf", "--dtype", dtype, "--out", out, "--license", "apache-2.0")
    assert result.code == 0, result.err + result.out
    weights = f"tiny-{dtype.upper()}.gguf"
    expected = {weights, "Modelfile", "template", "params", "README.md", "gate.json"}
    assert {path.name for path in out.iterdir()} >= expected
    assert not list(out.glob("*.tmp"))
    gate = json.loads((out / "gate.json").read_text())
    assert gate["passed"] is True
    assert gate["runtime"].startswith("llama.cpp (xllamacpp 20")
    checks = ["tokens of texts", "logits", "greedy tokens", "stop"]
    assert [row["check"] for row in gate["checks"]] == checks + ["rounding"] * (dtype != "fp32")
    assert dtype == "fp32" or "perplexity" in result.out
    tensors = {tensor.name: tensor for tensor in library.GGUFReader(out / weights).tensors}
    assert "output.weight" not in tensors  # the head is tied
    source = open_source(run)
    for name, tensor in hf_tensors(source.loaded.arena, source.architecture):
        stored = tensors[gguf.gguf_name(name)]
        if "q_proj" not in name and "k_proj" not in name:
            values = decode(np.asarray(stored.data), stored.tensor_type.name)
            assert np.array_equal(values, gguf.FORMAT.rounded(name, tensor, dtype).numpy()), name


def test_a_k_type_that_rows_are_too_short_for_is_refused_before_anything_is_written(run: Path):
    result = export(run, "--to", "gguf", "--dtype", "q4_k_m")
    assert result.code == 2
    assert "256 values of a row together" in result.err
    assert "--dtype q8_0, q5_1 or q4_1" in result.err
    assert not (run / "export").exists()


def test_a_mismatch_keeps_nothing_and_says_so(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gguf, "arranged", lambda name, tensor, model: tensor)
    result = export(run, "--to", "gguf", "--dtype", "fp32")
    assert result.code == 1
    assert "MISMATCH" in result.out
    assert not (run / "export").exists()


# What is in the file


def test_the_file_has_every_key_that_a_reader_looks_for(tmp_path: Path):
    source = replace(make_source(tmp_path / "run", vocab_size=403), model_license="mit")
    keys = keys_of(write(source, tmp_path / "out", "bf16"))
    tokens = keys.pop("tokenizer.ggml.tokens")
    assert keys.pop("tokenizer.ggml.suppress_tokens") == [400, 401, 402]
    scores, types = keys.pop("tokenizer.ggml.scores"), keys.pop("tokenizer.ggml.token_type")
    assert keys == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "random",
        "general.size_label": "0.1M",
        "general.license": "mit",
        "general.quantization_version": 2,
        "general.file_type": 32,
        "llama.vocab_size": 403,
        "llama.context_length": 96,
        "llama.embedding_length": 48,
        "llama.block_count": 3,
        "llama.feed_forward_length": 80,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5, rel=1e-6),
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 12,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.chat_template": JINJA,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }
    assert tokens[:5] == ["<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>", "<0x00>"]
    assert types[:5] == [3, 2, 3, 3, 6]
    assert set(types[5:260]) == {6}
    assert set(types[260:400]) == {1}
    assert types[400:] == [5, 5, 5]
    assert scores[260:263] == [0.0, -1.0, -2.0]


def test_the_types_are_the_library_s():
    for name, (block, size) in BLOCKS.items():
        assert library.GGML_QUANT_SIZES[library.GGMLQuantizationType[name]] == (block, size)
    names = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16"}
    for dtype, file_type in FILE_TYPES.items():
        name = names.get(dtype, f"MOSTLY_{dtype.upper()}")
        assert library.LlamaFileType[name] == file_type.number, dtype


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind not in ("F32", "F16", "BF16")])
def test_every_quantisation_is_as_close_as_its_bits_allow(kind: str):
    values = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    encoded = encode(values, kind)
    assert encoded.nbytes == stored_bytes(values.size, kind)
    error = np.sqrt(np.mean((decode(encoded, kind) - values) ** 2))
    bits = int(kind[1])
    # Of a block whose largest value is about 2.3, in steps of 2 * 2.3 / 2^bits, each off by step / sqrt(12).
    step = 2 * 2.3 / 2**bits
    assert 0.3 * step / math.sqrt(12) < error < 1.4 * step / math.sqrt(12)


def test_a_file_is_within_what_the_disk_was_asked_for(tmp_path: Path):
    source = make_source(tmp_path / "run", **QUANTISABLE)
    for dtype in ("fp32", "bf16", "q4_0"):
        path = write(source, tmp_path / dtype, dtype)
        widened = 0 if dtype == "fp32" else 4 * source.architecture.parameter_count
        used = sum(file.stat().st_size for file in path.parent.iterdir()) + widened
        assert 0.2 * gguf.FORMAT.needed_bytes(source, dtype) < used <= gguf.FORMAT.needed_bytes(source, dtype)


# llama.cpp's verdict on sound files


@pytest.mark.parametrize(
    ("dtype", "keys"),
    [
        (
            "fp32",
            {"tie_word_embeddings": False, "vocab_size": 700, "rope_theta": 500000.0, "rms_norm_eps": 1e-6},
        ),
        ("fp16", {"num_key_value_heads": 4, "mup_base_width": 36}),
        ("bf16", {"max_position_embeddings": 300}),
        ("q4_k_m", QUANTISABLE | {"tie_word_embeddings": False}),
    ],
)
def test_llama_cpp_computes_what_albor_computes(dtype: str, keys: dict[str, Any], tmp_path: Path):
    source = make_source(tmp_path / "run", **keys)
    for name, tensor in named_tensors(source.loaded.arena["weights"], source.architecture).items():
        if "hidden_size" in keys and not name.endswith("norm"):
            tensor.mul_(0.4)  # at twice the width, so that rounding activations to 8 bits is no chaos
    path = write(source, tmp_path / "out", dtype)
    found = judge(source, path, dtype)
    assert found.passed is True, found.rows
    assert found.rows[2].compared == "64 tokens"
    assert [entry.name for entry in path.parent.glob("*.tmp")] == []
    names = {tensor.name for tensor in library.GGUFReader(path).tensors}
    assert ("output.weight" in names) is not source.architecture.tie_word_embeddings


def hf_tokenizer(preset: str, tokens: int = 330) -> Tokenizer:
    """A byte-level BPE with this way to cut a text, trained on the gate's corpus."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=preset == "llama-bpe"))
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    cut = {"version": "1.0", "pre_tokenizer": PRESETS[preset], "model": empty}
    model.pre_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(cut)).pre_tokenizer
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([*CORPUS, Path(__file__).read_text()], trainer)
    model.add_tokens(["<tool>"])
    return Tokenizer(model.to_str().encode(), "hf")


def with_tokenizer(source: Source, words: Tokenizer) -> Source:
    return replace(source, loaded=source.loaded._replace(tokenizer=words))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_byte_level_tokenizer_cuts_every_text_as_albor_does(preset: str, tmp_path: Path):
    words = hf_tokenizer(preset)
    source = with_tokenizer(make_source(tmp_path / "run", vocab_size=words.vocab_size), words)
    path = write(source, tmp_path / "out")
    keys = keys_of(path)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", preset)
    assert keys["tokenizer.ggml.token_type"].count(4) == 1  # <tool>
    found = judge(source, path)
    assert found.passed is True, found.rows


# Every way of being wrong: what is done to a sound file, and the check that sees it


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return make_source(tmp_path_factory.mktemp("run"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the keys of a file, and tensors, which are among them by their names."""
    reader = library.GGUFReader(path)
    entries = {key: entry for key, entry in reader.fields.items() if not key.startswith("GGUF.")}
    values = {key: entry.contents() for key, entry in entries.items()}
    tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    both: dict[str, Any] = values | {name: data for name, (data, _) in tensors.items()}
    change(both)
    writer = library.GGUFWriter(path, "llama")
    for key, entry in entries.items():
        if key != "general.architecture" and key in both:
            inner = entry.types[-1] if entry.types[0] == library.GGUFValueType.ARRAY else None
            writer.add_key_value(key, both[key], entry.types[0], sub_type=inner)
    for name, (_, kind) in tensors.items():
        if name in both:
            writer.add_tensor(name, both[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assign(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda both: both.update({key: value})


def token_type(token: int, kind: int) -> Callable[[dict[str, Any]], None]:
    return lambda both: both["tokenizer.ggml.token_type"].__setitem__(token, kind)


def swap(first: str, second: str) -> Callable[[dict[str, Any]], None]:
    return lambda both: both.update({first: both[second], second: both[first]})


def swap_pieces(both: dict[str, Any]) -> None:
    tokens = both["tokenizer.ggml.tokens"]
    tokens[300], tokens[301] = tokens[301], tokens[300]


def flat_scores(both: dict[str, Any]) -> None:
    both["tokenizer.ggml.scores"] = [0.0] * len(both["tokenizer.ggml.scores"])


def half_split(both: dict[str, Any]) -> None:
    """One layer's keys as Hugging Face has them: 2 heads, 12 wide."""
    rows = both["blk.1.attn_k.weight"]
    both["blk.1.attn_k.weight"] = np.ascontiguousarray(
        rows.reshape(2, 6, 2, -1).swapaxes(1, 2).reshape(rows.shape)
    )


FP32_MUTATIONS = {
    "keys are not interleaved": (half_split, "logits"),
    "gate and up change places": (swap("blk.2.ffn_gate.weight", "blk.2.ffn_up.weight"), "logits"),
    "norms change places": (swap("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"), "logits"),
    "a space in front": (assign("tokenizer.ggml.add_space_prefix", True), "tokens of texts"),
    "no scores": (flat_scores, "tokens of texts"),
    "two pieces change places": (swap_pieces, "tokens of texts"),
    "a byte is a piece": (token_type(4 + 0x0A, 1), "tokens of texts"),
    "a marker is a piece that texts have": (token_type(2, 4), "tokens of texts"),
    "the end of a document is another token": (assign("tokenizer.ggml.eos_token_id", 300), "stop"),
    "the end of a turn is another token": (assign("tokenizer.ggml.eot_token_id", 300), "stop"),
    "the context is too short": (assign("llama.context_length", 64), "logits"),
    "the rotary width is another": (assign("llama.rope.dimension_count", 10), "loads"),
    "a tensor is missing": (lambda both: both.pop("blk.1.ffn_down.weight"), "loads"),
    "no vocabulary": (lambda both: both.pop("tokenizer.ggml.tokens"), "loads"),
    "the architecture has more blocks": (assign("llama.block_count", 4), "loads"),
}


@pytest.mark.parametrize("name", FP32_MUTATIONS)
def test_a_broken_file_is_refused(name: str, source: Source, tmp_path: Path):
    change, check = FP32_MUTATIONS[name]
    path = write(source, tmp_path / "out")
    rewrite(path, change)
    assert failed(judge(source, path))[:1] == [check]


# In less than fp32, llama.cpp's own rounding would hide these.
NUMBERS = {
    "epsilon": assign("llama.attention.layer_norm_rms_epsilon", 3e-5),
    "rotary base": assign("llama.rope.freq_base", 10100.0),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_wrong_number_shows_in_a_bf16_file_too(name: str, tmp_path: Path):
    source = make_source(tmp_path / "run")
    path = write(source, tmp_path / "out", "bf16")
    rewrite(path, NUMBERS[name])
    assert "logits" in failed(judge(source, path, "bf16"))


def test_a_rounding_that_makes_another_model_is_refused(source: Source, monkeypatch: pytest.MonkeyPatch):
    own = AlborRuntime(source.loaded, source.stop_ids)
    before = own.look_before()
    noise = np.random.default_rng(0).standard_normal((len(before.positions), 400)).astype(np.float32)
    old, new = before.perplexities(own.logits(before.tokens)[before.positions])
    assert new == pytest.approx(old, rel=1e-4)
    old, new = before.perplexities(before.log_probabilities + 3 * noise)
    assert new > 2 * old
    old, new = before.perplexities(before.log_probabilities + 0.05 * noise)
    assert old < new < 1.01 * old


def test_perplexities_are_those_of_their_definition():
    halves = np.log(np.array([[0.5, 0.5], [0.5, 0.5]]))
    before = rounding.Before([0, 1, 0], [0, 1], halves)
    assert before.perplexities(halves + 7)[0] == pytest.approx(2)
    assert before.perplexities(halves + 7)[1] == pytest.approx(2)
    assert before.perplexities(np.log([[0.25, 0.75]] * 2))[1] == pytest.approx(1 / math.sqrt(0.25 * 0.75))


# What is refused


def test_what_a_missing_library_means(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(source, tmp_path / "out")
    real = importlib.util.find_spec
    missing: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else real(name))
    missing.add("xllamacpp")
    with pytest.raises(NotInstalled, match=r"xllamacpp is not installed; run: pip install 'albor\[gguf\]'"):
        llama_cpp.LlamaCpp(path)
    found = judge(source, path)
    assert found.passed is None
    assert "xllamacpp is not installed" in str(found.unchecked)
    gguf.quantiser.cache_clear()
    with pytest.raises(MissingLibrary, match=r"its llama\.cpp computes the K types"):
        gguf.FORMAT.check(make_source(tmp_path / "run", **QUANTISABLE), "q6_k")
    missing.add("gguf")
    with pytest.raises(MissingLibrary, match="gguf is not installed") as raised:
        gguf.FORMAT.check(source, "fp32")
    assert raised.value.exit_code == 2


def test_values_beyond_fp16_are_refused(tmp_path: Path):
    source = make_source(tmp_path / "run")
    named_tensors(source.loaded.arena["weights"], source.architecture)["blocks.01.mlp.down"][0, 0] = 1e5
    with pytest.raises(
        CannotCarry, match=r"layers\.1\.mlp\.down_proj\.weight has values that fp16 cannot hold"
    ):
        write(source, tmp_path / "out", "fp16")


def test_rows_that_are_no_whole_blocks_are_refused(source: Source):
    with pytest.raises(CannotCarry, match=r"a row of model\.embed_tokens\.weight has 48; take --dtype fp16"):
        gguf.FORMAT.check(source, "q8_0")


def sentencepiece_model(tmp_path: Path, **options: Any) -> Tokenizer:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(CORPUS[:2]) * 3 + "unk> im_end|> an unk> a\n" * 20)
    settings: dict[str, Any] = {
        "model_type": "bpe", "vocab_size": 340, "byte_fallback": True, "normalization_rule_name": "identity",
        "add_dummy_prefix": False, "remove_extra_whitespaces": False, "bos_id": -1, "eos_id": 0, "unk_id": 1,
        "eos_piece": "<|endoftext|>", "minloglevel": 2, "hard_vocab_limit": False,
    }  # fmt: skip
    prefix = str(tmp_path / "model")
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=prefix, **settings | options)
    return Tokenizer((tmp_path / "model.model").read_bytes())


def test_a_sentencepiece_model_that_is_no_bpe_is_refused(tmp_path: Path):
    words = sentencepiece_model(tmp_path, model_type="unigram")
    with pytest.raises(CannotCarry, match="of the BPE kind"):
        vocabulary(words, words.vocab_size)


def test_a_vocabulary_that_could_spell_a_control_token_is_refused(tmp_path: Path):
    words = sentencepiece_model(tmp_path, split_by_unicode_script=False)
    with pytest.raises(CannotCarry, match="take the text <unk> for the token of that name"):
        vocabulary(words, words.vocab_size)


def test_pieces_of_the_user_s_own_are_found_as_sentencepiece_finds_them(tmp_path: Path):
    words = sentencepiece_model(tmp_path, user_defined_symbols=["fox\u2581jumps", "lazy dog", "<b>"])
    source = with_tokenizer(make_source(tmp_path / "run"), words)
    path = write(source, tmp_path / "out")
    assert keys_of(path)["tokenizer.ggml.token_type"].count(4) == 2
    found = judge(source, path)
    assert found.passed is True, found.rows


def edited(words: Tokenizer, change: Callable[[dict[str, Any]], object]) -> Tokenizer:
    content = json.loads(words.model)
    change(content)
    return Tokenizer(json.dumps(content).encode(), "hf")


def test_a_way_to_cut_texts_that_llama_cpp_has_not_is_refused():
    words = hf_tokenizer("smollm")
    assert vocabulary(words, 340).pre == "smollm"
    for change in (
        lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False),
        lambda content: content.update(pre_tokenizer=None),
        lambda content: content["model"].update(ignore_merges=True),
        lambda content: content.update(normalizer={"type": "Prepend", "prepend": "x"}),
    ):
        with pytest.raises(CannotCarry, match="gpt-2, smollm, llama-bpe"):
            vocabulary(edited(words, change), 340)
    free = edited(words, lambda content: content["added_tokens"][-1].update(lstrip=True))
    with pytest.raises(CannotCarry, match="where the added token '<tool>' may stand"):
        vocabulary(free, 340)


def test_merges_that_spell_a_control_token_are_refused():
    def spell(content: dict[str, Any]) -> None:
        content["model"]["merges"].append(["<|im", "_end|>"])
        for text in ("<|im", "_end|>"):
            content["model"]["vocab"][text] = len(content["model"]["vocab"]) + 5

    with pytest.raises(CannotCarry, match=r"take the text <\|im_end\|>"):
        vocabulary(edited(hf_tokenizer("gpt-2"), spell), 350)


# llama.cpp as a program


def test_a_file_that_is_cut_short_does_not_load(source: Source, tmp_path: Path):
    path = write(source, tmp_path / "out")
    os.truncate(path, path.stat().st_size // 2)
    found = judge(source, path)
    assert failed(found) == ["loads"]
    assert "llama.cpp does not load it" in found.rows[0].found
    assert "error loading model" in found.rows[0].found


def test_a_server_that_dies_is_a_finding_and_leaves_nothing(source: Source, tmp_path: Path):
    path = write(source, tmp_path / "out", "bf16")
    opened = []

    def open_and_kill() -> llama_cpp.LlamaCpp:
        runtime = llama_cpp.LlamaCpp(path)
        opened.append(runtime)
        os.kill(runtime._stored._process.pid, signal.SIGKILL)
        return runtime

    own = AlborRuntime(source.loaded, source.stop_ids)
    found = compare(own, "llama.cpp", open_and_kill, 96, gguf.FORMAT.tolerance("bf16"))
    assert failed(found) == ["tokens of texts"]
    assert "llama.cpp gives no answer" in found.rows[0].found
    (runtime,) = opened
    assert runtime._wide is not None
    assert runtime._wide._process.returncode is not None
    assert not list(path.parent.glob("*.tmp"))


def test_a_widened_file_has_the_same_keys_and_values(source: Source, tmp_path: Path):
    path = write(source, tmp_path / "out", "fp16")
    wide = tmp_path / "wide.gguf"
    assert llama_cpp.widen(path, wide) is True
    assert keys_of(wide) == keys_of(path) | {"general.file_type": 0}
    stored = {tensor.name: tensor.data for tensor in library.GGUFReader(path).tensors}
    for tensor in library.GGUFReader(wide).tensors:
        assert tensor.tensor_type == library.GGMLQuantizationType.F32
        assert np.array_equal(tensor.data, stored[tensor.name].astype(np.float32))
    assert llama_cpp.widen(wide, tmp_path / "again.gguf") is False
    assert not (tmp_path / "again.gguf").exists()


# Ollama


def test_the_modelfile_stops_and_samples_as_albor_does(source: Source, tmp_path: Path):
    path = write(replace(source, model_license="mit"), tmp_path / "out")
    assert (path.parent / "Modelfile").read_text() == (
        "FROM ./random-FP32.gguf\n"
        f'TEMPLATE """{CHAT_TEMPLATE}"""\n'
        "PARAMETER num_ctx 96\n"
        'PARAMETER stop "<|endoftext|>"\n'
        'PARAMETER stop "<|im_end|>"\n'
        "PARAMETER temperature 0.8\n"
        "PARAMETER top_k 0\n"
        "PARAMETER top_p 1.0\n"
        "PARAMETER repeat_penalty 1.0\n"
        'LICENSE """mit"""\n'
    )
    assert (path.parent / "template").read_text() == CHAT_TEMPLATE
    assert json.loads((path.parent / "params").read_text())["stop"] == ["<|endoftext|>", "<|im_end|>"]


def test_a_tokenizer_without_turns_has_no_chat_template(source: Source, tmp_path: Path):
    words = sentencepiece_model(tmp_path)
    path = write(with_tokenizer(source, words), tmp_path / "out")
    assert "tokenizer.chat_template" not in keys_of(path)
    assert 'TEMPLATE """{{ .Prompt }}"""' in (path.parent / "Modelfile").read_text()
    assert "LICENSE" not in modelfile("x.gguf", "", {}, None)


def test_the_template_in_go_says_what_the_one_in_jinja_says():
    """Go's own engine is not here; the constructs that are used mean the same after this translation."""
    translated = (
        CHAT_TEMPLATE.replace("{{ range .Messages }}", "{% for message in messages %}")
        .replace("{{ end }}", "{% endfor %}")
        .replace("{{ .Role }}", "{{ message.role }}")
        .replace("{{ .Content }}", "{{ message.content }}")
    )
    messages = [
        {"role": role, "content": f"{role} says\n\n hello "} for role in ("system", "user", "assistant")
    ]
    environment = jinja2.Environment(keep_trailing_newline=True)
    expected = environment.from_string(JINJA).render(messages=messages, add_generation_prompt=True)
    assert environment.from_string(translated).render(messages=messages) == expected
