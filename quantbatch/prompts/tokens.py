"""Texts to token ids: the tokenizer, tokens that data must not write, the length policy.

*Control tokens in data.* A tokenizer turns the text `<|im_end|>` into the token that ends a turn,
no matter who wrote it, so a row could end its own turn and speak for the assistant. Here only a
template writes such tokens; in data they are marked, and encoded as the plain text that they are.
That is what `sanitize_control_tokens` of transformers (5.23) does for a chat. Its functions are
used, and only for the rows that need it.

*Very long texts.* Tokenizing 10 MB takes 3 to 7 s and 1.7 GB (measured), and no model reads it.
Beyond 16 characters for each token of the limit only as much of a text is tokenized as decides the
matter: twice as much each time, until there are some hundred tokens more than needed. They absorb
that the word at the cut comes out differently; so the result is that of tokenizing the whole, but
for single words longer than that.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from quantbatch.errors import ModelError, RowError
from quantbatch.model import hub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from quantbatch.model.checkpoint import Checkpoint

Conversation = list[dict[str, Any]]
TextOrChat = TypeVar("TextOrChat", str, Conversation)
TooLong = Literal["error", "truncate_left", "truncate_right"]

_GENERAL = "TokenizersBackend"
"""The class that transformers 5 writes into a folder whose tokenizer needs no class of its own."""
CHARS_PER_TOKEN = 16
"""Texts with fewer characters than this for each token of the limit are tokenized whole. English
has 4; the longest runs of spaces in common vocabularies have 16 to 128."""
MIN_WHOLE_CHARS = 1 << 16
NEAR_THE_END = 1 << 12
"""Characters that are looked through for the last token of a template."""
MARGIN_TOKENS = 256
"""Tokens beyond the limit that make sure of a cut text; words are rarely longer than this."""
BATCH_CHARS = 1_000_000
"""Characters that are tokenized in one call; encodings take about 170 bytes for each (measured)."""


class MarkedText(NamedTuple):
    """A text for the tokenizer."""

    text: str
    marked: bool = False
    """Whether there are marks around control tokens that are only text."""


def tokenizer_of(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, once in a process.

    That of a GGUF file is made from its vocabulary, unless there is a tokenizer.json beside it,
    which needs no guessing. Its chat template is the file's.

    Raises:
        ModelError: See `load_tokenizer`.
    """
    file = _vocabulary_file(checkpoint)
    tokenizer = load_tokenizer(checkpoint.folder, file, trusted=checkpoint.trusted)
    if checkpoint.gguf:
        tokenizer.chat_template = checkpoint.chat_template
    return tokenizer


def _vocabulary_file(checkpoint: Checkpoint) -> str:
    """Return the GGUF file that the tokenizer has to be made from, if any; it is then whole."""
    if not checkpoint.gguf or (checkpoint.folder / "tokenizer.json").is_file():
        return ""
    if checkpoint.commit:
        hub.fetch_whole(checkpoint.id, checkpoint.gguf, checkpoint.commit)
    return checkpoint.gguf


def counting_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer for counting, without torch if its files allow it.

    Raises:
        ModelError: See `load_tokenizer`.
    """
    if checkpoint.trusted or _vocabulary_file(checkpoint):
        return tokenizer_of(checkpoint)
    return load_tokenizer_without_torch(checkpoint.folder)


@functools.lru_cache(maxsize=4)
def load_tokenizer(
    folder: Path, gguf_file: str = "", *, trusted: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, once in a process.

    The first call takes 3.7 s of CPU and 340 MB, because AutoTokenizer imports torch to read
    config.json. Where that matters, load it once and send it to others by pickle: they need 0.9 s,
    60 MB and no torch (measured with transformers 5.23).

    Args:
        folder: Where its files are.
        gguf_file: A file in it to make the tokenizer from; empty if there is a tokenizer.json.
        trusted: Whether code from the folder may run.

    Raises:
        ModelError: The files are missing or broken, or it needs code of its own.
    """
    if gguf_file:
        return _load(folder, _automatic_class, gguf_file=gguf_file)
    _require_tokenizer_file(folder)
    return _load(folder, _tokenizer_class, trust_remote_code=trusted)


