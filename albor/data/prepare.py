"""From a configuration to token streams: train or load the tokenizer, tokenise each source once, hold
documents out.

Each result is kept in `data.cache_dir` under a name that hashes all that it depends on, so a second run finds
it at once, and a changed file, vocabulary or held-out share makes a new one. Weights and epochs are not among
them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albor.config import FilesSource, PythonStdlibSource, RunConfig, Source
from albor.data.cache import Cache, digest
from albor.data.sentencepiece_encoder import RECIPE
from albor.data.shards import FORMAT, ShardWriter, TokenStream
from albor.data.sources import (
    NOT_LOSSLESS,
    Document,
    SourceReport,
    describe,
    list_files,
    read_documents,
)
from albor.data.tokenizer import Tokenizer, sample_text
from albor.errors import ConfigError, DataError, Problem

Progress = Callable[
    [str, int, int | None], None
]  # what is going on, UTF-8 bytes done, bytes in all where known

_BATCH_BYTES = 4_000_000  # text that is tokenised in one go: enough for all cores, little for the memory
_MODEL_FILE = "tokenizer.model"
_MANIFEST_FILE = "manifest.json"
_REPORT_FILE = "report.json"


@dataclass(frozen=True)
class PreparedData:
    """What a run reads; `train`, `reports` and `paths` have one entry per source, as configured."""

    tokenizer: Tokenizer
    tokenizer_path: Path
    train: tuple[TokenStream, ...]
    validation: TokenStream  # the held-out documents of all sources
    reports: tuple[SourceReport, ...]
    paths: tuple[Path, ...]

    @property
    def validation_text_bytes(self) -> int:
        """UTF-8 bytes of the held-out documents."""
        return self.validation.text_bytes

    @property
    def sha256(self) -> str:
        """Names the data: equal where the tokenizer, every source's tokens and their order are equal."""
        streams = [stream.sha256 for stream in (*self.train, self.validation)]
        return digest([self.tokenizer.sha256, *streams])


def prepare(config: RunConfig, progress: Progress | None = None) -> PreparedData:
    """The tokenizer and the verified token streams of `config`, made where they are not in the cache.

    Raises DataError where a source cannot be read or is too small, ConfigError where a path is not there or
    the tokenizer's vocabulary is not the model's.
    """
    report_progress = progress or (lambda stage, done, total: None)
    _require_documents(config.data.sources)
    cache = Cache(Path(config.data.cache_dir))
    tokenizer, tokenizer_path = prepare_tokenizer(config, report_progress)
    if problems := check_vocabulary(config, tokenizer):
        raise ConfigError(problems)
    sources = config.data.sources
    fraction = config.data.validation_fraction
    paths = tuple(_tokenise(cache, source, tokenizer, fraction, report_progress) for source in sources)
    prepared = PreparedData(
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        train=tuple(_open(path / "train", tokenizer) for path in paths),
        validation=TokenStream.join([_open(path / "validation", tokenizer) for path in paths]),
        reports=tuple(SourceReport.from_json(_read_json(path / _REPORT_FILE)) for path in paths),
        paths=paths,
    )
    _require_windows(config, prepared)
    return prepared


def prepare_tokenizer(config: RunConfig, progress: Progress | None = None) -> tuple[Tokenizer, Path]:
    """The tokenizer of `config` and its model file: the one at tokenizer.path, or one trained on the data.

    Held-out documents are left out of its training, so that bits per byte on them are honest.
    """
    report_progress = progress or (lambda stage, done, total: None)
    if config.tokenizer.path is not None:
        path = Path(config.tokenizer.path).expanduser()
        try:
            return Tokenizer.load(path, config.tokenizer.kind), path
        except DataError as error:  # elsewhere it is damage; here the key names the wrong file
            raise ConfigError([Problem("tokenizer.path", str(error))]) from error
    cache = Cache(Path(config.data.cache_dir))
    vocab_size, sample_bytes = config.model.vocab_size, config.tokenizer.sample_bytes
    fraction = config.data.validation_fraction
    sources = [_read_for_sample(source, sample_bytes) for source in config.data.sources]

    def write(directory: Path) -> None:
        reports = [SourceReport() for _ in sources]
        documents = (
            document
            for source, report in zip(sources, reports, strict=True)
            for document in _with_progress(source, report, "reading", report_progress)
            if not is_held_out(document.text, fraction)
        )
        sample = sample_text(documents, sample_bytes)
        if not sample:
            raise DataError(_explain_no_text(reports))
        report_progress("training the tokenizer", 0, None)
        trained = Tokenizer.train(sample, vocab_size)
        (directory / _MODEL_FILE).write_bytes(trained.model)
        (directory / _MANIFEST_FILE).write_text(json.dumps({"sha256": trained.sha256}) + "\n")

    content = [cache.fingerprint(source) for source in sources]
    key = digest(["tokenizer", RECIPE, content, vocab_size, sample_bytes, fraction])
    directory = cache.entry(f"tokenizer-{key[:16]}", write)
    tokenizer = Tokenizer.load(directory / _MODEL_FILE)
    if _read_json(directory / _MANIFEST_FILE).get("sha256") != tokenizer.sha256:
        raise DataError(
            f"{directory} is damaged (the SHA-256 of {_MODEL_FILE} differs); remove it and run again"
        )
    return tokenizer, directory / _MODEL_FILE


