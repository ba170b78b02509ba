"""Forms of answers: what compiles, what a text is checked for, how short an answer can be."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quantbatch import structured
from quantbatch.structured import Fault
from quantbatch.wants import Grammar

SCHEMA = {
    "type": "object",
    "properties": {"title": {"type": "string"}, "stars": {"type": "integer"}},
    "required": ["title", "stars"],
    "additionalProperties": False,
}


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (schema({"type": "strin"}), "$.type"),
        (schema({"type": "string", "pattern": "("}), "$.pattern"),
        (schema({"type": "string", "minLength": 3, "maxLength": 2}), "minLength"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"$ref": "https://example.com/schema"}), "https://example.com/schema"),
        (schema({"$ref": "#"}), "leads back to itself"),
        (schema({"$schema": 3}), "$schema"),
        (Grammar("regex", "a("), "unclosed group"),
        (Grammar("regex", "a(?=b)"), "look-around"),
        (Grammar("grammar", "start: nothing"), "nothing"),
    ],
)
def test_what_does_not_compile_says_why(grammar: Grammar, reason: str) -> None:
    problem = structured.problem(grammar)
    assert reason in problem
    assert "\n" not in problem


@pytest.mark.parametrize("levels", [70, 400])
def test_a_schema_that_is_too_deep_is_refused(levels: int) -> None:
    def nested(levels: int) -> dict[str, Any]:
        inner = nested(levels - 1) if levels else {"type": "string"}
        return {"type": "object", "properties": {"a": inner}}

    assert structured.problem(schema(nested(50))) == ""
    assert "nested too deeply" in structured.problem(schema(nested(levels)))


@pytest.mark.parametrize(
    ("form", "text", "reason"),
    [
        ({"type": "array", "items": {"$ref": "#"}}, "[" * 900 + "]" * 900, "too deeply"),
        ({"type": "integer", "multipleOf": 0.01}, "1" + "0" * 400, "too large"),
        ({"not": {"$ref": "https://example.com/a"}}, "1", "https://example.com/a"),
    ],
)
def test_what_can_not_be_checked_is_a_fault(form: Any, text: str, reason: str) -> None:
    found = structured.fault(schema(form), text)
    assert found is not None
    assert reason in found.reason


def test_what_compiles() -> None:
    for grammar in (
        schema(SCHEMA),
        schema({}),
        Grammar("regex", "[a-z]+é"),
        Grammar("choices", json.dumps(['a"b', "x\ny", "back\\slash", "é😀", "/re/"])),
        Grammar("grammar", 'start: "a" | start "b"'),
    ):
        assert structured.problem(grammar) == ""


@pytest.mark.parametrize("choice", ['a"b', "x\ny", "back\\slash", "é😀", "/re/", "a", "ab"])
def test_choices_are_taken_as_they_are(choice: str) -> None:
    choices = Grammar(
        "choices", json.dumps(['a"b', "x\ny", "back\\slash", "é😀", "/re/", "a", "ab"])
    )
    assert structured.fault(choices, choice) is None
    matcher = structured._matcher(structured._bytes(), structured.compiled(choices))
    assert matcher.consume_tokens(list(choice.encode()))
    assert matcher.is_accepting()
    assert structured.fault(choices, f"{choice}!") == Fault(
        "choices", f"{choice + '!'!r} is none of the choices"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"title": "a", "stars": 1}', ""),
        ('{"stars": 1.0, "title": "é\\u00e9"}', ""),
        ('{"title": "a", "stars": 1', "no JSON"),
        ('{"title": "a", "stars": "1"}', "$.stars"),
        ('{"title": "a"}', "'stars' is a required property"),
        ('{"title": "a", "stars": NaN}', "NaN is no number"),
        ('{"title": "a", "stars": 1e999}', "too large"),
        ('{"title": "a", "stars": 1, "stars": 2}', "a key comes twice"),
        ('{"title": "\\ud800", "stars": 1}', "half of a character"),
        ('{"title": "\\ud83d\\ude00", "stars": 1}', ""),
        ("[" * 100_000, "too deep"),
        (f'{{"title": "a", "stars": {"1" * 5000}}}', "no JSON"),
        ("", "no JSON"),
    ],
)
def test_json_is_read_strictly(text: str, reason: str) -> None:
    found = structured.fault(schema(SCHEMA), text)
    if not reason:
        assert found is None
    else:
        assert found is not None
        assert found.kind == "schema"
        assert reason in found.reason


def test_the_whole_text_has_to_match() -> None:
    regex = Grammar("regex", "[A-Z]{2}-[0-9]+")
    assert structured.fault(regex, "AB-12") is None
    for text in ("AB-", "AB-12 ", "xAB-12", ""):
        found = structured.fault(regex, text)
        assert found is not None
        assert found.kind == "regex"
    lark = Grammar("grammar", 'start: "(" start ")" | "x"')
    assert structured.fault(lark, "((x))") is None
    assert structured.fault(lark, "((x)") == Fault("grammar", "the text ends before its form does")


def test_a_schema_of_a_row_has_to_be_an_object() -> None:
    assert structured.schema_text('{"type": "null"}') == '{"type": "null"}'
    for text in ("{", "[]", "true", '"a"', "NaN"):
        with pytest.raises(ValueError, match=r"JSON|object"):
            structured.schema_text(text)


BYTES = [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize(
    ("grammar", "words", "tokens"),
    [
        # "title" and "stars" are 7 bytes each; the end token and what stands around them is one.
        (schema(SCHEMA), BYTES, 1 + 7 + 7 - 1),
        (schema(SCHEMA), [*BYTES, b"title", b'"stars"'], 1 + 3 + 1 - 1),
        (schema(SCHEMA), [*BYTES, b'{"tit', b'le":'], 1 + 2 + 7 - 1),
        (schema({"const": "abc"}), BYTES, 1 + 5),
        (schema({"type": "string"}), BYTES, 2),
        (Grammar("choices", '["yes", "no"]'), BYTES, 3),
        (Grammar("choices", '["yes", "no"]'), [*BYTES, b"yes", b"no!"], 2),
        (Grammar("regex", "abc[0-9]"), BYTES, 4),
    ],
)
def test_no_answer_is_shorter(grammar: Grammar, words: list[bytes], tokens: int) -> None:
    assert structured.fewest_tokens(grammar, words) == tokens


def test_the_bound_is_below_what_an_answer_takes() -> None:
    """By the tokenizer of bytes the shortest answer is known."""
    shortest = '{"title":"","stars":0}'
    assert structured.fault(schema(SCHEMA), shortest) is None
    assert structured.fewest_tokens(schema(SCHEMA), BYTES) <= len(shortest) + 1
