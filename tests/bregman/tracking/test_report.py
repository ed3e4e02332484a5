"""The report: complete, self-contained, safe with any text, and readable at any point of a run."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_run import RECIPE, record_run

from bregman.tracking.charts import is_rl, stage_charts, write_learning_curve
from bregman.tracking.report import write_report
from bregman.tracking.run_data import Curve, StageData, read_run, sample_rollouts
from bregman.tracking.run_folder import RunFolder

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Balance(HTMLParser):
    """Collects tags and text, and checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not {"src", "href", "onload", "onclick"} & {name for name, _ in attrs}, (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(path: Path) -> Balance:
    page = Balance()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def test_a_finished_run(fake_run: Path) -> None:
    path = write_report(fake_run)
    assert path == fake_run / "report.html"
    page = read_page(path)
    for wanted in (
        "tiny thinking <demo>",
        "6 of 6 stages finished",
        "0.970",
        "60.5",
        "Sample ledger",
        "Loss per trained token",
        "after joint_sft",
    ):
        assert wanted in page.text, wanted
    for wanted in ("start policy: pass rate 0.32", "iterations: 40", "616=9? <b>&", "gold answer", "reward: answer", "iteration 39"):
        assert wanted in page.text, wanted
    assert page.text.count("right problem") >= 3 and page.text.count("wrong problem") >= 3


def test_it_needs_no_network_and_runs_nothing(fake_run: Path) -> None:
    path = write_report(fake_run)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(|<link|<img|<iframe", text)
    assert "script" not in read_page(path).tags


def test_text_of_models_is_escaped_and_long_text_is_cut(tmp_path: Path) -> None:
    from bregman.tracking.report import _sample

    row = {
        **{name: "<script>alert(1)</script>" for name in ("problem_id", "finish_reason", "fate", "answer", "reward_error")},
        "prompt": "<img src=x onerror=alert(1)>" + "p" * 9000,
        "images": ["../<b>.png"],
        "response": "</pre><b>",
        "reward": 0.0,
        "reward_parts": {"<i>": None, "answer": 0.0},
        "advantage": None,
        "sample_index": 0,
        "num_tokens": 3,
    }
    html = _sample(row, tmp_path)
    assert re.findall(r"<(?!/?(?:div|span|pre|dl|dt|dd|figure)\b)", html) == []
    assert "characters left out" in html and len(html) < 9000


@pytest.mark.parametrize(("done", "wanted"), [(7, "7 of 40 steps"), (1, "1 of 40 steps"), (0, "not begun")])
def test_an_unfinished_run(tmp_path: Path, done: int, wanted: str) -> None:
    page = read_page(write_report(record_run(tmp_path / "run", iterations_done=done)))
    assert "4 of 6 stages finished" in page.text
    assert wanted in page.text
    assert ("Accuracy after each stage" in page.text) == (done == 0)
    if done == 7:  # killed while writing a line
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"time": 1, "sta')
        assert "7 of 40 steps" in read_page(write_report(tmp_path / "run")).text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", RECIPE).close()
    page = read_page(write_report(tmp_path / "run"))
    assert "0 of 6 stages finished" in page.text
    assert page.text.count("no data yet") == 2


def test_samples_are_early_middle_and_late_and_of_both_kinds(fake_run: Path) -> None:
    samples = sample_rollouts(RunFolder(fake_run), "rl")
    assert [step for step, _ in samples] == [0, 20, 39]
    assert [[row["reward"] for row in rows] for _, rows in samples] == [[1.0, 0.0]] * 3
    assert [step for step, _ in sample_rollouts(RunFolder(fake_run), "after_rl")] == [0]
    assert sample_rollouts(RunFolder(fake_run), "joint_sft") == []


def test_later_rows_of_a_step_win(tmp_path: Path) -> None:
    rows = ['{"time": 1, "stage": "rl", "step": 1, "loss": 1.0, "a": 5}', '{"time": 2, "stage": "rl", "step": 0, "loss": 3.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*rows, '{"time": 3, "stage": "rl", "step": 1, "loss": null}']) + "\n")
    [stage] = read_run(RunFolder(tmp_path)).stages
    assert {name: (list(curve.steps), list(curve.values)) for name, curve in stage.curves.items()} == {
        "loss": ([0, 1], [3.0, None]),
        "a": ([1], [5]),
    }


def test_learning_curve_ends_with_the_evaluation_after_rl(fake_run: Path, tmp_path: Path) -> None:
    path = write_learning_curve(fake_run, tmp_path / "docs" / "learning_curve.svg")
    text = path.read_text()
    ElementTree.fromstring(text)
    assert "held-out problems 0.97 at 40" in text
    assert "after joint_sft 0.19 at 0" in text
    assert os.path.getsize(path) < 60_000


def _begun(kind: str, *names: str) -> StageData:
    curves = {name: Curve(steps=(0, 1), values=(0.5, 0.6)) for name in names}
    return StageData(name=kind, kind=kind, planned_steps=None, summary=None, curves=curves)


@pytest.mark.parametrize(
    ("stage", "titles"),
    [
        (_begun("merge"), []),
        (_begun("rejection", "fate/kept"), []),  # it took the samples of another stage
        (_begun("rejection", "response_tokens/mean", "accuracy"), ["Share of samples, by chunk", "Mean response length, tokens"]),
        (
            _begun("dpo", "loss", "dpo/margins", "dpo/accuracies"),
            ["Loss of a pair, nats", "Implicit reward of an answer: beta x log-ratio, nats", "Share of pairs in their order"],
        ),
        (_begun("sft", "loss"), ["Loss per trained token, nats"]),
    ],
)
def test_stages_that_sample_or_prefer_are_not_taken_for_rl(stage: StageData, titles: list[str]) -> None:
    assert not is_rl(stage)
    assert [re.search('aria-label="(.*?)"', figure)[1] for figure in stage_charts(stage)] == titles
