"""Writes the Grafana dashboards beside this file: `python -m lorasrv.monitoring.dashboard`.

Knows Grafana's dashboard JSON (the classic model, which every current version imports); what the panels ask is in
`lorasrv.monitoring.panels` and `lorasrv.monitoring.training_panels`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasrv.monitoring import panels, training_panels
from lorasrv.monitoring.panels import Panel, Row

Json = Mapping[str, object]

_SCHEMA_VERSION = 41
_COLUMNS = 24
_PANEL_WIDTH = 8
_PANEL_HEIGHT = 8
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """A dashboard.

    Attributes:
        uid: Grafana's name of it.
        title: what it is about.
        description: what it shows.
        tags: to find it by.
        rows: of panels.
        present: a metric that every instance has.
    """

    uid: str
    title: str
    description: str
    tags: Sequence[str]
    rows: Sequence[Row]
    present: str

    def as_json(self) -> Json:
        """The dashboard as Grafana's JSON."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": list(self.tags),
            "schemaVersion": _SCHEMA_VERSION,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "timezone": "browser",
            "templating": {"list": [_datasource_variable(), _instance_variable(self.present)]},
            "panels": list(_panels(self.rows)),
        }


DASHBOARDS: Mapping[str, Dashboard] = {
    "grafana.json": Dashboard(
        uid="lorasrv",
        title="lorasrv",
        description="One base model, many adapters: traffic, latency, adapter residency, engine and errors.",
        tags=("lorasrv", "llm", "lora"),
        rows=panels.ROWS,
        present="lorasrv_build_info",
    ),
    "grafana_training.json": Dashboard(
        uid="lorasrv-training",
        title="lorasrv: training",
        description="Training runs: losses, learning rate, ranks, speed, memory and checkpoints.",
        tags=("lorasrv", "llm", "lora", "training"),
        rows=training_panels.ROWS,
        present="lorasrv_train_step",
    ),
}
"""By the name of its file."""


def _panels(rows: Sequence[Row]) -> Iterator[Json]:
    top = 0
    panel_id = 0
    for row in rows:
        panel_id += 1
        position = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
        yield {"id": panel_id, "type": "row", "title": row.title, "collapsed": False, "gridPos": position, "panels": []}
        top += 1
        per_line = _COLUMNS // _PANEL_WIDTH
        for index, panel in enumerate(row.panels):
            panel_id += 1
            position = {
                "x": index % per_line * _PANEL_WIDTH,
                "y": top + index // per_line * _PANEL_HEIGHT,
                "w": _PANEL_WIDTH,
                "h": _PANEL_HEIGHT,
            }
            yield _panel(panel, panel_id=panel_id, position=position)
        top += -(-len(row.panels) // per_line) * _PANEL_HEIGHT


def _panel(panel: Panel, *, panel_id: int, position: Mapping[str, int]) -> Json:
    defaults: dict[str, object] = {"unit": panel.unit, "min": 0}
    if panel.max_value is not None:
        defaults["max"] = panel.max_value
    options: Json = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    if panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "value_and_name"}
    return {
        "id": panel_id,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _DATASOURCE, "expr": expr, "legendFormat": legend}
            for index, (expr, legend) in enumerate(panel.queries)
        ],
    }


def _datasource_variable() -> Json:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _instance_variable(present: str) -> Json:
    query = f"label_values({present}, instance)"
    return {
        "name": "instance",
        "label": "Instance",
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": "instance"},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    for name, one in DASHBOARDS.items():
        (Path(__file__).parent / name).write_text(json.dumps(one.as_json(), indent=2) + "\n")
