"""`albor export --to onnx`: the graph, what onnxruntime makes of it, and what the gate must see.

To trace a graph takes seconds, so what can be tested on one that is there is tested on it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_cases import make_source
from run_cases import call

from albor.errors import ConfigError
from albor.export import hf, onnx_runtime
from albor.export import onnx as onnx_format
from albor.export.format import CannotCarry, Source
from albor.export.gate import AlborRuntime, Gate, NotInstalled, compare
from albor.export.onnx_runtime import OnnxRuntime
from albor.export.weights import layout

CLOSE = 1e-5  # of the largest logit: fp32 on both sides


def written(source: Source, path: Path, dtype: str = "fp32") -> Path:
    path.mkdir(parents=True)
    onnx_format.FORMAT.write(source, path, dtype, lambda *_: None)
    return path


def gate(source: Source, directory: Path, dtype: str = "fp32") -> Gate:
    """What the command does after writing: the weights are rounded as they were stored, and compared."""
    for piece in layout(source.architecture):
        values = piece.of(source.loaded.arena["weights"])
        values.copy_(onnx_format.FORMAT.rounded(piece.name, values, dtype))
    own = AlborRuntime(source.loaded, source.stop_ids)
    runtime = lambda: onnx_format.FORMAT.open_runtime(directory, dtype)  # noqa: E731
    context, tolerance = source.architecture.max_position_embeddings, onnx_format.FORMAT.tolerance(dtype)
    return compare(own, "onnxruntime", runtime, context, tolerance)


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, as a share of the largest logit."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return make_source(tmp_path_factory.mktemp("run"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def exported(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(source, tmp_path_factory.mktemp("onnx") / "fp32")


@pytest.fixture(scope="module")
def exported_fp16(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(source, tmp_path_factory.mktemp("onnx") / "fp16", "fp16")


@pytest.fixture(scope="module")
def beside(source: Source, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`exported` once more, with its weights in a file of their own."""
    directory = tmp_path_factory.mktemp("onnx") / "beside"
    shutil.copytree(exported, directory, ignore=shutil.ignore_patterns("model.onnx"))
    onnx_format.write_model(source, directory, "fp32", lambda *_: None, external_above=0)
    return directory


