"""Where a model's chat template runs: what it reaches, and what a conversation may cost.

A chat template is a program in Jinja that comes with the model's files, from a stranger. The
sandbox of transformers keeps it from Python, but not from the machine: `{{ 'a' * 10**9 }}`, a macro
that calls itself twice, or `lipsum(10**9)` end the process that renders rows, or hold it for ever
(measured with 5.23; the first already while the template is compiled). Templates of real models use
far more of Jinja than a prompt's (calls, macros, `set`, formats), so here everything counts:

- methods of texts, lists and dictionaries, filters and functions are those of the lists below;
- what could be large is measured before it is made, and all that is made, in whatever way, is taken
  off the conversation's `Budget`, as are calls and the steps of loops; the clock is looked at too.

A template within its budget makes what transformers makes of it.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import types
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.runtime import BlockReference, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from jinja2.visitor import NodeTransformer
from typing_extensions import override

from quantbatch.prompts.chat_budget import Budget, chars_of, refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from jinja2.parser import Parser
    from jinja2.runtime import Context

MAX_SOURCE_CHARS = 1_000_000
MAX_NODES = 50_000
"""Most nodes of a template's syntax tree; the longest that we know have some 3,000."""
MAX_SPECIFIED = 9_999
"""Largest width in a format."""
MAX_INDENT = 16
MAX_POWER_BITS = 4096

METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        ("capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum",
         "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace",
         "istitle", "isupper", "join", "lower", "lstrip", "partition", "removeprefix",
         "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split",
         "splitlines", "startswith", "strip", "swapcase", "title", "upper")
    ),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    Cycler: frozenset(("next", "reset")),
    LoopContext: frozenset(("changed", "cycle")),
}  # fmt: skip
"""Left out on purpose: `center`, `ljust`, `rjust`, `zfill` and `expandtabs`, whose numbers make
texts of any length."""

PLAIN_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first",
    "float", "groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min",
    "reject", "rejectattr", "reverse", "safe", "select", "selectattr", "sort", "title", "trim",
    "truncate", "unique", "upper", "wordcount",
)  # fmt: skip
"""Filters whose result is at most a few times their input."""
_EACH, _CONCAT, _TEXT, _SLICE = " each", " concat", " text", " slice"
"""Filters that we put into templates; no name in one has a space."""


class _Method(NamedTuple):
    owner: object
    name: str


def _method(obj: object) -> _Method | None:
    """Return whose method something is, also within what Jinja's sandbox wraps it in."""
    found = getattr(obj, "__wrapped__", obj) if isinstance(obj, types.FunctionType) else obj
    if not isinstance(found, types.MethodType | types.BuiltinMethodType):
        return None
    return _Method(found.__self__, found.__name__)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message)[:1000])


def _strftime_now(form: str) -> str:
    if len(form) > 1000 or re.search(r"\d{3}", form):
        refuse(f"a format for times of {len(form):,} characters, or with large numbers")
    return datetime.datetime.now().strftime(form)  # noqa: DTZ005 - as transformers does


class _Dict:
    """`dict` without what Python's has besides."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:  # noqa: ANN401
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """What a template keeps values in; as in transformers, none that Python would look at."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - so that `self` can be a value
        Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _Namespace._check(name)

    @override
    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"it may not set {name!r}")


