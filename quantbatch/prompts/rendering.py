"""Rows to prompts: what the spec says, through the model's chat template, as token ids.

Who may write the tokens that steer a model, such as `<|im_end|>`: in the format `chat` only the
model's chat template; in the format `text` what stands outside {{ }} in `prompt.template`, and with
`prompt.column` the column, because it then is the whole prompt. Anywhere else they are plain text.

What becomes of a prompt that is too long, if it may be cut: cutting the token ids of a chat on the
right would take the generation prompt, cutting them on the left the system prompt. So what is cut
is the text from the start of the first message that is not the system's to the end of the last;
what the chat template writes before and after stays. In the format `text` all may be cut but the
tokenizer's own special tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
from typing_extensions import override

from quantbatch.errors import RowError, SpecError
from quantbatch.prompts.chat import ChatTemplate, require_chat_template
from quantbatch.prompts.templates import RowTemplate, check_columns, missing_column
from quantbatch.prompts.tokens import ControlTokens, Encoder, MarkedText
from quantbatch.records import from_token_lists

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from transformers import PreTrainedTokenizerBase

    from quantbatch import spec
    from quantbatch.prompts.tokens import Conversation, TooLong

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
"""Roles that messages of a column may have, besides those that the chat template itself names. With
a template such as `<|{{ role }}|>` a role could be any token."""
SYSTEM_ROLES = frozenset({"system", "developer"})
SENTINEL = "\U000f0002"
"""Stands for a text to find its place: private use, so in no text, template and vocabulary."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a table's rows: for each row its token ids, or what is wrong with it."""

    token_ids: pa.ListArray
    """Lists of int32, one for each row in order; null where `errors` has the row."""
    errors: dict[int, RowError]
    asks: pa.Array | None = None
    """`wants.Ask` as JSON for each row; None where no row asks for anything of its own."""


