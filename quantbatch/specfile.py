"""A job's YAML file -> JobSpec, or one error for each mistake in it, with its line and the nearest
name.

The file is untrusted input, and so are overrides: `plainyaml` reads them.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from quantbatch.errors import JobError, SpecError
from quantbatch.plainyaml import MAX_BYTES, TOO_DEEP, TOO_MANY, children, parse
from quantbatch.spec import JobSpec, Section
from quantbatch.storage import redact

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pydantic_core import ErrorDetails

MAX_SAID = 200
"""Characters of a name or a value that a message repeats."""
MOST_OF_A_MESSAGE = 1000
"""Characters of what a validator says, which may repeat a value."""

Location = tuple[str | int, ...]


def load_spec(path: Path | str, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a job spec.

    Args:
        path: The YAML file.
        overrides: `a.b=value` strings, applied before validation; values are YAML.

    Raises:
        SpecError: The file can't be read, or its content is not a job spec: every problem at once.
    """
    path = Path(path)
    text = _read(path)
    try:
        node, document = parse(text, str(path))
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(error, path) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"{path}:{line}: not YAML: the character #x{error.character:04x}"
        raise SpecError(JobError(problem, "write it as an escape in double quotes")) from None
    if not isinstance(node, yaml.MappingNode):
        hint = "quantbatch init writes a commented example"
        raise SpecError(JobError(f"{path}: a spec is a mapping of fields to values", hint))
    origins = {_set(document, override): _shown(override) for override in overrides}
    odd = [
        JobError(
            f"{_origin(place, node, origins) or f'{path}:{_line(node, place)}'}:"
            f" {'.'.join(map(str, place))}: {what}"
        )
        for place, what in _odd_texts(document, ())
    ]
    if odd:
        raise SpecError(*odd)
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        raise SpecError(*_problems(error, path, node, document, origins)) from None


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        near = _nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        hint = f"did you mean {path.with_name(near)}?" if near else "quantbatch init writes one"
        raise SpecError(JobError(f"{path}: {error.strerror}", hint)) from None
    if len(data) > MAX_BYTES:
        raise SpecError(JobError(f"{path}: {len(data):,} bytes; a spec has at most {MAX_BYTES:,}"))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise SpecError(JobError(f"{path}: not UTF-8 at byte {error.start}")) from None


def _not_yaml(error: yaml.MarkedYAMLError, path: Path) -> SpecError:
    mark = error.problem_mark or error.context_mark
    problem = f"{path}:{mark.line + 1 if mark else 1}: not YAML: {error.problem}"
    hints = {
        "unhashable": 'a template needs quotes: "{{ text }}", or begins on a new line after a |',
        "'\\t'": "indent with spaces, not with tabs",
        "tag": "a spec holds texts, numbers, lists and mappings; leave out the !",
        "mapping values": "a text with a colon and a space needs quotes",
    }
    hint = next((hints[word] for word in hints if word in str(error.problem)), "")
    return SpecError(JobError(problem, hint))


def _set(document: dict[str, Any], override: str) -> Location:
    """Apply one `a.b=value` to a document in place and return the place that it names."""
    dotted, equals, text = override.partition("=")
    parts = dotted.split(".")
    if not equals or not all(parts):
        raise SpecError(JobError(f"{_shown(override)}: not of the form a.b=value"))
    value = _set_value(override, text)
    inner: Any = document
    for depth, part in enumerate(parts[:-1]):
        inner = inner.setdefault(part, {}) if isinstance(inner.get(part), dict | None) else None
        if not isinstance(inner, dict):
            place = ".".join(parts[: depth + 1])
            raise SpecError(JobError(f"{_shown(override)}: {place} is a value and has no fields"))
    inner[parts[-1]] = value
    return tuple(parts)


def _shown(override: str) -> str:
    return f"--set {_cut(redact(override))}"


def _cut(text: str, most: int = MAX_SAID) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _set_value(override: str, text: str) -> Any:  # noqa: ANN401 - parsed YAML
    said = _shown(override)
    if len(text) > MAX_BYTES:
        raise SpecError(JobError(f"{said}: {len(text):,} characters; at most {MAX_BYTES:,}"))
    try:
        return parse(text, said)[1]
    except (ComposerError, ConstructorError) as error:
        problem = str(error.problem)
        if "tag" in problem or problem in (TOO_MANY, TOO_DEEP):
            raise SpecError(JobError(f"{said}: {problem}")) from None
        return text
    except yaml.YAMLError:
        return text  # a template with a colon, and such


