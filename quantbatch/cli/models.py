"""Commands about a model and its bit widths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantbatch import console
from quantbatch.cli.common import AsJson, Overrides, SpecPath, card_named, load, outcome

if TYPE_CHECKING:
    from collections.abc import Callable


def compare_widths(  # noqa: PLR0913 - an argument for each option
    spec: SpecPath,
    bits: Annotated[
        str,
        typer.Option(help="Widths: 4, 8, 16, 32, or names such as bf16, int8, nf4, nf4-nodq, fp4."),
    ] = "16,8,4",
    rows: Annotated[int, typer.Option(help="Rows to compare, spread over the input.")] = 300,
    reference: Annotated[
        str | None, typer.Option(help="The width to compare with; the first that fits if not said.")
    ] = None,
    gold: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Input column with the right answers.")
    ] = None,
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Compare on the prompts' own tokens, too.")
    ] = False,
    on_cluster: Annotated[
        bool, typer.Option("--cluster", help="Run the models on the job's Ray cluster, not here.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; out/compare/NAME if not said.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run the same rows through several bit widths and tell what each costs in quality."""
    with outcome(as_json):
        job = load(spec, overrides)
        from quantbatch.compare.job import Choices, compare, compare_there

        choices = Choices(bits, rows, reference, gold, with_prompts=prompts)
        folder = out or Path("out/compare", job.name)
        run = compare_there if on_cluster else compare
        _show_comparison(run(job, choices, folder, console.note), folder, as_json=as_json)


def _show_comparison(document: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    from quantbatch.compare import report

    if as_json:
        console.say_document(document)
    else:
        console.say(report.table(document))
        console.say(console.facts([*report.remarks(document), ("report", f"{folder}/index.html")]))


def prequantize(
    spec: SpecPath,
    on_cluster: Annotated[
        bool, typer.Option("--cluster", help="Quantize on the job's Ray cluster, not here.")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a job's model and keep it in model.cache, so that its replicas start sooner."""
    with outcome(as_json):
        job = load(spec, overrides)
        from quantbatch.prequantize import prequantize as fill_cache

        document = fill_cache(job, on_cluster=on_cluster, say=console.note)
        if as_json:
            console.say_document(document)
        else:
            console.say(f"{job.name}: {console.OUTCOMES[document['outcome']]}", "bold")
            console.say(console.cached_table(document))


def formats(
    card: Annotated[
        str, typer.Option(metavar="NAME", help="Card, such as L4; else that of this machine.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show which checkpoints, quantized or not, this machine loads, and how."""
    with outcome(as_json):
        from quantbatch.documents import describe_formats

        document = describe_formats(card_named(card))
        if as_json:
            console.say_document(document)
        else:
            console.say(console.formats_table(document))
            for note in document["notes"]:
                console.say(note)


COMMANDS: dict[str, Callable[..., None]] = {
    "compare": compare_widths,
    "prequantize": prequantize,
    "formats": formats,
}
"""By name."""
