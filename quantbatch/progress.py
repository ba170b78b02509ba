"""Telling a person, or a log, how a run goes.

`Live` draws on a terminal, `JsonLines` writes for machines; both write to stderr, because stdout
belongs to the result. They are context managers, so that the terminal is in order again however a
run ends.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live as LiveDisplay
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from quantbatch.console import plain
from quantbatch.documents import describe_choice, describe_model
from quantbatch.records import Counts
from quantbatch.storage import redact

if TYPE_CHECKING:
    from types import TracebackType

    from quantbatch.preflight import Job
    from quantbatch.records import Receipt
    from quantbatch.report import RunFigures

JSON_LINE_EVERY_S = 10.0
"""A log of a night's run then has some 3,000 lines."""
UPDATES_PER_S = 4
"""More flicker on a slow terminal and tell a person nothing."""
BAR_WIDTH = 32


class Progress(Protocol):
    """Told what happens in a run, in this order."""

    def planned(self, job: Job, again: int | None = None) -> None:
        """The job may start; or `again` rows of a job that is done, see `retry`."""
        ...

    def started(self, device: str) -> None:
        """Ray is there; replicas are loading the model."""
        ...

    def committed(self, receipt: Receipt, figures: RunFigures) -> None:
        """A chunk is committed."""
        ...

    def stopping(self, name: str) -> None:
        """A signal came: chunks under way may finish; told from another thread."""
        ...


class Silent:
    """Says nothing."""

    def planned(self, job: Job, again: int | None = None) -> None:
        """See `Progress`."""

    def started(self, device: str) -> None:
        """See `Progress`."""

    def committed(self, receipt: Receipt, figures: RunFigures) -> None:
        """See `Progress`."""

    def stopping(self, name: str) -> None:
        """See `Progress`."""


@dataclass(frozen=True)
class Standing:
    """How far a job is, and how fast it goes. Rates are those since this run's first commit: the
    loading of the model would hide them for an hour.
    """

    rows: int
    rows_done: int
    errors: int
    """Rows that ended as `error` or `invalid`."""
    shards: int
    shards_done: int
    rows_per_s: float
    tokens_per_s: float
    eta_s: float | None
    """Time until all rows are answered; None until two chunks are committed."""
    replicas: int
    """Replicas that have answered a chunk."""
    replicas_wanted: str
    """`4`, or `1..8` for a pool that grows."""


class _Course:
    """What a run has told so far."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.doing = "planning"
        self.stopping = ""
        """What is said of a run that was told to stop."""
        self.figures: RunFigures | None = None
        self._rows = 0
        self._rows_before = 0
        self._errors_before = 0
        self._at_first = (0.0, 0, 0)
        """Time, rows and tokens of this run's first commit."""

    def planned(self, job: Job, again: int | None = None) -> None:
        counts = job.ledger.counts if again is None else Counts()
        self._rows = job.plan.rows if again is None else again
        self._rows_before = counts.rows
        self._errors_before = counts.error + counts.invalid
        self.doing = "starting Ray"
        self.job = job

    def started(self, device: str) -> None:
        self.doing = f"loading the model ({device})"

    def committed(self, figures: RunFigures) -> bool:
        """Note a commit; tell whether it is the first."""
        first = self.figures is None
        if first:
            counts = figures.counts
            self._at_first = (figures.elapsed_s, counts.rows, counts.completion_tokens)
        self.figures = figures
        return first

    def standing(self) -> Standing | None:
        """Return how far the job is; None before it is planned."""
        if self.job is None:
            return None
        plan, spec = self.job.plan, self.job.spec
        counts = self.figures.counts if self.figures else None
        done = self._rows_before + (counts.rows if counts else 0)
        rows_per_s, tokens_per_s = self._rates()
        replicas = spec.cluster.replicas
        return Standing(
            rows=self._rows,
            rows_done=done,
            errors=self._errors_before + (counts.error + counts.invalid if counts else 0),
            shards=len(plan.shards),
            shards_done=len(self.job.ledger.published),
            rows_per_s=round(rows_per_s, 3),
            tokens_per_s=round(tokens_per_s, 3),
            eta_s=round((self._rows - done) / rows_per_s, 1) if rows_per_s else None,
            replicas=len(self.figures.replicas) if self.figures else 0,
            replicas_wanted=str(replicas)
            if isinstance(replicas, int)
            else f"{replicas.min}..{replicas.max}",
        )

    def _rates(self) -> tuple[float, float]:
        if self.figures is None or self.figures.last_commit_s is None:
            return 0.0, 0.0
        began, rows, tokens = self._at_first
        took, counts = self.figures.last_commit_s - began, self.figures.counts
        if took <= 0:
            return 0.0, 0.0
        return (counts.rows - rows) / took, (counts.completion_tokens - tokens) / took


