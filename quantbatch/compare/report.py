"""The report of a comparison: one JSON document, and what a person reads of it on a terminal.

What may be claimed is said here too. Never that a width loses nothing: only how large a difference
would have been seen, with how many rows.
"""

from __future__ import annotations

import json
import math
import tempfile
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from quantbatch.compare import figures
from quantbatch.compare.candidates import is_original, own_dtype
from quantbatch.compare.divergence import DRAWN_WORDS, TOP_WORDS
from quantbatch.compare.statistics import LEVEL, RESAMPLES, SEED, Bootstrap, rule_of_three
from quantbatch.console import plain, several, size
from quantbatch.errors import Refused, StorageError
from quantbatch.storage import local_folder, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from quantbatch.compare.figures import Measured
    from quantbatch.compare.job import Outcome, Prepared
    from quantbatch.spec import Output

SIGNIFICANT = 0.05
"""Below this p of McNemar's test an accuracy is said to differ."""


def describe(prepared: Prepared, outcome: Outcome) -> dict[str, Any]:
    """Return the report as a document of JSON types."""
    rows = prepared.rows
    gold = [row.gold for row in rows.rows]
    bootstrap = Bootstrap(len(rows.rows))

    def width(measured: Measured, reference: Measured | None) -> dict[str, Any]:
        return _describe_width(measured, reference, gold, bootstrap)

    noise = width(outcome.again, outcome.reference)
    others = [width(measured, outcome.reference) for measured in outcome.others]
    for described in others:
        described["verdict"] = verdict(_finite(described), _finite(noise), len(rows.rows))
    name = outcome.reference.name
    document = {
        "outcome": "compared",
        "exit_code": 0,
        "name": prepared.spec.name,
        "model": prepared.checkpoint.id,
        "device": outcome.device,
        "reference": name,
        "reference_is": _what_the_reference_is(name, prepared),
        "rows": {
            "compared": len(rows.rows),
            "asked": rows.asked,
            "in_input": rows.in_input,
            "left_out": dict(rows.left_out),
        },
        "gold": prepared.choices.gold,
        "greedy_instead_of_sampled": prepared.samples,
        "free_instead_of_form": prepared.has_form,
        "method": {
            "kl": "reference || candidate, nats a token, on the reference's own greedy answers;"
            f" from the {TOP_WORDS} likeliest words and {DRAWN_WORDS} drawn from all others",
            "intervals": f"{LEVEL:.0%}, percentile bootstrap over rows,"
            f" {RESAMPLES:,} resamples, seed {SEED}",
        },
        "noise_floor": noise,
        "widths": [width(outcome.reference, None), *others],
        "skipped": outcome.skipped,
    }
    found: dict[str, Any] = _finite(document)
    return found


