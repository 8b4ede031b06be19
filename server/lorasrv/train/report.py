"""A page about a run: curves of loss, learning rate, gradient norm and speed, and for AdaLoRA where ranks went.

One file without a reference to any other. Knows the rows of `lorasrv.train.history` and draws; knows no model.
"""

import html
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorasrv.train.history import Row

_WIDTH, _HEIGHT = 620, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 26
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")

_STYLE = """
:root { --ink: #1d2733; --faint: #6b7785; --line: #d9dfe6; --paper: #fff; --one: #1f6feb; --two: #d1600c;
  --cold: 236 241 247; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --faint: #93a0ad; --line: #34404c; --paper: #12181f; --one: #6aa6ff; --two: #ff9d52;
    --cold: 28 36 45; }
}
body { margin: 2rem auto; max-width: 84rem; padding: 0 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1rem; margin: 0 0 .5rem; }
p { color: var(--faint); margin: 0 0 1.5rem; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0 0 2rem; }
dt { color: var(--faint); } dd { margin: 0; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--faint); font-size: 11px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); stroke-width: 1; } .one { stroke: var(--one); } .two { stroke: var(--two); }
.curve { fill: none; stroke-width: 1.5; stroke-linejoin: round; } .dot { fill: var(--two); stroke: none; }
.key { display: flex; gap: 1rem; font-size: .85rem; color: var(--faint); } .key b { font-weight: 400; }
.key .one { color: var(--one); } .key .two { color: var(--two); }
table { border-collapse: separate; border-spacing: 2px; font-size: .85rem; }
th { font-weight: 400; color: var(--faint); text-align: right; padding: 0 .4rem; }
td { width: 2.6rem; height: 1.6rem; text-align: center; border-radius: 3px; font-variant-numeric: tabular-nums; }
input { width: 24rem; vertical-align: middle; }
"""

_SLIDER = """
const frames = JSON.parse(document.getElementById('frames').textContent);
const slider = document.getElementById('step');
function show() {
  const frame = frames[slider.value];
  document.getElementById('at').textContent = frame.step;
  document.querySelectorAll('td[data-module]').forEach((cell, place) => {
    const rank = frame.ranks[place];
    cell.textContent = rank;
    cell.style.background = `color-mix(in srgb, var(--one) ${Math.round(85 * rank / frames.most)}%, rgb(var(--cold)))`;
  });
}
frames.most = Math.max(...frames.flatMap(frame => frame.ranks));
slider.addEventListener('input', show);
show();
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A curve.

    Attributes:
        name: what it shows.
        points: (step, value), ascending.
        dotted: whether its points are marked.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dotted: bool = False


def render_report(
    title: str,
    rows: Sequence[Row],
    *,
    facts: Mapping[str, str],
    modules: Sequence[str],
    held_out_before: float | None = None,
) -> str:
    """The page as HTML.

    Args:
        title: of the run.
        rows: of its history, at least one.
        facts: what else is worth saying, by name.
        modules: the adapted modules, in the base's order; a map of ranks is drawn if ranks ever changed.
        held_out_before: the held-out loss before the first step.
    """
    losses = [Series(name="training", points=_smooth(_points(rows, "loss")))]
    held_out = _points(rows, "held_out_loss")
    if held_out_before is not None:
        held_out.insert(0, (0, held_out_before))
    if held_out:
        losses.append(Series(name="held out", points=held_out, dotted=True))
    speed = [(row["step"], row["tokens"] / row["seconds"]) for row in rows if row["seconds"] > 0]
    charts = [
        _chart("Loss, nats a token", losses),
        _chart("Learning rate", [Series(name="learning rate", points=_points(rows, "learning_rate"))]),
        _chart("Gradient norm, before clipping", [Series(name="norm", points=_smooth(_points(rows, "gradient_norm")))]),
        _chart("Tokens a second", [Series(name="tokens", points=_smooth(speed))]),
    ]
    frames = [row for row in rows if "ranks" in row]
    if len(frames) > 1:
        charts.append(_rank_map(frames, modules))
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n<dl>{listed}</dl>\n<main>{''.join(charts)}</main></body></html>\n"
    )


def _chart(title: str, series: Sequence[Series]) -> str:
    points = [point for one in series for point in one.points]
    (left, right), (low, high) = _bounds(x for x, _ in points), _bounds(y for _, y in points)
    across = _scale(left, right, _LEFT, _WIDTH - _RIGHT)
    up = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [_axis_y(value, up(value)) for value in _ticks(low, high)]
    parts += [
        f'<text x="{across(x):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{x:g}</text>' for x in _ticks(left, right)
    ]
    for one, colour in zip(series, ("one", "two"), strict=False):
        line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in one.points)
        parts.append(f'<polyline class="curve {colour}" points="{line}"/>')
        if one.dotted:
            dots = (f'<circle class="dot" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>' for x, y in one.points)
            parts.append("".join(dots))
    names = "".join(
        f'<span class="{colour}">&#9632; <b>{one.name}</b></span>'
        for one, colour in zip(series, ("one", "two"), strict=False)
    )
    key = f'<div class="key">{names}</div>' if len(series) > 1 else ""
    drawn = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    return f"<section><h2>{html.escape(title)}</h2>{drawn}{key}</section>\n"


def _axis_y(value: float, y: float) -> str:
    line = f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'


def _rank_map(frames: Sequence[Row], modules: Sequence[str]) -> str:
    """A table of layers and modules whose numbers follow a slider over the steps."""
    places = [(match[1], match[2]) for match in map(_LAYER.fullmatch, modules) if match]
    layers, kinds = (list(dict.fromkeys(part)) for part in zip(*places, strict=True))
    cells = {place: f'<td data-module="{html.escape(".".join(place))}"></td>' for place in places}
    rows = "".join(
        f"<tr><th>layer {layer}</th>{''.join(cells.get((layer, kind), '<td></td>') for kind in kinds)}</tr>"
        for layer in layers
    )
    head = "".join(f"<th>{html.escape(kind.rpartition('.')[2].removesuffix('_proj'))}</th>" for kind in kinds)
    ordered = [f"layers.{layer}.{kind}" for layer in layers for kind in kinds if (layer, kind) in cells]
    full = {module[module.index("layers.") :]: module for module in modules if "layers." in module}
    data = [{"step": row["step"], "ranks": [row["ranks"][full[name]] for name in ordered]} for row in frames]
    last = len(data) - 1
    return (
        '<section><h2>Ranks</h2><label>after step <span id="at"></span> '
        f'<input id="step" type="range" min="0" max="{last}" value="{last}"></label>'
        f"<table><tr><th></th>{head}</tr>{rows}</table>"
        f'<script type="application/json" id="frames">{json.dumps(data)}</script><script>{_SLIDER}</script></section>\n'
    )


def _points(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if key in row]


def _smooth(points: Sequence[tuple[float, float]], *, most: int = 200) -> list[tuple[float, float]]:
    """At most so many points, each the mean of a run of equal length."""
    width = -(-len(points) // most)
    runs = [points[start : start + width] for start in range(0, len(points), max(1, width))]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def _bounds(values: Iterable[float]) -> tuple[float, float]:
    listed = sorted(values)
    low, high = (listed[0], listed[-1]) if listed else (0.0, 1.0)
    if low == high:
        return (low - abs(low or 1) / 2, high + abs(high or 1) / 2)
    return low, high


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within the bounds."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = -(-low // step) * step
    return [round(first + place * step, 12) for place in range(int((high - first) / step + 1e-9) + 1)]
