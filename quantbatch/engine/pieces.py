"""A row on its way through the engine, and the pieces of it that steps compute. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from quantbatch.wants import Embed, Rank, Score, Write

if TYPE_CHECKING:
    from quantbatch.engine.grammar import Matcher
    from quantbatch.engine.trees import Group, Tree
    from quantbatch.records import Request, TokenLogprobs

SCORE_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""What scores of places may take in a step that rows want which only read, by device. A step that
reads takes 27 ms and more through an 8B model on an H200, however few rows it has: with 128 MiB
short rows mostly waited for that."""
SCORE_ITEM_BYTES = 2 + 4
"""A score as the model gives it, and as float32."""
LEAST_SCORES = 16
"""Places whose scores a step may have, however large the vocabulary is."""
PLACES_AT_ONCE = 64
"""Places whose scores are turned into float32 together."""
TREE_TOKENS_AT_ONCE = 8192
"""On a card, tokens of rows, of the longest each, whose keys and values are copied together for
their candidates' tokens."""
PLACES_ALONE = 128
"""Places whose scores are there at once where rows are read one at a time."""


@dataclass(eq=False, slots=True)
class Row:
    """A request on its way through the engine."""

    request: Request
    order: tuple[int, int, int]
    """Its place in the queue: which `add` it came with, then the longer ones first."""
    tokens: list[int]
    """Prompt and answer as far as they are known."""
    limit: int
    """Most tokens it may have, prompt and answer together."""
    length: int
    """Tokens it has, those that are still being chosen on the device included."""
    computed: int = 0
    """Tokens whose keys and values are in the cache, or will be when launched steps are done."""
    once_computed: int = 0
    """The most that `computed` ever was: what is computed below it is computed again."""
    blocks: list[int] = field(default_factory=list)
    slot: int = -1
    """Its place in the batch; -1 while it waits."""
    digests: list[bytes] = field(default_factory=list)
    """Of its prompt's full blocks."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    tree: Tree | None = None
    """Its candidates, if it ranks any."""
    next_group: int = 0
    """The group of its tree that is computed next."""
    matcher: Matcher | None = None
    """What its answer may go on with, if that has a form; made when it first runs."""
    done: bool = False

    @property
    def reads(self) -> bool:
        """Whether it has no answer to write."""
        return not isinstance(self.request.want, Write)

    @property
    def is_read(self) -> bool:
        """Whether all of a row that only reads is computed."""
        groups = len(self.tree.groups) if self.tree else 0
        return self.reads and self.computed == self.length and self.next_group == groups

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def generated(self) -> int:
        """Tokens of the answer so far, those still being chosen included."""
        return self.length - self.prompt_tokens


class Piece(NamedTuple):
    """Tokens `start` to `end` of a row, computed in one step."""

    row: Row
    start: int
    end: int
    samples: bool
    """Whether the row's next token is chosen after this piece: it is, after the newest one."""
    group: Group | None = None
    """Candidates' tokens that are computed after the prompt, and forgotten."""

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.end - self.start + (len(self.group.tokens) if self.group else 0)

    @property
    def scored(self) -> range:
        """The places in the row whose scores a row that reads wants of this piece."""
        want, last = self.row.request.want, self.row.length - 1
        match want:
            case Score(first=first):
                return range(max(self.start, first - 1), min(self.end, last))
            case Rank():
                return range(max(self.start, last), self.end)
            case _:
                return range(0)

    @property
    def scores(self) -> int:
        """How many scores the row wants of this step, those of candidates included."""
        return len(self.scored) + (len(self.group.tokens) if self.group else 0)


def first_read(request: Request) -> int:
    """Return the first place of a prompt that has to be computed, and can't be taken from another
    row: what is wanted of a row's tokens is wanted from there on.
    """
    match request.want:
        case Score(first=first):
            return first - 1
        case Embed(pooling="mean"):
            return 0
        case _:
            return len(request.prompt_ids) - 1


class Budget:
    """What is left of a step."""

    def __init__(self, tokens: int, scores: int) -> None:
        self.tokens, self.scores = tokens, scores
        self.is_whole = True
        """Whether nothing was taken yet."""

    def take(self, piece: Piece) -> None:
        """Note what a piece needs."""
        self.tokens -= piece.tokens
        self.scores -= piece.scores
        self.is_whole = False


class ReadLimits(NamedTuple):
    """What rows that only read may take of a step, beside its tokens."""

    step_scores: int = 256
    """Places whose scores they may want."""
    most_nodes: int = 64
    """Most tokens of candidates that are computed together."""


class Limits(NamedTuple):
    """What a step may take at most; both shrink when memory runs out."""

    rows: int
    """Rows that run at once."""
    step_tokens: int
    """Tokens computed in one step."""
