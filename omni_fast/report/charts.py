"""The report's drawings: SVG and HTML tables built from numbers, no script, no external resource.

Colours are CSS variables of the page, so one drawing serves the light and the dark theme. Nothing rests on colour
alone: series differ in dash and marker too, a heat map's lightness is monotone and every cell prints its number,
negative cells are hatched. NaN leaves a gap in a line and an empty cell in a table.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from omni_fast.curriculum.scores import Estimate
from omni_fast.report.verdict import points, span

SERIES = 8  # distinct colours, dashes and markers; a ninth series starts over
Scale = Callable[[float], float]  # from a number to pixels
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
ERROR_HEADS = ("forecast", "points", "mean absolute", "bias", "root mean square", "Pearson", "Spearman")
DASHES = ("", "7 4", "2 3", "10 3 2 3", "4 2", "1 2", "12 4", "6 2 1 2")


def text(value: str) -> str:
    """Escaped for HTML; characters that no HTML document may hold become U+FFFD."""
    clean = "".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in value if not "\ud800" <= c <= "\udfff")
    return html.escape(clean.replace("\x7f", "\ufffd"))


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover low..high."""
    width = high - low if high > low else 1.0
    raw = width / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw - 1e-12)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, max(last, first + 1) + 1)]


def short(x: float) -> str:
    """A number for an axis: 0, 0.25, 1.5, 12, 3.4k."""
    if abs(x) >= 10_000:
        return f"{x / 1000:.0f}k"
    return f"{x:.6g}".replace("-", "−")


def scale(low: float, high: float, start: float, end: float) -> Scale:
    """From low..high to pixels start..end; what lies beyond is drawn at the end. NaN stays NaN."""
    return lambda x: start + ((x if math.isnan(x) else min(max(x, low), high)) - low) / (high - low) * (end - start)


class Cell(NamedTuple):
    """One cell of a heat map. value: what is coloured (NaN: empty); small: a second line; outlined: framed."""

    value: float
    label: str
    small: str = ""
    outlined: bool = False


