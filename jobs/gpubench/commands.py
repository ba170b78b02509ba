"""The sub-commands of `bench.py gpu`; imports nothing that takes seconds until one is run.

Each runs alone, prints a line of JSON for every result as soon as it is there, and with `--out`
also keeps all of them in a file. After `--budget-s` it begins nothing new and says what it left
out. `--device cpu --shape tiny` rehearses.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from jobs.gpubench.record import Record

app = typer.Typer(no_args_is_help=True, help=__doc__)

ShapeName = Annotated[str, typer.Option(help="8b (Llama 3.1), 32b (Qwen 2.5), tiny or tiny-qwen.")]
Kind = Annotated[str, typer.Option(help="Weights: fp32, bf16, int8, nf4 or nf4-dq.")]
Kinds = Annotated[
    list[str], typer.Option("--kind", help="Weights; give it several times for several.")
]
Sizes = Annotated[
    list[int], typer.Option("--batch", help="Rows at once; give it several times for several.")
]
Device = Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal.")]
Out = Annotated[Path | None, typer.Option(help="Folder for a file with the results.")]
Budget = Annotated[float, typer.Option(help="Seconds after which nothing new is begun.")]


@app.command()
def memory(
    shape: ShapeName = "8b",
    kinds: Kinds = ["bf16", "int8", "nf4"],  # noqa: B006 - typer reads it
    batches: Sizes = [16, 64, 192],  # noqa: B006
    prompt_tokens: int = 960,
    card_gib: Annotated[
        float, typer.Option(help="Run the first kind within so much memory instead; 0: do not.")
    ] = 0.0,
    device: Device = "cuda",
    out: Out = None,
    budget_s: Budget = 540.0,
) -> None:
    """Planned memory against measured; with --card-gib 23.6 a shape within a smaller card."""
    within = f"{card_gib:g}gib" if card_gib else ""
    record = _record("memory", device, out, budget_s, shape=shape, kind=_all(kinds), within=within)
    from jobs.gpubench import memory as part

    if card_gib:
        part.within(record, shape, kinds[0], card_gib, prompt_tokens=prompt_tokens)
    else:
        part.measure(record, shape, kinds, batches, prompt_tokens=prompt_tokens)


@app.command()
def oom(
    shape: ShapeName = "8b",
    kind: Kind = "fp32",
    times: int = 20,
    rows: int = 64,
    device: Device = "cuda",
    out: Out = None,
    budget_s: Budget = 300.0,
) -> None:
    """Memory that really runs out, so many times: no row is lost, and answers are equal."""
    record = _record("oom", device, out, budget_s, shape=shape, kind=kind, rows=rows)
    from jobs.gpubench import oom as part

    part.provoke(record, shape, kind, times=times, rows=rows)


@app.command()
def speed(
    shape: ShapeName = "8b",
    kind: Kind = "bf16",
    rows: int = 512,
    contender_s: Annotated[
        float, typer.Option(help="Seconds after which a contender gets no further batch.")
    ] = 45.0,
    only: Annotated[
        str, typer.Option(help="Parts of the names of those to run, with | between them.")
    ] = "",
    fused: Annotated[
        bool, typer.Option(help="All contenders multiply by our 4-bit kernel, where it is faster.")
    ] = False,
    device: Device = "cuda",
    out: Out = None,
    budget_s: Budget = 480.0,
) -> None:
    """Output tokens per second: pipeline, sorted generate, continuous batching, ours."""
    options = {"shape": shape, "kind": kind, "only": only, "rows": rows}
    options |= {"kernel": "fused"} if fused else {}
    record = _record("speed", device, out, budget_s, **options)
    from jobs.gpubench import speed as part

    part.race(record, shape, kind, rows=rows, contender_budget_s=contender_s, only=only)


@app.command()
def label(
    shape: ShapeName = "8b",
    kind: Kind = "bf16",
    rows: int = 256,
    only: Annotated[
        str,
        typer.Option(
            help="Of classify, shared, short, score, embed, structured, with | between them."
        ),
    ] = "",
    device: Device = "cuda",
    out: Out = None,
    budget_s: Budget = 150.0,
) -> None:
    """Labels, scores and vectors against generating and padded loops; forms against free text."""
    record = _record("label", device, out, budget_s, shape=shape, kind=kind, only=only, rows=rows)
    from jobs.gpubench import labels as part

    part.measure(record, shape, kind, rows=rows, only=only)


@app.command()
def floor(
    shape: ShapeName = "8b",
    kinds: Kinds = ["bf16", "nf4-dq", "int8"],  # noqa: B006
    batches: Sizes = [1, 8, 32, 128],  # noqa: B006
    steps: int = 48,
    device: Device = "cuda",
    out: Out = None,
    budget_s: Budget = 420.0,
) -> None:
    """Decode steps against the memory's bandwidth, prefill against the matrix rate."""
    record = _record("floor", device, out, budget_s, shape=shape, kind=_all(kinds))
    from jobs.gpubench import floor as part

    part.measure(record, shape, kinds, batches, steps=steps)


