"""The dashboard asks only for what is exported, and for all of it."""

import json
import re
from dataclasses import dataclass, field
from importlib.resources import files

import pytest
from lorasrv.metrics import ServerMetrics
from lorasrv.monitoring.dashboard import dashboard

# families that no panel needs, each with its reason
NOT_ON_THE_DASHBOARD = {
    # ids joined by commas, made for request routers
    "lorasrv_lora_requests_info",
}
# labels that Prometheus adds to what it scrapes, and the one of histogram buckets
LABELS_OF_PROMETHEUS = {"instance"}
AGGREGATIONS = {"sum", "topk"}
FUNCTIONS = {"rate", "histogram_quantile"}
TOKEN = re.compile(r'\s*(?:(?P<name>[a-zA-Z_]\w*)|(?P<string>"[^"]*")|(?P<number>\d+(?:\.\d+)?)|(?P<mark>=~|!=|.))')
BRACKETS = {")": "(", "}": "{", "]": "["}


@dataclass
class Asked:
    """What one expression names."""

    metrics: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)
    rated: set[str] = field(default_factory=set)


def parse(expression: str) -> Asked:
    """Reads PromQL far enough to know every name in it; fails on anything it does not know."""
    asked = Asked()
    tokens = list(TOKEN.finditer(expression.replace("$__rate_interval", "rate_interval")))
    texts = [match[0].strip() for match in tokens]
    opened: list[tuple[str, str]] = []
    for index, (match, text) in enumerate(zip(tokens, texts, strict=True)):
        following = texts[index + 1] if index + 1 < len(texts) else ""
        if text in BRACKETS:
            assert opened, expression
            assert opened.pop()[0] == BRACKETS[text], expression
        elif text in BRACKETS.values():
            opened.append((text, texts[index - 1] if index else ""))
        elif match["name"]:
            read_name(text, following, opened, asked)
        elif not match["string"] and not match["number"]:
            assert text in {"=", "=~", "!=", ",", "/", "*"}, (text, expression)
    assert not opened, expression
    return asked


def read_name(text: str, following: str, opened: list[tuple[str, str]], asked: Asked) -> None:
    """Decides by where it stands what a name is."""
    bracket, before = opened[-1] if opened else ("", "")
    if bracket == "[":
        assert text == "rate_interval"
    elif bracket == "{" or before == "by":
        asked.labels.add(text)
    elif text in {"by", "or"}:
        assert following not in {"", ")"}
    elif following == "(" or following == "by":
        assert text in AGGREGATIONS | FUNCTIONS, text
    else:
        asked.metrics.add(text)
        assert following == "{", f"{text} is not limited to the chosen instances"
        if before == "rate":
            asked.rated.add(text)


def panels() -> list[dict]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


@pytest.fixture
def exported(exercised: ServerMetrics) -> dict[str, tuple[str, set[str]]]:
    """Sample name -> (name and type of its family, labels)."""
    found: dict[str, tuple[str, str, set[str]]] = {}
    for family in exercised.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, (family.name, family.type, set()))[2].update(sample.labels)
    return found


def test_reader_knows_what_an_expression_names():
    asked = parse('topk(2, sum by (a, b) (rate(x_total{c="d", e!="f"}[$__rate_interval])) or 0 * sum (y{g=~"h"}))')
    assert asked == Asked(metrics={"x_total", "y"}, labels={"a", "b", "c", "e", "g"}, rated={"x_total"})


@pytest.mark.parametrize("wrong", ["sum(x{)}", "rate(x{}[5m])", "sum(x)", "frob(x{})", "sum(x{}", "x{} % y{}"])
def test_reader_refuses_what_it_does_not_know(wrong):
    with pytest.raises(AssertionError):
        parse(wrong)


@pytest.mark.parametrize("expression", expressions())
def test_expression_names_what_is_exported(expression, exported):
    asked = parse(expression)
    assert asked.metrics <= exported.keys()
    labels = set().union(*(exported[name][2] for name in asked.metrics)) | LABELS_OF_PROMETHEUS
    assert asked.labels <= labels
    counted = {name for name in asked.metrics if exported[name][1] in {"counter", "histogram"}}
    # a counter alone says nothing, and a rate of a gauge is wrong
    assert counted == asked.rated
    if "histogram_quantile" in expression:
        assert "le" in asked.labels


def test_every_family_is_watched(exported):
    asked = set().union(*(parse(expression).metrics for expression in expressions()))
    watched = {exported[name][0] for name in asked}
    ours = {family for family, _, _ in exported.values()}
    assert ours - watched == NOT_ON_THE_DASHBOARD


def test_legends_name_labels_of_their_expression():
    for panel in panels():
        for target in panel["targets"]:
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert legend <= parse(target["expr"]).labels, panel["title"]


def test_panels_can_be_read_by_a_stranger():
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)
    for panel in panels():
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_panels_do_not_overlap():
    cells = [
        (x, y)
        for position in (panel["gridPos"] for panel in dashboard()["panels"])
        for x in range(position["x"], position["x"] + position["w"])
        for y in range(position["y"], position["y"] + position["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def test_rows_and_variables():
    rows = [panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"]
    assert rows == ["Overview", "Adapters", "Engine", "Errors"]
    variables = {variable["name"]: variable["type"] for variable in dashboard()["templating"]["list"]}
    assert variables == {"datasource": "datasource", "instance": "query"}


def test_committed_file_is_what_the_panels_say():
    committed = json.loads(files("lorasrv.monitoring").joinpath("grafana.json").read_text())
    assert committed == dashboard(), "python -m lorasrv.monitoring.dashboard > server/lorasrv/monitoring/grafana.json"
