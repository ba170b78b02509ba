"""The user's templates over a row's columns: a small Jinja.

A template comes from a spec and the rows from anywhere, so neither may run code or eat the machine.
The syntax is checked here, against a list of what is allowed: no calls, no `*`, `**` and `%`, no
`set`, macros, blocks and includes. What is left runs in `sandbox`, with limits. A row's text is
only ever a value, never a template.

Two things differ from plain Jinja. To print a null is the row's error, where Jinja prints "None";
`default` and `if` take care of it. And columns whose names are no identifiers are read as
`{{ columns['Review Text'] }}`.
"""

from __future__ import annotations

import difflib
import traceback
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.visitor import NodeTransformer

from quantbatch.errors import JobError, RowError, SpecError
from quantbatch.prompts import sandbox

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

MAX_SOURCE_CHARS = 1_000_000
"""Longest template: room for a thousand few-shot examples."""
MAX_NODES = 2_000
"""Most nodes of a template's syntax tree, plain text not counted: bounds what one pass costs."""
MAX_MESSAGE_CHARS = 500
MAX_NAMES = 30

COLUMNS = "columns"
"""The name under which a template reaches all columns."""

SYNTAX = frozenset(
    {
        *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.CondExpr),
        *(nodes.Name, nodes.Const, nodes.List, nodes.Tuple),
        *(nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Test, nodes.Keyword),
        *(nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not),
        *(nodes.Concat, nodes.Add, nodes.Sub, nodes.Div, nodes.FloorDiv, nodes.Neg),
    }
)
WORDS: dict[type[nodes.Node], str] = {
    nodes.Call: "a call",
    nodes.Mul: "the operator *",
    nodes.Pow: "the operator **",
    nodes.Mod: "the operator %",
    nodes.Pos: "the sign +",
    nodes.Dict: "a dictionary",
    nodes.Assign: "{% set %}",
    nodes.AssignBlock: "{% set %}",
    nodes.FilterBlock: "{% filter %}",
    nodes.CallBlock: "{% call %}",
    nodes.FromImport: "{% from %}",
    nodes.ScopedEvalContextModifier: "{% autoescape %}",
}
"""What the user wrote, where the node's name does not say it."""
HINT = (
    "a template has {{ column }}, {% if %}, {% for %}, comparisons, + - / // ~ and filters; "
    "compute anything more as a column of the input"
)


class RowTemplate:
    """A compiled template; `compile` makes one.

    Args:
        tree: The template's checked syntax tree, which is used up.
        where: The template's path in the spec, for messages.
        environment: Where it runs.
    """

    def __init__(self, tree: nodes.Template, where: str, environment: sandbox.Sandbox) -> None:
        self.where = where
        self.columns = _columns_read(tree)
        """The columns that the template reads."""
        self._template = environment.from_string(_Counted(environment).visit(tree))

    @classmethod
    def compile(
        cls, source: str, where: str, *, marks: tuple[str, str] | None = None
    ) -> RowTemplate:
        """Check and compile a template.

        Args:
            source: The template.
            where: Its path in the spec, such as `prompt.template`.
            marks: What to put before and after each printed value, to tell the row's text from
                the template's own.

        Raises:
            SpecError: It is not well-formed, or uses more of Jinja than is allowed.
        """
        if len(source) > MAX_SOURCE_CHARS:
            problem = f"{where} has {len(source):,} characters, more than {MAX_SOURCE_CHARS:,}"
            raise SpecError(JobError(problem))
        for mark in marks or ():
            source = source.replace(mark, "")
        environment = sandbox.Sandbox(marks)
        try:
            tree = environment.parse(source)
            _check(tree, where)
            return cls(tree, where, environment)
        except TemplateSyntaxError as error:
            problem = f"{where}, line {error.lineno}: {error.message}"
            raise SpecError(JobError(problem)) from error
        except (RecursionError, MemoryError, SyntaxError) as error:
            # Python itself gives up on some 20 nested loops and some hundred nested brackets.
            raise SpecError(JobError(f"{where} is nested too deeply")) from error

    def render(self, row: Mapping[str, object]) -> str:
        """Return the template's text for a row that has at least its `columns`.

        Raises:
            RowError: `null_prompt`, `prompt_too_long` or `template`.
        """
        values = {name: sandbox.guarded(row[name], name) for name in self.columns}
        budget = sandbox.Budget()
        context = self._template.new_context(
            {**values, COLUMNS: values, sandbox.BUDGET: budget}, shared=True
        )
        try:
            return "".join(map(budget.output, self._template.root_render_func(context)))
        except sandbox.NullError as error:
            raise RowError("null_prompt", self._locate(error, str(error))) from error
        except RowError as error:
            raise RowError(error.kind, self._locate(error, error.message)) from error
        except sandbox.TEMPLATE_ERRORS as error:
            raise RowError("template", self._locate(error, str(error))) from error

    def _locate(self, error: Exception, message: str) -> str:
        lines = [
            self._template.get_corresponding_lineno(line)
            for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_filename == "<template>"
        ]
        place = f"{self.where}, line {lines[-1]}" if lines else self.where
        return f"{place}: {message[:MAX_MESSAGE_CHARS]}"


