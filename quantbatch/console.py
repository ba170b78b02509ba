r"""What a person sees: tables and errors on a terminal, or as plain lines in a log.

Everything that is printed goes through `plain`. Rows, model answers and file names are written by
strangers, and a terminal obeys what it is sent: `\\x1b]0;...` renames its window, `\\x1b[2J` wipes
out what stood above, a right-to-left mark makes a line read as another one.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from quantbatch.errors import JobError, SpecError
from quantbatch.storage import redact

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from quantbatch.progress import JsonLines, Live
    from quantbatch.report import RunReport

_OBEYED = re.compile(
    # C0 and C1 without tab and line feed; marks that reorder text; half surrogate pairs, which
    # can't be encoded.
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_LOG_COLUMNS = 1000
"""Width where there is no terminal: lines of a log are not wrapped."""
OUTCOMES = {
    "done": "done",
    "nothing_to_do": "nothing to do, all is answered",
    "too_many_errors": "done, with more errors than limits.max_error_rate allows",
    "input_unreadable": "all is answered but the input files that can't be read",
    "planned": "planned; nothing was written",
    "finished": "finished",
    "unfinished": "not finished; quantbatch run continues it",
    "proven": "proven: every row of the input is answered exactly once",
    "problems": "not proven",
    "stored": "the quantized weights are in the cache now",
    "already_there": "the quantized weights were in the cache already, and are whole",
}
"""How outcomes are said to a person."""
_SAMPLE_CHARS = 4000
"""Characters of a prompt that `sample` shows."""
SHOWN = 10
"""Names that a list shows before it says how many more there are."""


def plain(text: str) -> str:
    r"""Return a text with what a terminal would obey written as escapes, such as `\\x1b`."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str, chars: int = 200) -> str:
    """Return the beginning of a text on one line."""
    shown = plain(text).replace("\n", "\\n").replace("\t", "\\t")
    return shown if len(shown) <= chars else f"{shown[: chars - 3]}..."


def console(*, stderr: bool = False) -> Console:
    """Return stdout or stderr; text is printed as it is, markup has no meaning."""
    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal:
        made.width = _LOG_COLUMNS
    return made


def say(what: str | Table, style: str = "") -> None:
    """Print a result."""
    _print(console(), what, style)


def note(what: str) -> None:
    """Print something that is not part of the result."""
    _print(console(stderr=True), what, "dim")


def _print(to: Console, what: str | Table, style: str) -> None:
    if isinstance(what, str):
        to.print(Text(plain(what), style), soft_wrap=True)
    elif to.is_terminal:
        to.print(what)
    else:
        with to.capture() as captured:
            to.print(what)
        # A table is as wide as its widest line; a log needs no spaces after the others.
        to.out("\n".join(line.rstrip() for line in captured.get().splitlines()))


class Warnings(logging.Handler):
    """Prints what the log warns of as everything else is printed: names in it are strangers'."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        note(redact(self.format(record)))


def say_document(document: Mapping[str, Any]) -> None:
    """Print a JSON document on one line of its own: the last thing on stdout."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def complain(error: JobError) -> None:
    """Print each problem of an error with its hint."""
    to = console(stderr=True)
    for problem in problems_of(error):
        to.print(Text.assemble(("error", "bold red"), ": ", plain(problem.problem)), soft_wrap=True)
        if problem.hint:
            hint = Text.assemble(("  hint", "cyan"), ": ", plain(problem.hint))
            to.print(hint, soft_wrap=True)


def problems_of(error: JobError) -> Sequence[JobError]:
    """Return the problems of which an error consists."""
    return error.problems if isinstance(error, SpecError) else (error,)


def error_document(error: JobError) -> dict[str, Any]:
    """Return an error as the outcome of a command."""
    outcome = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
    problems = problems_of(error)
    return {
        "outcome": outcome,
        "exit_code": error.exit_code,
        "error": "; ".join(problem.problem for problem in problems),
        "hint": "; ".join(problem.hint for problem in problems if problem.hint),
        "problems": [{"error": p.problem, "hint": p.hint} for p in problems],
    }


def live_progress() -> Live | JsonLines:
    """Return what tells how a run goes: drawn if stderr is a terminal, else JSON lines."""
    from quantbatch.progress import JsonLines, Live

    to = console(stderr=True)
    return Live(to) if to.is_terminal and not to.is_dumb_terminal else JsonLines()


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and what there is to say of them."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(plain(name)), Text(plain(value)))
    return table