@functools.lru_cache(maxsize=4)
def load_tokenizer_without_torch(folder: Path) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer for counting, in a second and without torch.

    It is made from tokenizer.json alone. What a model's own tokenizer class adds to that, such as a
    token at the beginning, may be missing: counts can differ by one or two.

    Raises:
        ModelError: The files are missing or broken.
    """
    _require_tokenizer_file(folder)
    return _load(folder, _general_class)


def _require_tokenizer_file(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        # Without it, transformers 5.23 makes a Llama or Qwen2 tokenizer of three words or one.
        raise ModelError(
            f"{folder} has no tokenizer.json",
            "save it once with AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )


def _load(
    folder: Path,
    class_for: Callable[[Path], Any],
    *,
    trust_remote_code: bool = False,
    **arguments: str,
) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = class_for(folder).from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True, **arguments
        )
    except Exception as error:  # tokenizers' Rust part raises plain Exception
        raise _cannot_load(folder, error) from error
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise ModelError(f"{folder}: a tokenizer of the type {name} can't be used")
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:  # noqa: ANN401 - classes of transformers
    """Return AutoTokenizer, or what it would choose where the folder says so itself."""
    config = folder / "tokenizer_config.json"
    if config.is_file() and json.loads(config.read_bytes()).get("tokenizer_class") == _GENERAL:
        return _general_class(folder)
    return _automatic_class(folder)


def _automatic_class(_: Path) -> Any:  # noqa: ANN401 - classes of transformers
    from transformers import AutoTokenizer

    return AutoTokenizer


def _general_class(_: Path) -> Any:  # noqa: ANN401 - classes of transformers
    from transformers import TokenizersBackend

    return TokenizersBackend


def _cannot_load(folder: Path, error: Exception) -> ModelError:
    first_line = str(error).strip().partition("\n")[0]
    problem = f"{folder}: the tokenizer can't be loaded: {first_line or type(error).__name__}"
    if "trust_remote_code" in str(error):
        hint = "it needs code from its own folder: see model.trust_remote_code"
    elif isinstance(error, ImportError):
        hint = "install the package that it names"
    else:
        hint = "check that tokenizer.json and tokenizer_config.json are there and complete"
    return ModelError(problem, hint)


class ControlTokens:
    """The tokens that only a template may write, and how data is kept from writing them.

    Args:
        tokenizer: The model's.
        template: The template that may write them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

        # The rule of transformers: special tokens, and other added ones that the template names,
        # such as <tool_call>; but not line breaks and spaces, which some vocabularies add too.
        tokens = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special or (token.content in template and not token.content.isspace())
        ]
        longest_first = sorted(tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._tokenizer = tokenizer
        self._mark = mark_control_tokens
        self._encode = encode_marked_chat
        self.marks: tuple[str, str] = tuple(mark_control_tokens("|", re.compile(r"\|")).split("|"))

    def within(self, value: object) -> bool:
        """Return whether any text of a value holds such a token."""
        match value:
            case str():
                return self._pattern.search(value) is not None
            case dict():
                return any(map(self.within, value.values()))
            case list():
                return any(map(self.within, value))
            case _:
                return False

    def mark(self, value: TextOrChat) -> TextOrChat:
        """Put marks around the tokens in all texts of a value."""
        marked: TextOrChat = self._mark(value, self._pattern)
        return marked

    def safe_tools(self, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return tools that come from data, the tokens in their texts marked.

        Raises:
            RowError: The name of a property holds one, and names can't be marked.
        """
        if self._is_in_names(tools):
            raise RowError("control_token", "tools: a name in them holds a control token")
        return self.mark(tools) if self.within(tools) else tools

    def _is_in_names(self, value: object) -> bool:
        match value:
            case dict():
                return self.within([*value]) or any(map(self._is_in_names, value.values()))
            case list():
                return any(map(self._is_in_names, value))
            case _:
                return False

    def marked_in(self, value: object) -> bool:
        """Return whether any text of a value has marks."""
        match value:
            case str():
                return self.marks[0] in value
            case dict():
                return any(map(self.marked_in, value.values()))
            case list():
                return any(map(self.marked_in, value))
            case _:
                return False

    def mark_data(self, text: str) -> MarkedText:
        """Mark the tokens of a text that are not wholly in its literal parts.

        Args:
            text: What a template rendered that put `marks` around each value.
        """
        pieces = re.split("|".join(self.marks), text)
        ends = list(itertools.accumulate(map(len, pieces)))
        plain = "".join(pieces)

        def marked(match: re.Match[str]) -> str:
            piece = bisect.bisect_right(ends, match.start())
            is_literal = piece % 2 == 0 and match.end() <= ends[piece]
            return match[0] if is_literal else match[0].join(self.marks)

        result = self._pattern.sub(marked, plain)
        return MarkedText(result, marked=result != plain)

    def last_written(self, text: str) -> int:
        """Return where the last token begins that a template wrote into a marked text; -1 if none
        did near its end.
        """
        near = max(0, len(text) - NEAR_THE_END)
        starts = [
            match.start()
            for match in self._pattern.finditer(text, near)
            if text[match.start() - 1 : match.start()] != self.marks[0]
        ]
        return starts[-1] if starts else -1

    def encode(self, *texts: str) -> list[int]:
        """Return the token ids of adjacent marked texts, of which no token spans two."""
        try:
            # A mark without its partner is dropped, but keeps its two sides apart.
            token_ids: list[int] = self._encode(self._tokenizer, self.marks[0].join(texts))
        except ValueError as error:
            raise RowError("control_token", str(error)) from error
        return token_ids

    def beginning(self, text: str, chars: int) -> str:
        """Return the first characters of a marked text, without half a pair of marks at its end."""
        piece = text[:chars]
        start, end = map(piece.rfind, self.marks)
        return piece[:start] if start > end else piece

    def ending(self, text: str, chars: int) -> str:
        """Return the last characters of a marked text, without half a pair of marks before them."""
        piece = text[-chars:]
        start, end = map(piece.find, self.marks)
        return piece[end + 1 :] if end >= 0 and not 0 <= start < end else piece


class Encoder:
    """Makes token ids of texts, at most `limit` of each.

    Args:
        tokenizer: The model's; nobody else may use it meanwhile.
        control: The tokens that data must not write.
        limit: Longest prompt in tokens.
        too_long: What becomes of a longer one.
        adds_special: Whether the tokenizer puts its beginning-of-text token and such around texts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        control: ControlTokens,
        *,
        limit: int,
        too_long: TooLong,
        adds_special: bool,
    ) -> None:
        # Ray gives a task one core; tokenizers would start a thread for each core of the machine.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._backend = _backend(tokenizer)
        self._control = control
        self._limit = limit
        self._too_long = too_long
        self._adds_special = adds_special
        self._head, self._tail = self._special_ids() if adds_special else ([], [])
        self._whole_chars = max(MIN_WHOLE_CHARS, CHARS_PER_TOKEN * limit)

    def encode_batch(self, texts: Mapping[int, MarkedText]) -> dict[int, list[int]]:
        """Return the token ids of the texts that need no special care, by their keys."""
        token_ids: dict[int, list[int]] = {}
        for batch in _batches(
            (key, text.text)
            for key, text in texts.items()
            if not text.marked and len(text.text) <= self._whole_chars
        ):
            encodings = self._backend.encode_batch_fast(
                list(batch.values()), add_special_tokens=self._adds_special
            )
            token_ids.update(zip(batch, (encoding.ids for encoding in encodings), strict=True))
        return token_ids

    def fit(
        self, text: MarkedText, token_ids: list[int] | None, taken: int = 0
    ) -> list[int] | None:
        """Return a text's token ids, or None if it has to be cut.

        Args:
            text: The text.
            token_ids: What `encode_batch` returned for it, if it did.
            taken: Tokens of the limit that something else takes.

        Raises:
            RowError: It has no tokens, or too many and must not be cut.
        """
        if token_ids is None:
            ids = self._enough(text.text, self._limit, cut_left=False)
            token_ids = [*self._head, *ids, *self._tail]
        if not token_ids:
            raise RowError("empty_prompt", "the prompt has no tokens")
        limit = self._limit - taken
        if len(token_ids) <= limit:
            return token_ids
        if self._too_long != "error":
            return None
        size = f"{len(token_ids):,} tokens"
        if len(text.text) > self._whole_chars:
            chars = len(text.text) - sum(map(text.text.count, self._control.marks))
            size = f"{chars:,} characters and more than {self._limit:,} tokens"
        raise RowError("prompt_too_long", f"prompt has {size}; the limit is {limit:,}")

    def cut(self, before: str, body: str, after: str, taken: int = 0) -> list[int]:
        """Return exactly the limit of token ids: all but as much of the body as is too much.

        Args:
            before: What stays before the body; with it and `after` empty, special tokens stay.
            body: What is cut.
            after: What stays after it.
            taken: Tokens of the limit that something else takes.
        """
        head = self._control.encode(before) if before else self._head
        tail = self._control.encode(before, after)[len(head) :] if after else self._tail
        limit = self._limit - taken
        room = limit - len(head) - len(tail)
        if room < 1:
            size = f"{len(head) + len(tail):,} tokens around the part that can be cut"
            raise RowError("prompt_too_long", f"prompt has {size}; the limit is {limit:,}")
        cut_left = self._too_long == "truncate_left"
        ids = self._enough(body, room, cut_left=cut_left, before=before)
        return [*head, *(ids[-room:] if cut_left else ids[:room]), *tail]

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of unmarked texts, without special tokens around them."""
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def ending(self, text: MarkedText) -> str:
        """Return as much of a text's end as may matter, if its beginning is cut."""
        whole = len(text.text) <= self._whole_chars
        return text.text if whole else self._control.ending(text.text, self._whole_chars)

    @property
    def special(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after each text."""
        return self._head, self._tail

    @property
    def limit(self) -> int:
        """Longest prompt in tokens."""
        return self._limit

    def _enough(self, text: str, tokens: int, *, cut_left: bool, before: str = "") -> list[int]:
        """Return the token ids of as much of a text as surely has `tokens` of them, or of all."""
        chars = self._whole_chars
        part = self._control.ending if cut_left else self._control.beginning
        skipped = len(self._control.encode(before)) if before else 0
        while True:
            piece = text if len(text) <= chars else part(text, chars)
            texts = (before, piece) if before else (piece,)
            token_ids = self._control.encode(*texts)[skipped:]
            if len(text) <= chars or len(token_ids) >= tokens + MARGIN_TOKENS:
                return token_ids
            chars *= 2

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """Return the ids that the tokenizer puts before and after a text."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a").ids
        at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return full[:at], full[at + len(bare) :]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:  # noqa: ANN401 - varies with its class
    """Return the Rust tokenizer, set to return what it is given, whole.

    A tokenizer.json may hold the padding and the truncation of its training; transformers resets
    them on each call.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = False
    return backend


def _batches(texts: Iterator[tuple[int, str]]) -> Iterator[dict[int, str]]:
    """Yield texts that have together about `BATCH_CHARS` characters."""
    batch: dict[int, str] = {}
    chars = 0
    for key, text in texts:
        batch[key] = text
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = {}, 0
    if batch:
        yield batch
