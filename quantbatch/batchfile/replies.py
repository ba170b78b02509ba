"""Answers to the bodies of responses, as the official client reads them.

What is not here yet is `created`: the job's own time, which the lines get when they are published
(`lines`), so that it is the same whatever came in between.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantbatch import structured, toolcalls
from quantbatch.batchfile import forms
from quantbatch.records import Completion, Embedded, FinishReason
from quantbatch.structured import Fault
from quantbatch.wants import Write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantbatch.batchfile.tokens import TokenTexts
    from quantbatch.wants import Ask


@dataclass(frozen=True)
class Calls:
    """What a text has of calls."""

    content: str | None
    """What stands around them."""
    calls: tuple[toolcalls.ToolCall, ...]
    """Names of functions, and arguments as JSON text."""
    fault: str = ""
    """Why they are not as they were asked for."""


def body(ask: Ask, answers: Sequence[Completion | Embedded], texts: TokenTexts) -> dict[str, Any]:
    """Return the body of a response.

    Args:
        ask: What the row asked for, as `prompts` wrote it.
        answers: The row's answers, in order; none of them failed.
        texts: The texts of tokens, for log-probabilities.
    """
    written = [answer for answer in answers if isinstance(answer, Completion)]
    match ask.about["kind"]:
        case "chat":
            return _chat(ask, written, texts)
        case "completion":
            return _completion(ask, written, texts)
        case _:
            return _embeddings(ask, [a for a in answers if isinstance(a, Embedded)])


def completion_tokens(ask: Ask, answers: Sequence[Completion | Embedded]) -> int:
    """Return the tokens of a row's answers; of one that is given n times, so many times."""
    tokens = sum(len(each.token_ids) for each in answers if isinstance(each, Completion))
    copies: int = ask.about.get("copies", 1)
    return tokens * copies


def fault(ask: Ask, answers: Sequence[Completion | Embedded]) -> Fault | None:
    """Return why a whole answer is not of the form that was asked for."""
    assert ask.about is not None
    for answer in answers:
        if not isinstance(answer, Completion) or answer.finish_reason is FinishReason.LENGTH:
            continue
        found = None
        if isinstance(ask.want, Write) and ask.want.grammar:
            found = structured.fault(ask.want.grammar, answer.text)
        elif "tools" in ask.about and (why := calls_of(ask.about, answer.text).fault):
            found = Fault("tool_call", why)
        if found:
            return found
    return None


def calls_of(about: dict[str, Any], text: str) -> Calls:
    """Read the calls of tools out of an answer, if it is known how its model writes them.

    Args:
        about: Of the row: `family`, and `tools`, schemas of the functions whose arguments must have
            them, by name.
        text: The answer.
    """
    family = about["family"]
    if family is None:
        return Calls(text, ())
    try:
        calls = toolcalls.parse(family, text)
    except ValueError as error:
        return Calls(text, (), str(error))
    if not calls:
        return Calls(text, ())
    faults = (_fault_of(call, about["tools"].get(call.name)) for call in calls)
    content = toolcalls.beside(family, text) or None
    return Calls(content, tuple(calls), next(filter(None, faults), ""))


def _fault_of(call: toolcalls.ToolCall, schema: dict[str, Any] | None) -> str:
    """Say why the arguments of a call are not as its function wants them; else nothing."""
    wrong = schema is not None and forms.arguments_fault(schema, json.loads(call.arguments))
    return f"arguments of {call.name}: {wrong}" if wrong else ""


def _usage(ask: Ask, answers: Sequence[Completion]) -> dict[str, int]:
    prompt_tokens: int = ask.about["prompt_tokens"]
    new = completion_tokens(ask, answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new,
        "total_tokens": prompt_tokens + new,
    }


def _choices(ask: Ask, answers: Sequence[Completion]) -> list[Completion]:
    """Return the answers as they are given; one of several that are the same, so many times."""
    copies: int = ask.about.get("copies", 1)
    return [answer for answer in answers for _ in range(copies)]


def _chat(ask: Ask, answers: Sequence[Completion], texts: TokenTexts) -> dict[str, Any]:
    choices = [
        _chat_choice(ask, index, answer, texts)
        for index, answer in enumerate(_choices(ask, answers))
    ]
    return {
        "id": f"chatcmpl-{ask.about['id']}",
        "object": "chat.completion",
        "model": ask.about["model"],
        "choices": choices,
        "usage": _usage(ask, answers),
    }


def _chat_choice(ask: Ask, index: int, answer: Completion, texts: TokenTexts) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    reason: str = answer.finish_reason.value
    if "tools" in ask.about:
        found = calls_of(ask.about, answer.text)
        message["content"] = found.content
        if found.calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{ask.about['id'][:16]}_{index}_{number}",
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for number, (name, arguments) in enumerate(found.calls)
            ]
            reason = "tool_calls" if reason == "stop" else reason
    logprobs = None
    if answer.logprobs is not None:
        logprobs = {"content": _chat_logprobs(answer, texts), "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def _chat_logprobs(answer: Completion, texts: TokenTexts) -> list[dict[str, Any]]:
    assert answer.logprobs is not None
    shown = texts.shown(answer)
    return [
        _token(texts, token, each.logprob)
        | {"top_logprobs": [_token(texts, other, logprob) for other, logprob in each.top]}
        for token, each in zip(answer.token_ids[:shown], answer.logprobs, strict=False)
    ]


def _token(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    data = texts.data(token)
    return {"token": texts.text(token), "logprob": _finite(logprob), "bytes": data and list(data)}


def _finite(logprob: float) -> float:
    """Return a log-probability as JSON can hold it; the API gives -9999 for a token that can't
    be.
    """
    return logprob if math.isfinite(logprob) else -9999.0


def _completion(ask: Ask, answers: Sequence[Completion], texts: TokenTexts) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "text": answer.text,
            "logprobs": _text_logprobs(answer, texts),
            "finish_reason": answer.finish_reason.value,
        }
        for index, answer in enumerate(_choices(ask, answers))
    ]
    return {
        "id": f"cmpl-{ask.about['id']}",
        "object": "text_completion",
        "model": ask.about["model"],
        "choices": choices,
        "usage": _usage(ask, answers),
    }


def _text_logprobs(answer: Completion, texts: TokenTexts) -> dict[str, Any] | None:
    if answer.logprobs is None:
        return None
    tokens = answer.token_ids[: texts.shown(answer)]
    each = answer.logprobs[: len(tokens)]
    names = [texts.text(token) for token in tokens]
    offsets = [0, *itertools.accumulate(map(len, names))]
    return {
        "tokens": names,
        "token_logprobs": [_finite(token.logprob) for token in each],
        "top_logprobs": [
            {texts.text(other): _finite(logprob) for other, logprob in token.top} for token in each
        ],
        "text_offset": offsets[: len(names)],
    }


def _embeddings(ask: Ask, answers: Sequence[Embedded]) -> dict[str, Any]:
    tokens: int = ask.about["prompt_tokens"]
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _vector(answer, ask.about["encoding"]),
            }
            for index, answer in enumerate(answers)
        ],
        "model": ask.about["model"],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _vector(answer: Embedded, encoding: str) -> list[float] | str:
    """Return a vector of length 1, as the hosted API gives them."""
    found = np.asarray(answer.vector, np.float64)
    length = float(np.linalg.norm(found))
    found = (found / length if length > 0 else found).astype("<f4")
    if encoding == "base64":
        return base64.b64encode(found.tobytes()).decode()
    # As short as a float32 can be written: 9 digits tell any two of them apart.
    return [float(f"{value:.9g}") for value in found.tolist()]