def _read_for_sample(source: Source, sample_bytes: int) -> Source:
    """Of a data set that is streamed, only the beginning: all of it is read once, when it is tokenised.

    That is the same for every weight, so that a new mix does not mean another tokenizer.
    """
    if list_files(source) is not None:
        return source
    return source.model_copy(update={"max_bytes": min(sample_bytes, source.max_bytes or sample_bytes)})


def _explain_no_text(reports: Sequence[SourceReport]) -> str:
    held_out = sum(report.documents for report in reports)
    found = [f"{held_out:,} documents, all held out"] if held_out else []
    found += [line for report in reports for line in report.lines()]
    reasons = "; ".join(found) or "they are empty"
    return f"data.sources: there is no text to train a tokenizer on ({reasons})"


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is for validation. Its text alone decides, so copies are never on both sides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") < fraction * 2.0**256


def check_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> list[Problem]:
    """The problem, if there is one, that the tokenizer does not have exactly the model's vocabulary.

    Models with a tokenizer of kind hf often have some ids more, for the sake of round numbers.
    """
    wanted, found = config.model.vocab_size, tokenizer.vocab_size
    padded = config.tokenizer.kind == "hf"
    if wanted == found or (padded and wanted > found):
        return []
    message = f"{wanted}, but the tokenizer {config.tokenizer.path} has {found} tokens"
    remedy = (
        f"set it to {found} or more"
        if padded
        else f"set it to {found}, or tokenizer.path to null to train one"
    )
    return [Problem("model.vocab_size", message, remedy)]


def check_horizon(config: RunConfig, prepared: PreparedData, left_out: int = 0) -> list[Problem]:
    """A problem for each source that the run would repeat more often than data.max_epochs allows, with the
    samples that rollbacks have `left_out` on top of those of its steps.
    """
    data, train = config.data, config.train
    key, unit = ("max_steps", 1) if train.max_steps is not None else ("max_tokens", config.tokens_per_step)
    all_weights = sum(source.weight for source in data.sources)
    shares = [source.weight / all_weights for source in data.sources]
    # What one epoch reads: whole windows, as the loader cuts them.
    available = [
        (len(stream) - 1) // data.sequence_length * data.sequence_length for stream in prepared.train
    ]
    read = config.steps * config.tokens_per_step + left_out * data.sequence_length
    wanted = [read * share for share in shares]
    epochs = [tokens / limit for tokens, limit in zip(wanted, available, strict=True)]
    most_steps = math.floor(
        min(limit * data.max_epochs / share for limit, share in zip(available, shares, strict=True))
        / config.tokens_per_step
    )
    lower = f"lower train.{key} to {most_steps * unit}, " if most_steps else ""
    raised = f"raise data.max_epochs to {math.ceil(max(epochs) * 100) / 100}"
    # A run that has begun keeps its data, and may not be shortened under every schedule.
    remedy = raised if left_out else f"{lower}{raised}, or add data"
    reader = f"{config.steps:,} steps" + (f" and {left_out:,} samples of rollbacks" if left_out else "")
    return [
        Problem(
            f"train.{key}",
            f"{reader} read {math.ceil(wanted[i]):,} tokens of {describe(source)}, "
            f"{epochs[i]:.2f} times its {available[i]:,}; data.max_epochs allows {data.max_epochs:g}",
            remedy,
        )
        for i, source in enumerate(data.sources)
        if epochs[i] > data.max_epochs
    ]


