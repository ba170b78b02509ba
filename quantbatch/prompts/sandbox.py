"""Where templates run: what their expressions reach, and what a row may cost.

Jinja's own sandbox stops `__class__` and `range(10**9)`, but not `{{ 'a' * 10**9 }}` (measured:
killed at 4 s). Here each thing is bounded, or counted:

- `.` and `[]` reach into a row's values and nothing else: Python's attributes do not exist;
- there are only the filters and tests below; what they return is at most a few times what they
  take, and where it could be more it is measured before it is made;
- no text longer than `MAX_PROMPT_CHARS` is built, all loops of a row together take at most
  `MAX_STEPS` steps, and a row that takes longer than `MAX_RENDER_S` is given up. The clock is
  looked at after each piece of output and in each step of a loop; a run of filters and comparisons
  without either can't be interrupted. Only the clock depends on the machine: the other limits stop
  the same rows anywhere.

A null behaves like an undefined name, so that it can't end up as the word "None" in a prompt.
"""

from __future__ import annotations

import datetime
import decimal
import json
import time
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import StrictUndefined, TemplateError, UndefinedError
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.runtime import LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS as JINJA_TESTS
from jinja2.utils import pass_context
from typing_extensions import override

from quantbatch.errors import RowError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from jinja2.runtime import Context

TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""What a template can raise on values that it does not expect."""

MAX_PROMPT_CHARS = 20_000_000
"""Longest text that a template may build: twice the 10 MB row that has to reach the length policy.
It takes 80 MB at most."""
MAX_STEPS = 1_000_000
"""Most steps of all loops for one row: about 0.3 s of empty ones."""
MAX_RENDER_S = 10.0
"""Longest that one row may take. Generous: on a busy machine it must not hit honest rows."""

BUDGET = " budget"
"""Where the context has the row's budget: names in a template have no spaces, so none collides."""
EACH = " each"
"""Filter that counts the steps of a loop."""
CONCAT = " concat"
"""Filter that does what `~` does."""

LOOP_NAMES = frozenset({"index", "index0", "revindex", "revindex0", "first", "last", "length"})
PRINTABLE = (
    str,
    int,
    float,
    decimal.Decimal,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    Undefined,  # raises what is to be said about it
)


class NullError(UndefinedError):
    """A null was used where a value is needed."""


class Null(StrictUndefined):
    """A null of the row: undefined, but may be asked whether it is true."""

    @override
    def __bool__(self) -> bool:  # type: ignore[override]  # Jinja's never returns
        return False


class Budget:
    """What rendering one row may still take."""

    __slots__ = ("chars", "deadline", "steps")

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.chars = MAX_PROMPT_CHARS
        self.deadline = time.monotonic() + MAX_RENDER_S

    def step(self) -> None:
        """Take one step of a loop."""
        self.steps -= 1
        if self.steps < 0:
            raise RowError("template", f"the loops run more than {MAX_STEPS:,} times for this row")
        self._check_clock()

    def output(self, piece: str) -> str:
        """Take a piece of output."""
        self.chars -= len(piece)
        if self.chars < 0:
            _refuse_length()
        self._check_clock()
        return piece

    def _check_clock(self) -> None:
        if time.monotonic() > self.deadline:
            raise RowError("template", f"rendering took longer than {MAX_RENDER_S:g} s")


def guarded(value: object, name: str) -> object:
    """Return a column's value with the nulls in it replaced, however deep.

    Args:
        value: As Arrow gives it: texts, numbers, dates, lists, dictionaries.
        name: How a template writes it, for messages.
    """
    match value:
        case str():
            return value
        case None:
            hint = f"{name!r} is null; to print something else: {{{{ {name} | default('') }}}}"
            return Null(hint=hint, exc=NullError)
        case list():
            return [guarded(item, name) for item in value]
        case dict():
            return {key: guarded(item, f"{name}.{key}") for key, item in value.items()}
        case _:
            return value


def _refuse_length() -> NoReturn:
    raise RowError("prompt_too_long", f"the text is longer than {MAX_PROMPT_CHARS:,} characters")


def printed(value: object) -> str:
    """Return a value as it is printed; lists and such have no obvious text, so they have none."""
    if not isinstance(value, PRINTABLE):
        raise RowError("template", f"{_kind(value)} can't be printed; use join or tojson")
    text = str(value)
    if len(text) > MAX_PROMPT_CHARS:
        _refuse_length()
    return text


def _kind(value: object) -> str:
    match value:
        case None:
            return "a null"
        case list() | tuple():
            return "a list"
        case dict():
            return "a struct"
        case bytes():
            return "binary data"
        case _:
            return f"a value of type {type(value).__name__}"


def _concat(*values: object) -> str:
    return _join(values)


