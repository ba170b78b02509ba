"""Each field of a spec, changed between two runs of a job: refused by name, or let in.

The fields are those of the pydantic model itself, all kinds of tasks, engines and quantizations
included, so a new one is tried as soon as it is there: it must be refused, unless it is named in
TUNING here, too. (So who adds a field that is marked as tuning in the spec adds its name here, and
thereby says that no answer can depend on it.)
"""

from __future__ import annotations

import copy
import json
import types
import typing
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from quantbatch.errors import Refused
from quantbatch.input import listing
from quantbatch.ledger import Ledger
from quantbatch.plan import make_plan
from quantbatch.spec import JobSpec, Section

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from quantbatch.plan import Plan
    from tests.conftest import Count

TUNING = frozenset(
    {
        "name",
        "input.rows_per_chunk",
        "model.cache",
        "model.quantization.storage_dtype",
        "engine.batch_size",
        "engine.deduplicate",
        "engine.fused_4bit",
        "engine.share_prefixes",
        "engine.step_s",
        "engine.step_tokens",
        "output.uri",
        "answers_cache.uri",
        "limits.attempts",
        "limits.drain_s",
        "limits.load_timeout_s",
        "limits.step_timeout_s",
        "limits.max_error_rate",
    }
)
"""Fields that change how a job runs and not what it writes, besides all of TUNING_SECTIONS."""
TUNING_SECTIONS = (
    "input.storage.",
    "output.storage.",
    "model.cache_storage.",
    "answers_cache.storage.",
    "cluster.",
)
SAID_AS = {"model.bits": "model.quantization.kind"}
"""Short forms, which are told in their long form."""