def report_table(report: RunReport) -> Table:
    """Return what a run did and how the job stands."""
    run, counts = report.run, report.counts
    rows = [("rows", f"{counts.rows:,}")]
    for name in ("ok", "truncated", "invalid", "error"):
        count = getattr(counts, name)
        share = f"{count / counts.rows:9.2%}" if counts.rows else ""
        rows.append((f"  {name}", f"{count:>{len(f'{counts.rows:,}')},}{share}"))
    generated = f", {counts.completion_tokens:,} generated" if counts.completion_tokens else ""
    rows.append(("tokens", f"{counts.prompt_tokens:,} read{generated}"))
    if counts.cached:
        rows.append(("cached", f"{several(counts.cached, 'row')}, whose tokens are not counted"))
    if run.counts.rows:
        if run.counts != counts:
            rows.append(("this run", f"{run.counts.rows:,} rows in {run.total_s or 0:,.1f} s"))
        rows += _figures(report)
    rows += unreadable_lines(report.unreadable)
    return facts([*rows, ("output", f"{report.output} ({several(report.parts, 'file')})")])


def unreadable_lines(files: Mapping[str, str]) -> list[tuple[str, str]]:
    """Name the first few files that can't be read; most reasons begin with the file's name."""
    shown = [why if why.startswith(name) else f"{name}: {why}" for name, why in files.items()]
    more = [f"and {len(shown) - SHOWN:,} more"] if len(shown) > SHOWN else []
    return [("unreadable", line) for line in shown[:SHOWN] + more]


def _figures(report: RunReport) -> list[tuple[str, str]]:
    run = report.run
    speed = f"{run.rows_per_s:,.1f} rows/s"
    if run.counts.completion_tokens:
        speed += f", {run.tokens_per_s:,.1f} tokens/s"
    rows = [("speed", speed)]
    if run.planned_bytes:
        memory = f"{size(run.planned_bytes)} planned, {size(run.peak_bytes)} measured"
        rows.append(("peak memory", f"{memory} ({several(len(run.replicas), 'replica')})"))
    if run.first_commit_s is not None:
        rows.append(("first rows", f"after {run.first_commit_s:.1f} s: {_start_of(report)}"))
    return rows


def _start_of(report: RunReport) -> str:
    """Say where the time to the first committed row went."""
    run = report.run
    planned, cluster, first = run.plan_s or 0.0, run.cluster_s or 0.0, run.first_commit_s or 0.0
    load = max((stats.load_s for stats in run.replicas.values()), default=0.0)
    parts = {
        "plan": planned,
        "cluster": cluster - planned,
        "model": load,
        "first chunk": max(first - cluster - load, 0.0),
    }
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())


def several(count: int, noun: str) -> str:
    """Return a number of things."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def size(count: int) -> str:
    """Return a number of bytes as a person reads it."""
    for unit, bytes_each in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= bytes_each:
            return f"{count / bytes_each:,.2f} {unit}"
    return f"{count} bytes"


def formats_table(document: Mapping[str, Any]) -> Table:
    """Return what `documents.describe_formats` describes."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("format", "bits", "here", "planned as", "to load it as it is", "because"):
        table.add_column(title)
    for row in document["formats"]:
        installs = row["remedy"].startswith("pip install")
        why = f"{row['missing']}: {row['remedy']}" if installs else row["missing"]
        cells = (row["format"], row["bits"], row["how"], row["planned"], row["needs"], why)
        table.add_row(*(Text(plain(cell)) for cell in cells))
    return table


def status_table(document: Mapping[str, Any]) -> Table:
    """Return what `documents.describe_status` describes."""
    counts, total = document["counts"], document["rows"]
    statuses = [f"{name} {counts[name]:,}" for name in ("ok", "truncated", "invalid", "error")]
    rows = [
        ("job", document["name"]),
        ("state", OUTCOMES[document["outcome"]]),
        ("rows", f"{document['rows_done']:,} of {total:,}{_share(document['rows_done'], total)}"),
        ("by status", ", ".join(statuses)),
        ("chunks", f"{document['chunks_done']:,} of {document['chunks']:,} committed"),
        ("files", f"{document['files_done']:,} of {document['files']:,} published"),
        *unreadable_lines(document["unreadable"]),
        ("model", document["model"]),
        ("output", document["output"]),
    ]
    if run := document["last_run"]:
        speed = f"{run['run']['rows_per_s']:,.1f} rows/s"
        rows.append(("last run", f"{run['outcome']}, {run['run']['rows']:,} rows, {speed}"))
    return facts(rows)


def _share(done: int, total: int) -> str:
    return f" ({done / total:.1%})" if total else ""


def next_steps(report: RunReport, spec: str) -> Table:
    """Return what to do after a run, as commands and what they are for.

    Args:
        report: Of the run.
        spec: The arguments that name the job: the spec's path, and what was set.
    """
    steps = {
        f"quantbatch verify {spec}": "prove that each row is answered once",
        f"quantbatch status {spec}": "see how the job stands",
    }
    if report.unreadable:
        steps = {f"quantbatch run {spec} --extend": "once those files are mended"}
    elif report.exit_code:
        steps = {
            f"quantbatch sample {spec}": "see prompts and answers",
            f"quantbatch errors {spec}": "see which rows have no good answer, and why",
            f"quantbatch retry {spec}": "answer those with an error again",
        }
    return facts([("next", "")] + [(f"  {command}", why) for command, why in steps.items()])


