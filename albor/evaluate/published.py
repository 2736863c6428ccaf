"""Published results, to stand beside albor's own. Nothing here was measured by albor."""

from __future__ import annotations

from typing import Any

SOURCE = "the model card of YoAbriel/KodaLite-1.3B on the Hugging Face hub"
NOTE = (
    f"GPT-2 and KodaLite: accuracy in % as on {SOURCE}, which says neither by which program nor whether acc "
    "or acc_norm; not measured by albor"
)

# Accuracy in percent; for LAMBADA the perplexity too.
ROWS: dict[str, dict[str, float]] = {
    "GPT-2 124M": {
        "hellaswag": 29.22,
        "arc_easy": 38.30,
        "arc_challenge": 22.70,
        "winogrande": 49.49,
        "piqa": 62.24,
        "boolq": 49.76,
        "openbookqa": 26.40,
        "lambada_openai": 30.84,
    },
    "KodaLite 1.3B": {
        "hellaswag": 25.65,
        "arc_easy": 32.79,
        "arc_challenge": 21.50,
        "winogrande": 49.57,
        "piqa": 58.92,
        "boolq": 44.34,
        "openbookqa": 25.00,
        "lambada_openai": 18.22,
    },
}
PERPLEXITY = {"GPT-2 124M": 17.5, "KodaLite 1.3B": 93.78}  # of LAMBADA


def as_json(tasks: list[str]) -> dict[str, Any]:
    """The rows of these tasks, as a results file has them."""
    rows = {
        model: {task: accuracy for task, accuracy in row.items() if task in tasks}
        for model, row in ROWS.items()
    }
    return {"source": SOURCE, "note": NOTE, "accuracy_percent": rows, "lambada_perplexity": PERPLEXITY}