def row_seed(job_seed: int, row_id: str) -> int:
    """Return the seed of one row: 63 bits that depend on the job's seed and the row's id alone."""
    digest = hashlib.sha256(f"{job_seed}:{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_seed(job_seed: int, row_id: str, sample: int) -> int:
    """Return the seed of one of a row's samples.

    The first has the row's own, so that asking for more leaves it as it was.
    """
    return row_seed(job_seed, f"{row_id}#{sample}" if sample else row_id)


def compile_templates(
    prompt: spec.Prompt, marks: tuple[str, str] | None = None
) -> list[RowTemplate]:
    """Compile the templates of a prompt; with `prompt.column` there are none.

    Raises:
        SpecError: A template is wrong.
    """
    if prompt.template is not None:
        return [RowTemplate.compile(prompt.template, "prompt.template", marks=marks)]
    return [
        RowTemplate.compile(message.content, f"prompt.messages.{index}.content", marks=marks)
        for index, message in enumerate(prompt.messages or [])
    ]


def check_prompt(prompt: spec.Prompt, columns: Collection[str], chat_template: str | None) -> None:
    """Check all of a prompt that can be checked without a tokenizer, in milliseconds.

    Args:
        prompt: The spec's prompt.
        columns: Names of the input's columns.
        chat_template: The model's, or None if it has none.

    Raises:
        SpecError: A template is wrong, or reads a column that the input lacks.
        ModelError: The prompt needs a chat template and the model has none.
    """
    check_columns(compile_templates(prompt), columns)
    if prompt.column is not None and prompt.column not in columns:
        raise SpecError(missing_column("prompt.column", prompt.column, columns))
    require_chat_template(prompt, chat_template)


class PromptText(NamedTuple):
    """A row's prompt before it is tokenized."""

    text: MarkedText
    conversation: Conversation | None = None
    """What the text was rendered from, in the format `chat`."""
    tools: list[dict[str, Any]] | None = None
    """The row's own tools."""


class Renderer:
    """Makes token ids from rows. Can be pickled, so that Ray can send it to its workers.

    Args:
        prompt: The spec's prompt.
        tokenizer: The model's; nobody else may use it meanwhile.
        max_prompt_tokens: Longest prompt: the smaller of the engine's `max_input_tokens` and what
            the model's context leaves beside `max_new_tokens`.
        too_long: What becomes of a longer one.
        tools: Tools that the model is told of.

    Raises:
        SpecError: A template is wrong.
        ModelError: The prompt needs a chat template and the model has none.
    """

    def __init__(
        self,
        prompt: spec.Prompt,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_tokens: int,
        too_long: TooLong = "error",
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        self._arguments = (prompt, tokenizer, max_prompt_tokens, too_long, tools)
        self._prompt = prompt
        self._chat = ChatTemplate(prompt, tokenizer, tools) if prompt.format == "chat" else None
        source = self._chat.source if self._chat else prompt.template or ""
        self._roles = ROLES | set(re.findall(r"""['"](\w+)['"]""", source))
        self.control = ControlTokens(tokenizer, source)
        # Who wrote a token matters only if the template writes any: others need no telling apart.
        self._writes_tokens = self._chat is None and self.control.within(source)
        marks = self.control.marks if self._writes_tokens else None
        self._templates = compile_templates(prompt, marks)
        self.encoder = Encoder(
            tokenizer,
            self.control,
            limit=max_prompt_tokens,
            too_long=too_long,
            adds_special=self._chat is None,
        )

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return _renderer, self._arguments

    @property
    def columns(self) -> frozenset[str]:
        """The columns that the prompt reads."""
        if self._prompt.column is not None:
            return frozenset({self._prompt.column})
        return frozenset().union(*(template.columns for template in self._templates))

    def render(self, rows: pa.Table) -> Prompts:
        """Return the token ids, or the error, of each row of a table that has the `columns`."""
        errors: dict[int, RowError] = {}
        token_ids = self.encode(self.texts(rows, errors), errors)
        lists = [token_ids.get(row) for row in range(rows.num_rows)]
        return Prompts(from_token_lists(lists), dict(sorted(errors.items())))

    @property
    def chat_source(self) -> str:
        """The model's chat template; empty in the format `text`."""
        return self._chat.source if self._chat else ""

    def texts(
        self,
        rows: pa.Table,
        errors: dict[int, RowError],
        tools: list[dict[str, Any]] | None = None,
    ) -> dict[int, PromptText]:
        """Return the text of each row; one without gets an error instead.

        Args:
            rows: The rows.
            errors: Takes what is wrong.
            tools: Their own ones, control tokens marked.
        """
        return self._apply_chat_template(self._compose(rows, errors), errors, tools)

    def text_of(self, row: dict[str, Any]) -> PromptText:
        """Return the text of one row, which may say nothing at all.

        Raises:
            RowError: It can't be rendered.
        """
        errors: dict[int, RowError] = {}
        texts = self._apply_chat_template({0: self._composed(self._said(row))}, errors)
        if errors:
            raise errors[0]
        return texts[0]

    def encode(
        self,
        prompts: Mapping[int, PromptText],
        errors: dict[int, RowError],
        taken: Mapping[int, int] | None = None,
    ) -> dict[int, list[int]]:
        """Return the token ids of rows' texts; one without gets an error instead.

        Args:
            prompts: The texts.
            errors: Takes what is wrong.
            taken: Tokens of the limit that something else of a row takes.
        """
        batch = self.encoder.encode_batch({row: prompt.text for row, prompt in prompts.items()})
        token_ids: dict[int, list[int]] = {}
        for row, prompt in prompts.items():
            other = taken[row] if taken else 0
            try:
                ids = self.encoder.fit(prompt.text, batch.get(row), other)
                if ids is None:
                    ids = self.encoder.cut(*self._parts(prompt), other)
                token_ids[row] = ids
            except RowError as error:
                errors[row] = error
        return token_ids

    def after_answer(self) -> str:
        """Return what the chat template writes after an answer; nothing in the format `text`."""
        if self._chat is None:
            return ""
        turns: Conversation = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": SENTINEL},
        ]
        text = self._chat.render_one(turns)
        return "" if isinstance(text, RowError) else text.rpartition(SENTINEL)[2]

    def _compose(
        self, rows: pa.Table, errors: dict[int, RowError]
    ) -> dict[int, Conversation | MarkedText]:
        """Return what each row says, before the chat template."""
        names = sorted(self.columns)
        columns = [_values(rows[name]) for name in names]
        values = zip(*columns, strict=True) if names else [()] * rows.num_rows
        composed: dict[int, Conversation | MarkedText] = {}
        for row, row_values in enumerate(values):
            try:
                composed[row] = self._compose_row(dict(zip(names, row_values, strict=True)))
            except RowError as error:
                errors[row] = error
        return composed

    def _compose_row(self, row: dict[str, Any]) -> Conversation | MarkedText:
        said = self._said(row)
        if not any(text.strip() for text in _texts(said)):
            raise RowError("empty_prompt", "the prompt is empty")
        return self._composed(said)

    def _said(self, row: dict[str, Any]) -> str | Conversation:
        return self._from_column(row) if self._prompt.column else self._from_templates(row)

    def _composed(self, said: str | Conversation) -> Conversation | MarkedText:
        if isinstance(said, list):
            return said
        if self._chat is not None:
            return [{"role": "user", "content": said}]
        if self._writes_tokens:
            return self.control.mark_data(said)
        if self._prompt.column is None and self.control.within(said):
            return MarkedText(self.control.mark(said), marked=True)
        return MarkedText(said)

    def _from_templates(self, row: dict[str, Any]) -> str | Conversation:
        for value in row.values():
            if isinstance(value, RowError):
                raise value
        texts = [template.render(row) for template in self._templates]
        if self._prompt.messages is None:
            return texts[0]
        return [
            {"role": message.role, "content": text}
            for message, text in zip(self._prompt.messages, texts, strict=True)
        ]

    def _from_column(self, row: dict[str, Any]) -> str | Conversation:
        ((name, value),) = row.items()
        match value:
            case str():
                return value
            case None:
                raise RowError("null_prompt", f"column {name!r} is null")
            case RowError():
                raise value
            case list() if self._chat is not None:
                return _checked_messages(value, self._roles)
            case _:
                wanted = "a text" if self._chat is None else "a text or a list of messages"
                found = f"a value of type {type(value).__name__}"
                raise RowError("bad_messages", f"column {name!r} holds {found}, not {wanted}")

    def _apply_chat_template(
        self,
        composed: dict[int, Conversation | MarkedText],
        errors: dict[int, RowError],
        tools: list[dict[str, Any]] | None = None,
    ) -> dict[int, PromptText]:
        if self._chat is None:
            return {
                row: PromptText(said)
                for row, said in composed.items()
                if isinstance(said, MarkedText)
            }
        chats = {row: said for row, said in composed.items() if isinstance(said, list)}
        marked = {row: self.control.mark(c) for row, c in chats.items() if self.control.within(c)}
        chats |= marked
        own_marked = self.control.marked_in(tools)
        prompts: dict[int, PromptText] = {}
        for row, text in zip(chats, self._chat.render(list(chats.values()), tools), strict=True):
            if isinstance(text, RowError):
                errors[row] = text
            else:
                whole = MarkedText(text, own_marked or row in marked)
                prompts[row] = PromptText(whole, chats[row], tools)
        return prompts

    def _parts(self, prompt: PromptText) -> tuple[str, str, str]:
        """Split a prompt into what stays before, what may be cut, and what stays after."""
        text = prompt.text.text
        if self._chat is None or prompt.conversation is None:
            return "", text, ""
        cuttable = _cuttable(prompt.conversation)
        frame = self._chat.render_one(
            [
                message | {"content": SENTINEL} if message in cuttable else message
                for message in prompt.conversation
            ],
            prompt.tools,
        )
        if isinstance(frame, RowError):
            raise frame
        before = _common_length(text, frame)
        after = _common_length(text[before:][::-1], frame[before:][::-1])
        return text[:before], text[before : len(text) - after], text[len(text) - after :]


def _renderer(
    prompt: spec.Prompt,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    too_long: TooLong,
    tools: list[dict[str, Any]] | None,
) -> Renderer:
    return Renderer(prompt, tokenizer, max_prompt_tokens=limit, too_long=too_long, tools=tools)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Return a column's values; one that is no text although its column is becomes a RowError."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        return [_value(value) for value in column]
    return values


def _value(scalar: pa.Scalar) -> Any:  # noqa: ANN401 - whatever a row holds
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return RowError("bad_text", f"the text is not UTF-8: {error.reason}")


def _checked_messages(messages: list[Any], roles: frozenset[str]) -> Conversation:
    """Return a row's messages without their null fields."""
    if not messages:
        raise RowError("bad_messages", "the list of messages is empty")
    for number, message in enumerate(messages, start=1):
        if fault := _message_fault(message, roles):
            raise RowError("bad_messages", f"message {number} {fault}")
    # As apply_chat_template does: templates print a null as "None", but know a missing field.
    return [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]


def _message_fault(message: object, roles: frozenset[str]) -> str:
    match message:
        case {"role": str(role), "content": str()} if role in roles:
            return ""
        case {"role": str(role), "content": str()}:
            return f"has the role {role!r}; roles are {', '.join(sorted(ROLES))}"
        case {"role": str(role), "content": content}:
            return f"({role}) has the content {json.dumps(content, default=str)[:60]}, not a text"
        case dict():
            return "lacks a role or a content"
        case _:
            return "is not a struct of role and content"


def _cuttable(conversation: Conversation) -> Conversation:
    """Return the messages that hold the row's own text: all but the system's, if it has others."""
    others = [message for message in conversation if message["role"] not in SYSTEM_ROLES]
    return others or conversation


def _texts(said: str | Conversation) -> list[str]:
    return [said] if isinstance(said, str) else [m["content"] for m in _cuttable(said)]


def _common_length(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
