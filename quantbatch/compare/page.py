"""The report as one HTML file: tables and plots, readable in light and dark, with nothing to load.

The plots are drawn as SVG here, since a plotting library would be the largest dependency of all for
three pictures. The file is also well-formed XML. Every text goes through `_escaped`: names of jobs
and models, labels and reasons are written by strangers.
"""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from quantbatch.compare.report import columns_of, nats, remarks
from quantbatch.console import plain, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 120, 20, 50
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c00")
"""Okabe and Ito's, which colour-blind readers tell apart too, on white and on black."""
MARKS_OF_AXIS = 5
SMALLEST_KL = 1e-9
"""Where a logarithmic axis ends for a divergence of 0."""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --faint: #767676; --line: #d0d0d0;
  --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --faint: #9a9a9a; --line: #444444; --paper: #16181c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 0; }
figure { margin: 1rem 0; } figcaption { color: var(--faint); max-width: 40rem; }
svg { max-width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .axis { stroke: var(--line); } svg .noise { stroke: var(--faint); stroke-dasharray: 4 3; }
"""


def page(document: Mapping[str, Any]) -> str:
    """Return the report that `report.describe` made as HTML."""
    title = f"{document['name']}: bit widths against {document['reference']}"
    columns = columns_of(document)
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    parts = [
        f"<h1>{_escaped(title)}</h1>",
        f"<p>{_escaped(document['model'])}, on {_escaped(document['device'])}</p>",
        f'<div class="wide">{_table(columns, rows)}</div>',
        _accuracy(document),
        "<h2>What was seen</h2>",
        _definitions(remarks(document)),
        "<h2>Memory against divergence</h2>",
        _memory_plot(document),
        "<h2>Where answers begin to differ</h2>",
        _first_differences_plot(document),
        "<h2>Speed</h2>",
        _speed_plot(document),
        _flips(document),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{_escaped(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )


def _escaped(text: object) -> str:
    return html.escape(plain(str(text)))


# ---- tables


def _table(names: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_escaped(name)}</th>" for name in names)
    lines = [
        "<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _definitions(pairs: Iterable[tuple[str, str]]) -> str:
    items = [f"<dt>{_escaped(name)}</dt><dd>{_escaped(what)}</dd>" for name, what in pairs]
    return f"<dl>{''.join(items)}</dl>"


def _accuracy(document: Mapping[str, Any]) -> str:
    rows = []
    for width in document["widths"]:
        if not (found := width["accuracy"]):
            continue
        value = found["value"]
        cells = [width["name"], f"{value['value']:.1%} ({value['low']:.1%} - {value['high']:.1%})"]
        if "difference" in found:
            cells += [
                str(found["right_to_wrong"]),
                str(found["wrong_to_right"]),
                f"{found['mcnemar_exact_p']:.2g}",
                f"{found['mcnemar_mid_p']:.2g}",
            ]
        rows.append(cells + [""] * (6 - len(cells)))
    if not rows:
        return ""
    names = (
        "width", "accuracy (95 %)", "right to wrong", "wrong to right", "exact p", "mid-p",
    )  # fmt: skip
    return f"<h2>Accuracy by the column {_escaped(document['gold'])}</h2>{_table(names, rows)}"


def _flips(document: Mapping[str, Any]) -> str:
    rows = [
        [width["name"], flip["reference"], flip["candidate"], str(flip["count"])]
        for width in document["widths"][1:]
        for flip in width["labels"]["flips"]
    ]
    if not rows:
        return ""
    rows = [[name, _short(a), _short(b), count] for name, a, b, count in rows]
    names = ("width", f"{document['reference']} says", "this says", "rows")
    return f'<h2>Answers that differ</h2><div class="wide">{_table(names, rows)}</div>'


def _short(text: str | None) -> str:
    if text is None:
        return "(no answer)"
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- plots


class _Axis(NamedTuple):
    """Numbers to places."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        low, high = self._of(self.low), self._of(self.high)
        share = (self._of(value) - low) / (high - low or 1.0)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def _of(self, value: float) -> float:
        return math.log10(max(value, SMALLEST_KL)) if self.is_log else value

    def marks(self) -> list[float]:
        if self.is_log:
            first, last = math.floor(self._of(self.low)), math.ceil(self._of(self.high))
            return [10.0**n for n in range(first, last + 1) if self.low <= 10.0**n <= self.high]
        step = _round_step((self.high - self.low) / MARKS_OF_AXIS)
        count = int((self.high - self.low) / step + 1e-9)
        return [self.low + step * n for n in range(count + 1)]


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2, 5, 10, 20 ... that is not below a number, or 0.5, 0.2 ..."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= least * (1 - 1e-9))


def _across(high: float) -> _Axis:
    return _Axis(0, high or 1.0, LEFT, WIDTH - RIGHT)


def _figure(what: str, caption: str, drawn: Iterable[str]) -> str:
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img"'
        f' aria-label="{_escaped(what)}">{"".join(drawn)}</svg>'
        f"<figcaption>{_escaped(caption)}</figcaption></figure>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, attributes: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {attributes}/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_escaped(text)}</text>'


def _axes(x: _Axis, y: _Axis, x_names: Mapping[float, str], y_names: Mapping[float, str]) -> str:
    drawn = [
        _line(x.start, y.start, x.end, y.start, 'class="axis"'),
        _line(x.start, y.start, x.start, y.end, 'class="axis"'),
    ]
    for value, name in x_names.items():
        drawn.append(_text(x.place(value), y.start + 18, name, "middle"))
    for value, name in y_names.items():
        drawn.append(_line(x.start - 4, y.place(value), x.start, y.place(value), 'class="axis"'))
        drawn.append(_text(x.start - 8, y.place(value) + 4, name, "end"))
    return "".join(drawn)


def _coloured(document: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    others = document["widths"][1:]
    return [(width, COLOURS[n % len(COLOURS)]) for n, width in enumerate(others)]


def _memory_plot(document: Mapping[str, Any]) -> str:
    shown = [(width, colour) for width, colour in _coloured(document) if width["divergence"]]
    if not shown:
        return "<p>There is nothing to draw.</p>"
    noise = document["noise_floor"]["divergence"]
    intervals = [width["divergence"]["kl_mean"] for width, _ in shown]
    found = [i[end] for i in intervals for end in ("low", "high")] + [noise["kl_mean"]["high"]]
    positive = [value for value in found if value and value > 0] or [SMALLEST_KL]
    low = 10.0 ** math.floor(math.log10(max(min(positive), SMALLEST_KL)))
    high = 10.0 ** math.ceil(math.log10(max(max(positive), 10 * low)))
    most = max(width["memory"]["weight_bytes"] for width, _ in shown)
    unit, unit_name = (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")
    x = _across(1.1 * most / unit)
    y = _Axis(low, high, HEIGHT - BOTTOM, TOP, is_log=True)
    floor = y.place(noise["kl_mean"]["high"])
    drawn = [
        _axes(
            x,
            y,
            {v: f"{v:g} {unit_name}" for v in x.marks()},
            {v: f"{v:.0e}" for v in y.marks()},
        ),
        _line(x.start, floor, x.end, floor, 'class="noise"'),
        _text(x.end + 4, floor + 4, "noise floor"),
    ]
    labelled: list[float] = []
    for width, colour in sorted(shown, key=_mean_kl, reverse=True):
        interval = width["divergence"]["kl_mean"]
        at, mean = x.place(width["memory"]["weight_bytes"] / unit), y.place(interval["value"])
        paint = f'stroke="{colour}" stroke-width="2"'
        drawn += [
            _line(at, y.place(interval["low"]), at, y.place(interval["high"]), paint),
            f'<circle cx="{at:.1f}" cy="{mean:.1f}" r="4" fill="{colour}"/>',
            _text(at + 8, _free(mean, labelled) + 4, width["name"]),
        ]
    caption = (
        "Mean KL divergence in nats a token (logarithmic, bars: 95 % intervals) over the bytes of"
        f" the loaded weights. {document['reference']} takes"
        f" {size(document['widths'][0]['memory']['weight_bytes'])} and is at 0 by definition; up to"
        f" the noise floor, {nats(noise['kl_mean']['high'])}, it differs from itself."
    )
    return _figure("memory against divergence", caption, drawn)


def _mean_kl(shown: tuple[Mapping[str, Any], str]) -> float:
    value: float = shown[0]["divergence"]["kl_mean"]["value"]
    return value


def _first_differences_plot(document: Mapping[str, Any]) -> str:
    shown = _coloured(document)
    if not shown:
        return "<p>There is nothing to draw.</p>"
    rows = document["rows"]["compared"]
    longest = max(width["answers"]["longest"] for width, _ in shown)
    least = min(width["answers"]["identical"]["value"] for width, _ in shown)
    # From a whole tenth on: most answers of a good width are the same.
    y = _Axis(math.floor(10 * min(least, 0.9)) / 10, 1, HEIGHT - BOTTOM, TOP)
    x = _across(longest)
    x_names = {v: f"{v:g}" for v in x.marks()}
    drawn = [_axes(x, y, x_names, {v: f"{v:.0%}" for v in y.marks()})]
    labelled: list[float] = []
    for width, colour in shown:
        places = _steps(width["answers"]["first_differences"], rows, longest)
        drawn_places = " ".join(f"{x.place(a):.1f},{y.place(b):.1f}" for a, b in places)
        style = f'fill="none" stroke="{colour}" stroke-width="2"'
        drawn.append(f'<polyline points="{drawn_places}" {style}/>')
        at = _free(y.place(places[-1][1]), labelled)
        drawn.append(_line(x.end + 2, at, x.end + 12, at, f'stroke="{colour}" stroke-width="2"'))
        drawn.append(_text(x.end + 16, at + 4, width["name"]))
    caption = (
        f"Share of {rows:,} answers that are still those of {document['reference']} after so many"
        " tokens; where a line ends, so many are identical to their end."
    )
    return _figure("where answers begin to differ", caption, drawn)


def _steps(places: Sequence[int], rows: int, longest: int) -> list[tuple[float, float]]:
    """Return the corners of the share of answers that have not differed yet."""
    corners = [(0.0, 1.0)]
    for count, place in enumerate(sorted(places), start=1):
        corners += [(place, corners[-1][1]), (place, 1 - count / rows)]
    return [*corners, (longest, corners[-1][1])]


def _free(wanted: float, taken: list[float]) -> float:
    """Return the nearest place to the wanted one, downwards, that no label has yet."""
    while any(abs(wanted - other) < 14 for other in taken):
        wanted += 2
    taken.append(wanted)
    return wanted


def _speed_plot(document: Mapping[str, Any]) -> str:
    widths = document["widths"]
    x = _across(max(width["speed"]["tokens_per_s"] for width in widths))
    step = (HEIGHT - BOTTOM - TOP) / len(widths)
    colours = ["var(--faint)", *(colour for _, colour in _coloured(document))]
    y = _Axis(0, 1, HEIGHT - BOTTOM, TOP)
    drawn = [_axes(x, y, {v: f"{v:,.0f}" for v in x.marks()}, {})]
    for place, (width, colour) in enumerate(zip(widths, colours, strict=True)):
        speed, top = width["speed"]["tokens_per_s"], TOP + place * step
        wide, high = x.place(speed) - x.start, min(0.7 * step, 28)
        drawn += [
            f'<rect x="{x.start}" y="{top:.1f}" width="{wide:.1f}" height="{high:.1f}"'
            f' fill="{colour}"/>',
            _text(x.start - 8, top + high / 2 + 4, width["name"], "end"),
            _text(x.start + wide + 6, top + high / 2 + 4, f"{speed:,.0f}"),
        ]
    caption = f"Generated tokens per second, by the job's own engine on {document['device']}."
    return _figure("speed", caption, drawn)
