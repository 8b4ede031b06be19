"""Writes the Grafana dashboard: `python -m lorasrv.monitoring.dashboard > server/lorasrv/monitoring/grafana.json`.

Knows Grafana's dashboard JSON (the classic model, which every current version imports); what the panels ask is in
`lorasrv.monitoring.panels`.
"""

import json
import sys
from collections.abc import Iterator, Mapping

from lorasrv.monitoring.panels import ROWS, Panel

Json = Mapping[str, object]

_SCHEMA_VERSION = 41
_COLUMNS = 24
_PANEL_WIDTH = 8
_PANEL_HEIGHT = 8
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> Json:
    """Returns the dashboard as Grafana's JSON."""
    return {
        "uid": "lorasrv",
        "title": "lorasrv",
        "description": "One base model, many adapters: traffic, latency, adapter residency, engine and errors.",
        "tags": ["lorasrv", "llm", "lora"],
        "schemaVersion": _SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource_variable(), _instance_variable()]},
        "panels": list(_panels()),
    }


def _panels() -> Iterator[Json]:
    top = 0
    panel_id = 0
    for row in ROWS:
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


def _instance_variable() -> Json:
    query = "label_values(lorasrv_build_info, instance)"
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
    sys.stdout.write(json.dumps(dashboard(), indent=2) + "\n")