@pytest.fixture(scope="module")
def runtime(exported: Path) -> OnnxRuntime:
    return OnnxRuntime(exported, CLOSE)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_run_becomes_what_onnxruntime_runs(
    dtype: str, config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The command on a trained run, its gate, and the files."""
    monkeypatch.chdir(config.parent)
    out = tmp_path / "out"
    result = call("export", "runs/tiny", "--to", "onnx", "--dtype", dtype, "--out", out)
    assert result.code == 0, result.err
    assert f"onnx, {dtype}: albor and onnxruntime " in result.out
    assert {path.name for path in out.iterdir()} >= {
        "README.md", "config.json", "gate.json", "generation_config.json", "model.onnx",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    found = json.loads((out / "gate.json").read_text())
    assert found["passed"] is True
    assert [row["check"] for row in found["checks"]][:4] == [
        "tokens of texts",
        "logits",
        "greedy tokens",
        "stop",
    ]
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def shape_of(value: onnx.ValueInfoProto) -> list[str | int]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_names_and_shapes_are_those_that_other_runtimes_look_for(
    dtype: str, exported: Path, exported_fp16: Path
):
    directory = {"fp32": exported, "fp16": exported_fp16}[dtype]
    onnx.checker.check_model(str(directory / "model.onnx"), full_check=True)
    model = onnx.load(directory / "model.onnx")
    assert model.ir_version == 10
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    past, both = "past_sequence_length", "past_sequence_length + sequence_length"
    inputs: dict[str, list[str | int]] = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", both],
        "position_ids": ["batch_size", "sequence_length"],
    }
    outputs: dict[str, list[str | int]] = {"logits": ["batch_size", "sequence_length", 400]}
    for layer in range(2):
        for part in ("key", "value"):
            inputs[f"past_key_values.{layer}.{part}"] = ["batch_size", 2, past, 12]
            outputs[f"present.{layer}.{part}"] = ["batch_size", 2, both, 12]
    assert {value.name: shape_of(value) for value in model.graph.input} == inputs
    assert {value.name: shape_of(value) for value in model.graph.output} == outputs
    floats = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16}[dtype]
    types = {
        value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)
    }
    for name, found in types.items():
        cache = name.startswith(("past", "present"))
        ids = name in ("input_ids", "attention_mask", "position_ids")
        wanted = floats if cache else onnx.TensorProto.INT64 if ids else onnx.TensorProto.FLOAT
        assert found == wanted, name


def test_nothing_of_this_machine_is_in_the_graph(exported: Path):
    content = (exported / "model.onnx").read_bytes()
    for name in (str(Path(__file__).parent.parent), "site-packages", "stack_trace", "torch"):
        assert name.encode() not in content, name


def test_every_shape_of_model_passes_the_gate(tmp_path: Path):
    """MODEL is tied, has groups of two, and as many ids as its tokenizer; fp16 is held against that."""
    keys = {"tie_word_embeddings": False, "num_key_value_heads": 1, "vocab_size": 416, "num_hidden_layers": 1}
    keys["mup_base_width"] = 36
    source = make_source(tmp_path / "run", **keys)
    found = gate(source, written(source, tmp_path / "out"))
    assert found.passed is True, found


def test_fp16_passes_the_gate(exported_fp16: Path, tmp_path: Path):
    source = make_source(tmp_path / "run", num_hidden_layers=2)  # of its own, for its weights are rounded
    found = gate(source, exported_fp16, "fp16")
    assert found.passed is True, found


def test_weights_beside_the_graph_are_the_same_model(exported: Path, beside: Path, source: Source):
    """The nodes are the same to the byte, though they were traced anew."""
    apart = onnx.load(beside / "model.onnx", load_external_data=False)
    together = onnx.load(exported / "model.onnx")
    assert [node.SerializeToString() for node in apart.graph.node] == [
        node.SerializeToString() for node in together.graph.node
    ]
    outside = {tensor.name for tensor in apart.graph.initializer if tensor.external_data}
    assert outside >= {piece.name for piece in layout(source.architecture)}
    onnx.checker.check_model(str(beside / "model.onnx"), full_check=True)
    inside = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in together.graph.initializer}
    onnx.load_external_data_for_model(apart, str(beside))
    for tensor in apart.graph.initializer:
        assert np.array_equal(onnx.numpy_helper.to_array(tensor), inside[tensor.name]), tensor.name
    assert gate(source, beside).passed is True


# What a graph computes where the gate does not look: against transformers


@pytest.fixture(scope="module")
def llama(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("hf")
    hf.FORMAT.write(source, directory, "fp32", lambda *_: None)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_positions_are_those_that_are_given(runtime: OnnxRuntime, llama: Any):
    """With gaps, and in an order of their own: a graph that counts by itself would not show it otherwise."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 400, (2, 9))
    positions = np.stack([rng.permutation(96)[:9] for _ in range(2)])
    mask = np.ones_like(ids)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    found = runtime._session.run(["logits"], given | runtime.empty_cache(2))[0]
    with torch.inference_mode():
        wanted = llama(**{name: torch.from_numpy(value) for name, value in given.items()}).logits.numpy()
    assert apart(wanted, found) < CLOSE
    straight = runtime.read(ids, mask, runtime.empty_cache(2))[0]
    assert apart(straight, found) > 1e-2


def test_keys_and_values_are_transformers_own(runtime: OnnxRuntime, llama: Any):
    """So a cache may be handed from one to the other, and present.N.key is what it is called."""
    ids = np.random.default_rng(1).integers(0, 400, (2, 7))
    _, cache = runtime.read(ids, np.ones_like(ids), runtime.empty_cache(2))
    with torch.inference_mode():
        theirs = llama(torch.from_numpy(ids), use_cache=True).past_key_values
    for layer in range(2):
        for name, tensor in (("key", theirs.layers[layer].keys), ("value", theirs.layers[layer].values)):
            found = cache[f"past_key_values.{layer}.{name}"]
            assert apart(tensor.numpy(), found) < CLOSE, (layer, name)


def test_a_padded_batch_gives_the_logits_of_each_alone(runtime: OnnxRuntime, source: Source):
    """Two prompts, the shorter padded on its left, read at once and then token by token with the cache."""
    own = AlborRuntime(source.loaded, source.stop_ids)
    rng = np.random.default_rng(2)
    long, short = rng.integers(0, 400, 14), rng.integers(0, 400, 10)
    ids = np.stack([long, np.concatenate([[7, 8, 9, 10], short])])
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    cache, rows = runtime.empty_cache(2), []
    for start, stop in ((0, 11), (11, 12), (12, 13), (13, 14)):
        logits, cache = runtime.read(ids[:, start:stop], mask[:, :stop], cache)
        rows.append(logits)
    found = np.concatenate(rows, axis=1)
    assert apart(own.logits(long.tolist()), found[0]) < CLOSE
    assert apart(own.logits(short.tolist()), found[1, 4:]) < CLOSE


def test_a_position_beyond_the_context_is_an_error(runtime: OnnxRuntime):
    ids = np.zeros((1, 97), np.int64)
    with pytest.raises(Exception, match="indices element out of data bounds"):
        runtime.read(ids, np.ones_like(ids), runtime.empty_cache(1))


# Every way in which a graph with a cache is known to be wrong, and the reading that sees it

Change = Callable[[onnx.GraphProto], None]


def node_of(graph: onnx.GraphProto, operator: str, takes: str = "") -> onnx.NodeProto:
    """The only node of this operator, or the only one of it that takes this value."""
    (node,) = (n for n in graph.node if n.op_type == operator and (not takes or takes in n.input))
    return node


def add_constant(graph: onnx.GraphProto, name: str, values: Any) -> str:
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(values), name))
    return name


