"""Bodies of requests: every option is honoured, has no effect on an answer, or is refused by name.

The fields are those of the public reference (/v1/chat/completions, /v1/completions and
/v1/embeddings). A null counts as not given. Which model a body names does not matter: all rows are
answered by the job's model, which the response names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantbatch.batchfile import forms
from quantbatch.batchfile.messages import conversation_of, forced_by, tools_of
from quantbatch.batchfile.refusals import BAD_REQUEST, bad, unsupported
from quantbatch.errors import RowError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantbatch.prompts.tokens import Conversation
    from quantbatch.toolcalls import Choice
    from quantbatch.wants import Grammar

MAX_BODY_BYTES = 1_000_000
MAX_INPUTS = 2048
"""Most texts of one embeddings request, as in the hosted API."""
MAX_STOPS = 4
MOST_DIGITS = 10
"""Of a token id."""

Kind = Literal["chat", "completion", "embedding"]
URLS: dict[str, Kind] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/embeddings": "embedding",
}
PromptText = str | tuple[int, ...]
"""A text, or the token ids that somebody made of it."""


@dataclass(frozen=True)
class Wanted:
    """What one request asks for."""

    kind: Kind
    sampling: dict[str, Any] = field(default_factory=dict)
    """Fields of `spec.Sampling`, those that the body gives."""
    grammar: Grammar | None = None
    conversation: Conversation | None = None
    """Of a chat."""
    tools: list[dict[str, Any]] | None = None
    """As the chat template is to see them."""
    choice: Choice | None = None
    """Which calls of them the answer has to consist of."""
    prompts: tuple[PromptText, ...] = ()
    """Of the other kinds."""
    about: dict[str, Any] = field(default_factory=dict)
    """What the reply needs to know, in JSON types."""


Positive = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "prediction",
    "parallel_tool_calls",
)
"""Options that change nothing about an answer; `parallel_tool_calls` is looked at with the
tools."""
REASONS = {
    "stream": "a batch has no stream",
    "stream_options": "a batch has no stream",
    "audio": "answers are text",
    "modalities": "answers are text",
    "functions": "deprecated, use tools",
    "function_call": "deprecated, use tool_choice",
    "web_search_options": "there is no web search",
    "moderation": "there is no moderation",
    "reasoning_effort": "the job's prompt.chat_template_kwargs may have it for all rows",
    "verbosity": "no model here has such a setting",
    "echo": "the prompt is not scored",
    "best_of": "only n answers are made",
    "suffix": "text can't be filled in before a suffix",
    "dimensions": "vectors have the length that the model gives them",
}
"""Options of the API that can't be honoured, unless their value asks for what happens anyway."""
HARMLESS: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "modalities": (["text"],),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}
"""Values of those that ask for what happens anyway."""


class _Body(BaseModel):
    """What bodies of all kinds have; the types are strict, as JSON has them."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: Annotated[str, Field(min_length=1)]


class _Writing(_Body):
    """What bodies have that ask for text."""

    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Any = None
    logit_bias: Any = None


class _Chat(_Writing):
    """Of /v1/chat/completions."""

    messages: Any
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None


class _Completion(_Writing):
    """Of /v1/completions."""

    prompt: Any
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class _Embedding(_Body):
    """Of /v1/embeddings."""

    input: Any
    encoding_format: Literal["float", "base64"] | None = None


BodyT = TypeVar("BodyT", bound=_Body)


def read_request(row: Mapping[str, str | None]) -> Wanted:
    """Return what a line of a batch file asks for.

    Args:
        row: Its method, url and body, the body as JSON text.

    Raises:
        RowError: The line lacks something, or has an option that can't be honoured.
    """
    method, url = row["method"], row["url"]
    if method is None or url is None:
        raise bad("method" if method is None else "url", None, "is missing")
    if method.upper() != "POST":
        raise bad("method", method, "should be POST")
    if url not in URLS:
        raise bad("url", url, f"should be one of {', '.join(URLS)}")
    return read_body(URLS[url], _object(row["body"]))


def _object(text: str | None) -> dict[str, Any]:
    if text is None:
        raise bad("body", None, "is missing")
    if len(text) > MAX_BODY_BYTES or len(text.encode()) > MAX_BODY_BYTES:
        raise RowError(BAD_REQUEST, f"body: has more than {MAX_BODY_BYTES:,} bytes")
    try:
        found = forms.read_json(text)
    except json.JSONDecodeError:
        found = None
    except ValueError as error:
        raise bad("body", text, str(error)) from None
    if not isinstance(found, dict):
        raise bad("body", text, "is no object")
    return found


def read_body(kind: Kind, body: dict[str, Any]) -> Wanted:
    """Return what a body asks for.

    Raises:
        RowError: An option is wrong, or can't be honoured.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name in WITHOUT_EFFECT:
        if name != "parallel_tool_calls" or kind != "chat":
            given.pop(name, None)
    parallel = given.pop("parallel_tool_calls", True)
    for name, reason in REASONS.items():
        value = given.pop(name, None)
        if value is not None and not _is_harmless(name, value, body):
            raise unsupported(name, value, reason)
    match kind:
        case "chat":
            return _chat(_checked(_Chat, given), parallel=parallel)
        case "completion":
            return _completion(_checked(_Completion, given))
        case "embedding":
            return _embedding(_checked(_Embedding, given))


def _is_harmless(name: str, value: object, body: Mapping[str, Any]) -> bool:
    # True equals 1 in Python, and is something else in JSON.
    same = any(value == usual and type(value) is type(usual) for usual in HARMLESS.get(name, ()))
    return same or (name == "best_of" and value == body.get("n") and type(value) is int)


