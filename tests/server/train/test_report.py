"""The page about a run: it is whole, holds every curve, refers to nothing outside, and shows ranks over time."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from lorasrv.train.history import History
from lorasrv.train.observer import StepReport, StepResult
from lorasrv.train.report import _ticks, render_report

MODULES = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")]


def rows(*, with_ranks: bool) -> list[dict[str, object]]:
    made: list[dict[str, object]] = []
    for step in range(1, 11):
        row: dict[str, object] = {
            "step": step,
            "loss": 3 / step,
            "learning_rate": 1e-4 * step,
            "gradient_norm": 1.0,
            "tokens": 100,
            "seconds": 0.5,
        }
        if step % 5 == 0:
            row["held_out_loss"] = 2.0 + step
        if with_ranks and step in (1, 6):
            row["ranks"] = dict(zip(MODULES, (4, 4, 4, 4) if step == 1 else (4, 0, 1, 3), strict=True))
        made.append(row)
    return made


class Balanced(HTMLParser):
    """Fails where tags do not close in order."""

    VOID = ("meta", "input", "line", "polyline", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        del attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_a_page_is_whole_and_stands_alone() -> None:
    page = render_report(
        "Poet <1>", rows(with_ranks=False), facts={"data": "a & b"}, modules=MODULES, held_out_before=9.0
    )
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "Poet &lt;1&gt;" in page
    assert "a &amp; b" in page
    assert page.count("<polyline") == 5
    assert page.count('class="dot"') == 3
    assert not re.search(r"(src|href)=|url\(|@import|https?:", page)
    assert "Ranks" not in page


def test_ranks_over_time() -> None:
    page = render_report("Poet", rows(with_ranks=True), facts={}, modules=MODULES)
    found = re.search(r'id="frames">(.*?)</script>', page)
    assert found is not None
    assert json.loads(found[1]) == [{"step": 1, "ranks": [4, 4, 4, 4]}, {"step": 6, "ranks": [4, 0, 1, 3]}]
    assert page.count("data-module=") == 4
    assert re.findall(r"<th>([^<]*)</th>", page) == ["", "q", "up", "layer 0", "layer 1"]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1e-6, 2.1e-4), (2.93, 3.01), (-5.0, 70.0), (1.0, 12345.0)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low <= tick <= high for tick in ticks)


def test_a_history_goes_on_without_what_was_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    history = History(path)
    history.start(0)
    for step in (1, 2, 3):
        result = StepResult(loss=1.0 / step, learning_rate=1e-3, gradient_norm=2.0, ranks={})
        history.append(
            StepReport(
                step=step,
                tokens=10,
                seconds=0.1,
                seconds_left=1.0,
                memory_bytes=5,
                num_shrinks=0,
                jobs={"a": result},
                evaluations={"a": 5.0} if step == 2 else {},
            ),
            "a",
            ranks={"m": 3} if step == 1 else None,
        )
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in history.rows()] == [1, 2, 3]
    history.start(2)
    assert [(row["step"], row.get("held_out_loss"), row.get("ranks")) for row in history.rows()] == [
        (1, None, {"m": 3}),
        (2, 5.0, None),
    ]
