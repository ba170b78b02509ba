"""Schedules that a seed decides: who works on an output, what they do, and what goes wrong."""

from __future__ import annotations

import contextlib
import functools
import json
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from quantbatch.errors import InputError, JobError
from quantbatch.records import Status
from tests.faults.choices import Calm, Seeded
from tests.faults.recovery import end_state_is_right, finish, unexpected
from tests.faults.world import FILES, LATER, SPEC, World, input_file, spec_of_another_job

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantbatch.spec import JobSpec
    from tests.faults.memory import Fault
    from tests.faults.scheduler import Process

Step = tuple[str, "Callable[[World], object]"]
"""A command and its name."""

RUN: Step = ("run", lambda world: world.run())
EXTEND: Step = ("extend", lambda world: world.run(extend=True))
RETRY: Step = ("retry", lambda world: world.retry())
AGAIN: Step = ("retry error, truncated", lambda world: world.retry(Status.ERROR, Status.TRUNCATED))

SCRIPTS: list[list[Step]] = [
    [RUN],
    [RUN],
    [EXTEND],
    [RUN, RETRY],
    [EXTEND, AGAIN],
    [RETRY],
    [RETRY, AGAIN],
    [AGAIN, RUN],
]
"""What a driver is told to do, one after another."""


@dataclass
class Played:
    """A schedule that was run to its end."""

    seed: int
    story: list[str]
    """Who did what."""
    faults: list[Fault] = field(default_factory=list)
    calls: int = 0
    trace: list[str] = field(default_factory=list)
    tidied: bool = False
    """Whether `gc` ran beside the drivers."""
    wrong: BaseException | None = None

    @property
    def crashes(self) -> int:
        """Processes that were killed on the way."""
        return sum(1 for fault in self.faults if "kill" in fault.value)


@functools.cache
def done_before() -> World:
    """Return a job that is finished; whoever begins there copies it."""
    world = World()
    world.play(Calm(), ("first", world.run))
    return world


class _Cast(NamedTuple):
    """Who works on an output."""

    world: World
    commands: list[tuple[str, Callable[[], object]]]
    story: list[str]


def _cast(seed: int) -> _Cast:
    dice = random.Random(f"cast {seed}")
    done = done_before()
    world = done.snapshot(seed) if dice.random() < 0.4 else World(seed=seed)
    world.outlive = dice.random() < 0.5
    commands: list[tuple[str, Callable[[], object]]] = []
    story = []
    for number in range(dice.choice([1, 1, 2, 2, 2, 2, 3, 5])):
        script = dice.choice(SCRIPTS)
        commands.append((f"driver{number}", functools.partial(_follow, world, script)))
        story.append(f"driver{number}: {', '.join(name for name, _ in script)}")
    for name, chance, work in (
        ("stranger", 0.15, lambda: world.run(spec_of_another_job())),
        ("gc", 0.35, functools.partial(_tidy, world)),
        ("uploader", 0.3, functools.partial(_upload, world, dice.randrange(150))),
        ("meddler", 0.1, functools.partial(_meddle, world, dice.randrange(80))),
    ):
        if dice.random() < chance:
            commands.append((name, work))
            story.append(name)
    if dice.random() < 0.1:
        world.short = {dice.randrange(4)}
        story.append(f"an engine hands on too few rows of chunk {world.short}")
    return _Cast(world, commands, story)


def _follow(world: World, script: list[Step]) -> None:
    """Do what a user or a supervisor does: one command after another, each up to twice."""
    failure: JobError | None = None
    for _, work in script:
        for _ in range(2):
            failure = None
            try:
                work(world)
                break
            except JobError as error:
                failure = error
    if failure is not None:
        raise failure


def _tidy(world: World) -> None:
    """Remove what nobody needs, several times."""
    for _ in range(4):
        _let_pass(world, 10)
        with contextlib.suppress(InputError):  # no job has begun yet
            world.tidy()
        world.tidied += 1


def _upload(world: World, after: int) -> None:
    """Add files to the input while others work."""
    _let_pass(world, after)
    for name, rows in LATER.items():
        world.input.set(name, input_file(name, rows))


def _meddle(world: World, after: int) -> None:
    """Replace a file of the input for a while, once the job is planned."""
    _let_pass(world, after)
    if not world.checker.planned:
        return
    name = next(iter(FILES))
    before = world.input.found[name]
    world.checker.changed_input = True
    world.input.set(name, input_file(name, FILES[name], "another text"))
    try:
        _let_pass(world, after)
    finally:
        world.input.set(name, before)


def _let_pass(world: World, turns: int) -> None:
    for _ in range(turns):
        assert world.scheduler is not None
        world.scheduler.switch()


def play(seed: int, without: frozenset[int] = frozenset()) -> Played:
    """Run the schedule of a seed, bring the job to its end, and check all of it.

    Args:
        seed: Decides everything.
        without: Numbers of faults to leave out.
    """
    world, commands, story = _cast(seed)
    played = Played(seed, story)

    def jump(seconds: float) -> None:
        world.output.clock_s += seconds

    choices = Seeded(seed, jump=jump, without=without)
    try:
        processes = world.play(choices, *commands)
        played.calls, played.trace = world.calls, world.trace
        played.tidied = world.tidied > 0
        _ended_well(world, processes)
        if not choices.faults and _all_returned(processes):
            # Whoever was late has put right what it had put: nobody has to come after.
            world.checker.finished()
        spec = _owner(world)
        finish(world, spec)
        end_state_is_right(world, spec, rerun=seed % 4 == 0, proof=seed % 20 == 0)
    except AssertionError as error:
        played.wrong = error
        played.trace = played.trace or world.trace
    played.faults = choices.faults
    return played


def _ended_well(world: World, processes: list[Process]) -> None:
    """See that no process ended in a way that no user may see."""
    for process in processes:
        error = unexpected(process)
        of_a_short_chunk = isinstance(error, AssertionError) and "rows" in str(error)
        assert error is None or of_a_short_chunk, f"{process.name} ended with {process.ended}"


def _all_returned(processes: list[Process]) -> bool:
    return all(p.ended == "returned" for p in processes if p.name.startswith("driver"))


def _owner(world: World) -> JobSpec:
    """Return the spec of the job that the output belongs to; ours, if it belongs to nobody."""
    if "_quantbatch/job.json" not in world.output.found:
        return SPEC
    job = json.loads(world.output.found["_quantbatch/job.json"])
    ours = job["identity"]["sampling.seed"] == SPEC.sampling.seed
    return SPEC if ours else spec_of_another_job()


def told(played: Played) -> str:
    """Tell of a schedule that went wrong, with no more faults than it takes."""
    without: frozenset[int] = frozenset()
    for number in range(len(played.faults)):
        if play(played.seed, without | {number}).wrong:
            without |= {number}
    least = play(played.seed, without)
    needed = [f.value for n, f in enumerate(least.faults) if n not in without]
    lines = [
        f"seed {played.seed}: {least.wrong or played.wrong}",
        *(f"    {line}" for line in played.story),
        f"    faults that it takes: {', '.join(needed) or 'none'}",
        "    the last calls of stores:",
        *(f"        {call}" for call in least.trace[-40:]),
        f"again: QUANTBATCH_TEST_SEED={played.seed} pytest tests/faults/test_schedules.py",
    ]
    return "\n".join(lines)