def _checked(form: type[BodyT], given: dict[str, Any]) -> BodyT:
    try:
        return form.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        match first["type"]:
            case "missing":
                raise bad(name, None, "is missing") from None
            case "extra_forbidden":
                raise unsupported(name, first["input"], "there is no such option") from None
            case _:
                said = first["msg"].replace("Input should", "should")
                raise bad(name, first["input"], said) from None


def _chat(body: _Chat, *, parallel: object) -> Wanted:
    tools = tools_of(body.tools, body.tool_choice)
    choice = forced_by(body.tool_choice, tools)
    if choice is not None and parallel is False:
        choice = choice._replace(once=True)
    elif tools and parallel is not True:
        raise unsupported("parallel_tool_calls", parallel, "how many calls come is the model's")
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs", body.top_logprobs, "needs logprobs: true")
    sampling = _sampling(body, body.max_completion_tokens or body.max_tokens)
    if body.max_completion_tokens and body.max_tokens not in (None, body.max_completion_tokens):
        raise bad("max_tokens", body.max_tokens, "max_completion_tokens says another number")
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    grammar = _grammar(body.response_format)
    if grammar and tools:
        why = "not together with tools: a call of a tool would not have that form"
        raise unsupported("response_format", body.response_format, why)
    about = {"kind": "chat"} | ({"tools": _strict_schemas(tools)} if tools else {})
    conversation = conversation_of(body.messages)
    return Wanted("chat", sampling, grammar, conversation, tools, choice, about=about)


def _strict_schemas(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the schemas of the functions whose calls must have them, by name."""
    functions = [tool["function"] for tool in tools]
    return {each["name"]: each.get("parameters") for each in functions if each.get("strict")}


def _completion(body: _Completion) -> Wanted:
    sampling = _sampling(body, body.max_tokens)
    if body.logprobs is not None:
        sampling["logprobs"] = body.logprobs
    prompts = _prompts("prompt", body.prompt)
    return Wanted("completion", sampling, prompts=prompts, about={"kind": "completion"})


def _embedding(body: _Embedding) -> Wanted:
    prompts = _prompts("input", body.input)
    encoding = body.encoding_format or "float"
    return Wanted("embedding", prompts=prompts, about={"kind": "embedding", "encoding": encoding})


def _sampling(body: _Writing, max_tokens: int | None) -> dict[str, Any]:
    """Return the fields of `spec.Sampling` that a body gives."""
    names = ("temperature", "top_p", "n", "presence_penalty", "frequency_penalty")
    values: dict[str, Any] = {name: getattr(body, name) for name in names}
    values["max_new_tokens"] = max_tokens
    # The API's seeds may be negative.
    values["seed"] = None if body.seed is None else body.seed % 2**63
    values["stop"] = _stops(body.stop)
    values["logit_bias"] = _logit_bias(body.logit_bias)
    return {name: value for name, value in values.items() if value is not None}


def _stops(value: Any) -> list[str] | None:  # noqa: ANN401 - any JSON value
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    sound = isinstance(stops, list) and all(isinstance(text, str) and text for text in stops)
    if not sound or len(stops) > MAX_STOPS:
        raise bad("stop", value, f"should be a text or at most {MAX_STOPS} texts, none empty")
    return list(stops)


def _logit_bias(value: Any) -> dict[str, float] | None:  # noqa: ANN401 - any JSON value
    if value is None:
        return None
    if not isinstance(value, dict):
        raise bad("logit_bias", value, "should be an object of token ids and biases")
    for key, bias in value.items():
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (key.isascii() and key.isdigit() and len(key) <= MOST_DIGITS):
            raise bad("logit_bias", key, "is no token id")
        if not is_number or not -100 <= bias <= 100:
            raise bad(f"logit_bias.{key}", bias, "should be a number from -100 to 100")
    return value


def _grammar(value: Any) -> Grammar | None:  # noqa: ANN401 - any JSON value
    """Return what a `response_format` allows; None if all."""
    match value:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return forms.grammar_of({"type": "object"})
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            grammar = forms.grammar_of(schema)
            if wrong := forms.problem(grammar):
                raise bad("response_format.json_schema.schema", schema, wrong)
            return grammar
        case {"type": "json_schema"}:
            raise bad("response_format.json_schema", value.get("json_schema"), "lacks a schema")
        case _:
            raise unsupported(
                "response_format", value, "should be of type text, json_object or json_schema"
            )


def _prompts(name: str, value: Any) -> tuple[PromptText, ...]:  # noqa: ANN401 - any JSON value
    """Return the texts and token lists of a `prompt` or an `input`."""
    several = isinstance(value, list) and bool(value) and not _are_tokens(value)
    found = value if several else [value]
    if len(found) > MAX_INPUTS:
        raise RowError(BAD_REQUEST, f"{name}: has {len(found):,} texts, more than {MAX_INPUTS:,}")
    prompts: list[PromptText] = []
    for index, each in enumerate(found):
        where = f"{name}.{index}" if several else name
        if isinstance(each, str) and each:
            prompts.append(each)
        elif isinstance(each, list) and each and _are_tokens(each):
            prompts.append(tuple(each))
        else:
            raise bad(where, each, "should be a text or a list of token ids, and not empty")
    return tuple(prompts)


def _are_tokens(value: list[Any]) -> bool:
    return all(type(item) is int and item >= 0 for item in value)
