"""What commands have in common: their arguments, and how they end."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from quantbatch import console
from quantbatch.errors import JobError, SpecError
from quantbatch.storage import redact

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quantbatch.model.cards import Card
    from quantbatch.spec import JobSpec, Storage

EXIT_INTERRUPTED = 130
EXIT_OUR_FAULT = 70
"""EX_SOFTWARE of sysexits.h; Python's own 1 would mean a job that is done with too many errors."""

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The job's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Set a field of the spec, such as model.bits=8; may be given several times.",
    ),
]
Extend = Annotated[
    bool,
    typer.Option("--extend", help="Add input files that came after the job was planned."),
]
OnCard = Annotated[
    str | None,
    typer.Option(
        "--card", metavar="NAME", help="Plan for this card, such as 'RTX 4090', L4 or A100-80G."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="End stdout with one JSON document on a line.")
]


@contextlib.contextmanager
def outcome(as_json: bool) -> Iterator[None]:
    """Turn what ends a command early into messages, a document and an exit code."""
    try:
        yield
    except JobError as error:
        console.complain(error)
        leave(console.error_document(error), as_json)
    except KeyboardInterrupt:
        said = "interrupted; the same command continues where it was"
        console.note(said)
        leave({"outcome": "interrupted", "exit_code": EXIT_INTERRUPTED, "error": said}, as_json)
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:  # noqa: BLE001 - the last line on stdout is a document whatever happens
        sys.stderr.write(console.plain(redact(traceback.format_exc())))
        said = redact(f"{type(error).__name__}: {error}")
        leave({"outcome": "crashed", "exit_code": EXIT_OUR_FAULT, "error": said}, as_json)


def leave(document: dict[str, object], as_json: bool) -> NoReturn:
    """End a command with the exit code of a document."""
    document.setdefault("hint", "")
    if as_json:
        console.say_document(document)
    code = document["exit_code"]
    assert isinstance(code, int)
    raise typer.Exit(code)


def card_fields(card: str | None) -> list[str]:
    """Return what `--card` sets in the spec."""
    if card is None:
        return []
    return ["cluster.gpu_memory_gib=null", f"cluster.card={json.dumps(card)}"]


def load(path: Path, overrides: Sequence[str] | None) -> JobSpec:
    """Load the spec of a job.

    Raises:
        SpecError: It is wrong.
    """
    from quantbatch.specfile import load_spec

    return load_spec(path, overrides or ())


def output_of(where: str, overrides: Sequence[str] | None) -> tuple[str, Storage]:
    """Return the output that a spec or its own place names, and how to reach it.

    Raises:
        SpecError: The spec is wrong.
    """
    from quantbatch.spec import Storage

    if where.endswith((".yaml", ".yml")) or Path(where).is_file():
        output = load(Path(where), overrides).output
        return output.uri, output.storage
    return where, Storage()


def card_named(name: str) -> Card | None:
    """Return the card of a name, or without one this machine's first."""
    from quantbatch.model import cards, thiscard

    if not name:
        return next(iter(thiscard.local_cards()), None)
    try:
        return cards.find(name)
    except cards.UnknownCardError as error:
        raise SpecError(JobError(f"--card {error}")) from None