@app.command("profile")
def profile_(
    shape: ShapeName = "8b",
    kinds: Kinds = ["nf4-dq", "bf16"],  # noqa: B006
    rows: int = 128,
    device: Device = "cuda",
    out: Out = None,
    budget_s: Budget = 240.0,
) -> None:
    """The kernels of decode and prefill steps, with their shares; also as a table, on stderr."""
    record = _record("profile", device, out, budget_s, shape=shape, kind=_all(kinds))
    from jobs.gpubench import profiling as part

    part.measure(record, shape, kinds, rows=rows)


@app.command()
def fused(
    shapes: Annotated[
        list[str], typer.Option("--shape", help="Matrices of these; decoding by the first.")
    ] = ["8b", "32b"],  # noqa: B006
    kind: Annotated[str, typer.Option(help="Weights: nf4 or nf4-dq.")] = "nf4-dq",
    batches: Sizes = [8, 32, 64, 128, 256],  # noqa: B006
    steps: int = 48,
    device: Device = "cuda",
    out: Out = None,
    budget_s: Budget = 170.0,
) -> None:
    """Our 4-bit kernel against bitsandbytes and bf16 by matrix; decoding with and without it."""
    record = _record("fused", device, out, budget_s, shape=_all(shapes), kind=kind)
    from jobs.gpubench import fused as part

    part.measure(record, shapes, kind, batches, steps=steps)


@app.command()
def share(
    shape: ShapeName = "8b",
    kind: Kind = "nf4",
    rows: int = 1024,
    device: Device = "cuda",
    out: Out = None,
    budget_s: Budget = 300.0,
) -> None:
    """Two replicas on one card, each with half of it, against one."""
    record = _record("share", device, out, budget_s, shape=shape, kind=kind, rows=rows)
    from jobs.gpubench import share as part

    part.compare(record, shape, kind, rows=rows)


@app.command()
def loading(
    folder: Annotated[Path, typer.Option(help="On a local disk; 16 GB for the 8B shape.")],
    shape: ShapeName = "8b",
    kinds: Kinds = ["nf4-dq", "int8"],  # noqa: B006
    passes: int = 1,
    device: Device = "cuda",
    out: Out = None,
    budget_s: Budget = 420.0,
) -> None:
    """Loading from the cache of quantized weights against quantizing at load."""
    record = _record("loading", device, out, budget_s, shape=shape, kind=_all(kinds))
    from jobs.gpubench import loading as part

    part.measure(record, shape, kinds, folder, passes=passes)


def _all(kinds: list[str]) -> str:
    return "_".join(kinds)


def _record(command: str, device: str, out: Path | None, budget_s: float, **options: Any) -> Record:
    """Set what a replica sets before torch is loaded, and begin a record."""
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from jobs.gpubench.record import Record

    return Record(command, device, options, out, budget_s)
