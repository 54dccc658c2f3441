"""The Grafana dashboard: of Grafana's model, and about the metrics that there are."""

import json
import re
import runpy
from pathlib import Path

import pytest
from loads import sets
from prometheus_client.parser import text_string_to_metric_families
from schoolhouse_server.observe import metrics

GRAFANA = Path(__file__).parents[2] / "deploy/grafana"
DASHBOARD = json.loads((GRAFANA / "schoolhouse.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
NAME = re.compile(r"\bschoolhouse_\w+")
FAMILIES = list(text_string_to_metric_families(metrics.exposition(sets).decode()))
SAMPLES = {sample.name for family in FAMILIES for sample in family.samples}
LABELS = {name for family in FAMILIES for sample in family.samples for name in sample.labels}


def queries_of_variables():
    return [one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]


def test_the_file_is_what_the_panels_say():
    made = runpy.run_path(str(GRAFANA / "generate.py"))["dashboard"]()
    assert (GRAFANA / "schoolhouse.json").read_text() == made, "run python deploy/grafana/generate.py"


def test_it_is_a_dashboard():
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["title"] == "Schoolhouse"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) > 10
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat", "table")
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)


def test_panels_do_not_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_each_metric_that_is_asked_for_exists():
    asked = {name for text in (*EXPRESSIONS, *queries_of_variables()) for name in NAME.findall(text)}
    assert asked <= SAMPLES
    assert len(asked) > 20


def test_each_metric_is_shown():
    asked = {name for text in EXPRESSIONS for name in NAME.findall(text)}
    for family in FAMILIES:
        assert asked & {sample.name for sample in family.samples}, family.name


def test_labels_exist():
    for text in EXPRESSIONS:
        selectors = re.findall(r"\{([^}]*)\}", text)
        named = {name for selector in selectors for name in re.findall(r"(\w+)=~?\"", selector)}
        named |= {name.strip() for group in re.findall(r"by \(([^)]*)\)", text) for name in group.split(",")}
        assert named <= LABELS | {"le"}, text


def test_counters_are_read_as_rates():
    for text in EXPRESSIONS:
        for name in re.findall(r"(\w+)\(?schoolhouse_\w+_total", text):
            assert name == "rate"
        assert text.count("(") == text.count(")")


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: f"{panel['id']}-{panel['title']}")
def test_the_data_source_is_chosen_by_who_looks(panel):
    for one in (panel, *panel["targets"]):
        assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_variables():
    kinds = {one["name"]: one["type"] for one in DASHBOARD["templating"]["list"]}
    assert kinds == {"datasource": "datasource", "teacher": "query", "replica": "query", "job": "query"}