class Live:
    """A bar and a line on a terminal, drawn over in place and gone at the end.

    Args:
        console: The terminal.
    """

    def __init__(self, console: Console) -> None:
        self._course = _Course()
        self._display = LiveDisplay(
            console=console,
            get_renderable=self._drawn,
            refresh_per_second=UPDATES_PER_S,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._display.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._display.stop()

    def planned(self, job: Job, again: int | None = None) -> None:
        """See `Progress`."""
        self._course.planned(job, again)
        if said := describe_choice(job):
            self._display.console.print(Text(plain(said)))
        # Now, because starting Ray keeps all other threads waiting for seconds.
        self._display.refresh()

    def started(self, device: str) -> None:
        """See `Progress`."""
        self._course.started(device)

    def committed(self, receipt: Receipt, figures: RunFigures) -> None:
        """See `Progress`."""
        del receipt
        self._course.committed(figures)

    def stopping(self, name: str) -> None:
        """See `Progress`."""
        self._course.stopping = f"{name}: finishing what is under way; again ends at once"
        self._display.refresh()

    def _drawn(self) -> RenderableType:
        course = self._course
        now = course.standing()
        if now is None or course.figures is None:
            bar = ProgressBar(total=None, width=BAR_WIDTH)  # a pulse
            return _side_by_side(bar, Text(course.stopping or course.doing))
        bar = ProgressBar(total=now.rows, completed=now.rows_done, width=BAR_WIDTH)
        share = now.rows_done / now.rows if now.rows else 1.0
        left = f"{_clock(now.eta_s)} left" if now.eta_s else ""
        head = f"{now.rows_done:,} of {now.rows:,} rows  {share:.0%}  {left}"
        return Group(
            _side_by_side(bar, Text(head)), Text(course.stopping or _details(now), style="dim")
        )


def _side_by_side(bar: ProgressBar, text: Text) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(bar, text)
    return grid


def _details(now: Standing) -> str:
    return " · ".join(
        (
            f"{now.shards_done:,} of {now.shards:,} files",
            f"{now.errors:,} error{'s' * (now.errors != 1)}",
            f"{now.rows_per_s:,.1f} rows/s",
            f"{now.tokens_per_s:,.0f} tokens/s",
            f"{now.replicas} of {now.replicas_wanted} replicas",
        )
    )


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


class JsonLines:
    """A JSON object on a line for each step of a run, and while it goes on one every 10 s.

    Args:
        file: Where to write; None is stderr.
        every_s: Least time between two lines that only tell how far the run is.
    """

    def __init__(self, file: IO[str] | None = None, every_s: float = JSON_LINE_EVERY_S) -> None:
        self._file = file or sys.stderr
        self._every_s = every_s
        self._course = _Course()
        self._began = self._written = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Before it was planned there is nothing to tell that the outcome does not.
        if self._course.job is not None:
            self._write("ended", **({"exception": kind.__name__} if kind else {}))

    def planned(self, job: Job, again: int | None = None) -> None:
        """See `Progress`."""
        self._course.planned(job, again)
        output = redact(job.ledger.store.uri)
        model = describe_model(job.spec.model)
        self._write("planned", name=job.spec.name, output=output, model=model)

    def started(self, device: str) -> None:
        """See `Progress`."""
        self._course.started(device)
        self._write("started", device=device)

    def committed(self, receipt: Receipt, figures: RunFigures) -> None:
        """See `Progress`."""
        del receipt
        if self._course.committed(figures):
            self._write("first_commit")
        elif time.monotonic() - self._written >= self._every_s:
            self._write("progress")

    def stopping(self, name: str) -> None:
        """See `Progress`."""
        self._write("stopping", signal=name)

    def _write(self, event: str, **facts: Any) -> None:  # noqa: ANN401 - any JSON value
        self._written = time.monotonic()
        now = self._course.standing()
        line = {
            "event": event,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "elapsed_s": round(self._written - self._began, 3),
            **facts,
            **(asdict(now) if now else {}),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
