"""Answers that have a form (`task.response`): what form a row's has, and what is wrong with one."""

from __future__ import annotations

from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from quantbatch import structured, toolcalls
from quantbatch.errors import JobError, RowError, SpecError
from quantbatch.records import Completion, Failure, FinishReason
from quantbatch.spec import Generate, Response
from quantbatch.tasks import flat
from quantbatch.wants import Ask, Grammar, Write

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from quantbatch.records import Answer
    from quantbatch.spec import JobSpec

BAD_SCHEMA = "bad_schema"
"""`error_type` of rows whose own schema is none."""


def want(task: Generate, ask: Ask) -> Write:
    """Return what a row wants to be written: in its own form, else in the job's."""
    assert isinstance(ask.want, Write)
    if ask.want.grammar is not None or task.response is None:
        return ask.want
    return _usual(_key(task.response))


def _key(response: Response) -> str:
    return response.model_dump_json()


@lru_cache(maxsize=16)
def _usual(key: str) -> Write:
    return Write(grammar=structured.grammar_of(Response.model_validate_json(key)))


def check(spec: JobSpec, task: Generate, columns: Collection[str]) -> None:
    """Refuse a form that no answer could have.

    Args:
        spec: The job.
        task: Its task.
        columns: Names of the input's columns.

    Raises:
        SpecError: With the field and the reason.
    """
    response = task.response
    if task.calls_tools and spec.prompt.format == "text":
        raise _wrong(
            "task.tools: the model's chat template tells of them, and prompt.format is text",
            "set prompt.format: chat",
        )
    _check_column("task.tools_column", task.tools_column, columns)
    if task.tool_choice != "auto":
        _check_engine(spec, "task.tool_choice")
    if response is None:
        if spec.output.explode:
            raise _wrong("output.explode: there is no task.response.json_schema", "give one")
        return
    _check_engine(spec, "task.response")
    _check_column("task.response.schema_column", response.schema_column, columns)
    _check_grammar(response)
    if spec.output.explode:
        _check_explode(spec, response)


def _check_column(field: str, name: str | None, columns: Collection[str]) -> None:
    if name is not None and name not in columns:
        raise _wrong(
            f"{field}: the input has no column {name!r}", f"its columns are {', '.join(columns)}"
        )


def _check_engine(spec: JobSpec, field: str) -> None:
    """Refuse engine and sampling that don't go with answers of a form."""
    if spec.engine.kind == "llama_cpp":
        raise _wrong(
            f"{field}: the engine llama_cpp writes free answers only",
            "use the engine continuous, which runs GGUF files with model.allow_dequantize",
        )
    if spec.sampling.min_new_tokens:
        raise _wrong(
            f"sampling.min_new_tokens: an answer with {field} ends where its form ends",
            "leave it out; a schema has minLength and minItems",
        )


def _check_grammar(response: Response) -> None:
    grammar = structured.grammar_of(response)
    wrong = structured.problem(grammar) if grammar else ""
    if grammar and wrong:
        raise _wrong(
            f"task.response.{grammar.kind}: {wrong}", "llguidance has to be able to compile it"
        )


def _check_explode(spec: JobSpec, response: Response) -> None:
    if response.json_schema is None:
        raise _wrong(
            "output.explode: columns are those of task.response.json_schema, and there is none",
            "rows with schemas of their own have no columns in common",
        )
    try:
        names = {field.name for field in exploded(spec)}
    except ValueError as error:
        raise _wrong(
            f"output.explode: task.response.json_schema is not flat: {error}",
            "leave it off; `completion` holds the JSON",
        ) from error
    from quantbatch.tasks.generate import OWN_COLUMNS

    if both := sorted(names & OWN_COLUMNS):
        raise _wrong(
            f"output.explode: the property {both[0]!r} has the name of a column that quantbatch"
            " adds",
            "give it another name",
        )
    if marked := sorted(name for name in names if name.startswith("in.")):
        raise _wrong(
            f"output.explode: the property {marked[0]!r} begins with `in.`, as columns of the"
            " input do on their way",
            "give it another name",
        )


