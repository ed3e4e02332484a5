"""The demo's task: what its verifier accepts, what its demonstrations do, and that held-out puzzles stay held out."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TASK = Path(__file__).parents[2] / "recipes" / "tiny_thinking" / "task.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_thinking_task", TASK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


task = _load()

MISS, HIT = "6+1=7-6=1-9=2", "6+1=7+6=3-3=0"


def _score(metric: str, completion: Any, digits: Any = "616", target: int = 9) -> float:
    prompts = [[{"role": "user", "content": f"{digits}={target}?"}]]
    (score,) = getattr(task, metric)(prompts=prompts, completions=[completion], digits=[digits], target=[target], id=["a"])
    return score


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("6*1+6", 0.0),  # 2
        ("6+1+6", 1.0),  # 3
        ("<think></think>6+1+6", 1.0),
        (f"<think>{HIT}</think>6+1+6", 1.0),
        ("<think>\nnonsense\n</think>\n\n6+1+6\n", 1.0),  # thinking is ignored
        ("<think>6+1+6", 0.0),  # never closed
        ("<think>6+1+6</think>", 0.0),  # no answer
        ("<think>6+1+6</think>6+1-6", 0.0),
        ("</think>6+1+6", 1.0),
        ("6+1+6?", 0.0),
        ("6+1+6=3", 0.0),
        ("1+6+6", 0.0),  # the right value from other digits
        ("6+6+1", 0.0),
        ("6+1", 0.0),
        ("6/1+6", 0.0),
        ("6+1+6 6+1+6", 0.0),
        ("", 0.0),
    ],
)
def test_verifier(completion: str, score: float) -> None:
    assert _score("operator_search", completion, target=3) == score
    assert _score("operator_search", [{"role": "assistant", "content": completion}], digits=616, target=3) == score


@pytest.mark.parametrize(
    ("completion", "gave_up", "wrong_claim", "flawed"),
    [
        (f"<think>{HIT}</think>6+1+6", 0, 0, 0),
        ("<think>6+1=7-6=1-3=8\n6+1=7*6=2-3=9?</think>6+1*6", 1, 0, 0),
        ("<think>6+1=7-6=1-3=8\n6+1=7+6=3-3=0</think>6+1+6", 0, 0, 0),
        ("<think>6+1=7-6=1-3=8?</think>6+1*6", 1, 0, 1),  # answers with what it has not tried
        ("<think>6+1=7-6=1-3=8</think>6+1-6", 0, 1, 1),  # claims what its line refutes
        ("<think>6+1=7-6=1-3=0</think>6+1-6", 0, 1, 1),  # claims by a wrong check
        ("<think>6+1=7-6=3-3=0</think>6+1-6", 0, 1, 1),  # claims by wrong arithmetic
        (f"<think>{HIT}</think>6+1-6", 0, 1, 1),  # answers something else than it found
        (f"<think>{HIT}?</think>6+1+6", 1, 0, 1),  # gives up on a hit
        (f"<think>{HIT}\n6+1=7-6=1-3=8?</think>6+1-6", 1, 0, 1),  # goes on after a hit
        ("<think>6+1=7-6=1-9=2?</think>6+1-6", 1, 0, 1),  # another target
        ("<think>?</think>6+1-6", 1, 0, 1),
        ("<think></think>6+1+6", 0, 0, 1),
        (f"<think>{HIT}", 0, 0, 1),
        ("6+1+6", 0, 0, 1),
        ("6+1-6", 0, 0, 1),  # a direct answer claims nothing
    ],
)
def test_metrics(completion: str, gave_up: float, wrong_claim: float, flawed: float) -> None:
    assert _score("gave_up", completion, target=3) == gave_up
    assert _score("wrong_claim", completion, target=3) == wrong_claim
    assert _score("flawed_thinking", completion, target=3) == flawed


def test_attempt_line() -> None:
    assert task.attempt("616", "+-", 9) == MISS
    assert task.attempt("616", "++", 3) == HIT
    assert task.attempt("259", "-*", 4) == "2-5=7*9=3-4=9"  # modulo 10, also below zero


@pytest.fixture(scope="module")
def demonstrations() -> list[dict[str, Any]]:
    return list(task.long_cot_sft(seed=3, count=20_000))


def _taken_apart(row: dict[str, Any]) -> tuple[str, int, list[str], str, str]:
    """(digits, target, choices tried, mark at the end of thinking, completion)."""
    question, completion = (message["content"] for message in row["messages"])
    thought = completion.removeprefix("<think>").split("</think>")[0]
    tried = [line[1] + line[5] for line in thought.rstrip("?").split("\n")]
    return question[:3], int(question[4]), tried, thought[-1], completion


def test_demonstrations_are_what_they_claim(demonstrations: list[dict[str, Any]]) -> None:
    for row in demonstrations:
        digits, target, tried, mark, completion = _taken_apart(row)
        solved = _score("operator_search", completion, digits, target)
        assert solved == (mark != "?") == (task.value(digits, tried[-1]) == target)
        assert _score("gave_up", completion, digits, target) == 1.0 - solved
        assert _score("wrong_claim", completion, digits, target) == 0.0
        assert _score("flawed_thinking", completion, digits, target) == 0.0


def test_attempts_run_in_cyclic_order_from_every_start(demonstrations: list[dict[str, Any]]) -> None:
    starts = set()
    for row in demonstrations:
        _, _, tried, _, _ = _taken_apart(row)
        order = [task.CHOICES.index(choice) for choice in tried]
        assert order == [(order[0] + step) % 9 for step in range(len(order))]
        starts.add(order[0])
    assert starts == set(range(9))


def test_persistence_is_the_flaw(demonstrations: list[dict[str, Any]]) -> None:
    """After the first failed attempt, 0.9 x 0.7 of the demonstrations give up; of those after three, who are rarer, fewer."""
    after: dict[int, list[bool]] = {1: [], 4: []}
    for row in demonstrations:
        _, _, tried, mark, _ = _taken_apart(row)
        for failures, gave_up in after.items():
            if len(tried) > failures or (len(tried) == failures and mark == "?"):
                gave_up.append(len(tried) == failures)
    first, fourth = (sum(after[failures]) / len(after[failures]) for failures in (1, 4))
    assert first == pytest.approx(0.9 * 0.7, abs=0.015)
    still_fickle = 0.9 * 0.3**3 / (0.9 * 0.3**3 + 0.1)
    assert fourth == pytest.approx(still_fickle * 0.7, abs=0.04)


@pytest.mark.parametrize(("persistent", "give_up"), [(1.0, 0.7), (0.0, 0.0)])
def test_a_search_to_the_end_always_succeeds(persistent: float, give_up: float) -> None:
    for row in task.long_cot_sft(seed=0, count=500, persistent=persistent, give_up=give_up):
        digits, target, _, _, completion = _taken_apart(row)
        assert _score("operator_search", completion, digits, target) == 1.0


def test_direct_answers_are_right() -> None:
    for row in task.joint_sft(seed=1, count=500, arithmetic=0.0, attempts=0.0):
        question, answer = (message["content"] for message in row["messages"])
        assert row["source"] == "direct"
        assert _score("operator_search", answer, question[:3], int(question[4])) == 1.0


def test_worksheets_are_right() -> None:
    hits = lines = 0
    for row in task.joint_sft(seed=1, count=2_000, direct=0.0):
        asked, answered = (message["content"].split("\n") for message in row["messages"])
        for question, line in zip(asked, answered, strict=True):
            if row["source"] == "arithmetic":
                left, operator, right = question
                assert line == f"{question}={task.apply(int(left), operator, int(right))}"
            else:
                digits, choice, target = question[0:5:2], question[1:5:2], int(question[6])
                assert line == task.attempt(digits, choice, target)
                hits, lines = hits + line.endswith("=0"), lines + 1
    assert 0.5 < hits / lines < 0.6  # made to hit, or by chance


def test_held_out_puzzles_occur_in_no_training_row(demonstrations: list[dict[str, Any]]) -> None:
    held_out = {problem["id"] for problem in task.held_out_problems()}
    assert len(held_out) == 256
    seen = {problem["id"] for problem in task.train_problems(seed=0)}
    joint = list(task.joint_sft(seed=5, count=40_000))
    assert {row["source"] for row in joint} == {"direct", "arithmetic", "attempts"}
    for row in [*joint, *demonstrations]:
        text = "\n".join(message["content"] for message in row["messages"])
        seen |= {f"{digits}={target}?" for digits, target in re.findall(r"(\d{3})=(\d)\?", text)}
        seen |= {f"{a}{b}{c}={target}?" for a, b, c, target in re.findall(r"(\d)[+*-](\d)[+*-](\d)=(\d)", text)}
        seen |= {f"{a}{b}{c}={target}?" for a, b, c, target in re.findall(r"(\d)[+*-](\d)=\d[+*-](\d)=\d-(\d)=\d", text)}
    assert not seen & held_out


def test_problems_are_labelled_and_solvable() -> None:
    held_out, training = list(task.held_out_problems(seed=1)), list(task.train_problems(seed=2))
    assert held_out == list(task.held_out_problems(seed=9)) and held_out[:7] == list(task.held_out_problems(count=7))
    assert len({problem["id"] for problem in held_out + training}) == len(held_out) + len(training)
    for problem in held_out + training:
        values = [task.value(problem["digits"], choice) for choice in task.CHOICES]
        assert problem["solving_share"] == values.count(problem["target"]) / 9 > 0
        assert problem["difficulty"] == 1.0 - problem["solving_share"]
        assert problem["num_digits"] == 3
        assert problem["messages"] == [{"role": "user", "content": f"{problem['digits']}={problem['target']}?"}]
    with pytest.raises(ValueError, match="256"):
        list(task.held_out_problems(count=257))


@pytest.mark.parametrize("name", ["joint_sft", "long_cot_sft", "train_problems"])
def test_generators_repeat_and_give_json(name: str) -> None:
    generator = getattr(task, name)
    rows = list(generator(seed=7, count=50))
    assert len(rows) == 50
    assert json.loads(json.dumps(rows)) == rows == list(generator(seed=7, count=50)) != list(generator(seed=8, count=50))


def test_longest_demonstration_fits_the_recipe() -> None:
    rng = random.Random(0)
    longest = max((task.demonstration(puzzle, 0.0, rng) for puzzle in task.split()[1]), key=len)
    tokens = len(re.findall(r"</?think>|.|\n", longest)) + 1  # the end token
    assert tokens <= 133
