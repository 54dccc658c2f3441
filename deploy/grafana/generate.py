"""Writes the Grafana dashboard, `schoolhouse.json`, from the panels that the web page and `schoolhouse top` show, too.

python deploy/grafana/generate.py
"""

import json
from pathlib import Path
from typing import Any

from schoolhouse_server.observe import panels
from schoolhouse_server.observe.panels import Panel

DASHBOARD = Path(__file__).with_name("schoolhouse.json")
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_NOW = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "none"}
_LINES = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
_HIDDEN = {"excludeByName": {"Time": True, "instance": True, "job": True, "__name__": True}}
_FRAME = {
    "title": "Schoolhouse",
    "uid": "schoolhouse",
    "description": "Teachers, their replicas, and the jobs that share them.",
    "tags": ["schoolhouse"],
    "schemaVersion": 39,
    "editable": True,
    "graphTooltip": 1,  # the pointer stands at the same time on all panels
    "refresh": "10s",
    "time": {"from": "now-30m", "to": "now"},
}
_CHOICE = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}}
_VARIABLES = {
    "teacher": "label_values(schoolhouse_wanted_replicas, teacher)",
    "replica": 'label_values(schoolhouse_replica_info{teacher=~"$teacher"}, replica)',
    "job": 'label_values(schoolhouse_job_weight{teacher=~"$teacher"}, job_name)',
}


def dashboard() -> str:
    """The text of the file, with a line for each panel."""
    tiles, replicas, jobs = (
        [
            _panel("stat", one, "", instant=True, range=False) | {"options": _NOW | {"graphMode": "none"}}
            for one in panels.TILES
        ],
        [_chart(one) for one in panels.REPLICA_CHARTS],
        [_chart(one) for one in panels.JOB_CHARTS],
    )
    made: list[dict[str, Any]] = []
    y = 0
    for title, members, width in (("Now", tiles, 3), ("Replicas", [*replicas, _table()], 8), ("Jobs", jobs, 8)):
        made.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _at(0, y, 24, 1)})
        for i, one in enumerate(members):
            down, across = divmod(i, 24 // width)
            made.append(one | {"gridPos": _at(across * width, y + 1 + down * width, width, width)})
        y += 1 + -(-len(members) * width // 24) * width
    frame = _FRAME | {"templating": {"list": [_CHOICE, *(_variable(*one) for one in _VARIABLES.items())]}}
    lines = ",\n".join(json.dumps({"id": i} | one) for i, one in enumerate(made, 1))
    return f'{json.dumps(frame)[:-1]}, "panels": [\n{lines}\n]}}\n'


def _variable(name: str, query: str) -> dict[str, Any]:
    asked = {"definition": query, "query": {"query": query, "refId": name}, "refresh": 2, "sort": 1}
    chosen = {"multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return {"name": name, "label": name.capitalize(), "type": "query", "datasource": _SOURCE} | asked | chosen


def _chart(panel: Panel) -> dict[str, Any]:
    made = _panel("timeseries", panel, " / ".join(f"{{{{{label}}}}}" for label in panel.by), by=panel.by)
    stacked = {"stacking": {"mode": "normal"}} if panel.stacked else {}
    made["fieldConfig"]["defaults"]["custom"] = {"fillOpacity": 10, "showPoints": "never"} | stacked
    return made | {"options": _LINES}


def _panel(kind: str, panel: Panel, legend: str, by: tuple[str, ...] = (), **how: bool) -> dict[str, Any]:
    most = {"max": panel.unit.most / panel.unit.scale} if panel.unit.most else {}
    zero = " or vector(0)" if not by and panel.by == ("error",) else ""  # there is no metric before the first error
    queries = [(f"{legend} {end}".strip(), one.promql(by) + zero) for end, one in panel.lines()]
    return {
        "type": kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit.grafana, "min": 0} | most, "overrides": []},
        "targets": [_target(i, query, legend) | how for i, (legend, query) in enumerate(queries)],
    }


def _table() -> dict[str, Any]:
    asked = [
        f'schoolhouse_{name}{{teacher=~"$teacher",replica=~"$replica"}}' for name in ("replica_info", "uptime_seconds")
    ]
    return {
        "type": "table",
        "title": "Replicas",
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": "short", "min": 0}, "overrides": []},
        "transformations": [{"id": "merge", "options": {}}, {"id": "organize", "options": _HIDDEN}],
        "targets": [
            _target(i, query, "") | {"instant": True, "range": False, "format": "table"}
            for i, query in enumerate(asked)
        ],
    }


def _target(i: int, query: str, legend: str) -> dict[str, Any]:
    return {"refId": "ABC"[i], "datasource": _SOURCE, "expr": query, "legendFormat": legend}


def _at(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


if __name__ == "__main__":
    DASHBOARD.write_text(dashboard())
