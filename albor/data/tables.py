"""Rows of tables: Parquet files, and data sets of the Hugging Face hub. Both need the `hf` extra."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from albor.config import HubSource
from albor.errors import ConfigError, DataError, Problem


def parquet_rows(path: Path, name: str, text_key: str) -> Iterator[tuple[str, Any]]:
    """(name:row, text) of a Parquet file; `name` is for people. Raises OSError for what is no such file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing_extra("pyarrow", "parquet") from error
    try:
        with parquet.ParquetFile(path) as table:
            _require_column(text_key, table.schema_arrow.names, str(path))
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    yield f"{name}:{row}", text
                    row += 1
    except pyarrow.ArrowException as error:
        raise OSError(f"{path} is no Parquet file: {error}") from error  # counted as unreadable


def hub_rows(source: HubSource) -> Iterator[tuple[str, Any]]:
    """(path:row, text) of a data set, streamed from the hub or a local folder of the same form."""
    try:
        import datasets
    except ImportError as error:
        raise _missing_extra("datasets", "hf") from error
    path = Path(source.path).expanduser()
    try:
        with _without_log("huggingface_hub"):
            rows = datasets.load_dataset(
                str(path) if path.is_dir() else source.path,
                name=source.subset,
                split=source.split,
                revision=source.revision,
                streaming=True,
            )
        for number, row in enumerate(rows):
            _require_column(source.text_key, list(row), source.path)
            yield f"{source.path}:{number}", row[source.text_key]
    except ConfigError:
        raise
    except (
        Exception
    ) as error:  # `datasets` lets errors of a dozen libraries through; all mean that it cannot be read
        reason = str(error).strip().splitlines() or [""]
        raise DataError(
            f"data.sources: data set {source.path!r} cannot be read ({type(error).__name__}: {reason[0]}); "
            "check the name, subset, split and revision, and the network (HF_TOKEN for a gated data set), "
            "or download it and use a source of kind parquet, jsonl or files"
        ) from error


@contextmanager
def _without_log(name: str) -> Iterator[None]:
    """Keeps to itself what a library would say of each of its attempts; the last error is ours to explain."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _require_column(text_key: str, columns: list[str], where: str) -> None:
    if text_key not in columns:
        message = f"{where} has no column {text_key!r}"
        raise ConfigError([Problem("data.sources", message, f"set text_key to one of {', '.join(columns)}")])


def _missing_extra(package: str, kind: str) -> DataError:
    return DataError(
        f"data.sources: kind {kind} needs the package {package}, which is not installed; "
        "run: pip install 'albor[hf]'"
    )
