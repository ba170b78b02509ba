"""The form of an answer: whether a grammar is one, whether a text has it. Pure, without torch.

A grammar goes to llguidance as that library writes grammars (`compiled`), and the engines never
choose a token that it does not allow. What comes of that is checked here once more from the text
alone (`fault`), since the text is what readers get: JSON by another library, the rest by the same
one over bytes instead of tokens.

JSON may hold one space, or one line break with up to 16 spaces, where it may hold any white space:
models write `"a": 1` and indented lines as they learned it, and none can go on for ever. So say
`additionalProperties: false`, `maxLength` and `maxItems` where an answer has to end.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from quantbatch.wants import Grammar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llguidance import LLMatcher, LLTokenizer

    from quantbatch.spec import Response

WHITE_SPACE = r"(?: |\n {0,16})?"
MOST_CHARACTERS = 400
"""Longest part of a library's message that is shown."""
TOO_DEEP = "it is nested too deeply (some 60 levels can be had), or a $ref leads back to itself"
LONGEST_PART = 64
"""Bytes of a fixed part of an answer that are looked at: as many as the longest words have."""


class Fault(NamedTuple):
    """Why a text is not of the form that was asked for."""

    kind: str
    """`schema`, `regex`, `choices` or `grammar`; becomes `error_type`."""
    reason: str


def grammar_of(response: Response) -> Grammar | None:
    """Return what a job's `task.response` asks of all rows; None if each row has its own."""
    if response.json_schema is not None:
        return Grammar("json_schema", schema_text(response.json_schema))
    if response.regex is not None:
        return Grammar("regex", response.regex)
    if response.choices is not None:
        return Grammar("choices", json.dumps(response.choices, ensure_ascii=False))
    return None if response.grammar is None else Grammar("grammar", response.grammar)


def schema_text(schema: str | dict[str, Any]) -> str:
    """Return a JSON schema as text.

    Raises:
        ValueError: It is no JSON, or no object.
    """
    found = parse_json(schema) if isinstance(schema, str) else schema
    if not isinstance(found, dict):
        raise ValueError(f"a schema is an object, this is {type(found).__name__}")
    try:
        return json.dumps(found, ensure_ascii=False, allow_nan=False)
    except TypeError as error:  # YAML has dates
        raise ValueError(str(error)) from error


def problem(grammar: Grammar) -> str:
    """Say why a grammar can't be used; else nothing."""
    try:
        if grammar.kind == "json_schema":
            _validator(grammar.text)
        wrong = matcher_problem(_matcher(_bytes(), compiled(grammar)))
        if grammar.kind == "json_schema" and not wrong:
            # Any text will do: a reference that leads to itself has no end with all of them.
            _violation(grammar.text, None)
    except RecursionError:
        return TOO_DEEP
    except ValueError as error:
        # So says llguidance of JSON with more than 128 levels.
        return TOO_DEEP if "recursion limit exceeded" in str(error) else str(error)
    return wrong


def compiled(grammar: Grammar) -> str:
    """Return a grammar as llguidance reads it; whether it is sound is not looked at.

    Raises:
        ValueError: It is no JSON where it has to be.
    """
    from llguidance import LLMatcher

    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(
                grammar.text, overrides={"whitespace_pattern": WHITE_SPACE}
            )
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choices":
            choices = [json.dumps(choice, ensure_ascii=False) for choice in _choices(grammar)]
            return LLMatcher.grammar_from_lark("start: " + " | ".join(choices))
        case "grammar":
            return LLMatcher.grammar_from_lark(grammar.text)


def matcher_problem(matcher: LLMatcher) -> str:
    """Say what llguidance has against a grammar or a token, in one line; else nothing."""
    if not matcher.is_error():
        return ""
    said = " ".join(re.split("<state>|<non-verbose", matcher.get_error())[0].split())
    return said[:MOST_CHARACTERS] or "llguidance does not say why"


def fault(grammar: Grammar, text: str) -> Fault | None:
    """Check an answer from its text alone."""
    match grammar.kind:
        case "json_schema":
            reason = _schema_fault(grammar.text, text)
            return Fault("schema", reason) if reason else None
        case "choices":
            if text in _choices(grammar):
                return None
            return Fault("choices", f"{text[:MOST_CHARACTERS]!r} is none of the choices")
        case kind:
            matcher = _matcher(_bytes(), compiled(grammar))
            if matcher.consume_tokens(list(text.encode())) and matcher.is_accepting():
                return None
            return Fault(kind, matcher_problem(matcher) or "the text ends before its form does")


def parse_json(text: str) -> Any:  # noqa: ANN401 - any JSON
    """Read JSON as strictly as it is defined: no NaN, no key twice, no half of a character.

    Raises:
        ValueError: It is none.
    """
    try:
        found = json.loads(
            text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_once
        )
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("no JSON: an escape stands for half of a character") from error
    except RecursionError as error:
        raise ValueError("no JSON that can be read: it is too deep") from error
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from error
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    found = float(digits)
    if abs(found) == float("inf"):
        raise ValueError(f"{digits[:40]} is too large a number")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _schema_fault(schema: str, text: str) -> str:
    try:
        return _violation(schema, parse_json(text))
    except ValueError as error:
        return str(error)
    except RecursionError:
        return "it is nested too deeply to be checked"
    except OverflowError:
        return "it has an integer that is too large to be checked"


