"""What a client may ask for: OpenAI's request bodies, checked field by field, and its form of errors.

A field that would change the answer and is not heeded is refused unless it asks for what happens anyway: a
client that believes its setting had an effect is worse off than one that is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from albor.data.tokenizer import Tokenizer
from albor.errors import ConfigError
from albor.generate.chat import CannotChat, Role, Turn, encode
from albor.generate.generate import Settings

_MOST_STOPS = 16
_COMPLETION_TOKENS = 16  # OpenAI's default for a completion; a chat's is what the context has room for
_COMMON = frozenset({
    "model", "temperature", "top_p", "stop", "seed", "stream", "stream_options", "max_tokens", "n",
    "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "user", "metadata", "store",
    "service_tier", "top_k",
})  # fmt: skip
_FIELDS = {
    "completion": _COMMON | {"prompt", "best_of", "echo", "suffix"},
    "chat": _COMMON | {
        "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "functions",
        "function_call", "response_format", "modalities", "parallel_tool_calls",
    },
}  # fmt: skip
# What changes nothing, besides null. Of other fields every value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "echo": (False,),
    "suffix": ("",),
    "top_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}

Kind = Literal["completion", "chat"]


class Refused(Exception):
    """A request that gets no answer: its HTTP status, the reason, and OpenAI's names for what is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kinds = {401: "authentication_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code},
        }


@dataclass(frozen=True)
class Asked:
    """A request that can be answered."""

    kind: Kind
    prompt_ids: tuple[int, ...]
    settings: Settings
    stream: bool
    include_usage: bool


def read_request(
    kind: Kind, body: Any, model_id: str, tokenizer: Tokenizer, context: int, random_seed: int
) -> Asked:
    """The request that a JSON body makes; `random_seed` is for one that names none. Raises Refused."""
    if not isinstance(body, dict):
        raise Refused(400, "the body has to be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    _check_fields(kind, given)
    if _required(given, "model", str) != model_id:
        raise Refused(
            404, f"there is no model {given['model']!r} here, only {model_id!r}", "model", "model_not_found"
        )
    try:
        prompt_ids = (_prompt if kind == "completion" else _chat)(given, tokenizer)
    except CannotChat as error:
        raise Refused(400, f"{error}, or /v1/completions", "messages", "model_cannot_chat") from error
    if len(prompt_ids) > context:
        raise Refused(
            400,
            f"the prompt has {len(prompt_ids):,} tokens, and the model's context holds {context:,}",
            "prompt" if kind == "completion" else "messages",
            "context_length_exceeded",
        )
    stream = _optional(given, "stream", bool, False)
    options = _optional(given, "stream_options", dict, {})
    if options and not stream:
        raise Refused(400, "stream_options has a meaning with stream only", "stream_options")
    if unknown := sorted(options.keys() - {"include_usage", "include_obfuscation"}):
        raise Refused(400, f"unknown stream option {unknown[0]!r}", f"stream_options.{unknown[0]}")
    include_usage = _optional(options, "include_usage", bool, False)
    settings = _settings(kind, given, context, random_seed)
    return Asked(kind, tuple(prompt_ids), settings, stream, include_usage)


def _check_fields(kind: Kind, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name not in _FIELDS[kind]:
            raise Refused(400, f"unknown field {name!r}", name, "unknown_field")
        if name in _NEUTRAL and not any(type(value) is type(v) or _numbers(value, v) for v in _NEUTRAL[name]):
            raise Refused(400, f"{name} is not supported: leave it out", name, "unsupported_field")
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise Refused(400, f"{name}={value!r} is not supported: leave it out", name, "unsupported_value")


def _numbers(value: Any, neutral: Any) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in (value, neutral))


def _settings(kind: Kind, given: dict[str, Any], context: int, random_seed: int) -> Settings:
    limits = [name for name in ("max_tokens", "max_completion_tokens") if name in given]
    if len(limits) > 1:
        raise Refused(400, "max_tokens and max_completion_tokens are one setting: give one", limits[0])
    name = limits[0] if limits else "max_tokens"
    # Whatever is asked for, the context ends it.
    most = min(_optional(given, name, int, _COMPLETION_TOKENS if kind == "completion" else context), context)
    if most < 1:
        raise Refused(400, f"{name} has to be 1 or more", name)
    stop = given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise Refused(400, "stop has to be a text, or a list of texts", "stop")
    if len(stops) > _MOST_STOPS:
        raise Refused(400, f"there are {len(stops)} stop texts, and {_MOST_STOPS} are heeded", "stop")
    for text in stops:
        _check_unicode(text, "stop")
    top_p = _number(given, "top_p", 1.0)
    try:
        return Settings(
            max_tokens=most,
            temperature=_number(given, "temperature", 1.0),
            top_p=None if top_p == 1 else top_p,  # all tokens, in whichever order
            top_k=_optional(given, "top_k", int, None),
            stop=tuple(stops),
            seed=_optional(given, "seed", int, random_seed),
        )
    except ConfigError as error:
        raise Refused(400, str(error), error.problems[0].key) from error


def _prompt(given: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """A document's beginning, as `albor generate` reads it; a list of tokens is taken as it is."""
    prompt = given.get("prompt", "")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        _check_unicode(prompt, "prompt")
        return [tokenizer.end_of_document_id, *tokenizer.encode(prompt).tolist()]
    if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
        raise Refused(400, "prompt has to be one text, or one list of tokens", "prompt")
    if not prompt or not all(0 <= token < tokenizer.vocab_size for token in prompt):
        what = "is empty" if not prompt else f"has tokens outside 0 to {tokenizer.vocab_size - 1}"
        raise Refused(400, f"the prompt's list of tokens {what}", "prompt")
    return prompt


def _chat(given: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    messages = _required(given, "messages", list)
    if not messages:
        raise Refused(400, "messages is empty", "messages")
    return encode(tokenizer, [_turn(message, n) for n, message in enumerate(messages)])


def _turn(message: Any, number: int) -> Turn:
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise Refused(400, f"{where} has to be an object with role and content", where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise Refused(400, f"{where}.role has to be one of {', '.join(_ROLES)}", f"{where}.role")
    if any(message.get(name) for name in ("tool_calls", "function_call", "audio")):
        raise Refused(400, f"{where} has more than text, which this model cannot read", where)
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") if part.get("type") == "text" else None for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise Refused(400, f"{where}.content has to be text", f"{where}.content")
    _check_unicode(content, f"{where}.content")
    return Turn(_ROLES[role], content)


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(400, "the text has a surrogate, which is half of a pair, alone", param) from error


def _required(given: dict[str, Any], name: str, kind: type) -> Any:
    if name not in given:
        raise Refused(400, f"{name} is missing", name, "missing_field")
    return _optional(given, name, kind, None)


def _optional(given: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = given.get(name)
    if value is None:
        return default
    if type(value) is not kind:
        words = {
            bool: "true or false",
            int: "a whole number",
            str: "a text",
            list: "a list",
            dict: "an object",
        }
        raise Refused(400, f"{name} has to be {words[kind]}", name, "invalid_type")
    return value


def _number(given: dict[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if type(value) not in (int, float):
        raise Refused(400, f"{name} has to be a number", name, "invalid_type")
    try:
        return float(value)
    except OverflowError as error:  # JSON's whole numbers have no end
        raise Refused(400, f"{name} is too large", name) from error