def _join(values: Iterable[object], d: str = "") -> str:
    texts = [printed(value) for value in values]
    separator = printed(d)
    if sum(map(len, texts)) + len(separator) * len(texts) > MAX_PROMPT_CHARS:
        _refuse_length()
    return separator.join(texts)


def _replace(value: object, old: str, new: str) -> str:
    text, old, new = printed(value), printed(old), printed(new)
    if len(text) + text.count(old) * (len(new) - len(old)) > MAX_PROMPT_CHARS:
        _refuse_length()
    return text.replace(old, new)


def _round(value: float, precision: int = 0) -> float:
    return round(float(value), precision)


def _tojson(value: object) -> str:
    if _json_chars(value) > MAX_PROMPT_CHARS:
        _refuse_length()
    return printed(json.dumps(value, ensure_ascii=False, default=_json_value))


def _json_chars(value: object) -> int:
    """Return about how long a value is as JSON, without making it."""
    match value:
        case str():
            return len(value)
        case dict():
            return sum(len(str(key)) + _json_chars(item) for key, item in value.items())
        case list() | tuple():
            return sum(map(_json_chars, value))
        case _:
            return 8


def _json_value(value: object) -> str | None:
    return None if isinstance(value, Null) else printed(value)


def _truncate(value: object, length: int = 255, killwords: bool = False, end: str = "...") -> str:
    text = printed(value)
    if len(text) <= length:
        return text
    kept = text[: max(length - len(end), 0)]
    return (kept if killwords else kept.rsplit(" ", 1)[0]) + end


def _on_text(name: str) -> Callable[..., object]:
    """Return a filter of Jinja that takes a text, refusing anything else."""
    function: Callable[..., object] = JINJA_FILTERS[name]

    def on_text(value: object, *args: object, **kwargs: object) -> object:
        return function(printed(value), *args, **kwargs)

    return on_text


@pass_context
def _each(context: Context, values: Iterable[object]) -> Iterator[object]:
    budget: Budget = context.parent[BUDGET]
    for value in values:
        budget.step()
        yield value


FILTERS: dict[str, Callable[..., object]] = {
    **{name: _on_text(name) for name in ("trim", "upper", "lower", "title", "capitalize")},
    **{name: _on_text(name) for name in ("string", "wordcount")},
    **{name: JINJA_FILTERS[name] for name in ("first", "last", "list", "sort", "items", "default")},
    **{name: JINJA_FILTERS[name] for name in ("length", "int", "float")},
    "join": _join,
    "replace": _replace,
    "round": _round,
    "tojson": _tojson,
    "truncate": _truncate,
}
"""Left out on purpose: `center`, `indent` and `format`, whose numbers make text of any length;
`map`, `select` and their kin, which call other filters by name; `attr`, which reaches Python;
Jinja's `round`, which computes 10**precision."""

TESTS: dict[str, Any] = {
    **{name: JINJA_TESTS[name] for name in ("defined", "undefined", "string", "number", "integer")},
    **{name: JINJA_TESTS[name] for name in ("float", "boolean", "true", "false", "mapping")},
    **{name: JINJA_TESTS[name] for name in ("sequence", "odd", "even", "divisibleby")},
    "none": lambda value: value is None or isinstance(value, Null),
}


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, narrowed as this module says.

    Args:
        marks: What to put before and after each printed value; taken out of the value.
    """

    intercepted_binops = frozenset({"+"})

    def __init__(self, marks: tuple[str, str] | None = None) -> None:
        super().__init__(
            undefined=StrictUndefined,
            finalize=_marked(*marks) if marks else printed,
            # Blocks on lines of their own leave no empty lines, as in transformers' templates.
            trim_blocks=True,
            lstrip_blocks=True,
            # The optimizer evaluates each level of nested constant filters anew while compiling.
            optimized=False,
        )
        self.globals.clear()
        self.filters = {**FILTERS, EACH: _each, CONCAT: _concat}
        self.tests = dict(TESTS)

    @override
    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, str) and isinstance(right, str):
            return _concat(left, right)
        if isinstance(left, list) or isinstance(right, list):
            raise RowError("template", "the operator + takes numbers or texts, not lists")
        return left + right

    @override
    def getattr(self, obj: Any, attribute: str) -> Any:
        return self.getitem(obj, attribute)

    @override
    def getitem(self, obj: Any, argument: Any) -> Any:
        match obj:
            case dict() if argument in obj:
                return obj[argument]
            case list() | tuple() | str() if isinstance(argument, int):
                if -len(obj) <= argument < len(obj):
                    return obj[argument]
            case LoopContext() if argument in LOOP_NAMES:
                return getattr(obj, argument)
            case Undefined():
                return obj[argument]
            case _:
                pass
        return self.undefined(obj=obj, name=argument)


def _marked(start: str, end: str) -> Callable[[object], str]:
    def marked(value: object) -> str:
        return f"{start}{printed(value).replace(start, '').replace(end, '')}{end}"

    return marked