BASE: dict[str, Any] = {
    "name": "job",
    "input": {"uri": "in", "rows_per_chunk": 4},
    "model": {"id": "m", "bits": 4},
    "prompt": {"template": "{{ text }}"},
    "output": {"uri": "out"},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
MESSAGES = [{"role": "user", "content": "a"}]
REQUESTS: dict[str, Any] = {"input": {"uri": "in", "format": "openai-batch"}, "prompt": None}

AROUND: dict[str, dict[str, Any]] = {
    # What a spec has to hold for the field to be there, or to take another value.
    "model.trust_remote_code": {"model": {"revision": "0" * 40}},
    "model.quantization": {"model": {"bits": None}},
    "model.dtype": {"model": {"bits": None}},
    "sampling.n": {"sampling": {"temperature": 0.5}},
    "task.classify.": {"task": {"labels": ["a", "b"]}},
    "task.classify.labels_column": {"task": {"labels": None, "labels_column": "x"}},
    "task.classify.multi_label": {"task": {"multi_label": {}}},
    "task.openai.": REQUESTS,
    "task.generate.tool_choice": {"task": {"tools": [TOOL]}},
    "task.generate.response.json_schema": {"task": {"response": {"json_schema": SCHEMA}}},
    "task.generate.response.schema_column": {"task": {"response": {"schema_column": "c"}}},
    "task.generate.response.regex": {"task": {"response": {"regex": "a"}}},
    "task.generate.response.choices": {"task": {"response": {"choices": ["a"]}}},
    "task.generate.response.grammar": {"task": {"response": {"grammar": 'start: "a"'}}},
    "output.explode": {"task": {"response": {"json_schema": SCHEMA}}},
    "output.format": REQUESTS,
    "prompt.messages": {"prompt": {"template": None, "messages": MESSAGES}},
    "prompt.column": {"prompt": {"template": None, "column": "a"}},
    "answers_cache.": {"answers_cache": {"uri": "cache"}},
    "cluster.replicas.": {"cluster": {"replicas": {"min": 2, "max": 3}}},
}
VALUES: dict[str, Any] = {
    # Values that are not found by trying.
    "task.generate.response.json_schema": SCHEMA | {"required": ["a"]},
    "task.generate.response.grammar": 'start: "b"',
    "task.generate.tools": [TOOL],
    "task.classify.labels": ["a", "c"],
    "task.classify.multi_label.question": "Is it {label}? ",
    "cluster.card": "L4",
    "prompt.messages": [*MESSAGES, *MESSAGES],
    "input.delimiter": ";",
}
CANDIDATES: list[Any] = [
    True, False, 1, 2, 3, 16, 0.5, 0.25, "x", "other", ["x"], [3], {3: 1.0}, {"x": 1}, "http://x",
    "0" * 40, {"min": 1, "max": 2},
]  # fmt: skip


class Leaf(NamedTuple):
    """A field that holds a value."""

    path: str
    """As a spec names it."""
    id: str
    """With the kind of its section, where there are several."""
    kinds: tuple[tuple[str, str], ...]
    """The kinds of the sections that it is in, by their paths."""
    choices: tuple[Any, ...]
    """The values that it may have, as far as its type lists them."""


def leaves(
    model: type[Section], path: str = "", id: str = "", kinds: tuple[tuple[str, str], ...] = ()
) -> Iterator[Leaf]:
    for name, info in model.model_fields.items():
        if name == "kind" and len(typing.get_args(info.annotation)) == 1:
            continue  # what tells one kind of section from another is tried below
        parts = list(_flat(info.annotation))
        sections = [p for p in parts if isinstance(p, type) and issubclass(p, Section)]
        plain = [p for p in parts if p not in sections and p is not types.NoneType]
        for section in sections:
            kind = section.model_fields.get("kind")
            value = kind.default if kind else ""
            below = f"{id}{name}.{value}." if value and len(sections) > 1 else f"{id}{name}."
            more = ((path + name, value),) if value else ()
            yield from leaves(section, f"{path}{name}.", below, kinds + more)
        if plain:
            choices = [v for p in plain for v in typing.get_args(p) if p is not str]
            yield Leaf(path + name, id + name, kinds, tuple(choices))


def _flat(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union, without what is noted about them."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _flat(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for each in typing.get_args(annotation):
            yield from _flat(each)
    else:
        yield annotation


LEAVES = {leaf.id: leaf for leaf in leaves(JobSpec)}


def is_tuning(leaf: Leaf) -> bool:
    return leaf.path in TUNING or leaf.path.startswith(TUNING_SECTIONS)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a spec with changes to it; a prompt that is None is left out."""
    found = copy.deepcopy(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = merged(found[name], value) if both else copy.deepcopy(value)
    return {name: value for name, value in found.items() if name != "prompt" or value is not None}


def with_value(fields: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(fields)
    at = found
    *above, last = path.split(".")
    for name in above:
        at = at.setdefault(name, {})
    at[last] = value
    return found


def value_at(spec: JobSpec, path: str) -> Any:
    found: Any = spec
    for name in path.split("."):
        found = getattr(found, name)
    return found


def base_of(leaf: Leaf) -> dict[str, Any]:
    """Return a spec that has the field."""
    fields = copy.deepcopy(BASE)
    for path, kind in leaf.kinds:
        if kind != "openai":  # that follows from the input
            fields = with_value(fields, f"{path}.kind", kind)
    for prefix, changes in AROUND.items():
        if leaf.id.startswith(prefix):
            fields = merged(fields, changes)
    return fields


def pair_of(leaf: Leaf) -> tuple[JobSpec, JobSpec]:
    """Return two specs that differ in one field."""
    fields = base_of(leaf)
    first = JobSpec.model_validate(fields)
    for value in [VALUES[leaf.id]] if leaf.id in VALUES else [*leaf.choices, *CANDIDATES]:
        try:
            second = JobSpec.model_validate(with_value(fields, leaf.path, value))
        except ValidationError:
            continue
        if value_at(second, leaf.path) != value_at(first, leaf.path):
            return first, second
    raise AssertionError(f"a new field? say in VALUES or AROUND what {leaf.id} may be")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("in")
    pq.write_table(pa.table({"text": ["x"] * 9}), folder / "a.parquet")
    spec = JobSpec.model_validate(merged(BASE, {"input": {"uri": str(folder)}}))
    return make_plan(spec, listing.list_input(spec.input))


@pytest.fixture
def reopened(tmp_path: Path, plan: Plan) -> Callable[[JobSpec, JobSpec], Ledger]:
    """Begin a job with one spec, and go on with another."""

    def reopened(first: JobSpec, second: JobSpec) -> Ledger:
        Ledger.open(at(first, tmp_path), "digest").freeze(plan)
        return Ledger.open(at(second, tmp_path), "digest")

    return reopened


def at(spec: JobSpec, folder: Path) -> JobSpec:
    """Return a spec with its output in a folder, reached as a folder is."""
    output = spec.output.model_copy(update={"uri": str(folder / "out")})
    return spec.model_copy(update={"output": output})


def refusal(reopen: Callable[[], object]) -> Refused:
    with pytest.raises(Refused) as caught:
        reopen()
    assert caught.value.exit_code == 3
    assert "output.uri" in caught.value.hint
    return caught.value


DECIDING = [id for id, leaf in LEAVES.items() if not is_tuning(leaf)]


def test_there_are_as_many_fields_as_were_looked_at(count: Count) -> None:
    assert len(LEAVES) > 120
    assert len(DECIDING) > 70
    assert {leaf.path for leaf in LEAVES.values()} >= TUNING
    count(f"fields={len(LEAVES)} deciding={len(DECIDING)} tuning={len(LEAVES) - len(DECIDING)}")


@pytest.mark.parametrize("id", DECIDING)
def test_a_field_that_decides_the_output_is_refused_by_name(
    reopened: Callable[[JobSpec, JobSpec], Ledger], id: str
) -> None:
    first, second = pair_of(LEAVES[id])
    name = SAID_AS.get(id, LEAVES[id].path)
    problem = refusal(lambda: reopened(first, second)).problem
    before, now = (json.dumps(spec.deciding()[name], sort_keys=True) for spec in (first, second))
    assert f"{name} was " in problem
    if max(len(before), len(now)) <= 80:
        assert f"{name} was {before}, now {now}" in problem


def test_of_long_values_the_difference_is_shown(
    reopened: Callable[[JobSpec, JobSpec], Ledger],
) -> None:
    """A template of which the last words changed."""
    specs = [
        JobSpec.model_validate(merged(BASE, {"prompt": {"template": f"{'a word ' * 40}{end}"}}))
        for end in ("Answer with one word.", "Answer with one number.")
    ]
    problem = refusal(lambda: reopened(specs[0], specs[1])).problem
    assert 'Answer with one word.", now ...' in problem
    assert problem.endswith('Answer with one number."')
    assert len(problem.partition("prompt.template was ")[2]) < 200


@pytest.mark.parametrize("id", [id for id in LEAVES if id not in DECIDING])
def test_a_field_that_changes_how_a_job_runs_is_let_in(
    reopened: Callable[[JobSpec, JobSpec], Ledger], plan: Plan, id: str
) -> None:
    ledger = reopened(*pair_of(LEAVES[id]))
    assert ledger.plan == plan
    assert [chunk.id for chunk in ledger.undone()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"engine": {"kind": "static"}}, {"engine": {"kind": "echo"}}, "engine.kind"),
        ({}, {"task": {"kind": "embed"}}, "task.kind"),
        ({}, {"task": {"response": {"regex": "a"}}}, "task.response.regex"),
        ({}, {"model": {"bits": 16}}, "model.quantization.kind"),
        ({}, {"model": {"bits": 32}}, "model.dtype"),
        ({}, {"prompt": {"template": None, "column": "a"}}, "prompt.column"),
        ({}, {"answers_cache": {"uri": "cache"}}, "answers_cache"),
        (
            {"task": {"kind": "classify", "labels": ["a", "b"]}},
            {"task": {"kind": "classify", "labels": ["a", "b"], "multi_label": {}}},
            "task.multi_label.question",
        ),
    ],
)
def test_another_kind_of_section_is_refused_by_name(
    reopened: Callable[[JobSpec, JobSpec], Ledger],
    first: dict[str, Any],
    second: dict[str, Any],
    said: str,
) -> None:
    one, other = (JobSpec.model_validate(merged(BASE, changes)) for changes in (first, second))
    assert f"{said} was " in refusal(lambda: reopened(one, other)).problem