def _tokenise(
    cache: Cache, source: Source, tokenizer: Tokenizer, fraction: float, progress: Progress
) -> Path:
    """The cache entry of one source: `train/` and `validation/` shards, and the report of its reading."""
    fingerprint = cache.fingerprint(source)

    def write(directory: Path) -> None:
        train, validation = (
            ShardWriter(directory / split, tokenizer.vocab_size, tokenizer.sha256)
            for split in ("train", "validation")
        )
        report = SourceReport()
        stage = f"tokenising {describe(source)}"
        for documents in _batches(_with_progress(source, report, stage, progress)):
            encoded = tokenizer.encode_batch([document.text for document in documents])
            for document, ids in zip(documents, encoded, strict=True):
                data = document.text.encode()
                if tokenizer.decode_bytes(ids) != data:
                    report.withdraw(document, NOT_LOSSLESS)
                    continue
                writer = validation if is_held_out(document.text, fraction) else train
                writer.add(tokenizer.end_document(ids), len(data))
        if not report.documents:
            found = "; ".join(report.lines()) or "it is empty"
            raise DataError(f"data.sources: {describe(source)} gives no usable document ({found})")
        if cache.fingerprint(source) != fingerprint:
            raise DataError(f"data.sources: {describe(source)} changed while it was read; run again")
        train.close()
        validation.close()
        (directory / _REPORT_FILE).write_text(json.dumps(report.to_json(), indent=1) + "\n")

    key = digest(["tokens", FORMAT, fingerprint, tokenizer.sha256, fraction])
    return cache.entry(f"tokens-{source.kind}-{key[:16]}", write)


def _with_progress(
    source: Source, report: SourceReport, stage: str, progress: Progress
) -> Iterator[Document]:
    total = source.max_bytes
    if isinstance(source, PythonStdlibSource | FilesSource):  # elsewhere a file's size is not its text's
        statuses = [file.status() for file in list_files(source) or []]
        size = sum(status.st_size for status in statuses if status is not None)
        total = size if total is None else min(size, total)
    for document in read_documents(source, report):
        progress(stage, report.text_bytes, total)
        yield document


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _open(directory: Path, tokenizer: Tokenizer) -> TokenStream:
    stream = TokenStream.open(directory)
    if stream.tokenizer_sha256 != tokenizer.sha256 or stream.vocab_size != tokenizer.vocab_size:
        raise DataError(f"{directory} was made with another tokenizer; remove it and prepare the data again")
    return stream


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); remove {path.parent} and run again") from error
    return value


def _require_documents(sources: Sequence[Source]) -> None:
    """Raises ConfigError, before any work, for one file without a separator: a document cannot be divided
    between training and validation.
    """
    first = sources[0]
    if len(sources) > 1 or not isinstance(first, FilesSource) or first.separator is not None:
        return
    if len(list_files(first) or []) == 1:
        message = f"is null, which makes {first.path} a single document, and some must be held out"
        remedy = r'say what lies between its documents, such as "\n\n", or give more files'
        raise ConfigError([Problem("data.sources[0].separator", message, remedy)])


def _require_windows(config: RunConfig, prepared: PreparedData) -> None:
    """Raises DataError unless each source has a whole sequence to train on, and all have one to validate."""
    needed = config.data.sequence_length + 1
    for source, stream in zip(config.data.sources, prepared.train, strict=True):
        if len(stream) < needed:
            raise DataError(
                f"data.sources: {describe(source)} gives {len(stream):,} training tokens, fewer than the "
                f"{needed:,} of one sequence; add text, or lower data.sequence_length to "
                f"{max(1, len(stream) - 1)}"
            )
    found = len(prepared.validation)
    if found < needed:
        documents, held_out = (
            sum(report.documents for report in prepared.reports),
            prepared.validation.documents,
        )
        raise DataError(
            f"data.validation_fraction {config.data.validation_fraction:g} holds out {held_out:,} of "
            f"{documents:,} documents, {found:,} tokens, fewer than the {needed:,} of one sequence; raise "
            "it, or give more documents, in files or with a separator (they are held out whole)"
        )
