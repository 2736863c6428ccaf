"""Export to ONNX: one graph that reads a prompt and goes on token by token, with the cache passed in and out.

Inputs and outputs have the names that Hugging Face's optimum gave them, by which onnxruntime-genai and
transformers.js find them. torch.onnx makes the graph of a model without values (`FakeTensorMode`); weights
then go to their file one at a time, so that nothing holds all of them a second time.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from albor import __version__
from albor.architecture import Architecture
from albor.durable import write_file
from albor.errors import AlborError, ConfigError, Problem
from albor.export import hf
from albor.export.card import write_card
from albor.export.format import CannotCarry, Format, Source
from albor.export.gate import Runtime, Tolerance
from albor.export.onnx_model import Head, Layer, Stem
from albor.export.onnx_runtime import OnnxRuntime
from albor.export.tokenizer_files import write_tokenizer_files
from albor.export.weights import EMBEDDING, hf_tensors
from albor.progress import Report
from albor.strictjson import to_json

MODEL, DATA = "model.onnx", "model.onnx_data"
OPSET = 18  # of 2022: all that this graph needs, and every runtime since onnxruntime 1.14 has it
IR_VERSION = 10  # of 2024: onnxruntime 1.18 and later
EXTERNAL_ABOVE = 100_000_000  # bytes of weights; from there on they lie in a file of their own
_ALIGNMENT = 4096  # of a tensor in that file: a page, so that a runtime may map it
_GRAPH_BYTES_PER_LAYER = 100_000
_BATCH, _NEW, _PAST = 2, 3, 5  # sizes to trace with: all different, and none of them 1
_TORCH = {"fp32": torch.float32, "fp16": torch.float16}


def write_model(
    source: Source, directory: Path, dtype: str, report: Report, external_above: int = EXTERNAL_ABOVE
) -> None:
    """Writes model.onnx, and model.onnx_data where the weights are more than `external_above` bytes."""
    import onnx_ir as ir
    from onnxscript import optimizer

    report("tracing the graph", 0, None)
    graph = trace(source.architecture, _TORCH[dtype])
    values = graph.graph.initializers
    total, done = sum(value.const_value.nbytes for value in values.values()), 0
    inline = total <= external_above
    with open(os.devnull if inline else directory / DATA, "wb") as file:
        for name, tensor in _tensors(source, values, _TORCH[dtype]):
            value, content = values[name], tensor.numpy()
            if inline:
                value.const_value = ir.tensor(content, name=name)
            else:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                start, size = file.tell(), content.nbytes
                value.const_value = ir.ExternalTensor(
                    DATA, start, size, value.dtype, shape=value.shape, name=name, base_dir=directory
                )
                file.write(content.data)
            done += content.nbytes
            report("writing the weights", done, total)
    optimizer.optimize_ir(graph)  # after the weights, of which it reads the small ones
    _describe(graph, source.architecture)
    write_file(directory / MODEL, ir.to_proto(graph).SerializeToString(deterministic=True))
    if inline:
        return
    for value in values.values():  # they are mapped, and the file is about to get another name
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.release()


def trace(model: Architecture, dtype: torch.dtype) -> Any:
    """The graph, an onnx_ir.Model that is not optimised. Its initializers have the names of the Hugging Face
    layout, and no values.
    """
    import onnx_ir as ir

    stem, layer, head = _trace_parts(model, dtype)
    inputs = [_copy(given, given.name) for given in stem.inputs]
    nodes, initializers = list[ir.Node](), dict[str, ir.Value]()
    stream, *shared = _append(nodes, initializers, stem, inputs, "")
    present = list[ir.Value]()
    for number in range(model.num_hidden_layers):
        past = [
            _copy(given, f"past_key_values.{number}.{part}")
            for part, given in zip(("key", "value"), layer.inputs[-2:], strict=True)
        ]
        stream, *cache = _append(
            nodes, initializers, layer, [stream, *shared, *past], f"model.layers.{number}."
        )
        for part, value in zip(("key", "value"), cache, strict=True):
            value.name = f"present.{number}.{part}"
        inputs += past
        present += cache
    (logits,) = _append(nodes, initializers, head, [stream], "")
    logits.name = "logits"
    graph = ir.Graph(
        inputs=inputs,
        outputs=[logits, *present],
        nodes=nodes,
        initializers=list(initializers.values()),
        opset_imports={"": OPSET},
        name="llama",
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="albor", producer_version=__version__)


def _trace_parts(model: Architecture, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """The graphs of what comes before the layers, of one layer, and of what comes behind.

    torch.onnx takes seconds for a layer, and they are all alike.
    """
    width, half, total = model.hidden_size, model.head_dim // 2, _PAST + _NEW

    def ids(length: int) -> torch.Tensor:
        return torch.zeros(_BATCH, length, dtype=torch.int64)

    # A tensor for each input: torch.onnx would take one that is given twice for one input.
    with _quiet(), FakeTensorMode():
        stream = torch.zeros(_BATCH, _NEW, width, dtype=dtype)
        cos, sin = (torch.zeros(_BATCH, 1, 1, _NEW, half) for _ in range(2))
        seen = torch.zeros(_BATCH, 1, 1, _NEW, total, dtype=torch.bool)
        past = (_BATCH, model.num_key_value_heads, _PAST, model.head_dim)
        keys, values = (torch.zeros(past, dtype=dtype) for _ in range(2))
        stem = _trace(
            Stem(model, dtype),
            {
                "input_ids": (ids(_NEW), (0, 1)),
                "attention_mask": (ids(total), (0, 1)),
                "position_ids": (ids(_NEW), (0, 1)),
            },
        )
        layer = _trace(
            Layer(model, dtype),
            {
                "x": (stream, (0, 1)),
                "cos": (cos, (0, 3)),
                "sin": (sin, (0, 3)),
                "seen": (seen, (0, 3, 4)),
                "past_keys": (keys, (0, 2)),
                "past_values": (values, (0, 2)),
            },
        )
        head = _trace(Head(model, dtype), {"x": (stream, (0, 1))})
    return stem, layer, head


def _trace(module: torch.nn.Module, inputs: Mapping[str, tuple[torch.Tensor, tuple[int, ...]]]) -> Any:
    """The graph of a module, from each input's name, a tensor, and the axes that may have other sizes."""
    program = torch.onnx.export(
        module.eval(),
        tuple(tensor for tensor, _ in inputs.values()),
        dynamo=True,
        optimize=False,
        verbose=False,
        opset_version=OPSET,
        input_names=list(inputs),
        dynamic_shapes=tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for _, axes in inputs.values()),
    )
    assert program is not None
    return program.model.graph