def _violation(schema: str, value: Any) -> str:  # noqa: ANN401 - any JSON
    """Say where a value is not as its schema says; else nothing.

    Raises:
        ValueError: The schema refers to what is not in it.
        RecursionError: Value or schema is nested too deeply.
        OverflowError: An integer is to be compared as a float, and is none.
    """
    from jsonschema.exceptions import best_match
    from referencing.exceptions import Unresolvable

    try:
        wrong = best_match(_validator(schema).iter_errors(value))
    except Unresolvable as error:
        raise ValueError(f"the schema refers to what is not in it: {error.ref}") from error
    return f"{wrong.json_path}: {wrong.message}"[:MOST_CHARACTERS] if wrong else ""


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Any:  # noqa: ANN401 - has no types
    """Return what checks values by a schema; it never fetches what `$ref` names elsewhere.

    Raises:
        ValueError: The schema is none.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    found = json.loads(schema)
    if not isinstance(found.get("$schema", ""), str):
        raise ValueError("$['$schema']: is no text")
    kind = validator_for(found, default=Draft202012Validator)
    try:
        # With formats, so that a pattern that Python can't read is found here.
        kind.check_schema(found, format_checker=kind.FORMAT_CHECKER)
    except SchemaError as error:
        raise ValueError(f"{error.json_path}: {error.message}"[:MOST_CHARACTERS]) from error
    return kind(found, registry=Registry())


@lru_cache(maxsize=1)
def _bytes() -> LLTokenizer:
    """Return a tokenizer whose tokens are bytes."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _matcher(tokenizer: LLTokenizer, text: str) -> LLMatcher:
    from llguidance import LLMatcher
    from llguidance._lib import LLParserLimits

    return LLMatcher(tokenizer, text, log_level=0, limits=LLParserLimits(verbose_errors=False))


def _choices(grammar: Grammar) -> list[str]:
    found: list[str] = json.loads(grammar.text)
    return found


# ---- the shortest answer


def fewest_tokens(grammar: Grammar, words: Iterable[bytes]) -> int:
    """Return a number of tokens that no valid answer is shorter than, its end token included.

    Counted are the fixed parts that each answer has: the names of required fields, a constant, the
    beginning that a regex or grammar forces. The tokens that touch a part are at least as many as
    the fewest words that cover it, of which the first and the last may reach beyond it; two
    neighbouring parts may share one. What lies between the parts is not counted: most schemas need
    more.

    Args:
        grammar: A sound one.
        words: The bytes of each token of the vocabulary.
    """
    vocabulary = b"\0".join([b"", *words, b""])
    if grammar.kind == "choices":
        return 1 + min(_cover(choice.encode(), vocabulary, 0) for choice in _choices(grammar))
    if grammar.kind == "json_schema":
        schema = json.loads(grammar.text)
        parts = [part.encode() for part in _fixed(schema, schema, 0)]
    else:
        parts = [_matcher(_bytes(), compiled(grammar)).compute_ff_bytes()]
    return 2 + sum(_cover(part[:LONGEST_PART], vocabulary, 1) - 1 for part in parts if part)


def _fixed(schema: Any, root: Any, depth: int) -> Iterable[str]:  # noqa: ANN401 - a part of a schema
    """Yield texts that each answer to a schema has, none of which overlap."""
    if not isinstance(schema, dict) or depth > 8:
        return
    if "const" in schema or len(schema.get("enum", ())) == 1:
        only = schema["const"] if "const" in schema else schema["enum"][0]
        if isinstance(only, str) and re.fullmatch(r"[ !#-\[\]-~]+", only):
            yield f'"{only}"'
    elif "$ref" in schema:
        yield from _fixed(local(schema["$ref"], root), root, depth + 1)
    elif schema.get("type") == "object":
        for name in schema.get("required", ()):
            if re.fullmatch(r"[ !#-\[\]-~]+", name):  # others may be written with escapes
                yield f'"{name}"'
            yield from _fixed(schema.get("properties", {}).get(name), root, depth + 1)
    elif schema.get("type") == "array":
        for _ in range(min(schema.get("minItems", 0), 1000)):
            yield from _fixed(schema.get("items"), root, depth + 1)


def local(reference: str, root: Any) -> Any:  # noqa: ANN401 - a part of a schema
    """Return what a `$ref` within the same schema stands for; None if it is none of those."""
    found = root
    for name in reference.removeprefix("#").split("/")[1:] if reference.startswith("#") else "?":
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _cover(part: bytes, vocabulary: bytes, reach: int) -> int:
    """Return the fewest words that cover a text.

    Args:
        part: The text.
        vocabulary: All words, each between zero bytes.
        reach: 1 if the first and the last word may reach beyond the text, else 0.
    """
    first, last = (b"", b"") if reach else (b"\0", b"\0")
    if first + part + last in vocabulary:
        return 1
    size = len(part)
    fewest: list[float] = [0] + [float("inf")] * size
    for end in range(1, size + 1):
        for begin in range(max(0, end - LONGEST_PART), end):
            word = part[begin:end]
            before = first if begin == 0 else b"\0"
            after = last if end == size else b"\0"
            if fewest[begin] + 1 < fewest[end] and before + word + after in vocabulary:
                fewest[end] = fewest[begin] + 1
    return 1 if fewest[size] == float("inf") else int(fewest[size])


def words_of_tokenizer(tokenizer: Any) -> Sequence[bytes]:  # noqa: ANN401 - of transformers
    """Return the bytes of each token of a fast tokenizer."""
    from llguidance.hf import from_tokenizer

    found = from_tokenizer(tokenizer)
    return [found.decode_bytes([token]) for token in range(found.vocab_size)]
