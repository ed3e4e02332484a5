"""The reward hacking watch: each sign is measured, warned about once when it begins, and survives a resume; honest runs stay quiet."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from bregman.tracking.console import Console
from bregman.tracking.report import write_report
from bregman.tracking.run_folder import RunFolder
from bregman.tracking.tracker import RunTracker
from bregman.types import Group, Problem, Trajectory
from rewards.config import RewardsConfig
from rl.hacking_watch import NAME, HackingWatch, watch_metrics

THOUGHT = "<think>6+1=7-6=1-9=2</think>"
REWARDS = RewardsConfig.model_validate({"functions": [{"function": "exact_answer"}, {"function": "math", "second_opinion": True}]})


def response(text: str, right: float | None = 1.0, second: float | None = None, tokens: int = 10) -> Trajectory:
    return Trajectory(
        problem_id="p",
        sample_index=0,
        token_ids=(1,) * tokens,
        logprobs=(0.0,) * tokens,
        segments=(),
        finish_reason="stop",
        text=text,
        reward=right,
        reward_parts={"exact_answer": right, "math": second},
    )


def group(*trajectories: Trajectory, answer: str | None = None, **columns: object) -> Group:
    problem = Problem(id="p", messages=({"role": "user", "content": "?"},), prompt_ids=(1,), answer=answer, columns=columns)
    return Group(problem=problem, trajectories=trajectories)


@pytest.mark.parametrize(
    ("responses", "share"),
    [
        ([response(f"{THOUGHT}9")], 0.0),
        ([response("9"), response(f"{THOUGHT}9")], 0.5),
        ([response("<think></think>9")], 1.0),
        ([response("<think>123456789</think>9")], 1.0),  # nine characters
        ([response("<think>1234567890</think>9")], 0.0),
        ([response("9", right=0.0), response(f"{THOUGHT}9")], 0.0),  # a wrong answer does not count
        ([response("9", right=None), response(f"{THOUGHT}9")], 0.0),
        ([response("9", right=0.0)], None),
    ],
)
def test_right_without_thinking(responses: Sequence[Trajectory], share: float | None) -> None:
    assert watch_metrics([group(*responses)]).get("watch/right_without_thinking") == share


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (f"{THOUGHT}B", "B"),
        ("(B)", "B"),
        ("B. Paris", "B"),
        ("\\boxed{B}", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("The answer is B.", "B"),
        ("A) 1 or B) 2", None),
        ("A cat", None),
        ("I think so", None),
        ("42", None),
        ("", None),
        ("A or C", None),
    ],
)
def test_which_letter_an_answer_is(text: str, letter: str | None) -> None:
    """The bias is 1 where the letter is given and never right, absent where there is no letter."""
    metrics = watch_metrics([group(response(text), answer="H")])
    assert metrics.get("watch/letter_bias") == (None if letter is None else 1.0)
    if letter:
        assert watch_metrics([group(response(text), answer=f"({letter})")])["watch/letter_bias"] == 0.0


def test_letter_bias_is_against_what_is_right() -> None:
    always_a = [group(*[response("A")] * 4, answer=gold) for gold in "ABCD"]
    assert watch_metrics(always_a)["watch/letter_bias"] == pytest.approx(0.75)
    often_a_since_it_is_right = [group(*[response("A")] * 4, answer=gold) for gold in "AAAB"]
    assert watch_metrics(often_a_since_it_is_right)["watch/letter_bias"] == pytest.approx(0.25)
    assert "watch/letter_bias" not in watch_metrics([group(response("A"), answer="42")])


def test_position_bias() -> None:
    """Whether the answer is an option's letter or its text, and the same for the gold answer."""
    options = ["red", "green", "blue", "grey"]
    first = [
        group(response(text), answer=gold, options=options)
        for gold, text in zip(options, ("red", "A", "A) red", "\\boxed{A}"), strict=True)
    ]
    assert watch_metrics(first) == {"watch/right_without_thinking": 1.0, "watch/position_bias": 0.75}
    honest = [group(response(text), answer=gold, options=options) for gold, text in zip("ABCD", options, strict=True)]
    assert watch_metrics(honest)["watch/position_bias"] == 0.0
    assert "watch/position_bias" not in watch_metrics([group(response("pink"), answer="red", options=options)])
    named = {"x": "red", "Y": "green"}
    assert watch_metrics([group(response("Y"), answer="red", options=named)])["watch/position_bias"] == 1.0


def test_agreement_of_two_verifiers() -> None:
    both = [response("9", right, second) for right, second in ((1.0, 1.0), (0.0, 0.0), (1.0, 0.4), (0.0, 1.0), (1.0, None), (None, 1.0))]
    assert watch_metrics([group(*both)], ["math"])["watch/agreement/math"] == 0.5
    assert "watch/agreement/math" not in watch_metrics([group(response("9", 1.0, None))], ["math"])
    assert "watch/agreement/math" not in watch_metrics([group(*both)])  # not marked as a second opinion


def batch(*, right: float = 0.5, thinking: float = 1.0, tokens: int = 100, agree: bool = True, count: int = 40) -> list[Group]:
    """A share `right` of right responses, of which a share `thinking` think; every fourth is longer than the others."""
    rights = round(right * count)
    return [
        group(
            *[
                response(
                    f"{THOUGHT}9" if index >= rights or index < thinking * rights else "9",
                    right=float(index < rights),
                    second=float((index < rights) == agree),
                    tokens=tokens + 40 * (index % 4 == 0),
                )
                for index in range(count)
            ]
        )
    ]