class _Generation(Extension):
    """`{% generation %}` marks what a model writes, for training; here it means nothing."""

    tags = {"generation"}

    @override
    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class ChatSandbox(ImmutableSandboxedEnvironment):
    """The sandbox of one chat template; for one thread at a time."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        self.budget = Budget()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=self._printed,
            optimized=False,
        )
        self.globals = {
            "range": safe_range,
            "dict": _Dict(),
            "namespace": _Namespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self._functions = [*map(id, self.globals.values())]
        own: dict[str, Callable[..., Any]] = {
            "string": self._text_of,
            "join": self._join,
            "replace": self._replace,
            "indent": self._indent,
            "round": self._round,
            "tojson": self._tojson,
            _CONCAT: lambda *values: "".join(map(self._text_of, values)),
            _EACH: self._each,
            _TEXT: pass_context(lambda _, text: text),
            _SLICE: lambda value, *bounds: value[slice(*bounds)],
        }
        filters = {name: JINJA_FILTERS[name] for name in PLAIN_FILTERS} | own
        self.filters = {name: self._counted(each) for name, each in filters.items()}

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # keeps Jinja's mark of functions that want the context
        def counted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any filter
            return self.budget.made(function(*args, **kwargs))

        return counted

    def compiled(self, source: str) -> ChatProgram:
        """Compile a template.

        Raises:
            RowError: It is too large.
            TemplateError: It is not well-formed.
            RecursionError, MemoryError, SyntaxError: It is nested too deeply.
        """
        if len(source) > MAX_SOURCE_CHARS:
            refuse(f"it has {len(source):,} characters, more than {MAX_SOURCE_CHARS:,}")
        tree = self.parse(source)
        count = sum(1 for _ in tree.find_all(nodes.Node))
        if count > MAX_NODES:
            refuse(f"it has {count:,} expressions and statements, more than {MAX_NODES:,}")
        self.budget = Budget()
        return ChatProgram(self, _Counted(self).visit(tree))

    @override
    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        match operator, left, right:
            case "+", str() | list() | tuple(), str() | list() | tuple():
                self.budget.reserve(len(left) + len(right))
            case "*", str() | list() | tuple(), int():
                self.budget.reserve(len(left) * max(right, 0))
            case "*", int(), str() | list() | tuple():
                self.budget.reserve(len(right) * max(left, 0))
            case "**" | "*", int(), int():
                more = right if operator == "**" else 1
                if left.bit_length() * abs(more) > MAX_POWER_BITS:
                    refuse("it computes with numbers of thousands of digits")
            case "%", str(), _:
                values = right if isinstance(right, tuple) else (right,)
                self._reserve_format(left, "%", [*values])
            case _:
                pass
        return self.budget.made(super().call_binop(context, operator, left, right))

    @override
    def is_safe_callable(self, obj: Any) -> bool:
        if isinstance(obj, Macro | BlockReference | LoopContext | Joiner | Undefined):
            return True
        method = _method(obj)
        if method is None:
            return id(obj) in self._functions
        # Jinja's sandbox wraps str.format, which reaches attributes; so a bare one is no use.
        bare = method.name == "format" and not hasattr(obj, "__wrapped__")
        kind = str if isinstance(method.owner, str) else type(method.owner)
        return method.name in METHODS.get(kind, ()) and not bare

    @override
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # The names are Jinja's, so that no argument of a template collides with them.
        __self.budget.step()
        if not __self.is_safe_callable(__obj):
            name = getattr(__obj, "__name__", type(__obj).__name__)
            raise SecurityError(f"it may not call {name!r}")
        if isinstance(__obj, LoopContext):  # a recursive loop
            args = (__self._each(args[0]), *args[1:])
        match _method(__obj):
            case str(text), "replace":
                __self._reserve_replace(text, *args[:2])
            case str(text), "join":
                args = ([*args[0]],)
                __self._reserve_join(text, args[0])
            case str(text), "format":
                __self._reserve_format(text, "{", [*args, *kwargs.values()])
            case _:
                pass
        return __self.budget.made(super().call(__context, __obj, *args, **kwargs))

    def _reserve_replace(self, text: str, old: str, new: str) -> None:
        self.budget.reserve(len(text) + text.count(old) * max(len(new) - len(old), 0))

    def _reserve_join(self, separator: str, texts: list[Any]) -> None:
        self.budget.reserve(sum(len(t) + len(separator) for t in texts if isinstance(t, str)))

    def _reserve_format(self, form: str, mark: str, values: list[Any]) -> None:
        computed = r"%[^%a-zA-Z]*\*" if mark == "%" else r"{[^}]*{"
        if re.search(rf"\d{{{len(str(MAX_SPECIFIED)) + 1}}}|{computed}", form):
            refuse("a format has a width that is large, or is computed")
        longest = max((chars_of(value, self.budget.work) for value in values), default=0)
        self.budget.reserve(len(form) + form.count(mark) * (longest + MAX_SPECIFIED))

    def _text_of(self, value: object) -> str:
        """Return a value as text, as Jinja prints it."""
        match value:
            case str():
                return value
            case list() | tuple() | dict():
                self.budget.reserve(chars_of(value, self.budget.work))
                return str(value)
            case None | bool() | int() | float() | Undefined():
                return str(value)
            case _:
                return f"<{type(value).__name__}>"

    def _printed(self, value: object) -> str:
        made: str = self.budget.made(self._text_of(value))
        return made

    def _each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.budget.step()
            yield value

    def _join(self, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = (self.getitem(value, attribute) for value in values)
        texts = [self.budget.made(self._text_of(value)) for value in values]
        self._reserve_join(d, texts)
        return d.join(texts)

    def _replace(self, value: object, old: str, new: str, count: int | None = None) -> str:
        text, old, new = map(self._text_of, (value, old, new))
        self._reserve_replace(text, old, new)
        return text.replace(old, new, -1 if count is None else count)

    def _indent(
        self, s: str, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        if (width if isinstance(width, int) else len(width)) > MAX_INDENT:
            refuse(f"it indents by more than {MAX_INDENT}")
        self.budget.reserve(len(s) + s.count("\n") * MAX_INDENT)
        indented: str = JINJA_FILTERS["indent"](s, width, first, blank)
        return indented

    def _round(self, value: float, precision: int = 0, method: str = "common") -> float:
        if abs(precision) > MAX_INDENT:
            refuse(f"it rounds to {precision} digits")
        rounded: float = JINJA_FILTERS["round"](value, precision, method)
        return rounded

    def _tojson(
        self,
        x: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        step = len(indent) if isinstance(indent, str) else indent or 0
        if max(step, *map(len, separators or ("",))) > MAX_INDENT:
            refuse(f"it indents JSON by more than {MAX_INDENT}")
        self.budget.reserve(chars_of(x, self.budget.work) * max(step, 1))
        return json.dumps(
            x,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )


class ChatProgram:
    """A compiled chat template."""

    def __init__(self, environment: ChatSandbox, tree: nodes.Template) -> None:
        self._environment = environment
        self._template = environment.from_string(tree)

    def render(self, values: Mapping[str, Any], chars: int) -> str:
        """Return the template's text.

        Args:
            values: What the template sees: plain JSON values.
            chars: Characters of the conversation.

        Raises:
            RowError: It would take too much.
            Exception: What Jinja and Python raise on values that the template does not expect.
        """
        self._environment.budget = Budget(chars)
        return "".join(self._template.root_render_func(self._template.new_context(dict(values))))


class _Counted(NodeTransformer):
    """Puts our filters where a template makes something without a call or an operator."""

    def __init__(self, environment: ChatSandbox) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - the name is Jinja's
        self.generic_visit(node)
        if not node.recursive:
            node.iter = self._filter(_EACH, [node.iter])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - the name is Jinja's
        self.generic_visit(node)
        return self._filter(_CONCAT, node.nodes)

    def visit_TemplateData(  # noqa: N802 - the name is Jinja's
        self, node: nodes.TemplateData
    ) -> nodes.Node:
        # In a loop or a macro, a template's own text is made again and again.
        return self._filter(_TEXT, [nodes.Const(node.data, lineno=node.lineno)])

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802 - the name is Jinja's
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [
            nodes.Const(None, lineno=node.lineno) if each is None else each
            for each in (node.arg.start, node.arg.stop, node.arg.step)
        ]
        return self._filter(_SLICE, [node.node, *bounds])

    def _filter(self, name: str, values: list[Any]) -> nodes.Filter:
        made = nodes.Filter(values[0], name, values[1:], [], None, None, lineno=values[0].lineno)
        made.set_environment(self._environment)
        return made
