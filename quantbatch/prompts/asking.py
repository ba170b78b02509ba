"""Rows to what is asked of a model: the prompt of each, and what its task wants of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from quantbatch.errors import JobError, RowError, SpecError
from quantbatch.prompts.labels import Splitter
from quantbatch.prompts.rendering import Prompts, Renderer
from quantbatch.records import from_token_lists
from quantbatch.spec import Classify, Embed, Score, plain_label
from quantbatch.wants import Ask, Beside, Rank
from quantbatch.wants import Embed as WantEmbed
from quantbatch.wants import Score as WantScore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from quantbatch.prompts.labels import Split
    from quantbatch.prompts.rendering import PromptText
    from quantbatch.prompts.tokens import TooLong
    from quantbatch.spec import Prompt

ReadingTask = Classify | Score | Embed


class Asker:
    """Makes of rows what the tasks classify, score and embed ask of a model.

    Args:
        prompt: The spec's prompt.
        task: Its task.
        tokenizer: The model's; nobody else may use it meanwhile.
        max_prompt_tokens: Longest prompt.
        too_long: What becomes of a longer one.

    Raises:
        SpecError: A template is wrong.
        ModelError: The prompt needs a chat template and the model has none.
    """

    def __init__(
        self,
        prompt: Prompt,
        task: ReadingTask,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_tokens: int,
        too_long: TooLong = "error",
    ) -> None:
        self._task = task
        self._renderer = Renderer(
            prompt, tokenizer, max_prompt_tokens=max_prompt_tokens, too_long=too_long
        )
        self._splitter = Splitter(self._renderer, tokenizer)
        self._beside: dict[tuple[str, ...], Beside] = {}

    @property
    def columns(self) -> frozenset[str]:
        """The columns that prompt and task read."""
        match self._task:
            case Classify(labels_column=str(column)) | Score(continuation=str(column)):
                return self._renderer.columns | {column}
            case _:
                return self._renderer.columns

    def render(self, rows: pa.Table) -> Prompts:
        """Return what each row asks for, of a table that has the columns of the job."""
        match self._task:
            case Embed(pooling=pooling):
                found = self._renderer.render(rows)
                usual = Ask(WantEmbed(pooling)).to_json()
                return Prompts(found.token_ids, found.errors, pa.repeat(usual, rows.num_rows))
            case Score(continuation=None) as task:
                return self._of_prompts(rows, task)
            case Score() as task:
                return self._continued(rows, task)
            case Classify() as task:
                return self._classified(rows, task)

    def _of_prompts(self, rows: pa.Table, task: Score) -> Prompts:
        found = self._renderer.render(rows)
        errors = dict(found.errors)
        asks: list[str | None] = []
        lists = found.token_ids.to_pylist()
        for row, ids in enumerate(lists):
            if ids is not None and len(ids) < 2:
                errors[row] = RowError("too_short", "nothing comes before the only token to score")
            about = ids[1:] if task.per_token and ids else None
            asks.append(Ask(WantScore(1), about=about).to_json())
        return Prompts(found.token_ids, dict(sorted(errors.items())), pa.array(asks, pa.string()))

    def _continued(self, rows: pa.Table, task: Score) -> Prompts:
        assert task.continuation is not None
        errors: dict[int, RowError] = {}
        texts = self._renderer.texts(rows, errors)
        endings = {
            row: task.before + value
            for row, value in _texts(rows, task.continuation, errors)
            if row in texts
        }
        texts = {row: text for row, text in texts.items() if row in endings}
        limit = self._renderer.encoder.limit
        taken = {row: self._splitter.tokens_of(ending) for row, ending in endings.items()}
        for row in [row for row, tokens in taken.items() if tokens >= limit]:
            why = f"the continuation has {taken[row]:,} tokens; with the prompt, {limit:,} fit"
            errors[row] = RowError("prompt_too_long", why)
            del texts[row]
        token_ids = self._renderer.encode(texts, errors, taken)
        whole: dict[int, Sequence[int]] = {}
        asks: dict[int, str] = {}
        for row, ids in token_ids.items():
            try:
                prompt, (continuation,) = self._splitter.split(texts[row].text, ids, [endings[row]])
            except RowError as error:
                errors[row] = error
                continue
            if not continuation:
                errors[row] = RowError("empty_continuation", "the continuation has no tokens")
                continue
            whole[row] = (*prompt, *continuation)
            about = list(continuation) if task.per_token else None
            asks[row] = Ask(WantScore(len(prompt)), about=about).to_json()
        return _asked(rows.num_rows, whole, asks, errors)

    def _classified(self, rows: pa.Table, task: Classify) -> Prompts:
        errors: dict[int, RowError] = {}
        texts = self._renderer.texts(rows, errors)
        token_ids = self._renderer.encode(texts, errors)
        names = sorted(self._renderer.columns)
        own = rows[task.labels_column].to_pylist() if task.labels_column else None
        prompts: dict[int, Sequence[int]] = {}
        asks: dict[int, str] = {}
        for row, ids in token_ids.items():
            try:
                labels = _own_labels(own[row], task) if own is not None else list(task.spoken)
                split = self._split(task, texts[row], ids, labels)
                beside = self._without_row(task, names, labels) if task.prior_correction else None
            except RowError as error:
                errors[row] = error
                continue
            prompts[row] = split.prompt_ids
            about = labels if own is not None else None
            asks[row] = Ask(Rank(split.candidates), about=about, beside=beside).to_json()
        return _asked(rows.num_rows, prompts, asks, errors)

    def _split(
        self, task: Classify, text: PromptText, ids: Sequence[int], labels: Sequence[str]
    ) -> Split:
        split = self._splitter.split(text.text, ids, _endings(task, labels))
        most = max(map(len, split.candidates))
        if task.labels is None and most > task.max_label_tokens:
            why = f"a label has {most:,} tokens; task.max_label_tokens is {task.max_label_tokens:,}"
            raise RowError("bad_labels", why)
        return split._replace(candidates=self._splitter.ended(split.candidates, task.end))

    def _without_row(self, task: Classify, names: Sequence[str], labels: Sequence[str]) -> Beside:
        """Return the template with empty columns, but for the row's own labels, and the labels
        after it.
        """
        key = tuple(labels)
        if key not in self._beside:
            if len(self._beside) >= MOST_REMEMBERED:
                self._beside.clear()
            empty: dict[str, Any] = dict.fromkeys(names, "")
            if task.labels_column in empty:
                empty[task.labels_column] = list(labels)
            text = self._renderer.text_of(empty)
            errors: dict[int, RowError] = {}
            ids = self._renderer.encode({0: text}, errors)
            if errors:
                raise errors[0]
            split = self._split(task, text, ids[0], labels)
            self._beside[key] = Beside(split.prompt_ids, Rank(split.candidates))
        return self._beside[key]

    def check(self) -> None:
        """Refuse labels that are wrong whatever the row, and a template that needs one.

        Raises:
            SpecError: With the reason.
        """
        task = self._task
        if not isinstance(task, Classify) or task.labels is None:
            return
        try:
            self._splitter.check(_endings(task, list(task.spoken)))
        except RowError as error:
            raise SpecError(JobError(f"task.labels: {error.message}")) from error
        if not task.prior_correction:
            return
        try:
            self._without_row(task, sorted(self._renderer.columns), list(task.spoken))
        except RowError as error:
            problem = (
                f"task.prior_correction: the template has no text without a row: {error.message}"
            )
            hint = "give each column a default: {{ text | default('', true) }}"
            raise SpecError(JobError(problem, hint)) from error


MOST_REMEMBERED = 1024
"""Sets of labels whose prior prompts are remembered."""


def _asked(
    count: int,
    prompts: dict[int, Sequence[int]],
    asks: dict[int, str],
    errors: dict[int, RowError],
) -> Prompts:
    lists = [prompts.get(row) for row in range(count)]
    texts = pa.array([asks.get(row) for row in range(count)], pa.string())
    return Prompts(from_token_lists(lists), dict(sorted(errors.items())), texts)


def _texts(rows: pa.Table, column: str, errors: dict[int, RowError]) -> Iterator[tuple[int, str]]:
    """Yield the texts of a column; a row without one gets an error, unless it has one."""
    for row, value in enumerate(rows[column].to_pylist()):
        if isinstance(value, str) and value:
            yield row, value
        else:
            what = "is empty" if value == "" else "is null" if value is None else "is no text"
            errors.setdefault(row, RowError("empty_continuation", f"column {column!r} {what}"))


def _own_labels(value: object, task: Classify) -> list[str]:
    """Return a row's own labels."""
    column = task.labels_column
    if not isinstance(value, list) or not value:
        raise RowError("bad_labels", f"column {column!r} has no list of labels")
    labels = [each for each in value if isinstance(each, str) and plain_label(each)]
    if len(labels) < len(value):
        raise RowError("bad_labels", f"column {column!r} holds a label that is empty or no text")
    if len(set(map(plain_label, labels))) < len(labels):
        raise RowError("bad_labels", f"column {column!r} holds a label twice")
    if len(labels) == 1 and not task.multi_label:
        why = f"column {column!r} holds the label {labels[0]!r} alone, and it takes 2 to compare"
        raise RowError("bad_labels", why)
    return labels


def _endings(task: Classify, labels: Sequence[str]) -> list[str]:
    """Return what may follow the prompt, in the order in which `tasks.classify` counts on it."""
    if task.multi_label:
        asked = [task.multi_label.asked(label) for label in labels]
        return [task.before + text for pair in asked for text in pair]
    if task.labels is None:
        return [task.before + label for label in labels]
    return [task.before + word for label in labels for word in task.spoken[label]]
