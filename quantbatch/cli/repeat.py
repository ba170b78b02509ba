"""Commands about rows that did not end well: what is wrong with them, and trying them again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quantbatch import console
from quantbatch.cli.common import AsJson, Overrides, SpecPath, leave, load, outcome, output_of
from quantbatch.draining import signals_wait, stoppable
from quantbatch.errors import JobError, SpecError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quantbatch.records import Status


def retry(
    spec: SpecPath,
    status: Annotated[
        list[str] | None,
        typer.Option(help="Rows to answer again: error, invalid, truncated; several with commas."),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Answer rows of a finished job again: those with an error, or with other statuses.

    --set gives other limits, such as sampling.max_new_tokens=512; fields of sampling and engine
    may change. Interrupted, the same command continues.
    """
    with outcome(as_json), stoppable():
        statuses = _statuses(status, "error")
        job = load(spec, overrides)
        with signals_wait():
            from quantbatch import retry as retrying

        with console.live_progress() as progress:
            report = retrying.retry(job, statuses, progress=progress)
        if as_json:
            console.say_document(report.to_json())
        else:
            console.say(f"{job.name}: {console.OUTCOMES[report.outcome.value]}", "bold")
            console.say(console.report_table(report))
        raise typer.Exit(report.exit_code)


def errors(
    where: Annotated[str, typer.Argument(metavar="SPEC_OR_OUTPUT", help="A spec or an output.")],
    status: Annotated[
        list[str] | None,
        typer.Option(help="Rows to list: error, invalid, truncated; several with commas."),
    ] = None,
    count: Annotated[int, typer.Option("-n", min=0, max=1000, help="Examples of each kind.")] = 3,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """List the rows without a good answer by kind, with examples; needs neither model nor input."""
    with outcome(as_json):
        statuses = _statuses(status, "error,invalid,truncated")
        from quantbatch.faults import describe_faults

        document = describe_faults(*output_of(where, overrides), statuses, count)
        if not as_json:
            console.say_faults(document)
        leave(document, as_json)


def _statuses(given: Sequence[str] | None, usual: str) -> list[Status]:
    from quantbatch.records import Status

    names = [name.strip() for text in given or [usual] for name in text.split(",")]
    known = [status.value for status in Status if status is not Status.OK]
    for name in names:
        if name not in known:
            problem = f"--status {name}: a row's status is one of {', '.join(known)}"
            raise SpecError(JobError(problem))
    return [Status(name) for name in dict.fromkeys(names)]


COMMANDS: dict[str, Callable[..., None]] = {"retry": retry, "errors": errors}
"""By name."""
