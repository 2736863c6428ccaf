"""The model card: what a stranger needs to know of a model before using it, from what the run recorded.

Nothing is claimed that is not in the run's files; what is missing there, the card says it does not know.
Paths of this machine stay out of it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from albor import __version__
from albor.config import FilesSource, HubSource, JsonlSource, ModelConfig, ParquetSource, PythonStdlibSource
from albor.durable import write_file
from albor.export.format import Source
from albor.runlog import METRICS, read_rows
from albor.strictjson import from_json, read_bounded

CARD, PICTURE = "README.md", "loss.png"
CHINCHILLA_TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022 (arXiv 2203.15556): about, at its compute optimum
_UNKNOWN_LICENSE = "unknown"  # a value that the hub knows
_TABLE_ROWS = 12  # of the loss, where there is no picture
_PLOTTED = 1000  # points of the training loss, each the mean of its neighbours
_BLUE, _ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's, which the colour-blind tell apart

Loss = list[tuple[int, float]]  # (tokens, loss)


def write_card(source: Source, directory: Path, format_name: str, dtype: str) -> None:
    """Writes README.md to `directory`, and loss.png where there is a loss to draw and matplotlib to do it."""
    training, validation = _losses(source, "train/loss"), _losses(source, "val/loss")
    picture = bool(training or validation) and find_spec("matplotlib") is not None
    if picture:
        write_file(directory / PICTURE, _draw(training, validation))
    sections = (
        _introduction(source, format_name, dtype),
        _use(source, format_name),
        _architecture(source),
        _training(source),
        _data(source),
        _loss(training, validation, picture),
        _results(source),
        _limits(source),
        _license(source),
    )
    text = _front_matter(source, format_name) + "\n".join("\n".join(lines) + "\n" for lines in sections)
    write_file(directory / CARD, text.encode())


def _front_matter(source: Source, format_name: str) -> str:
    hub = [data.path for data in source.config.data.sources if isinstance(data, HubSource)]
    library = {"hf": "transformers", "gguf": "gguf", "onnx": "onnx"}[format_name]
    content: dict[str, Any] = {
        "license": source.model_license or _UNKNOWN_LICENSE,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["albor", "llama", "causal-lm", "text-generation"],
    }
    if hub:
        content["datasets"] = list(dict.fromkeys(hub))
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---\n\n"


def _introduction(source: Source, format_name: str, dtype: str) -> list[str]:
    model = source.architecture
    return [
        f"# {source.config.name}",
        "",
        f"A Llama-style language model of {_count(model.parameter_count)} parameters, trained with albor on "
        f"{_count(source.state['tokens'])} tokens. It is a base model: it goes on with a text, and was not "
        "taught to follow instructions.",
        "",
        f"These files are its {format_name} export in {dtype}. `gate.json` says which program loaded them, "
        "and what of its tokens, logits and generated text was compared with the trainer's own.",
    ]


def _use(source: Source, format_name: str) -> list[str]:
    name = source.config.name
    lines = ["## Use", ""]
    if format_name == "hf":
        lines += [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            'inputs = tokenizer(tokenizer.bos_token + "Once upon", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
            "```",
            "",
            f"MLX, on a Mac: `mlx_lm.generate --model {name} --prompt 'Once upon'`. For llama.cpp and Ollama "
            "there is `albor export RUN --to gguf`.",
        ]
    elif format_name == "gguf":
        lines += [
            "llama.cpp: `llama-cli -m FILE.gguf -p 'Once upon'`. "
            f"Ollama: `ollama create {name} -f Modelfile`."
        ]
    else:
        lines += ["Load `model.onnx` with onnxruntime, and `tokenizer.json` with the tokenizers library."]
    lines += [
        "",
        "In training every document followed an end-of-document token, and texts begin with one here too.",
    ]
    return lines


def _architecture(source: Source) -> list[str]:
    model, tokenizer = source.architecture, source.tokenizer
    vocabulary = f"{model.vocab_size:,}"
    if tokenizer.vocab_size < model.vocab_size:
        vocabulary += f", of which {model.vocab_size - tokenizer.vocab_size:,} at the end are unused"
    rows = [
        ("Architecture", "Llama: RMSNorm before each part, rotary positions, SwiGLU, no biases"),
        ("Parameters", f"{model.parameter_count:,}"),
        ("Layers", f"{model.num_hidden_layers}"),
        ("Hidden size", f"{model.hidden_size:,}"),
        ("Feed-forward size", f"{model.intermediate_size:,}"),
        ("Query heads, key/value heads", f"{model.num_attention_heads}, {model.num_key_value_heads}"),
        ("Head width", f"{model.head_dim}"),
        ("Vocabulary", vocabulary),
        ("Context", f"{model.max_position_embeddings:,} tokens"),
        ("Rotary base", f"{model.rope_theta:g}"),
        ("RMSNorm epsilon", f"{model.rms_norm_eps:g}"),
        ("Output head", "tied to the embedding" if model.tie_word_embeddings else "its own"),
        ("Tokenizer", f"{source.config.tokenizer.kind}, {tokenizer.vocab_size:,} tokens"),
    ]
    return ["## Architecture", "", *_table(("", ""), rows)]


def _training(source: Source) -> list[str]:
    config, tokens, step = source.config, source.state["tokens"], source.state["step"]
    ratio = tokens / source.architecture.parameter_count
    share = ratio / CHINCHILLA_TOKENS_PER_PARAMETER
    optimizer = config.optimizer
    rows = [
        ("Tokens", f"{tokens:,}"),
        (
            "Tokens per parameter",
            f"{ratio:.3g}, which is {share:.1%} of the {CHINCHILLA_TOKENS_PER_PARAMETER} that are "
            "compute-optimal (Chinchilla)",
        ),
        ("Steps", f"{_steps(step, config.steps)}, of {config.tokens_per_step:,} tokens each"),
        ("Sequence length", f"{config.data.sequence_length:,}"),
        (
            "Optimizer",
            f"AdamW, learning rate {optimizer.lr:g}, betas {optimizer.betas[0]:g} and "
            f"{optimizer.betas[1]:g}, weight decay {optimizer.weight_decay:g}, gradient norm clipped at "
            f"{optimizer.grad_clip:g}",
        ),
        *_width_transfer(config.model),
        ("Schedule", f"{config.schedule.kind}, {config.schedule.warmup_steps:,} steps of warm-up"),
        ("Precision", config.train.precision),
        ("Seed", f"{config.seed}"),
    ]
    start = getattr(config.model, "init_from", None)
    rows.append(("Began with", "random weights" if start is None else f"the weights of {Path(start).name}"))
    if device := _environment(source).get("device"):
        rows.append(("Device", str(device)))
    rows.append(("Exported with", f"albor {__version__}"))
    return ["## Training", "", *_table(("", ""), rows)]


def _width_transfer(model: ModelConfig) -> list[tuple[str, str]]:
    if model.mup_base_width is None:
        return []
    scale = f"{model.mup_base_width:,} / {model.hidden_size:,}"
    what = f"learning rate of the blocks' matrices and logits times {scale}, which the final norm contains"
    return [("muP", what)]


def _steps(step: int, planned: int) -> str:
    return f"{step:,}" if step >= planned else f"{step:,} of the {planned:,} that the run is to have"


def _environment(source: Source) -> dict[str, Any]:
    """What the run recorded of the machine that trained it; nothing where that is gone."""
    try:
        content = from_json(read_bounded(source.run / "env.json"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _data(source: Source) -> list[str]:
    sources = source.config.data.sources
    whole = sum(data.weight for data in sources)
    length = source.config.data.sequence_length
    read = [samples * length for samples in source.state["loader"]["per_source"]]
    rows = [
        (_describe(data), f"{data.weight / whole:.1%}", f"{tokens:,}")
        for data, tokens in zip(sources, read, strict=True)
    ]
    return [
        "## Data",
        "",
        *_table(("Source", "Share of the tokens", "Tokens read"), rows),
        "",
        f"{source.config.data.validation_fraction:.2%} of the documents were held out, by their hash; the "
        "validation below is measured on them.",
    ]


def _describe(data: Any) -> str:
    """A source for strangers: of a local file its name and not where it lies."""
    if isinstance(data, PythonStdlibSource):
        return "Source files of the Python standard library (PSF licence)"
    if isinstance(data, HubSource):
        parts = [
            f"[{data.path}](https://huggingface.co/datasets/{data.path})",
            data.subset,
            f"split {data.split}",
        ]
        revision = None if data.revision is None else f"revision {data.revision}"
        return ", ".join(part for part in (*parts, revision) if part)
    assert isinstance(data, FilesSource | JsonlSource | ParquetSource)
    return f"Local files ({data.kind}): {Path(data.path).name}"


def _losses(source: Source, metric: str) -> Loss:
    """(tokens, value) of a metric up to the step that is exported, non-finite ones left out."""
    found = {
        row["tokens"]: float(row[metric])
        for row in read_rows(source.run / METRICS)
        if isinstance(row.get(metric), int | float)
        and math.isfinite(row[metric])
        and isinstance(row.get("step"), int)
        and isinstance(row.get("tokens"), int)
        and row["step"] <= source.state["step"]
    }
    return sorted(found.items())  # a run that went back has a step's row twice, and the later one counts


def _loss(training: Loss, validation: Loss, picture: bool) -> list[str]:
    lines = ["## Loss", ""]
    if not training and not validation:
        return [*lines, "The run's record of its loss was not there when this card was written."]
    if picture:
        lines += [f"![Training and validation loss over tokens]({PICTURE})", ""]
    else:
        lines += [
            "There is no picture, because matplotlib was not installed where this card was written.",
            "",
        ]
    held_out = dict(validation)
    learned = dict(training)
    tokens = _evenly(
        sorted(held_out.keys() & learned.keys() or learned.keys() | held_out.keys()), _TABLE_ROWS
    )
    rows = [
        (f"{t:,}", *(f"{part[t]:.4f}" if t in part else "" for part in (learned, held_out))) for t in tokens
    ]
    return [*lines, *_table(("Tokens", "Training loss", "Validation loss"), rows)]


def _evenly(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of `values`, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _draw(training: Loss, validation: Loss) -> bytes:
    """A PNG of both losses over the tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    group = max(1, math.ceil(len(training) / _PLOTTED))
    parts = [training[start : start + group] for start in range(0, len(training), group)]
    means = [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]
    if means:
        axes.plot(*zip(*means, strict=True), color=_BLUE, linewidth=1.2, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color=_ORANGE, marker="o", markersize=3, label="validation")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": f"albor {__version__}"})
    return picture.getvalue()


