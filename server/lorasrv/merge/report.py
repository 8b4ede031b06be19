"""A page about a merge: what became of every module's update, and how the result answers beside what was merged.

One file without a reference to any other. Reads the record of a merge and draws; knows no model.
"""

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorasrv.merge.advice import advice

REPORT_NAME = "merge_report.html"

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
# divergences below this are rounding of float32
_LOWEST_KL = 1e-12

_STYLE = """
:root { --ink: #1d2733; --faint: #6b7785; --line: #d9dfe6; --paper: #fff; --one: 31 111 235; --two: 209 96 12;
  --cold: 236 241 247; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --faint: #93a0ad; --line: #34404c; --paper: #12181f; --one: 76 141 255; --two: 255 157 82;
    --cold: 28 36 45; }
}
body { margin: 2rem auto; max-width: 84rem; padding: 0 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .75rem; } h2 { font-size: 1rem; margin: 0; }
p { color: var(--faint); margin: 0 0 .75rem; font-size: .9rem; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 2.5rem 3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0 0 1.5rem; }
dt { color: var(--faint); } dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
ul { margin: 0 0 2rem; padding-left: 1.1rem; } li.warning { color: rgb(var(--two)); }
table { border-collapse: separate; border-spacing: 2px; font-size: .85rem; }
th { font-weight: 400; color: var(--faint); text-align: right; padding: 0 .4rem; white-space: nowrap; }
tr:first-child th { text-align: center; }
td { min-width: 3.4rem; height: 1.7rem; text-align: center; border-radius: 3px; font-variant-numeric: tabular-nums; }
td.none { background: rgb(var(--cold)); }
.bar { fill: rgb(var(--one)); } .bar.two { fill: rgb(var(--two)); } .grid { stroke: var(--line); }
svg { width: 100%; height: auto; display: block; max-width: 40rem; }
svg text { fill: var(--faint); font-size: 12px; } svg text.value { fill: var(--ink); }
"""

_Shade = Callable[[float], float]
"""A figure to how strongly its cell is coloured, 0 to 1."""


def render_report(record: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        record: what `merge.json` holds.
    """
    modules = record["modules"]
    largest = max((one["size"] for one in modules), default=0.0) or 1.0
    coarsest = max((one["error"] for one in modules), default=0.0) or 1.0
    sections = [
        _map("Update", "Its size, in percent of the weight.", modules, "size", "one", lambda x: x / largest),
        _map("Kept", "How much of the update is in the stored weights, in percent.", modules, "kept", "two", _missing),
        _map(
            "Error", "What storing changed, in percent of the update.", modules, "error", "two", lambda x: x / coarsest
        ),
        _answers(record["verification"]),
    ]
    facts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in _facts(record))
    lines = "".join(
        f"<li{' class=warning' if line.startswith('warning') else ''}>{html.escape(line)}</li>"
        for line in advice(record)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Merge</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>Merge</h1>\n<dl>{facts}</dl>\n<ul>{lines}</ul>\n<main>{''.join(sections)}</main></body></html>\n"
    )


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    adapters = [
        f"{one['kind']}, digest {one['digest'][:12]}" + ("" if one["weight"] == 1 else f", weight {one['weight']:g}")
        for one in record["adapters"]
    ]
    stored = record["dtype"] + (", linear layers in NF4" if record["quantize"] == "nf4" else "")
    return [
        ("base", f"{record['base'] or 'unnamed'}, digest {record['base_digest'][:12]}"),
        *(("adapter", adapter) for adapter in adapters),
        ("merged into", f"{record['weights']} weights"),
        ("stored as", f"{stored}, {record['num_bytes'] / 1e6:.1f} MB"),
        ("changed", f"{len(record['modules'])} weights" + (", head untied from embedding" if record["untied"] else "")),
    ]


def _map(
    title: str, subtitle: str, modules: Sequence[Mapping[str, Any]], figure: str, colour: str, shade: _Shade
) -> str:
    """A table of layers and modules, then the modules outside of layers, coloured by a figure."""
    found = [(_LAYER.fullmatch(one["module"]), one) for one in modules]
    cells = {(match[1], match[2]): one[figure] for match, one in found if match}
    layers = sorted({layer for layer, _ in cells}, key=int)
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    head = "".join(f"<th>{html.escape(_short(kind))}</th>" for kind in kinds)
    rows = [
        f"<tr><th>layer {layer}</th>{''.join(_cell(cells.get((layer, kind)), colour, shade) for kind in kinds)}</tr>"
        for layer in layers
    ]
    others = "".join(
        f"<tr><th>{html.escape(one['module'])}</th>{_cell(one[figure], colour, shade)}</tr>"
        for match, one in found
        if not match
    )
    tables = f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>" if rows else ""
    tables += f"<table>{others}</table>" if others else ""
    return f"<section><h2>{title}</h2><p>{subtitle}</p>{tables}</section>\n"


def _cell(value: float | None, colour: str, shade: _Shade) -> str:
    if value is None:
        return '<td class="none"></td>'
    percent = min(80, max(0, round(80 * shade(value)))) if math.isfinite(value) else 80
    style = f"color-mix(in srgb, rgb(var(--{colour})) {percent}%, rgb(var(--cold)))"
    return f'<td style="background: {style}">{_percent(value)}</td>'


def _answers(found: Mapping[str, Any]) -> str:
    """Two bars on a logarithmic scale: what the adapter does to the answers, and what merging changed in them."""
    bars = [("the adapter", found["effect"], ""), ("merging", found["kl"], " two")]
    top = max(10 ** math.ceil(math.log10(max(found["effect"], found["kl"], _LOWEST_KL))), 10 * _LOWEST_KL)
    decades = math.log10(top / _LOWEST_KL)
    parts = []
    for power in range(-12, round(math.log10(top)) + 1, 3):
        x = 100 + 380 * (power + 12) / decades
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="76"/>')
        parts.append(f'<text x="{x:.1f}" y="92" text-anchor="middle">1e{power}</text>')
    for place, (name, value, colour) in enumerate(bars):
        width = 380 * max(0.0, math.log10(max(value, _LOWEST_KL) / _LOWEST_KL)) / decades
        y = 10 + 34 * place
        parts.append(
            f'<text x="90" y="{y + 15}" text-anchor="end">{name}</text>'
            f'<rect class="bar{colour}" x="100" y="{y}" width="{width:.1f}" height="22" rx="2"/>'
            f'<text class="value" x="{108 + width:.1f}" y="{y + 15}">{value:.2g} nats</text>'
        )
    subtitle = "How far next-token probabilities moved: KL divergence, mean over all positions of the prompts."
    drawn = f'<svg viewBox="0 0 600 100" role="img" aria-label="{subtitle}">{"".join(parts)}</svg>'
    return f"<section><h2>Answers</h2><p>{subtitle}</p>{drawn}</section>\n"


def _missing(kept: float) -> float:
    return abs(1 - kept)


def _short(kind: str) -> str:
    return kind.rpartition(".")[2].removesuffix("_proj")


def _percent(value: float) -> str:
    percent = 100 * value
    return f"{percent:.3g}" if abs(percent) < 1 else f"{percent:.1f}"
