"""What a user does after trouble, the same commands again, and what has to be true then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantbatch.errors import JobError
from quantbatch.records import Status
from quantbatch.report import Outcome
from quantbatch.retries import Retries
from quantbatch.verify import verify
from tests.faults.choices import Calm
from tests.faults.memory import MemoryStore
from tests.faults.world import OUT, SPEC, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantbatch.spec import JobSpec
    from tests.faults.scheduler import Process


def calmly(world: World, work: Callable[[], object]) -> Process:
    """Run one process that nothing goes wrong for."""
    (process,) = world.play(Calm(), ("later", work))
    return process


def finish(world: World, spec: JobSpec = SPEC) -> None:
    """Run the job to its end, and the retry that is open, without further trouble."""
    world.short.clear()
    _must(calmly(world, lambda: world.run(spec, extend=True)))
    retries = Retries.load(MemoryStore(OUT, world.output))
    if retries.open is not None:
        asked = retries.open.asked
        statuses = [Status(status) for status in asked["statuses"]]
        spec = SPEC if asked["changes"] else spec
        _must(calmly(world, lambda: world.retry(*statuses, spec=spec)))


def end_state_is_right(
    world: World, spec: JobSpec = SPEC, *, rerun: bool = True, proof: bool = False
) -> None:
    """Check the output of a job that is done.

    Args:
        world: Where.
        spec: Of the job.
        rerun: Whether to see that running it once more changes nothing.
        proof: Whether to ask `verify` too.
    """
    world.checker.finished()
    if rerun:
        before, reports = dict(world.output.found), len(world.reports)
        _must(calmly(world, lambda: world.run(spec, extend=True)))
        assert world.output.found == before, "a rerun of a finished job wrote something"
        outcome = world.reports[reports].outcome
        expected = {Outcome.NOTHING_TO_DO, Outcome.INPUT_UNREADABLE}
        assert outcome in expected, f"a rerun of a finished job: {outcome}"
    if proof and not world.checker.changed_input:
        verdict = verify(spec)
        assert verdict.outcome == "proven", verdict


def unexpected(process: Process) -> BaseException | None:
    """Return what ended a process though nothing ever may: not a JobError, not a kill."""
    return None if isinstance(process.error, JobError | None) else process.error


def _must(process: Process) -> None:
    if process.error is not None:
        raise AssertionError(f"afterwards: {process.ended}") from process.error
