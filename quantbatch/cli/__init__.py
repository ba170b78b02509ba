"""The command line. Each command is a few lines: load the spec, call one function, show what it
returns.

`--help` answers at once, and `plan` in a second or two, most of which imports a tokenizer from
transformers. So nothing here is imported before a command needs it, and Ray and torch only by
commands that run a model.

The commands are in `jobs.py`, `repeat.py`, `models.py` and `files.py`; what they have in common, in
`common.py`.

Results go to stdout; errors and progress to stderr. With `--json` the last line on stdout is one
JSON document, whatever happens. Exit codes are those of `errors.py`, and 70 for a fault of
quantbatch itself.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from quantbatch import __version__, console
from quantbatch.cli import files, jobs, models, repeat, streams

if TYPE_CHECKING:
    from collections.abc import Sequence

_WITHOUT_PANDAS = frozenset({"plan", "validate", "status", "verify", "gc", "formats", "errors"})

app = typer.Typer(
    name="quantbatch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code.

    Args:
        args: What follows the command's name; None takes it from the process.
    """
    stdout = streams.forgive()
    args = sys.argv[1:] if args is None else list(args)
    if _WITHOUT_PANDAS & set(args[:1]):
        _keep_pandas_away()
    log, warnings = logging.getLogger("quantbatch"), console.Warnings(logging.WARNING)
    log.addHandler(warnings)
    try:
        app(args=args, prog_name="quantbatch")
    except SystemExit as left:
        sys.exit(streams.code_after(left.code, stdout, args))
    finally:
        log.removeHandler(warnings)
    raise AssertionError("typer leaves by itself")


class _NoPandas:
    """A finder of modules by which pandas is not installed."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name, name=name)


def _keep_pandas_away() -> None:
    """Have pyarrow look for pandas now, once and for all, and not find it.

    It would import it to see whether a list is a Series (`_is_array_like`, 26.0), which takes a
    quarter of the time of `plan`. Can go when pyarrow asks sys.modules instead.
    """
    import pyarrow as pa

    sys.meta_path.insert(0, _NoPandas)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(_NoPandas)


def _version(asked: bool) -> None:
    if asked:
        console.say(f"quantbatch {__version__}")
        raise typer.Exit


@app.callback()
def quantbatch(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Batch inference with quantized transformers models on Ray: every row answered exactly once.

    Exit codes:
    0 done
    1 done with more errors than allowed, or with input that can't be read; not proven
    2 bad spec, input or surroundings
    3 refused, or the model does not fit
    70 a fault of quantbatch itself
    75 stopped on the way: the same command continues
    130 Ctrl-C before the work began
    """
    del version


for _commands in (jobs.COMMANDS, repeat.COMMANDS, models.COMMANDS, files.COMMANDS):
    for _name, _command in _commands.items():
        app.command(_name)(_command)
