"""Every error that quantbatch raises on purpose.

    JobError                  ends the run; the command line prints it and exits with its
    `exit_code`
    |-- SpecError       2     the job's YAML is wrong
    |-- InputError      2     an input can't be found, opened or understood
    |-- ModelError      2     the model can't be found or loaded as asked
    |-- ClusterError    2     Ray, or a GPU that the job needs, is not there
    |-- StorageError    2     the store can't be reached, or refuses us
    |-- DoesNotFit      3     the model does not fit the card
    |-- Refused         3     the output belongs to another job, or something changed under us
    `-- Stopped         75    stopped on the way; the same command continues
    RowError                  becomes the result of one row; never ends a run

Exit codes: 0 done; 1 done with more errors than allowed, or with input that could not be read; 2
bad spec, input or surroundings; 3 refused; 70 a fault of quantbatch itself (EX_SOFTWARE of
sysexits.h); 75 stopped, also by SIGTERM or Ctrl-C, and resumable (EX_TEMPFAIL); 130 Ctrl-C before
the work began.
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override


class JobError(Exception):
    """What ends a run: one problem, said once, with what to do about it.

    Args:
        problem: What is wrong, where, and the offending value.
        hint: What the user can do; empty if there is nothing to add.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem, hint)
        self.problem = problem
        self.hint = hint

    @override
    def __str__(self) -> str:
        return f"{self.problem}\n  hint: {self.hint}" if self.hint else self.problem


class SpecError(JobError):
    """The job spec is wrong: one or more problems, each with its path and line."""

    def __init__(self, *problems: JobError) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems

    @override
    def __reduce__(self) -> tuple[type[SpecError], tuple[JobError, ...]]:
        return type(self), self.problems


class InputError(JobError):
    """An input is missing, unreadable, or lacks what the prompt needs."""


class ModelError(JobError):
    """The model is missing, incomplete, or can't be loaded as the spec asks."""


class ClusterError(JobError):
    """Ray can't be reached, or lacks a resource that the job needs."""


class StorageError(JobError):
    """The store refuses us or can't be reached."""


class DoesNotFit(JobError):
    """The model, its cache and its workspace need more memory than the card has."""

    exit_code = 3


class Refused(JobError):
    """Going on would damage or mix results: another job's output, another spec, changed input."""

    exit_code = 3


class Stopped(JobError):
    """The run ended before the job did; the same command continues it."""

    exit_code = 75


def in_the_end(exit_code: int, problem: str, hint: str) -> JobError:
    """Return the error that ends a run for trouble that one of Ray's processes reported."""
    if exit_code == DoesNotFit.exit_code:
        return DoesNotFit(problem, hint)
    if exit_code == Stopped.exit_code:
        return Stopped(problem, hint)
    return ModelError(problem, hint)


class RowError(Exception):
    """What is wrong with one row; it becomes that row's result.

    Args:
        kind: A short stable name for the `error_type` column, such as `prompt_too_long`.
        message: What is wrong and the value, for the `error_message` column.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    @override
    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"
