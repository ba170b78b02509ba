"""YAML of strangers as values: bounded in size, depth and what its aliases make, and plain."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any

import yaml
from typing_extensions import override
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from quantbatch.errors import JobError, SpecError
from quantbatch.storage import redact

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BYTES = 1_000_000
MAX_VALUES = 10_000
MAX_DEPTH = 50
"""Deepest nesting: a JSON schema of 20 levels has 40."""
TOO_MANY = f"more than {MAX_VALUES:,} values, aliases expanded"
TOO_DEEP = "nested too deeply"


class _Loader(yaml.SafeLoader):
    """yaml's safe loader, which stops at a number of values and tells where a bad one is."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = self._depth = 0

    @override
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._count += 1
        self._depth += 1
        if self._count > MAX_VALUES or self._depth > MAX_DEPTH:
            what = TOO_MANY if self._count > MAX_VALUES else TOO_DEEP
            raise ComposerError(None, None, what, self.get_mark())
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    @override
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, AttributeError, LookupError) as error:
            # Such as the date 2026-13-01, and `!!bool x`, for which yaml has no words.
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            said = f"{json.dumps(redact(str(node.value))[:40])} is no {kind}"
            raise ConstructorError(None, None, said, node.start_mark) from error


def parse(text: str, where: str) -> tuple[yaml.Node | None, Any]:
    """Return what a text of YAML holds, as nodes and as values in JSON types.

    Raises:
        SpecError: It is too large, gives a key twice, or holds what is no text, number, list or
            mapping.
        yaml.YAMLError: It is no YAML.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return None, None
        if _count(node, {}) > MAX_VALUES:
            raise SpecError(JobError(f"{where}: {TOO_MANY}"))
        repeated = [f"{where}:{line}: {key!r} is given twice" for key, line in _repeated(node)]
        if repeated:
            raise SpecError(*map(JobError, repeated))
        # Aliases share their values; a round trip through JSON gives each place its own.
        built = _Loader("").construct_document(node)
        return node, json.loads(json.dumps(built, default=_as_text))
    except (TypeError, ValueError) as error:
        said = str(error).partition(",")[0]
        raise SpecError(
            JobError(f"{where}: not text, numbers, lists and mappings: {said}")
        ) from None


def _as_text(value: object) -> str:
    """Write a date as the text that it most likely is; anything else is none that a spec holds."""
    if isinstance(value, datetime.date):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values under a node as they are with every alias expanded."""
    if id(node) not in known:
        known[id(node)] = MAX_VALUES  # what a node that contains itself counts
        known[id(node)] = 1 + sum(_count(child, known) for _, child in children(node))
    return known[id(node)]


def children(node: yaml.Node) -> Iterator[tuple[str | int, yaml.Node]]:
    """Yield what a node holds, with its keys or places."""
    match node:
        case yaml.MappingNode():
            yield from ((key.value, value) for key, value in node.value)
        case yaml.SequenceNode():
            yield from enumerate(node.value)
        case _:
            return


def _repeated(node: yaml.Node) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                yield str(key.value), key.start_mark.line + 1
            seen.add(str(key.value))
    for _, child in children(node):
        yield from _repeated(child)