def cached_table(document: Mapping[str, Any]) -> Table:
    """Return what `prequantize` found or stored."""
    of = document["of"]
    rows = [
        ("model", document["model"]),
        ("for", f"{of['device']}, other weights in {of['dtype']}"),
        ("size", f"{size(document['bytes'])} in {several(document['files'], 'file')}"),
        ("took", f"{document['elapsed_s']:,.1f} s"),
        ("place", document["uri"]),
    ]
    if document["damage"]:
        rows.append(("replaces", f"an entry that was damaged: {document['damage']}"))
    return facts(rows)


def say_sample(row: Mapping[str, Any]) -> None:
    """Print one row that `documents.describe_sample` describes."""
    if row["error"]:
        say(f"{row['row_id']}: error row", "bold red")
        say(_indented(f"{row['error']['type']}: {row['error']['message']}"))
    if row["prompt"] is not None:
        say(f"{row['row_id']}: {several(row['prompt_tokens'], 'token')}", "bold")
        say(_indented(row["prompt"]))
    if row["completion"] is not None:
        say(f"-> {several(row['completion_tokens'], 'token')}, {row['finish_reason']}", "green")
        say(_indented(row["completion"]))
    for name, value in (row["answer"] or {}).items():
        say(f"-> {name}: {_value(value)}", "green")
    say("")


def _value(value: Any) -> str:  # noqa: ANN401 - of any column
    """Write a value of a column on one line, numbers with four digits."""
    match value:
        case float():
            return f"{value:.4g}"
        case dict():
            likeliest = sorted(value.items(), key=lambda item: -item[1])[:SHOWN]
            return ", ".join(f"{name} {_value(each)}" for name, each in likeliest)
        case list():
            return "[" + ", ".join(map(_value, value)) + "]"
        case _:
            return str(value)


def _indented(text: str) -> str:
    shown = text if len(text) <= _SAMPLE_CHARS else f"{text[:_SAMPLE_CHARS]} ..."
    return "\n".join(f"  {line}" for line in shown.split("\n"))


def say_faults(document: Mapping[str, Any]) -> None:
    """Print the rows that `faults.describe_faults` describes."""
    rows, done = document["rows"], several(document["rows_done"], "row")
    say(f"{document['name']}: {rows:,} of {done}: {', '.join(document['statuses'])}", "bold")
    for kind in document["kinds"]:
        name = kind["status"] + (f" {kind['error_type']}" if kind["error_type"] else "")
        say(f"{name}: {several(kind['rows'], 'row')}", "bold red")
        for example in kind["examples"]:
            message = f": {example['message']}" if example["message"] else ""
            say(f"  {one_line(example['row_id'] + message)}")
            if example["prompt"] is not None:
                say(f"    {one_line(example['prompt'])}", "dim")
    for key, why in document["damaged"].items():
        say(f"can't be read: {one_line(f'{key}: {why}')}", "red")


def say_tidied(document: Mapping[str, Any]) -> None:
    """Print what `gc` removed."""
    what = "would be removed" if document["dry_run"] else "removed"
    for name, found in document["removed"].items():
        say(f"{what}: {name}: {several(found['objects'], 'object')}, {size(found['bytes'])}")
    if not document["removed"]:
        say("nothing to remove")
    if document["undecided"]:
        files = several(document["undecided"], "data file")
        say(f"kept: {files} of chunks that are not answered; quantbatch run decides about them")


def say_verdict(document: Mapping[str, Any]) -> None:
    """Print what `verify` found."""
    counts = document["counts"]
    statuses = [f"{name} {counts[name]:,}" for name in ("ok", "truncated", "invalid", "error")]
    style = {"proven": "bold green", "problems": "bold red"}.get(document["outcome"], "bold yellow")
    say(f"{document['name']}: {OUTCOMES[document['outcome']]}", style)
    rows = [("by status", ", ".join(statuses))]
    for side, way in (("output", "out"), ("input", "in")):
        files = several(document[f"files_{way}"], "file")
        rows.insert(0, (side, f"{several(document[f'rows_{way}'], 'row')} in {files}"))
    if document["rows_left"]:
        rows.append(("to do", f"{several(document['rows_left'], 'row')} not published yet"))
    if document["prompts_same"] is not None:
        rows.append(("prompts", f"{several(document['prompts_same'], 'row')} rendered the same"))
    for problem in document["problems"]:
        rows.append(("problem", f"{problem['kind']}: {problem['count']:,}"))
        rows += [("", one_line(example)) for example in problem["examples"]]
    say(facts(rows))