def heat_table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]], *, scale: float, corner: str) -> str:
    """A heat map as an HTML table. scale: the magnitude that gets the full colour; negative values are hatched."""
    head = "".join(f"<th scope=col>{text(name)}</th>" for name in columns)
    drawn = ((text(name), "".join(_heat_cell(cell, scale) for cell in cells)) for name, cells in rows)
    body = "".join(f"<tr><th scope=row>{name}</th>{row}</tr>" for name, row in drawn)
    return (
        f"<div class=scroll><table class=heat><thead><tr><td class=corner>{text(corner)}</td>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _heat_cell(cell: Cell, scale: float) -> str:
    if not math.isfinite(cell.value):
        return f"<td class=none>{text(cell.label)}</td>"
    strength = min(1.0, abs(cell.value) / scale) if scale > 0 else 0.0
    classes = [kind for kind, on in (("neg", cell.value < 0), ("strong", strength > 0.7), ("own", cell.outlined)) if on]
    small = f"<small>{text(cell.small)}</small>" if cell.small else ""
    return (
        f'<td class="{" ".join(classes)}" style="--v:{strength * 100:.0f}%"><span>{text(cell.label)}{small}</span></td>'
    )


class Line(NamedTuple):
    """One curve. style: which colour, dash and marker."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: int = 0


def line_panel(title: str, lines: Sequence[Line], *, y_range: tuple[float, float] | None, x_label: str) -> str:
    """One small panel of curves with its own legend; curves of more than 24 points get a running mean on top."""
    width, height, left, top, right, bottom = 460, 236, 42, 30, 14, 36
    known = [(x, y) for line in lines for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
    if not known:
        nothing = f'<text x={width / 2} y={height / 2} class="mid dim">nothing recorded</text>'
        return _panel(width, title, nothing, height)
    xs, ys = zip(*known, strict=True)
    y_marks = ticks(*(y_range or _padded(min(ys), max(ys))))
    low, high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    px, py = scale(low, high, left, width - right), scale(y_marks[0], y_marks[-1], height - bottom, top)
    counted = all(x == int(x) for x in xs)  # steps, stages; temperatures are marked each
    x_marks = [x for x in ticks(low, high, 5) if low <= x <= high and x == int(x)] if counted else sorted({*xs})
    parts = [_axes(px, x_marks, py, y_marks, (left, width - right), height, x_label)]
    for line in lines:
        drawn = [(px(x), py(y)) for x, y in zip(line.xs, line.ys, strict=True)]
        if len(drawn) > 24:
            parts.append(_path(drawn, line.style, faint=True))
            drawn = [(px(x), py(y)) for x, y in zip(line.xs, _running_mean(line.ys), strict=True)]
        parts.append(_path(drawn, line.style))
        step = max(1, len(drawn) // 12)
        parts.extend(_marker(x, y, line.style) for x, y in drawn[::step] if math.isfinite(y))
    legend = "".join(
        f"<span>{_swatch(line.style)}{text(line.name)}</span>" for line in lines if any(map(math.isfinite, line.ys))
    )
    return _panel(width, title, "".join(parts), height, legend)


def _running_mean(ys: Sequence[float], half: int = 3) -> list[float]:
    near = [[y for y in ys[max(0, k - half) : k + half + 1] if math.isfinite(y)] for k in range(len(ys))]
    return [sum(some) / len(some) if some else math.nan for some in near]


def _panel(width: int, title: str, inner: str, height: int, legend: str = "") -> str:
    return _figure("panel", width, height, title, f"<text x=4 y=16 class=title>{text(title)}</text>{inner}", legend)


def _figure(kind: str, width: int, height: int, label: str, inner: str, legend: str = "") -> str:
    return (
        f'<figure class={kind}><svg viewBox="0 0 {width} {height}" role=img aria-label="{text(label)}">{inner}</svg>'
        f"<figcaption class=legend>{legend}</figcaption></figure>"
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.08 * (high - low) or max(0.05, 0.1 * abs(high))
    return (0.0 if low >= 0 and low - pad < 0 else low - pad), high + pad


def _axes(
    px: Scale, xs: Sequence[float], py: Scale, ys: Sequence[float], ends: tuple[int, int], height: int, label: str
) -> str:
    """Grid lines at ys from end to end, numbers at ys and xs, the label of x."""
    (left, right), low = ends, py(ys[0])
    grid = (
        f"<line x1={left} x2={right} y1={py(m):.1f} y2={py(m):.1f} class=grid />"
        f"<text x={left - 6} y={py(m) + 4:.1f} class=end>{short(m)}</text>"
        for m in ys
    )
    below = (f"<text x={px(m):.1f} y={low + 15:.0f} class=mid>{short(m)}</text>" for m in xs)
    return "".join([*grid, *below, _x_label(label, ends, height)])


def _x_label(label: str, ends: tuple[int, int], height: int) -> str:
    return f'<text x={sum(ends) / 2:.0f} y={height - 4} class="mid dim">{text(label)}</text>'


def _path(points: Sequence[tuple[float, float]], style: int, faint: bool = False) -> str:
    d, pen_down = [], False
    for x, y in points:
        if math.isfinite(y):
            d.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = math.isfinite(y)
    dash = f' stroke-dasharray="{DASHES[style % SERIES]}"' if DASHES[style % SERIES] and not faint else ""
    return f'<path d="{"".join(d)}" class="line s{style % SERIES}{" faint" if faint else ""}"{dash} />'


def _marker(x: float, y: float, style: int, size: float = 3.4, hollow: bool = False) -> str:
    """Circle, square, diamond or triangle, in the style's colour."""
    kind = f'class="dot{" hollow" if hollow else ""} s{style % SERIES}"'
    big = size * (1.35 if style % 4 == 2 else 1.25)
    return (
        f"<circle cx={x:.1f} cy={y:.1f} r={size} {kind} />",
        f"<rect x={x - size:.1f} y={y - size:.1f} width={2 * size} height={2 * size} {kind} />",
        f'<path d="M{x:.1f} {y - big:.1f}l{big} {big}l{-big} {big}l{-big} {-big}z" {kind} />',
        f'<path d="M{x:.1f} {y - big:.1f}l{big} {2 * big}l{-2 * big} 0z" {kind} />',
    )[style % 4]


def _swatch(style: int) -> str:
    drawn = _path([(1, 6), (29, 6)], style) + _marker(15, 6, style)
    return f'<svg viewBox="0 0 30 12" class=swatch aria-hidden=true>{drawn}</svg>'


class Mark(NamedTuple):
    """A point with an interval; NaN value: not drawn."""

    at: Estimate
    style: int
    hollow: bool = False


class MarkRow(NamedTuple):
    """One row: its label, the marks (one below the other) and text at the right."""

    label: str
    marks: Sequence[Mark]
    note: str = ""


def mark_rows(
    rows: Sequence[MarkRow], *, keys: Sequence[tuple[str, int, bool]] = (), zero: bool = False, label: str
) -> str:
    """Rows of points with intervals on one horizontal scale.

    zero: a heavy line at 0.   keys: the legend, (name, style, hollow).   label: what the scale is.
    """
    found = [mark.at for row in rows for mark in row.marks]
    spread = [x for at in found for x in (at.value, at.low, at.high) if math.isfinite(x)]
    if not spread:
        return "<p class=dim>Nothing measured yet.</p>"
    marks = ticks(min([*spread, 0.0] if zero else spread), max([*spread, 0.0] if zero else spread), 5)
    left = 24 + 7 * max(len(row.label) for row in rows)
    behind = 30 + 7 * max(len(row.note) for row in rows)
    width, row_height, top = max(760, left + 200 + behind), 14 + 13 * max(len(row.marks) for row in rows), 8
    right = width - behind
    height = top + row_height * len(rows) + 38
    px = scale(marks[0], marks[-1], left, right)
    parts = [_x_label(label, (left, right), height)]
    for m in marks:
        heavy = " zero" if zero and abs(m) < 1e-12 else ""
        parts.append(
            f'<line x1={px(m):.1f} x2={px(m):.1f} y1={top} y2={height - 34} class="grid{heavy}" />'
            f"<text x={px(m):.1f} y={height - 20} class=mid>{short(m)}</text>"
        )
    for k, row in enumerate(rows):
        middle = top + row_height * (k + 0.5)
        if k:
            parts.append(f"<line x1=0 x2={width} y1={top + row_height * k} y2={top + row_height * k} class=rule />")
        parts.append(f'<text x={left - 14} y={middle + 4:.1f} class="end strong">{text(row.label)}</text>')
        parts.append(f"<text x={right + 16} y={middle + 4:.1f} class=dim>{text(row.note)}</text>")
        for n, mark in enumerate(row.marks):
            if not math.isfinite(mark.at.value):
                continue
            y = middle + 13 * (n - (len(row.marks) - 1) / 2)
            low, high = px(mark.at.low), px(mark.at.high)
            if math.isfinite(low) and math.isfinite(high):
                parts.append(
                    f'<path d="M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8"'
                    f' class="bar s{mark.style % SERIES}" />'
                )
            parts.append(_marker(px(mark.at.value), y, mark.style, 4.2, mark.hollow))
    legend = "".join(
        f'<span><svg viewBox="0 0 16 12" class=key aria-hidden=true>{_marker(8, 6, style, 4.2, hollow)}</svg>'
        f"{text(name)}</span>"
        for name, style, hollow in keys
    )
    return _figure("wide", width, height, label, "".join(parts), legend)


def forecast_panel(title: str, points: Sequence[tuple[Estimate, Estimate]], style: int) -> str:
    """One small panel of scores, (forecast, realised) each, one or more, and the line on which they are equal.

    Intervals that are wider than most end at the panel's edge, and the axes at 0 and 1; NaN is not drawn.
    """
    width, height, left, top, right, bottom = 460, 400, 46, 30, 14, 38
    known = [(x, y) for x, y in points if math.isfinite(x.value) and math.isfinite(y.value)]
    if not known:
        return _panel(width, title, f'<text x={width / 2} y=48 class="mid dim">nothing measured</text>', 80)
    values = [at.value for pair in known for at in pair]
    usual = sorted((at.high - at.low) / 2 for pair in known for at in pair)[len(known)]
    marks = ticks(max(0.0, min(values) - usual), min(1.0, max(values) + usual), 4)
    px, py = scale(marks[0], marks[-1], left, width - right), scale(marks[0], marks[-1], height - bottom, top)
    parts = [
        _axes(px, marks, py, marks, (left, width - right), height, "forecast"),
        _path([(px(m), py(m)) for m in (marks[0], marks[-1])], 7, faint=True),
        f'<text x={width - right} y=16 class="end dim">realised ↑</text>',
    ]
    for x, y in known:
        parts.append(_path([(px(end), py(y.value)) for end in (x.low, x.high)], style, faint=True))
        parts.append(_path([(px(x.value), py(end)) for end in (y.low, y.high)], style, faint=True))
    parts.extend(_marker(px(x.value), py(y.value), style) for x, y in known)
    return _panel(width, title, "".join(parts), height)


def facts_table(facts: Sequence[tuple[str, str]]) -> str:
    """A two-column table."""
    rows = "".join(f"<tr><th scope=row>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in facts)
    return f"<div class=scroll><table class=plain>{rows}</table></div>" if rows else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table whose first `words` columns are text and whose others are numbers."""
    kinds = ["" if k < words else " class=num" for k in range(len(heads))]
    head = "".join(f"<th{kind}>{text(name)}</th>" for name, kind in zip(heads, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{text(cell)}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>"
        for row in rows
    )
    return f"<div class=scroll><table class=plain><tr>{head}</tr>{body}</table></div>"


def pair_table(tasks: Sequence[str], shares: Mapping[str, Mapping[str, float]]) -> str:
    """first -> then -> share of draws in which that order of the two is better; a task has none with itself."""
    rows = []
    for first in tasks:
        values = [shares[first].get(then, math.nan) for then in tasks]
        rows.append((f"{first} first", [Cell(x, f"{x:.0%}" if math.isfinite(x) else "") for x in values]))
    title = "<h3>Which of two tasks is better placed right before the other (share of draws)</h3>"
    return title + heat_table([f"then {task}" for task in tasks], rows, scale=1.0, corner="")


def transfer_table(tasks: Sequence[str], effects: Mapping[tuple[str, str], Estimate]) -> str:
    """(trained, scored) -> effect, as a heat map; what a task does to itself is framed and does not set the scale."""
    rows = []
    for i in tasks:
        found = [effects[i, j] for j in tasks]
        cells = [Cell(e.value, points(e.value), span(e, 2), i == j) for j, e in zip(tasks, found, strict=True)]
        rows.append((i, cells))
    off = [abs(effect.value) for (i, j), effect in effects.items() if i != j and math.isfinite(effect.value)]
    return heat_table(tasks, rows, scale=1.2 * max([*off, 0.05]), corner="trained \\ scored on")


def entropy_table(tasks: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """(policy, entropy on the prompts of each task, in nats) as a heat map; "" where none is known."""
    cells = [(name, [Cell(x, points(x, signed=False)) for x in values]) for name, values in rows]
    known = [x for _, values in rows for x in values if math.isfinite(x)]
    return heat_table(tasks, cells, scale=max(known), corner="policy \\ prompts of") if known else ""


def verdict(sentences: Sequence[tuple[str, str]]) -> str:
    """(tone, text) as a list, marked by tone."""
    items = "".join(f"<li class={tone}>{text(said)}</li>" for tone, said in sentences)
    return f"<ul class=verdict>{items}</ul>" if items else ""


def configuration(config: object) -> str:
    shown = json.dumps(config, indent=2, ensure_ascii=False, default=str)
    return f"<details><summary>Configuration</summary><pre>{text(shown)}</pre></details>"


def duration(seconds: float) -> str:
    """42 s, 3 min 05 s, 2 h 10 min; an en dash when it is not known."""
    if not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def sections(bodies: Mapping[str, str], notes: Mapping[str, str]) -> str:
    """The cards of a page, title -> HTML; those without any are named in a last one."""
    drawn = {title: body for title, body in bodies.items() if body}
    if absent := [title for title in bodies if title not in drawn]:
        drawn["Not there yet"] = f"<p>Nothing was recorded for: {text(', '.join(absent))}.</p>"
    small = {title: f"<p class=note>{text(notes[title])}</p>" if title in notes else "" for title in drawn}
    return "".join(f"<section><h2>{text(title)}</h2>{small[title]}{body}</section>" for title, body in drawn.items())


def tiles(facts: Sequence[tuple[str, str, str]]) -> str:
    """Large numbers at the head of the page: (what, number, small print)."""
    drawn = "".join(
        f"<div class=tile><span class=what>{text(what)}</span><b>{text(big)}</b><span>{text(small)}</span></div>"
        for what, big, small in facts
    )
    return f"<div class=tiles>{drawn}</div>" if facts else ""


def write_page(path: Path, page: str) -> None:
    """In one rename: OSError leaves an older file as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(page.encode("utf-8", "replace"))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def frame(title: str, kicker: str, headline: str, body: str, footer: str) -> str:
    """A whole self-contained page; `body` is HTML already."""
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{css}</style></head><body><main>"
        f"<header><p class=kicker>{text(kicker)}</p><h1>{text(headline)}</h1></header>"
        f"{body}<footer>{text(footer)}</footer></main></body></html>"
    )
