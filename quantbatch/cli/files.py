"""Commands that write a beginning."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantbatch import console
from quantbatch.cli.common import outcome
from quantbatch.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Callable


SCHEMA_NAME = "quantbatch.schema.json"


def schema() -> None:
    """Print the JSON schema of a spec, for editors."""
    console.say(_schema_text().rstrip("\n"))


def _schema_text() -> str:
    from quantbatch.spec import json_schema

    return json.dumps(json_schema(), indent=2) + "\n"


def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("job.yaml"),
) -> None:
    """Write a commented spec to start from, and the schema by which editors complete it."""
    with outcome(False):
        text = resources.files("quantbatch").joinpath("starter.yaml").read_text()
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            raise Refused(f"{path} exists", "choose another name, or remove it") from None
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}", "choose another place") from None
        beside = path.with_name(SCHEMA_NAME)
        if not beside.exists():
            beside.write_text(_schema_text())
        console.say(f"wrote {path} and {beside}")
        console.say(f"next: edit it, then quantbatch validate {path}")


COMMANDS: dict[str, Callable[..., None]] = {"schema": schema, "init": init}
"""By name."""
