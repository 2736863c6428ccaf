"""What a preparation gave, for `albor data prepare`: as one JSON object, and as lines."""

from __future__ import annotations

from typing import Any

from albor.config import RunConfig
from albor.data.prepare import PreparedData
from albor.data.sources import describe


def summarise(config: RunConfig, data: PreparedData) -> dict[str, Any]:
    """Counts of each source and of the validation, and where everything lies."""
    columns = zip(config.data.sources, data.reports, data.train, data.paths, strict=True)
    return {
        "tokenizer": str(data.tokenizer_path),
        "sources": [
            {
                "source": describe(source),
                "documents": report.documents,
                "text_bytes": report.text_bytes,
                "train_tokens": len(stream),
                "directory": str(path),
            }
            for source, report, stream, path in columns
        ],
        "validation": {
            "documents": data.validation.documents,
            "tokens": len(data.validation),
            "text_bytes": data.validation_text_bytes,
        },
    }


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The same for people."""
    validation = summary["validation"]
    return [
        *(
            f"{row['source']}: {row['documents']:,} documents, {row['text_bytes']:,} bytes, "
            f"{row['train_tokens']:,} training tokens in {row['directory']}"
            for row in summary["sources"]
        ),
        f"validation: {validation['documents']:,} documents, {validation['tokens']:,} tokens",
        f"tokenizer: {summary['tokenizer']}",
    ]
