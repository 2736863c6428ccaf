"""What Ollama wants beside a GGUF file: a Modelfile, and for a model that it takes from a hub, its parts.

Ollama's templates are Go's. This one says what the Jinja template in the GGUF file does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

# The last line break is an expression, because whoever trims the file would take it.
CHAT_TEMPLATE = (
    "{{ range .Messages }}<|im_start|>{{ .Role }}\n"
    "{{ .Content }}<|im_end|>\n"
    '{{ end }}<|im_start|>assistant{{ "\\n" }}'
)
TEXT_TEMPLATE = "{{ .Prompt }}"


def parameters(context: int, stop: Sequence[str], temperature: float) -> dict[str, object]:
    """Ollama's settings: those of `albor generate` where its own are others."""
    return {
        "num_ctx": context,
        "stop": list(stop),
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
        "repeat_penalty": 1.0,
    }


def modelfile(weights: str, template: str, settings: Mapping[str, object], model_license: str | None) -> str:
    """A Modelfile for the GGUF file of the name `weights` in the same directory: `ollama create NAME`."""
    lines = [f"FROM ./{weights}", f'TEMPLATE """{template}"""']
    for name, value in settings.items():
        for single in value if isinstance(value, list) else [value]:
            lines.append(f"PARAMETER {name} {json.dumps(single, ensure_ascii=False)}")
    if model_license is not None:
        lines.append(f'LICENSE """{model_license}"""')
    return "\n".join(lines) + "\n"