def _finite(value: Any) -> Any:  # noqa: ANN401 - of a document
    """Return a document with null in place of numbers that JSON lacks."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe_width(
    measured: Measured,
    reference: Measured | None,
    gold: Sequence[str | None],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    said = measured.said
    theirs = None if reference is None else reference.said
    described: dict[str, Any] = {
        "name": measured.name,
        **figures.describe_loading(measured.loading, said),
        "counts": figures.describe_counts(said, gold),
        "accuracy": figures.describe_accuracy(said, gold, bootstrap, theirs),
    }
    if reference is None or measured.differences is None:
        return described
    found = measured.differences
    return described | {
        "divergence": figures.describe_divergence(found.of(prompts=False), bootstrap),
        "divergence_on_prompts": figures.describe_divergence(found.of(prompts=True), bootstrap),
        "answers": figures.describe_answers(reference.said, said, bootstrap),
        "labels": figures.describe_labels(reference.said, said, bootstrap),
    }


def _what_the_reference_is(name: str, prepared: Prepared) -> str:
    checkpoint = prepared.checkpoint
    if is_original(name, checkpoint):
        return f"{name}, which holds the checkpoint's own numbers"
    if checkpoint.quantized is not None:
        there = f"quantized ({checkpoint.quantized}) already"
    else:
        there = f"stored as {own_dtype(checkpoint)}"
    return (
        f"{name}, while the checkpoint is {there}: differences are from {name}, and no measure of"
        " what is lost against the original"
    )


# ---- what may be claimed


def verdict(width: Mapping[str, Any], noise: Mapping[str, Any], rows: int) -> list[str]:
    """Say what was seen of a width, and how large a difference could have been missed."""
    seen = f"with {several(rows, 'row')}"
    said = [*_said_of_divergence(width["divergence"], noise["divergence"], seen)]
    said.append(_said_of_labels(width, rows))
    if width["accuracy"] and "difference" in width["accuracy"]:
        said.append(_said_of_accuracy(width["accuracy"]))
    return said


def _said_of_divergence(
    found: Mapping[str, Any] | None, noise: Mapping[str, Any] | None, seen: str
) -> Sequence[str]:
    if found is None:
        return ["no token of an answer could be compared"]
    kl = found["kl_mean"]
    broken = found["not_finite"]
    said = [f"scores of {several(broken, 'token')} are no numbers"] if broken else []
    floor = noise["kl_mean"]["high"] if noise else 0.0
    if kl["high"] <= floor:
        return [*said, f"no difference larger than the noise, {nats(floor)} nats a token, {seen}"]
    interval = f"{nats(kl['low'])} to {nats(kl['high'])}"
    return [*said, f"differs by {nats(kl['value'])} nats a token ({interval}) {seen}"]


def _said_of_labels(width: Mapping[str, Any], rows: int) -> str:
    labels = width["labels"]
    least, most = 1 - labels["same"]["high"], 1 - labels["same"]["low"]
    noun, seen = _noun(width, rows), f"with {several(rows, 'row')}"
    if not labels["flipped"]:
        return f"no difference in more than {most:.2%} of {noun}s seen {seen}"
    flipped = several(labels["flipped"], noun)
    return f"{flipped} changed, between {least:.2%} and {most:.2%} of rows, seen {seen}"


def _noun(width: Mapping[str, Any], rows: int) -> str:
    """Return what answers are: labels, or texts that hardly any two rows share."""
    is_label = width["accuracy"] or width["labels"]["distinct"] <= rows / 2
    return "label" if is_label else "answer"


def _said_of_accuracy(accuracy: Mapping[str, Any]) -> str:
    change, p = accuracy["difference"], accuracy["mcnemar_mid_p"]
    seen = f"with {several(accuracy['rows'], 'row')} (McNemar mid-p {p:.2g})"
    if p < SIGNIFICANT:
        interval = f"{points(change['low'])} to {points(change['high'])}"
        return f"accuracy differs by {points(change['value'])} points ({interval}) {seen}"
    most = max(abs(change["low"]), abs(change["high"]))
    if not accuracy["right_to_wrong"] + accuracy["wrong_to_right"]:
        most = rule_of_three(accuracy["rows"])
    return f"no difference in accuracy larger than {100 * most:.1f} points seen {seen}"


def nats(value: float | None) -> str:
    """Write a divergence."""
    return "?" if value is None else f"{value:.2g}"


def times(ratio: float | None) -> str:
    """Write a ratio of perplexities."""
    return "x?" if ratio is None else f"x{ratio:.4f}"


def points(share: float) -> str:
    """Write a change of a share in percentage points."""
    return f"{100 * share:+.1f}"


# ---- on a terminal


def table(document: Mapping[str, Any]) -> Table:
    """Return the figures of all widths, a column each."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    figures_of = columns_of(document)
    made.add_column("", style="bold", no_wrap=True)
    for name in figures_of.pop("width"):
        made.add_column(plain(name), justify="right")
    for name, cells in figures_of.items():
        made.add_row(name, *(Text(plain(cell)) for cell in cells))
    return made