def _odd_texts(value: Any, place: Location) -> Iterator[tuple[Location, str]]:  # noqa: ANN401 - parsed YAML
    """Yield the texts that no path and no tokenizer takes; YAML can write them as escapes."""
    match value:
        case str() if re.search(r"[\0\ud800-\udfff]", value):
            yield (
                place,
                f"{json.dumps(redact(value))[:80]}: holds a NUL or half of a surrogate pair",
            )
        case dict():
            for key, inner in value.items():
                yield from _odd_texts(inner, (*place, key))
        case list():
            for index, inner in enumerate(value):
                yield from _odd_texts(inner, (*place, index))
        case _:
            pass


def _problems(
    error: ValidationError,
    path: Path,
    node: yaml.Node,
    document: dict[str, Any],
    origins: dict[Location, str],
) -> list[JobError]:
    by_place: dict[Location, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_place.setdefault(_place(detail, document), []).append(detail)
    found = []
    for place, details in sorted(by_place.items(), key=lambda item: _line(node, item[0])):
        where = _origin(place, node, origins) or f"{path}:{_line(node, place)}"
        if telling := _telling(place, details, by_place):
            found.append(_problem(place, telling, where, document))
    return found


def _telling(
    place: Location, details: list[ErrorDetails], places: Iterable[Location]
) -> list[ErrorDetails]:
    """Leave out what only says that a value is not of the kind of some other member of a union."""
    of_another_kind = [d for d in details if d["type"].endswith("_type")]
    vague = [*of_another_kind, *(d for d in details if d["type"] == "literal_error")]
    if any(place == other[: len(place)] != other for other in places):
        return [detail for detail in details if detail not in vague]
    if len(vague) < len(details):
        return [detail for detail in details if detail not in of_another_kind]
    return details


def _place(detail: ErrorDetails, document: Any) -> Location:  # noqa: ANN401 - parsed YAML
    """Drop from pydantic's location what it adds for the members of a union."""
    place: list[str | int] = []
    inner = document
    last = len(detail["loc"]) - 1
    for depth, part in enumerate(detail["loc"]):
        if isinstance(inner, dict) and part in inner:
            inner = inner[part]
        elif isinstance(inner, list) and isinstance(part, int):
            inner = inner[int(part)]
        elif depth < last or detail["type"] != "missing":
            continue
        place.append(part)
    return tuple(place)


def _origin(place: Location, node: yaml.Node, origins: dict[Location, str]) -> str | None:
    """Return the override that a place comes from; one may have made the sections around it."""
    texts = tuple(str(part) for part in place)
    for at, said in origins.items():
        made = bool(texts) and at[: len(texts)] == texts and not _has(node, place)
        if made or at == texts[: len(at)]:
            return said
    return None


def _has(node: yaml.Node, place: Location) -> bool:
    for part in place:
        inner = dict(children(node)).get(part)
        if inner is None:
            return False
        node = inner
    return True


def _line(node: yaml.Node, place: Location) -> int:
    """Return the line of the deepest part of a place that the file has, from 1."""
    line = node.start_mark.line
    for part in place:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line
    return line + 1


def _problem(
    place: Location, details: list[ErrorDetails], where: str, document: dict[str, Any]
) -> JobError:
    name = _cut(".".join(str(part) for part in place))
    first = details[0]
    match first["type"]:
        case "extra_forbidden":
            return JobError(f"{where}: there is no field {name}", _suggestion(place, document))
        case "missing":
            return JobError(f"{where}: {name} is missing", _description(place, document))
        case "value_error":
            said = _cut(str(first["msg"]).removeprefix("Value error, "), MOST_OF_A_MESSAGE)
            return JobError(f"{where}: {name}: {said}" if name else f"{where}: {said}")
        case "union_tag_not_found":
            return JobError(f"{where}: {name}.kind is missing", f"it is {_either(_kinds(place))}")
        case "union_tag_invalid":
            kind, kinds = str(first.get("ctx", {}).get("tag")), _kinds(place)
            near = _nearest(kind, kinds)
            value = _cut(redact(json.dumps(kind)))
            problem = f"{where}: {name}.kind: {value}: should be {_either(kinds)}"
            return JobError(problem, f"did you mean {near}?" if near else "")
        case _:
            pass
    said = " or ".join(dict.fromkeys(_said(str(detail["msg"])) for detail in details))
    value = redact(json.dumps(first["input"], default=str))[:80]
    problem = f"{where}: {name}: {value}: {said.replace(' or should be ', ' or ')}"
    return JobError(problem, _quotes(first) or _description(place, document))


def _said(message: str) -> str:
    """Put pydantic's words for Python types in those of YAML."""
    message = re.sub(r"^(Input|String|List) should", "should", message)
    message = message.removesuffix(" after validation, not 0")
    return re.sub(r"a valid dictionary or (instance of \w+|object.*)", "a mapping", message)


def _quotes(detail: ErrorDetails) -> str:
    """Say where quotes are wanting or too many: YAML takes `1e-3` for text and `no` for false."""
    value = detail["input"]
    if detail["type"] == "string_type" and isinstance(value, bool | int | float):
        return f"YAML reads this as {json.dumps(value)}: put quotes around it"
    if detail["type"] in ("float_type", "int_type") and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return f"YAML reads this as text: write {float(value):.16g} without quotes"
    return ""


def _suggestion(place: Location, document: dict[str, Any]) -> str:
    """Say which field was meant: the nearest name here, or the section that has this one."""
    *outer, name = [str(part) for part in place]
    here = dict.fromkeys(f for s in _sections(outer, document) for f in s.model_fields)
    near = _nearest(name, [*here])
    if near:
        return f"did you mean {'.'.join([*outer, near])}?"
    fields = dict.fromkeys(_every_field(JobSpec, ""))
    elsewhere = [dotted for dotted in fields if dotted.split(".")[-1] == name]
    if ".".join([*outer, name]) in elsewhere:
        return f"another kind of {'.'.join(outer)} has it; this one has {', '.join(here)}"
    if elsewhere:
        return f"did you mean {_either(elsewhere)}?"
    return f"the fields of {'.'.join(outer) or 'a job'} are {', '.join(here)}" if here else ""


def _description(place: Location, document: dict[str, Any]) -> str:
    """Return what the spec says of a field, or of the section that it holds."""
    *outer, name = [str(part) for part in place] or [""]
    for section in _sections(outer, document):
        if name in section.model_fields:
            info = section.model_fields[name]
            inner = next(_sections_in(info.annotation), None)
            said = info.description or (inner.__doc__ if inner else "")
            return " ".join((said or "").split())
    return ""


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _kinds(place: Location) -> list[str]:
    """Return the kinds of section that a place can hold."""
    sections = _sections([str(part) for part in place], {})
    return [kind for section in sections for kind in _kinds_of(section)]


def _kinds_of(section: type[Section]) -> tuple[str, ...]:
    kind = section.model_fields.get("kind")
    return typing.get_args(kind.annotation) if kind else ()


def _sections(place: Sequence[str], document: Any) -> list[type[Section]]:  # noqa: ANN401 - parsed YAML
    """Return the section or, for a union, the sections that a dotted place can hold.

    Args:
        place: Names of fields.
        document: Tells which section of a union is meant, where it names a kind.
    """
    sections: list[type[Section]] = [JobSpec]
    inner = document
    for part in place:
        inner = inner.get(part) if isinstance(inner, dict) else None
        if not part.isdigit():
            fields = [s.model_fields[part] for s in sections if part in s.model_fields]
            sections = [found for info in fields for found in _sections_in(info.annotation)]
        kind = inner.get("kind") if isinstance(inner, dict) else None
        sections = [s for s in sections if kind in _kinds_of(s)] or sections
    return sections


def _sections_in(annotation: Any) -> Iterator[type[Section]]:  # noqa: ANN401 - any type expression
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, Section):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)


def _every_field(section: type[Section], prefix: str) -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield prefix + name
        for inner in _sections_in(info.annotation):
            yield from _every_field(inner, f"{prefix}{name}.")


def _nearest(name: str, names: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.6)), None)