def _append(
    nodes: list[Any], initializers: dict[str, Any], part: Any, inputs: Sequence[Any], prefix: str
) -> list[Any]:
    """Appends a copy of the graph `part`, applied to `inputs`; returns its outputs.

    Its initializers are named `prefix` and their own name; one that is there already is shared.
    """
    import onnx_ir as ir

    values = dict(zip(part.inputs, inputs, strict=True))
    for name, value in part.initializers.items():
        values[value] = initializers.setdefault(prefix + name, _copy(value, prefix + name))
    number = len(nodes)
    for node in part:
        given = [value if value is None else values[value] for value in node.inputs]
        copied = ir.Node(
            node.domain, node.op_type, given, node.attributes.values(), num_outputs=len(node.outputs)
        )
        for value, copy in zip(node.outputs, copied.outputs, strict=True):
            copy.name, copy.type, copy.shape = f"{value.name}_{number}", value.type, value.shape
            values[value] = copy
        nodes.append(copied)
    return [values[value] for value in part.outputs]


def _copy(value: Any, name: str) -> Any:
    """An input or initializer like `value` that belongs to no graph yet. What torch.onnx noted beside it,
    such as the names of files on this machine, is not copied.
    """
    import onnx_ir as ir

    return ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)


def _tensors(
    source: Source, values: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """What the graph has under these names, each in new memory only for as long as it is looked at."""
    arena = source.loaded.arena
    stored = dict(hf_tensors(arena, source.architecture))
    tables = {"rotary_cos.weight": arena["rotary.cos"], "rotary_sin.weight": arena["rotary.sin"]}
    if stored.keys() | tables.keys() != values.keys():
        raise AlborError(f"torch.onnx made a graph without, or with other, {stored.keys() ^ values.keys()}")
    for name in values:
        if name in tables:
            yield name, tables[name].float()
            continue
        tensor = stored[name].to(dtype)
        matrix = tensor.ndim == 2 and name != EMBEDDING
        yield name, (tensor.T if matrix else tensor).contiguous()


def _describe(graph: Any, model: Architecture) -> None:
    """Gives the axes of inputs and outputs their names."""
    import onnx_ir as ir

    inner = {value for node in graph.graph for value in node.outputs} - set(graph.graph.outputs)
    for value in inner:
        value.shape = value.type = None  # in axes with names of torch.export's; a runtime infers them again
    batch, new, past = "batch_size", "sequence_length", "past_sequence_length"
    heads, width = model.num_key_value_heads, model.head_dim
    shapes = {
        "input_ids": (batch, new),
        "attention_mask": (batch, f"{past} + {new}"),
        "position_ids": (batch, new),
        "past_key_values": (batch, heads, past, width),
        "logits": (batch, new, model.vocab_size),
        "present": (batch, heads, f"{past} + {new}", width),
    }
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        value.shape = ir.Shape(shapes[value.name.partition(".")[0]])


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch.onnx tells its developers: the operators of libraries that are not there, deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _write(source: Source, directory: Path, dtype: str, report: Report) -> None:
    write_model(source, directory, dtype, report)
    write_file(directory / "config.json", to_json(hf.config_json(source, dtype)))
    write_file(directory / "generation_config.json", to_json(hf.generation_config_json(source)))
    write_tokenizer_files(source.tokenizer, directory, source.architecture.max_position_embeddings)
    write_card(source, directory, "onnx", dtype)


def _needed_bytes(source: Source, dtype: str) -> int:
    model = source.architecture
    tables = 2 * model.max_position_embeddings * (model.head_dim // 2) * torch.float32.itemsize
    tensors = 2 + 9 * model.num_hidden_layers + 3
    graph = _GRAPH_BYTES_PER_LAYER * (model.num_hidden_layers + 1)
    return hf.FORMAT.needed_bytes(source, dtype) + tables + tensors * _ALIGNMENT + graph


def _check(source: Source, dtype: str) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        message = f"onnx needs {' and '.join(missing)}, which are not installed"
        raise ConfigError([Problem("--to", message, "run: pip install 'albor[onnx]'", "command line")])
    for name, tensor in hf_tensors(source.loaded.arena, source.architecture):
        if not tensor.to(_TORCH[dtype]).isfinite().all():
            raise CannotCarry(f"{name} has values that {dtype} cannot hold; take --dtype fp32")


def _open_runtime(directory: Path, dtype: str) -> Runtime:
    return OnnxRuntime(directory, _TOLERANCES[dtype].logits)


_TOLERANCES = {
    "fp32": Tolerance(1e-4, "both sides compute in fp32 with the same values"),
    "fp16": Tolerance(1e-2, "the weights are the same, and onnxruntime rounds what it computes to fp16 too"),
}

FORMAT = Format(
    name="onnx",
    program="onnxruntime",
    dtypes=("fp32", "fp16"),
    needed_bytes=_needed_bytes,
    check=_check,
    write=_write,
    rounded=hf.FORMAT.rounded,
    open_runtime=_open_runtime,
    tolerance=_TOLERANCES.__getitem__,
)