def columns_of(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the figures by column, a cell for each width; the noise floor follows the reference,
    whose own cells are empty where a figure is a difference from it.
    """
    reference, *others = document["widths"]
    noun = _noun(document["noise_floor"], document["rows"]["compared"])
    again = document["noise_floor"] | {"name": f"{reference['name']} again"}
    widths = (reference, again, *others)
    shown: dict[str, Callable[[Any], str]] = {
        "width": lambda width: width["name"],
        "weights": lambda width: size(width["memory"]["weight_bytes"]),
        "kept as": lambda width: width["dtype"],
        "saved": lambda width: f"{width['memory']['saved']:.1%}",
        "KL mean": lambda width: nats(width["divergence"]["kl_mean"]["value"]),
        "  95 %": _interval_of_kl,
        "  p99": lambda width: nats(width["divergence"]["kl_p99"]["value"]),
        "KL on prompts": lambda width: nats(width["divergence_on_prompts"]["kl_mean"]["value"]),
        "  95 % ": lambda width: _interval_of_kl(width, "divergence_on_prompts"),
        "perplexity": lambda width: times(width["divergence"]["perplexity_ratio"]["value"]),
        "same top": lambda width: f"{width['divergence']['same_top']['value']:.2%}",
        "RMS dp": lambda width: f"{width['divergence']['rms_dp']['value']:.2%}",
        "identical": lambda width: f"{width['answers']['identical']['value']:.1%}",
        "differs at": _first_difference,
        f"same {noun}": lambda width: f"{width['labels']['same']['value']:.1%}",
        "accuracy": lambda width: f"{width['accuracy']['value']['value']:.1%}",
        "  mid-p": lambda width: f"{width['accuracy']['mcnemar_mid_p']:.2g}",
        "memory planned": lambda width: size(width["memory"]["planned_bytes"]),
        "  measured": lambda width: size(width["memory"]["peak_bytes"]),
        "tokens/s": lambda width: f"{width['speed']['tokens_per_s']:,.0f}",
    }
    if document["device"] == "cpu":
        # Later widths reuse what earlier ones left to the process, so its growth tells little.
        del shown["memory planned"], shown["  measured"]
    columns = {name: [_cell(cell, width) for width in widths] for name, cell in shown.items()}
    return {name: cells for name, cells in columns.items() if any(cells)}


def _cell(cell: Callable[[Any], str], width: Mapping[str, Any]) -> str:
    """Return a cell, empty if the width has no such figure."""
    try:
        return cell(width)
    except (KeyError, TypeError):
        return ""


def _interval_of_kl(width: Mapping[str, Any], part: str = "divergence") -> str:
    kl = width[part]["kl_mean"]
    return f"{nats(kl['low'])} - {nats(kl['high'])}"


def _first_difference(width: Mapping[str, Any]) -> str:
    return f"token {width['answers']['first_difference_median'] + 1:g}"


def remarks(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is to be said besides the figures: a subject and a sentence each."""
    rows = document["rows"]
    spread = f"{rows['compared']:,} of {rows['in_input']:,}, evenly spread over the input"
    left_out = [f"{kind} {count:,}" for kind, count in rows["left_out"].items()]
    said = [
        ("reference", document["reference_is"]),
        ("rows", "; without a prompt: ".join([spread, *([", ".join(left_out)] * bool(left_out))])),
        ("KL", document["method"]["kl"]),
        ("intervals", document["method"]["intervals"]),
    ]
    if document["greedy_instead_of_sampled"]:
        said.append(("sampling", "compared greedily, though the job draws its answers"))
    if document["free_instead_of_form"]:
        said.append(
            ("form", "answers are compared free, though the job's have a form (task.response)")
        )
    floor = document["noise_floor"]
    said.append(("noise floor", _said_of_noise(floor, document["reference"])))
    for width in document["widths"][1:]:
        said += [(width["name"], "; ".join(width["verdict"]))]
    said += [(name, f"skipped: {why}") for name, why in document["skipped"].items()]
    return said


def _said_of_noise(floor: Mapping[str, Any], name: str) -> str:
    found = floor["divergence"]
    kl = "no token to compare" if found is None else f"{nats(found['kl_mean']['value'])} nats"
    return (
        f"{name} against itself in other batches, padded on the other side: {kl} a token,"
        f" {floor['answers']['identical']['value']:.1%} of answers identical"
    )


def check_folder(folder: Path, output: Output) -> None:
    """Make the folder of a report, and see that it can be written to, before models run for it.

    Raises:
        StorageError: It can't be.
        Refused: It is in the output of the job, where only the job's own files may be.
    """
    job = local_folder(open_store(output.uri, output.storage), "")
    if job is not None and folder.resolve().is_relative_to(job.resolve()):
        raise Refused(
            f"--out {folder} is in the job's output {output.uri}, which then is no job's any more",
            "choose another folder for the report with --out",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problem = f"--out {folder}: {error.strerror}"
        raise StorageError(problem, "choose another folder for the report") from error


def save(document: Mapping[str, Any], folder: Path) -> None:
    """Write the report as compare.json and index.html."""
    from quantbatch.compare.page import page

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "compare.json").write_text(text + "\n", encoding="utf-8")
    (folder / "index.html").write_text(page(document), encoding="utf-8")