def add_first(graph: onnx.GraphProto, operator: str, inputs: list[str], output: str) -> None:
    graph.node.insert(0, onnx.helper.make_node(operator, inputs, [output]))


def sees_what_follows(graph: onnx.GraphProto) -> None:
    node_of(graph, "And").input[0] = add_constant(graph, "yes", [[True]])


def sees_padding(graph: onnx.GraphProto) -> None:
    node_of(graph, "And").input[1] = add_constant(graph, "yes", [[[True]]])


def mask_without_past(graph: onnx.GraphProto) -> None:
    """Query t sees the keys up to t, whatever came before."""
    shape = node_of(graph, "Shape", "attention_mask")
    total_minus_new = node_of(graph, "Sub", node_of(graph, "Squeeze", shape.output[0]).output[0])
    queries = node_of(graph, "Range", total_minus_new.output[0])
    queries.input[0] = add_constant(graph, "nought", 0)
    queries.input[1] = total_minus_new.input[1]


def positions_begin_again(graph: onnx.GraphProto) -> None:
    """Of each piece, as if there were no past."""
    for table in ("rotary_cos.weight", "rotary_sin.weight"):
        node_of(graph, "Gather", table).input[1] = "from_nought"
    nought, one = add_constant(graph, "nought", [0]), add_constant(graph, "one", [1])
    add_first(graph, "Sub", ["position_ids", "first"], "from_nought")
    add_first(graph, "Slice", ["position_ids", nought, one, one], "first")


def positions_for_ids(graph: onnx.GraphProto) -> None:
    """What torch.onnx makes of one tensor that is given for both."""
    node_of(graph, "Gather", "model.embed_tokens.weight").input[1] = "position_ids"


def rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]


def keys_for_values(graph: onnx.GraphProto) -> None:
    rename(graph, {"present.0.key": "present.0.value", "present.0.value": "present.0.key"})