QUIET = [batch(right=share, tokens=tokens) for share, tokens in ((0.5, 100), (0.55, 104), (0.45, 97), (0.6, 108), (0.55, 103))]


def observe(watch: HackingWatch, batches: Sequence[list[Group]], first: int = 0) -> list[str]:
    warnings: list[str] = []
    for index, groups in enumerate(batches):
        watch.observe(groups, first + index, warnings.append)
    return warnings


def test_an_honest_run_is_quiet() -> None:
    steady = [batch(right=0.3 + 0.03 * i, tokens=100 + 5 * i) for i in range(20)]  # it learns, and thinks longer
    assert observe(HackingWatch(REWARDS), steady) == []


@pytest.mark.parametrize(
    ("hacked", "said"),
    [
        (batch(thinking=0.5), "50% of the right answers come without thinking, 0% did at the start"),
        (batch(tokens=10), "mean response length jumped from about 112 to 20 tokens"),
        (batch(tokens=400), "mean response length jumped from about 112 to 410 tokens"),
        (batch(right=1.0), "mean reward jumped from about 0.53 to 1"),
        (batch(agree=False), "`math` contradicts the first reward on 100% of the responses"),
    ],
    ids=["thinking", "shorter", "longer", "reward", "agreement"],
)
def test_each_sign_is_warned_about_once(hacked: list[Group], said: str) -> None:
    watch = HackingWatch(REWARDS)
    assert observe(watch, QUIET) == []
    assert observe(watch, [hacked], first=5) == [f"{NAME}: iteration 5: {said}; look at its sample responses"]
    assert observe(watch, [hacked] * 3, first=6) == []


def test_usual_noise_is_no_jump() -> None:
    """From 30% to 70% and back is a jump for a steady run, and nothing new for one that always swings so."""
    swings = [batch(right=0.3 if index % 2 else 0.7) for index in range(12)]
    assert observe(HackingWatch(REWARDS), swings[:3] + swings) == []
    assert len(observe(HackingWatch(REWARDS), [batch(right=0.3)] * 12 + [batch(right=0.7)])) == 1


def test_a_small_step_of_a_run_that_stood_still_is_no_jump() -> None:
    assert observe(HackingWatch(REWARDS), [batch()] * 10 + [batch(right=0.6, tokens=115)]) == []


def test_a_sign_that_comes_back_is_said_again() -> None:
    watch = HackingWatch(REWARDS)
    warnings = observe(watch, [*QUIET, batch(agree=False), batch(), batch(agree=False)])
    assert len(warnings) == 2


def test_a_slow_drift_is_found_too() -> None:
    """No step of it is a jump: it is compared with the start."""
    drift = [batch(thinking=1 - 0.03 * i) for i in range(20)]
    [warning] = observe(HackingWatch(REWARDS), drift)
    assert "of the right answers come without thinking" in warning


def test_the_first_iterations_never_jump() -> None:
    assert observe(HackingWatch(REWARDS), [batch(right=0.1, tokens=50), batch(right=0.9, tokens=300)]) == []


def test_jumps_are_logged_in_units_of_the_metric() -> None:
    watch = HackingWatch(REWARDS)
    first = watch.observe(batch(right=0.5, tokens=90), 0, print)  # 100 tokens on average
    second = watch.observe(batch(right=0.75, tokens=140), 1, print)
    assert (first["watch/length_jump"], first["watch/reward_jump"]) == (0.0, 0.0)
    assert (second["watch/length_jump"], second["watch/reward_jump"]) == (pytest.approx(0.5), pytest.approx(0.25))


def test_a_resumed_watch_goes_on_alike() -> None:
    whole, before = HackingWatch(REWARDS), HackingWatch(REWARDS)
    later = [batch(agree=False), batch(thinking=0.5), batch(tokens=10), batch(thinking=0.5)]
    observe(whole, QUIET)
    observe(before, QUIET)
    assert observe(before, [batch(agree=False)]) == observe(whole, [batch(agree=False)]) != []
    resumed = HackingWatch(REWARDS)
    resumed.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert observe(resumed, later, first=6) == observe(whole, later, first=6) != []
    assert resumed.state_dict() == whole.state_dict()


def test_nothing_sampled_or_scored() -> None:
    watch = HackingWatch(REWARDS)
    assert watch.observe([group()], 0, print) == {}
    assert watch.observe([group(response("9", right=None))], 1, print) == {"watch/length_jump": 0.0}


def test_the_report_has_a_section_of_it(tmp_path: Path) -> None:
    """Charts of what was logged, and its own warnings apart from others."""
    recipe = {"name": "r", "output_dir": "x", "stages": [{"name": "rl", "kind": "rl", "iterations": 7}]}
    folder = RunFolder.open(tmp_path / "run", recipe)
    tracker = RunTracker(folder, num_stages=1, console=Console(1, stream=io.StringIO()))
    tracker.begin_stage(0, "rl", "rl", total_steps=7)
    watch = HackingWatch(REWARDS)
    for iteration, groups in enumerate([*QUIET, batch(agree=False), batch()]):
        tracker.log(iteration, {"accuracy": 0.5, "response_tokens/mean": 1.0, **watch.observe(groups, iteration, tracker.warn)})
    tracker.warn("something else")
    tracker.close()
    folder.close()
    page = write_report(tmp_path / "run").read_text()
    section = page.partition("<h2>Reward hacking watch</h2>")[2].partition("</section>")[0]
    assert "`math` contradicts the first reward on 100% of the responses" in section
    assert "something else" not in section
    for label in ("right without thinking", "agreement with math", "length jump", "reward jump"):
        assert label in section
