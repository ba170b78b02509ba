"""Prompts of rows that have tools: those of the job, or each row's own."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
from typing_extensions import override

from quantbatch import structured, toolcalls
from quantbatch.batchfile.messages import tools_of
from quantbatch.errors import JobError, RowError, SpecError
from quantbatch.prompts.chat import require_tools
from quantbatch.prompts.rendering import Prompts, Renderer
from quantbatch.records import from_token_lists
from quantbatch.toolcalls import Choice
from quantbatch.wants import Ask, Write

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from quantbatch.prompts.rendering import PromptText
    from quantbatch.prompts.tokens import TooLong
    from quantbatch.spec import Generate, Prompt
    from quantbatch.toolcalls import Family

Tools = list[dict[str, Any]]
BAD_TOOLS = "bad_tools"
"""`error_type` of rows whose own tools are none."""


class ToolRenderer:
    """Makes token ids from rows with tools. Can be pickled.

    Args:
        prompt: The spec's prompt.
        task: Its task, which has tools or a column of them.
        tokenizer: The model's; nobody else may use it meanwhile.
        max_prompt_tokens: Longest prompt.
        too_long: What becomes of a longer one.

    Raises:
        SpecError: A template is wrong, or calls can't be forced.
        ModelError: The model has no chat template that knows tools.
    """

    def __init__(
        self,
        prompt: Prompt,
        task: Generate,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_tokens: int,
        too_long: TooLong = "error",
    ) -> None:
        self._arguments = (prompt, task, tokenizer, max_prompt_tokens, too_long)
        self._task = task
        self._renderer = Renderer(
            prompt,
            tokenizer,
            max_prompt_tokens=max_prompt_tokens,
            too_long=too_long,
            tools=task.tools,
        )
        template = self._renderer.chat_source
        require_tools(task.tools_column or task.tools, template)
        self._family = toolcalls.family_of(template)
        check_choice(task, template)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return _renderer, self._arguments

    @property
    def columns(self) -> frozenset[str]:
        """The columns that prompt and tools are read from."""
        own = self._task.tools_column
        return self._renderer.columns | (frozenset() if own is None else {own})

    def render(self, rows: pa.Table) -> Prompts:
        """Return the token ids and the ask, or the error, of each row."""
        errors: dict[int, RowError] = {}
        texts: dict[int, PromptText] = {}
        asks: list[str | None] = [None] * rows.num_rows
        for group in self._groups(rows, errors):
            wrong: dict[int, RowError] = {}
            found = self._renderer.texts(rows.take(group.rows), wrong, group.tools)
            texts |= {group.rows[place]: text for place, text in found.items()}
            errors |= {group.rows[place]: error for place, error in wrong.items()}
            for row in group.rows:
                asks[row] = group.ask
        token_ids = self._renderer.encode(dict(sorted(texts.items())), errors)
        lists = [token_ids.get(row) for row in range(rows.num_rows)]
        texts_of_asks = pa.array(asks, pa.string())
        return Prompts(from_token_lists(lists), dict(sorted(errors.items())), texts_of_asks)

    def _groups(self, rows: pa.Table, errors: dict[int, RowError]) -> Iterator[_Group]:
        """Yield rows with the same tools together; those with bad ones get an error instead."""
        if self._task.tools_column is None:
            ask = _ask(self._family, self._task.tools, self._task.tool_choice)
            yield _Group(list(range(rows.num_rows)), None, ask)
            return
        same: dict[str | None, list[int]] = {}
        for row, scalar in enumerate(rows[self._task.tools_column]):
            try:
                same.setdefault(_text(scalar), []).append(row)
            except ValueError as error:
                errors[row] = self._bad(str(error))
        for text, places in same.items():
            try:
                yield _Group(places, *self._read(text))
            except RowError as error:
                errors |= dict.fromkeys(places, self._bad(error.message))
            except ValueError as error:
                errors |= dict.fromkeys(places, self._bad(str(error)))

    def _bad(self, why: str) -> RowError:
        return RowError(BAD_TOOLS, f"column {self._task.tools_column!r}: {why}")

    def _read(self, text: str | None) -> tuple[Tools | None, str | None]:
        """Return a row's own tools, as the chat template is to see them, and what it asks for.

        Raises:
            RowError: They are none.
            ValueError: They are none, or can't be had.
        """
        tools = _tools(text or "[]")
        if not tools and self._task.tool_choice != "auto":
            raise ValueError(f"it has no tools, and task.tool_choice is {self._task.tool_choice!r}")
        ask = _ask(self._family, tools, self._task.tool_choice)
        return self._renderer.control.safe_tools(tools) if tools else None, ask


class _Group(NamedTuple):
    """Rows that have the same tools."""

    rows: list[int]
    tools: Tools | None
    """Their own."""
    ask: str | None


def _text(scalar: pa.Scalar) -> str | None:
    text = scalar.as_py()  # a ValueError, if it is no UTF-8
    if isinstance(text, str | None):
        return text
    raise ValueError(f"{type(text).__name__} is no JSON text")


@lru_cache(maxsize=1024)
def _tools(text: str) -> Tools:
    tools = structured.parse_json(text)
    return tools_of(tools, None) or []


def _ask(family: Family | None, tools: Tools, choice: str) -> str | None:
    """Return what a row asks for: calls read as its model writes them, and nothing else if forced.

    Raises:
        ValueError: Calls can't be forced.
    """
    if family is None and choice == "auto":
        return None
    want = Write()
    if choice != "auto":
        want = Write(grammar=toolcalls.forced(family, tools, choice_of(choice)))
    return Ask(want, about={"tool_calls": family}).to_json()


def choice_of(choice: str) -> Choice:
    """Return what a `task.tool_choice` other than auto forces."""
    return Choice(None if choice == "required" else choice)


def check_choice(task: Generate, chat_template: str | None) -> None:
    """Refuse calls that can't be forced.

    Raises:
        SpecError: With the reason.
    """
    if task.tool_choice == "auto":
        return
    family = toolcalls.family_of(chat_template or "")
    # Of a column's tools nothing is known but how the model writes calls.
    example: Tools = [{"type": "function", "function": {"name": task.tool_choice}}]
    try:
        grammar = toolcalls.forced(family, task.tools or example, choice_of(task.tool_choice))
    except ValueError as error:
        problem = f"task.tool_choice {task.tool_choice}: {error}"
        raise SpecError(JobError(problem, "leave it out, or choose another model")) from error
    if wrong := structured.problem(grammar):
        raise SpecError(JobError(f"task.tools: {wrong}", "llguidance has to be able to compile it"))


def _renderer(
    prompt: Prompt,
    task: Generate,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    too_long: TooLong,
) -> ToolRenderer:
    return ToolRenderer(prompt, task, tokenizer, max_prompt_tokens=limit, too_long=too_long)