def layers_swapped(graph: onnx.GraphProto) -> None:
    rename(graph, {"present.0.value": "present.1.value", "present.1.value": "present.0.value"})


def past_of_another_layer(graph: onnx.GraphProto) -> None:
    rename(graph, {"past_key_values.1.key": "past_key_values.0.key"})


def past_behind_the_new(graph: onnx.GraphProto) -> None:
    node = node_of(graph, "Concat", "past_key_values.0.value")
    node.input[:] = list(reversed(node.input))


MUTATIONS: dict[str, tuple[Change, str]] = {
    "sees-what-follows": (sees_what_follows, "through the cache|position"),
    "sees-padding": (sees_padding, "padded on the left"),
    "mask-without-past": (mask_without_past, "through the cache"),
    "positions-begin-again": (positions_begin_again, "through the cache"),
    "positions-for-ids": (positions_for_ids, "position"),
    "keys-for-values": (keys_for_values, "through the cache"),
    "layers-swapped": (layers_swapped, "through the cache"),
    "past-of-another-layer": (past_of_another_layer, "through the cache"),
    "past-behind-the-new": (past_behind_the_new, "through the cache"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_gate_sees_a_graph_that_is_wrong(name: str, source: Source, exported: Path, tmp_path: Path):
    change, said = MUTATIONS[name]
    directory = tmp_path / "out"
    shutil.copytree(exported, directory)
    model = onnx.load(exported / "model.onnx")
    change(model.graph)
    onnx.save(model, directory / "model.onnx")
    onnx.checker.check_model(model)  # a graph like any other: it is the numbers that are wrong
    found = gate(source, directory)
    assert found.passed is False
    row = next(row for row in found.rows if row.check == "logits")
    assert not row.passed
    assert re.search(said, row.found)


class Forgetful(OnnxRuntime):
    """A loop that gives every new token the cache of the prompt's first token."""

    def read(self, ids: np.ndarray, mask: np.ndarray, cache: dict[str, np.ndarray]) -> Any:
        if next(iter(cache.values())).shape[2]:
            cache = {name: values * 0.5 for name, values in cache.items()}
        return super().read(ids, mask, cache)


def test_greedy_tokens_are_read_again_without_the_cache(exported: Path):
    with pytest.raises(Exception, match=r"with the cache, and [0-9]+ without it"):
        Forgetful(exported, CLOSE).greedy([0, 5, 6], 16)


# Refusals


def test_what_fp16_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path):
    source = make_source(tmp_path / "run", num_hidden_layers=1)
    onnx_format.FORMAT.check(source, "fp16")
    source.loaded.arena["weights"][5] = 1e5
    onnx_format.FORMAT.check(source, "fp32")
    with pytest.raises(CannotCarry, match=r"embed_tokens\.weight has values that fp16 cannot hold"):
        onnx_format.FORMAT.check(source, "fp16")


def test_a_missing_library_is_named_before_anything_is_written(
    source: Source, exported: Path, monkeypatch: pytest.MonkeyPatch
):
    there = onnx_format.importlib.util.find_spec
    hidden = {"onnxscript", "onnxruntime"}
    monkeypatch.setattr(
        onnx_format.importlib.util, "find_spec", lambda name: None if name in hidden else there(name)
    )
    with pytest.raises(ConfigError) as refused:
        onnx_format.FORMAT.check(source, "fp32")
    assert "onnxscript" in str(refused.value)
    assert "pip install 'albor[onnx]'" in str(refused.value)
    with pytest.raises(NotInstalled, match="onnxruntime is not installed"):
        onnx_runtime.OnnxRuntime(exported, CLOSE)


def test_the_disk_is_asked_for_enough(source: Source, exported: Path, beside: Path):
    for directory in (exported, beside):
        size = sum(path.stat().st_size for path in directory.iterdir())
        assert size <= onnx_format.FORMAT.needed_bytes(source, "fp32")