class _Counted(NodeTransformer):
    """Puts the sandbox's filters around loops and in place of `~`."""

    def __init__(self, environment: sandbox.Sandbox) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - the name is Jinja's
        self.generic_visit(node)
        node.iter = self._filter(sandbox.EACH, [node.iter])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - the name is Jinja's
        self.generic_visit(node)
        return self._filter(sandbox.CONCAT, node.nodes)

    def _filter(self, name: str, values: list[Any]) -> nodes.Filter:
        made = nodes.Filter(values[0], name, values[1:], [], None, None, lineno=values[0].lineno)
        made.set_environment(self._environment)
        return made


def _check(tree: nodes.Template, where: str) -> None:
    """Refuse what is not allowed, with its line."""
    named = {id(node.node) for node, _ in _named_columns(tree)}
    count = 0
    for node in tree.find_all(nodes.Node):
        count += not isinstance(node, nodes.TemplateData | nodes.Output)
        fault = _fault(node)
        if isinstance(node, nodes.Name) and node.name == COLUMNS and id(node) not in named:
            fault = f"{COLUMNS} needs a name in quotes after it", "{{ columns['Review Text'] }}"
        if fault:
            raise SpecError(JobError(f"{where}, line {node.lineno}: {fault[0]}", fault[1]))
    if count > MAX_NODES:
        problem = f"{where} has {count:,} expressions and statements, more than {MAX_NODES:,}"
        raise SpecError(JobError(problem))


def _fault(node: nodes.Node) -> tuple[str, str] | None:
    """Return what is wrong with one node, and a hint."""
    if type(node) not in SYNTAX:
        word = WORDS.get(type(node), f"{{% {type(node).__name__.lower()} %}}")
        hint = "use a filter: {{ text | trim }}; " if isinstance(node, nodes.Call) else ""
        return f"{word} is not allowed in a template", hint + HINT
    match node:
        case nodes.Filter(name=name) if name not in sandbox.FILTERS:
            return f"no filter {name!r}", f"filters are {', '.join(sorted(sandbox.FILTERS))}"
        case nodes.Test(name=name) if name not in sandbox.TESTS:
            return f"no test {name!r}", f"tests are {', '.join(sorted(sandbox.TESTS))}"
        case nodes.Filter() | nodes.Test() if node.dyn_args or node.dyn_kwargs:
            return "* and ** are not allowed in arguments", HINT
        case nodes.For(recursive=True):
            return "a recursive loop is not allowed", HINT
        case nodes.Name(name="self"):
            return "the name self is Jinja's own", "use {{ columns['self'] }} for a column self"
        case nodes.List(items=items) | nodes.Tuple(items=items, ctx="load") if any(
            # A list of columns would let one filter see the same long text many times.
            not isinstance(item, nodes.Const)
            for item in items
        ):
            return "a list may hold only texts and numbers", HINT
        case _:
            return None


def _named_columns(tree: nodes.Template) -> Iterator[tuple[nodes.Getitem | nodes.Getattr, str]]:
    """Yield the places where `columns` is followed by a name."""
    for node in tree.find_all((nodes.Getitem, nodes.Getattr)):
        match node:
            case nodes.Getitem(node=nodes.Name(name="columns"), arg=nodes.Const(value=str(name))):
                yield node, name
            case nodes.Getattr(node=nodes.Name(name="columns"), attr=name):
                yield node, name
            case _:
                pass


def _columns_read(tree: nodes.Template) -> frozenset[str]:
    named = {name for _, name in _named_columns(tree)}
    return (_free_names(tree, frozenset()) - {COLUMNS}) | named


def _free_names(node: nodes.Node, bound: frozenset[str]) -> frozenset[str]:
    """Return the names that no loop sets; Jinja's own function for it runs its optimizer too."""
    if isinstance(node, nodes.Name):
        return frozenset() if node.name in bound else frozenset({node.name})
    if not isinstance(node, nodes.For):
        return frozenset().union(*(_free_names(c, bound) for c in node.iter_child_nodes()))
    inner = bound | {"loop"} | _free_names(node.target, frozenset())
    inside = [*node.body, *([node.test] if node.test else [])]
    return frozenset().union(
        *(_free_names(child, inner) for child in inside),
        *(_free_names(child, bound) for child in [node.iter, *node.else_]),
    )


def check_columns(templates: Iterable[RowTemplate], columns: Collection[str]) -> None:
    """Refuse templates that read a column which the input lacks.

    Raises:
        SpecError: With one problem for each such column.
    """
    problems = [
        missing_column(template.where, name, columns)
        for template in templates
        for name in sorted(template.columns - set(columns))
    ]
    if problems:
        raise SpecError(*problems)


def missing_column(where: str, name: str, columns: Collection[str]) -> JobError:
    """Return the problem of a column that the input lacks, with the nearest of those it has."""
    shown = ", ".join(list(columns)[:MAX_NAMES]) + (", ..." if len(columns) > MAX_NAMES else "")
    near = difflib.get_close_matches(name, list(columns), n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return JobError(
        f"{where} uses the column {name!r}, which the input lacks",
        f"{guess}the columns are {shown}",
    )
