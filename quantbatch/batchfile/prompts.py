"""Rows of a batch file to token ids, each with what it asks for.

Who may write tokens that steer a model: in a chat only the model's chat template, as everywhere;
the prompt of /v1/completions and the input of /v1/embeddings are whole prompts, and may.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
from pydantic import ValidationError
from typing_extensions import override

from quantbatch import toolcalls
from quantbatch.batchfile import forms
from quantbatch.batchfile.bodies import read_request
from quantbatch.batchfile.refusals import BAD_REQUEST, UNSUPPORTED, bad, unsupported
from quantbatch.errors import RowError
from quantbatch.prompts.chat import ChatTemplate
from quantbatch.prompts.rendering import Prompts
from quantbatch.prompts.tokens import ControlTokens, Encoder, MarkedText
from quantbatch.records import from_token_lists
from quantbatch.spec import BatchRequests, JobSpec, Sampling
from quantbatch.wants import Ask, Embed, Write

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from quantbatch.batchfile.bodies import Wanted
    from quantbatch.prompts.tokens import Conversation
    from quantbatch.wants import Grammar

COLUMNS = ("custom_id", "method", "url", "body")
TOO_LONG = "prompt_too_long"


class _Key(NamedTuple):
    """Which prompt of which row."""

    row: int
    prompt: int


class RequestRenderer:
    """Makes token ids and asks from the lines of a batch file. Can be pickled.

    Args:
        spec: The job.
        tokenizer: The model's; nobody else may use it meanwhile.
        max_prompt_tokens: Longest prompt.
    """

    def __init__(
        self, spec: JobSpec, tokenizer: PreTrainedTokenizerBase, *, max_prompt_tokens: int
    ) -> None:
        assert isinstance(spec.task, BatchRequests), "the task of every job over a batch file"
        self._arguments = (spec, tokenizer, max_prompt_tokens)
        self._spec = spec
        self._pooling = spec.task.pooling
        self._room = max_prompt_tokens + spec.sampling.max_new_tokens
        self._vocabulary = len(tokenizer)
        # That of a base model is empty: chats are error rows then, other requests are answered.
        self._chat = ChatTemplate(spec.prompt, tokenizer)
        self._control = ControlTokens(tokenizer, self._chat.source)
        limits: Any = {"limit": max_prompt_tokens, "too_long": "error"}
        self._of_chats = Encoder(tokenizer, self._control, adds_special=False, **limits)
        self._of_texts = Encoder(tokenizer, self._control, adds_special=True, **limits)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return _renderer, self._arguments

    @property
    def columns(self) -> frozenset[str]:
        """The columns that a line has."""
        return frozenset(COLUMNS)

    def render(self, rows: pa.Table) -> Prompts:
        """Return the token ids and the ask, or the error, of each row."""
        errors: dict[int, RowError] = {}
        wanted: dict[int, Wanted] = {}
        texts: dict[_Key, MarkedText] = {}
        chats: dict[_Key, MarkedText] = {}
        lines = rows.select(COLUMNS).to_pylist()
        for row, line in enumerate(lines):
            try:
                found = wanted[row] = read_request(line)
                if found.conversation is not None:
                    chats[_Key(row, 0)] = self._chat_text(found.conversation, found.tools)
                for number, text in enumerate(found.prompts):
                    if isinstance(text, str):
                        texts[_Key(row, number)] = MarkedText(text)
            except RowError as error:
                errors[row] = error
        encoded: dict[_Key, list[int] | RowError] = {}
        encoded |= _encoded(self._of_chats, chats) | _encoded(self._of_texts, texts)
        token_ids: list[list[int] | None] = [None] * rows.num_rows
        asks: list[str | None] = [None] * rows.num_rows
        for row in wanted.keys() - errors.keys():
            try:
                prompts = self._prompts(wanted[row], row, encoded)
                asks[row] = self._ask(wanted[row], prompts, lines[row]["custom_id"]).to_json()
                token_ids[row] = prompts[0]
            except RowError as error:
                errors[row] = error
        return Prompts(
            from_token_lists(token_ids), dict(sorted(errors.items())), pa.array(asks, pa.string())
        )

    def _chat_text(
        self, conversation: Conversation, tools: list[dict[str, Any]] | None
    ) -> MarkedText:
        if not self._chat.source:
            raise RowError(UNSUPPORTED, "url: the model has no chat template")
        conversation = [self._known_role(message) for message in conversation]
        marked = self._control.within([conversation, tools])
        tools = tools and self._control.safe_tools(tools)
        if marked:
            conversation = self._control.mark(conversation)
        text = self._chat.render_one(conversation, tools)
        if isinstance(text, RowError):
            raise text
        if tools and text == self._chat.render_one(conversation):
            raise RowError(UNSUPPORTED, "tools: the model's chat template shows it no tools")
        return MarkedText(text, marked)

    def _known_role(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a developer's message as the system's, unless the template knows developers."""
        if message["role"] == "developer" and "developer" not in self._chat.source:
            return message | {"role": "system"}
        return message

    def _prompts(
        self, wanted: Wanted, row: int, encoded: Mapping[_Key, list[int] | RowError]
    ) -> list[list[int]]:
        """Return a row's prompts as token ids, those included that came as such."""
        count = max(1, len(wanted.prompts))
        found: list[list[int]] = []
        for number in range(count):
            text = wanted.prompts[number] if wanted.prompts else ""
            ids = encoded[_Key(row, number)] if isinstance(text, str) else list(text)
            if isinstance(ids, RowError):
                raise ids
            found.append(ids)
            if not isinstance(text, str):
                self._check_tokens(wanted, ids)
        return found

    def _check_tokens(self, wanted: Wanted, ids: list[int]) -> None:
        name = "input" if wanted.kind == "embedding" else "prompt"
        strange = next((token for token in ids if token >= self._vocabulary), None)
        if strange is not None:
            raise bad(name, strange, f"no such token, the model has {self._vocabulary:,}")
        limit = self._room - self._spec.sampling.max_new_tokens
        if len(ids) > limit:
            raise RowError(TOO_LONG, f"prompt has {len(ids):,} tokens; the limit is {limit:,}")

    def _ask(self, wanted: Wanted, prompts: list[list[int]], custom_id: str | None) -> Ask:
        about = wanted.about | {
            "id": hashlib.sha256((custom_id or "").encode()).hexdigest()[:24],
            "model": self._spec.model.id,
            "prompt_tokens": sum(map(len, prompts)),
        }
        if wanted.tools:
            about["family"] = self._chat.family
        more = tuple(map(tuple, prompts[1:]))
        if wanted.kind == "embedding":
            return Ask(Embed(self._pooling), about=about, more_prompts=more)
        sampling = self._sampling(wanted.sampling, max(map(len, prompts)))
        grammar = self._forced(wanted) if wanted.choice else wanted.grammar
        ask = Ask(Write(grammar=grammar), wanted.sampling, about, more)
        if sampling.n > 1 and sampling.temperature == 0:
            # All of them would be the same: one is made, and given n times.
            single = {**wanted.sampling, "n": 1}
            return replace(ask, sampling=single, about=about | {"copies": sampling.n})
        return ask

    def _forced(self, wanted: Wanted) -> Grammar:
        """Return the form of an answer that has to consist of calls of tools."""
        assert wanted.choice is not None
        said = wanted.choice.name or "required"
        try:
            grammar = toolcalls.forced(self._chat.family, wanted.tools or [], wanted.choice)
        except ValueError as error:
            raise unsupported("tool_choice", said, f"{error}; auto and none can be had") from None
        if wrong := forms.problem(grammar):
            raise bad("tools", None, wrong)
        return grammar

    def _sampling(self, own: dict[str, Any], prompt_tokens: int) -> Sampling:
        """Return the sampling that a row will have, once it is known to be sound."""
        for token in own.get("logit_bias", ()):
            if int(token) >= self._vocabulary:
                why = f"no such token, the model has {self._vocabulary:,}"
                raise bad("logit_bias", token, why)
        tokens = own.get("max_new_tokens", 0)
        if prompt_tokens + tokens > self._room:
            raise RowError(
                TOO_LONG,
                f"max_tokens: {tokens:,} new tokens after a prompt of {prompt_tokens:,} are more"
                f" than the job's {self._room:,}; see engine.max_input_tokens and"
                " sampling.max_new_tokens",
            )
        fields = self._spec.sampling.model_dump() | own
        greedy = fields["temperature"] == 0
        try:
            made = Sampling.model_validate(fields | ({"n": 1} if greedy else {}))
        except ValidationError as error:
            said = error.errors(include_url=False)[0]
            name = ".".join(map(str, said["loc"])) or "sampling"
            raise RowError(BAD_REQUEST, f"{name}: {said['msg']}") from None
        return made.model_copy(update={"n": fields["n"]})


def _encoded(encoder: Encoder, texts: dict[_Key, MarkedText]) -> dict[_Key, list[int] | RowError]:
    """Return the token ids of texts, or what is wrong with each."""
    keys = list(texts)
    batch = encoder.encode_batch({number: texts[key] for number, key in enumerate(keys)})
    found: dict[_Key, list[int] | RowError] = {}
    for number, key in enumerate(keys):
        try:
            ids = encoder.fit(texts[key], batch.get(number))
        except RowError as error:
            found[key] = error
            continue
        assert ids is not None, "a text that is too long is an error, never cut"
        found[key] = ids
    return found


def _renderer(
    spec: JobSpec, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> RequestRenderer:
    return RequestRenderer(spec, tokenizer, max_prompt_tokens=max_prompt_tokens)