def _wrong(problem: str, hint: str) -> SpecError:
    return SpecError(JobError(problem, hint))


class Asked(NamedTuple):
    """What rows ask for."""

    asks: pa.Array | None = None
    """`Ask` as JSON, null where a row asks for nothing of its own; None if no row does."""
    errors: Mapping[int, RowError] = MappingProxyType({})


def asked(task: Generate, table: pa.Table) -> Asked:
    """Return the forms that rows bring in `schema_column`."""
    column = task.response.schema_column if task.response else None
    if column is None:
        return Asked()
    asks: list[str | None] = [None] * table.num_rows
    errors: dict[int, RowError] = {}
    for row, scalar in enumerate(table[column]):
        try:
            asks[row] = _ask_for(_text(scalar.as_py()))
        except ValueError as error:  # also of text that is no UTF-8
            errors[row] = RowError(BAD_SCHEMA, f"column {column!r}: {error}")
    return Asked(pa.array(asks, pa.string()), errors)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("it is null" if value is None else "it is no text")
    return value


@lru_cache(maxsize=1024)
def _ask_for(text: str) -> str:
    grammar = Grammar("json_schema", structured.schema_text(text))
    if wrong := structured.problem(grammar):
        raise ValueError(wrong)
    return Ask(Write(grammar=grammar)).to_json()


class Verdict(NamedTuple):
    """What a complete answer is."""

    failure: Failure | None = None
    """Why it is not of its form."""
    values: dict[str, Any] | None = None
    """Its properties as columns hold them, where they are wanted and it is valid."""


def verdict(spec: JobSpec, ask: Ask, answer: Answer) -> Verdict:
    """Look at an answer again, from its text alone; of one that was cut off there is none."""
    assert isinstance(spec.task, Generate)
    grammar = want(spec.task, ask).grammar
    if spec.task.calls_tools:
        return _calls(ask, answer)
    if (
        grammar is None
        or not isinstance(answer, Completion)
        or answer.finish_reason is FinishReason.LENGTH
    ):
        return Verdict()
    wrong = structured.fault(grammar, answer.text)
    if wrong:
        return Verdict(Failure(answer.id, *wrong))
    if not spec.output.explode:
        return Verdict()
    found = structured.parse_json(answer.text)
    try:
        values = {
            field.name: flat.cell(found.get(field.name), field.type) for field in exploded(spec)
        }
    except ValueError as error:
        return Verdict(Failure(answer.id, "schema", str(error)))
    return Verdict(values=values)


def _calls(ask: Ask, answer: Answer) -> Verdict:
    if (
        not ask.about
        or not isinstance(answer, Completion)
        or answer.finish_reason is FinishReason.LENGTH
    ):
        return Verdict()
    assert isinstance(ask.want, Write)
    form = ask.want.grammar
    if form is not None and (wrong := structured.fault(form, answer.text)):
        return Verdict(Failure(answer.id, "tool_call", wrong.reason))
    try:
        calls = toolcalls.parse(ask.about["tool_calls"], answer.text)
    except ValueError as error:
        return Verdict(Failure(answer.id, "tool_call", str(error)))
    return Verdict(values={"tool_calls": [call._asdict() for call in calls]})


def exploded(spec: JobSpec) -> list[pa.Field]:
    """Return the columns of a job's schema, none if they are not wanted.

    Raises:
        ValueError: The schema is not flat.
    """
    response = spec.task.response if isinstance(spec.task, Generate) else None
    if not spec.output.explode or response is None or response.json_schema is None:
        return []
    return _exploded(structured.schema_text(response.json_schema))


@lru_cache(maxsize=16)
def _exploded(schema: str) -> list[pa.Field]:
    return flat.fields(structured.parse_json(schema))