def _results(source: Source) -> list[str]:
    rows = list(_result_rows(source))
    lines = ["## Results", ""]
    if not rows:
        return [*lines, "None were stored with the run when this card was written (`albor eval`)."]
    return [*lines, *_table(("What", "Metric", "Value ± standard error"), rows)]


_VALIDATION = {  # in eval/final.json
    "val/loss": "loss (nats per token)",
    "val/perplexity": "perplexity",
    "val/bits_per_byte": "bits per byte",
}


def _result_rows(source: Source) -> Iterator[tuple[str, str, str]]:
    """What RUN/eval holds of the step that is exported."""
    for path in sorted((source.run / "eval").glob("*.json")):
        try:
            content = from_json(read_bounded(path))
        except (OSError, ValueError):
            continue  # a damaged record is no result
        if not isinstance(content, dict) or content.get("step") != source.state["step"]:
            continue
        for key, name in _VALIDATION.items():
            if isinstance(content.get(key), int | float):
                yield "held-out documents", name, f"{content[key]:.4f}"
        if isinstance(text := content.get("text"), dict) and isinstance(text.get("bits_per_byte"), float):
            yield Path(str(text.get("path"))).name, "bits per byte", f"{text['bits_per_byte']:.4f}"
        if isinstance(tasks := content.get("results"), dict):
            yield from _task_rows(tasks, content.get("limit"))


