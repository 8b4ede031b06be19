"""The dashboards ask only for what is exported, and for all of it."""

import json
import re
from dataclasses import dataclass, field
from importlib.resources import files

import pytest
from lorasrv.monitoring.dashboard import DASHBOARDS

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


def panels(name: str) -> list[dict]:
    return [panel for panel in DASHBOARDS[name].as_json()["panels"] if panel["type"] != "row"]


def expressions(name: str) -> list[str]:
    return [target["expr"] for panel in panels(name) for target in panel["targets"]]


@pytest.fixture
def exported(exercised, exercised_training) -> dict[str, dict[str, tuple[str, str, set[str]]]]:
    """By dashboard: sample name -> (name and type of its family, labels)."""
    found: dict[str, dict[str, tuple[str, str, set[str]]]] = {}
    for name, metrics in zip(DASHBOARDS, (exercised, exercised_training), strict=True):
        samples = found[name] = {}
        for family in metrics.registry.collect():
            for sample in family.samples:
                samples.setdefault(sample.name, (family.name, family.type, set()))[2].update(sample.labels)
    return found


def test_reader_knows_what_an_expression_names():
    asked = parse('topk(2, sum by (a, b) (rate(x_total{c="d", e!="f"}[$__rate_interval])) or 0 * sum (y{g=~"h"}))')
    assert asked == Asked(metrics={"x_total", "y"}, labels={"a", "b", "c", "e", "g"}, rated={"x_total"})


@pytest.mark.parametrize("wrong", ["sum(x{)}", "rate(x{}[5m])", "sum(x)", "frob(x{})", "sum(x{}", "x{} % y{}"])
def test_reader_refuses_what_it_does_not_know(wrong):
    with pytest.raises(AssertionError):
        parse(wrong)


@pytest.mark.parametrize(("name", "expression"), [(name, one) for name in DASHBOARDS for one in expressions(name)])
def test_expression_names_what_is_exported(name, expression, exported):
    asked, samples = parse(expression), exported[name]
    assert asked.metrics <= samples.keys()
    labels = set().union(*(samples[metric][2] for metric in asked.metrics)) | LABELS_OF_PROMETHEUS
    assert asked.labels <= labels
    counted = {metric for metric in asked.metrics if samples[metric][1] in {"counter", "histogram"}}
    # a counter alone says nothing, and a rate of a gauge is wrong
    assert counted == asked.rated
    if "histogram_quantile" in expression:
        assert "le" in asked.labels


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_family_is_watched(name, exported):
    samples = exported[name]
    asked = set().union(*(parse(expression).metrics for expression in expressions(name)))
    watched = {samples[metric][0] for metric in asked}
    ours = {family for family, _, _ in samples.values()}
    assert ours - watched == NOT_ON_THE_DASHBOARD & ours
    assert DASHBOARDS[name].present in samples


@pytest.mark.parametrize("name", DASHBOARDS)
def test_legends_name_labels_of_their_expression(name):
    for panel in panels(name):
        for target in panel["targets"]:
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert legend <= parse(target["expr"]).labels, panel["title"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_can_be_read_by_a_stranger(name):
    titles = [panel["title"] for panel in panels(name)]
    assert len(set(titles)) == len(titles)
    for panel in panels(name):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_do_not_overlap(name):
    found = DASHBOARDS[name].as_json()["panels"]
    cells = [
        (x, y)
        for position in (panel["gridPos"] for panel in found)
        for x in range(position["x"], position["x"] + position["w"])
        for y in range(position["y"], position["y"] + position["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    ids = [panel["id"] for panel in found]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("grafana.json", ["Overview", "Adapters", "Engine", "Errors"]),
        ("grafana_training.json", ["Learning", "Ranks", "Machine"]),
    ],
)
def test_rows_and_variables(name, rows):
    found = DASHBOARDS[name].as_json()
    assert [panel["title"] for panel in found["panels"] if panel["type"] == "row"] == rows
    variables = {variable["name"]: variable["type"] for variable in found["templating"]["list"]}
    assert variables == {"datasource": "datasource", "instance": "query"}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_committed_file_is_what_the_panels_say(name):
    committed = json.loads(files("lorasrv.monitoring").joinpath(name).read_text())
    assert committed == DASHBOARDS[name].as_json(), "python -m lorasrv.monitoring.dashboard"


def test_dashboards_are_told_apart():
    assert len({dashboard.uid for dashboard in DASHBOARDS.values()}) == len(DASHBOARDS)