def _task_rows(tasks: dict[str, Any], limit: int | None) -> Iterator[tuple[str, str, str]]:
    """What `albor eval` found: each task's metrics are those that have a value."""
    for task, figures in tasks.items():
        what = task if limit is None else f"{task}, its first {limit} items only"
        for metric, figure in figures.items() if isinstance(figures, dict) else ():
            if isinstance(figure, dict) and isinstance(figure.get("value"), int | float):
                value, error = figure["value"], figure.get("stderr")
                share = metric != "perplexity"
                shown = [
                    f"{part:.2%}" if share else f"{part:.2f}" for part in (value, error) if part is not None
                ]
                yield what, metric, " ± ".join(shown)


def _limits(source: Source) -> list[str]:
    model = source.architecture
    return [
        "## Limits",
        "",
        f"- A model of {_count(model.parameter_count)} parameters knows little and states what is false with "
        "ease. Check what it says.",
        "- It was trained on the data above without a filter of its own for bias, private data or licences: "
        "it may repeat what stands there.",
        f"- It was trained on sequences of {source.config.data.sequence_length:,} tokens; beyond that, up to "
        f"its context of {model.max_position_embeddings:,}, it was not tested."
        if model.max_position_embeddings > source.config.data.sequence_length
        else f"- It reads at most {model.max_position_embeddings:,} tokens.",
        "- It was not aligned, and is not fit for decisions about people.",
    ]


def _license(source: Source) -> list[str]:
    if source.model_license is not None:
        return ["## Licence", "", f"The weights: {source.model_license}. The data has licences of its own."]
    return [
        "## Licence",
        "",
        "Whoever exported this model named none (`albor export --license`): ask before you use it. The data "
        "has licences of its own.",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def _count(number: int) -> str:
    """`number` to three digits, with the unit that people use: 12.3M."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number}"
