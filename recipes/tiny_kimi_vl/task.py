"""The tasks of the tiny Kimi-VL: operator search in text and as a picture, and scans of drawn shapes and charts.

Owns supervised data, problems, verifier and metrics; the recipe names these functions. The puzzles of operator search are
tiny_thinking's, scans are in `scans.py`, pictures in `drawing.py`. Knows nothing of tokens, models or training.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import scans
from drawing import draw_shapes, draw_text

from recipes.tiny_thinking import task as search
from recipes.tiny_thinking.task import Completion, Puzzle

THINK_TAGS = {"<think>": "◁think▷", "</think>": "◁/think▷"}
"""tiny_thinking's tags, and those that Kimi's vocabulary has as tokens."""

SCANS = ("count", "chart")

CHARACTERS = "0123456789+-*=?"
"""What pictures of text show."""

PICTURED = 0.05
"""What a picture adds to the difficulty of a puzzle."""

Row = dict[str, Any]
Turn = tuple[Any, list[Any]]
"""Content and images of a user's turn."""

# --- pictures of text -------------------------------------------------------------------------------------------------------


def draw_puzzle(puzzle: Puzzle, rng: random.Random) -> Any:
    """A picture of the puzzle's question in one, two or three lines."""
    width = rng.choice((6, 3, 2))
    question = puzzle.question
    return draw_text([question[start : start + width] for start in range(0, len(question), width)], rng)


def _picture_turn(image: Any, text: str = "") -> Turn:
    """The picture, then the text if there is one."""
    return [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])], [image]


# --- supervised data --------------------------------------------------------------------------------------------------------


def joint_sft(
    *,
    seed: int,
    count: int,
    reading: float = 0.1,
    naming: float = 0.05,
    worksheets: float = 0.55,
    scanning: float = 0.2,
    direct: float = 0.1,
) -> Iterator[Row]:
    """`count` conversations with the given weights.

    reading: characters in a picture, copied. naming: shapes in a picture, written as `rc` for a red circle. worksheets: four
    steps of arithmetic or two attempt lines, as text or as a picture. scanning: all rows of a grid of shapes or of a chart,
    without a think block. direct: a training puzzle of any kind answered at once.
    """
    rng = random.Random(seed)
    makers = {"reading": _reading, "naming": _naming, "worksheets": _worksheet, "scanning": _scanning, "direct": _direct}
    for source in rng.choices(list(makers), (reading, naming, worksheets, scanning, direct), k=count):
        turn, answer = makers[source](rng)
        yield _conversation(turn, answer, source)


def long_cot_sft(
    *, seed: int, count: int, give_up: float = 0.7, persistent: float = 0.1, text: float = 0.3, picture: float = 0.4, scan: float = 0.3
) -> Iterator[Row]:
    """`count` demonstrations: searches in text, searches in a picture and scans, with the given weights.

    A share `persistent` of them goes on to the end; the others give up with probability `give_up` after each step that does not
    end them.
    """
    rng = random.Random(seed)
    puzzles = search.split()[1]
    for source in rng.choices(("text", "picture", "scan"), (text, picture, scan), k=count):
        patience = 0.0 if rng.random() < persistent else give_up
        if source == "scan":
            shown = scans.random_scan(rng, rng.choice(SCANS), held_out=False)
            turn = _picture_turn(shown.draw(rng), shown.question)
            yield _conversation(turn, scans.demonstration(shown, patience, rng), "long_cot")
            continue
        puzzle = rng.choice(puzzles)
        turn = _picture_turn(draw_puzzle(puzzle, rng)) if source == "picture" else (puzzle.question, [])
        yield _conversation(turn, search.demonstration(puzzle, patience, rng), "long_cot")


def _reading(rng: random.Random) -> tuple[Turn, str]:
    """One line of one to six characters; short ones teach what characters look like, long ones how to walk along a line."""
    line = "".join(rng.choices(CHARACTERS, k=rng.choice((1, 1, 1, 2, 2, 3, 4, 5, 6))))
    return _picture_turn(draw_text([line], rng), "read"), line


def _naming(rng: random.Random) -> tuple[Turn, str]:
    grid = scans.random_grid(rng, rng.randint(1, 2))
    return _picture_turn(draw_shapes(grid, rng), "name"), "\n".join("".join(colour[0] + shape[0] for colour, shape in row) for row in grid)


def _worksheet(rng: random.Random) -> tuple[Turn, str]:
    """Half of a worksheet of tiny_thinking."""
    (row,) = search.joint_sft(seed=rng.getrandbits(32), count=1, direct=0.0)
    asked, answered = (message["content"].split("\n") for message in row["messages"])
    half = len(asked) // 2
    turn: Turn = _picture_turn(draw_text(asked[:half], rng)) if rng.random() < 0.5 else ("\n".join(asked[:half]), [])
    return turn, "\n".join(answered[:half])


def _scanning(rng: random.Random) -> tuple[Turn, str]:
    scan = scans.random_scan(rng, rng.choice(("count", "count", "chart")), held_out=False)  # shapes are learned later than bars
    return _picture_turn(scan.draw(rng), f"rows {scan.question}"), "\n".join(scan.lines)


def _direct(rng: random.Random) -> tuple[Turn, str]:
    kind = rng.choice(("text", "picture", *SCANS))
    if kind in SCANS:
        scan = scans.random_scan(rng, kind, held_out=False)
        return _picture_turn(scan.draw(rng), scan.question), str(scan.total)
    puzzle = rng.choice(search.split()[1])
    turn: Turn = _picture_turn(draw_puzzle(puzzle, rng)) if kind == "picture" else (puzzle.question, [])
    return turn, search.expression(puzzle.digits, rng.choice(puzzle.solutions))


def _conversation(turn: Turn, answer: str, source: str) -> Row:
    content, images = turn
    for plain, kimi in THINK_TAGS.items():
        answer = answer.replace(plain, kimi)
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        "images": images,
        "source": source,
    }


# --- problems ---------------------------------------------------------------------------------------------------------------


def train_problems(*, seed: int, text: int = 600, pictures: int = 600, scans_each: int = 150) -> Iterator[Row]:
    """Training problems in the random order of `seed`: searches in text and in pictures, and scans of both kinds."""
    rng = random.Random(seed)
    puzzles = rng.sample(search.split()[1], text + pictures)
    problems = [text_problem(puzzle) for puzzle in puzzles[:text]] + [picture_problem(puzzle, rng) for puzzle in puzzles[text:]]
    for task in SCANS:
        problems += _scan_problems(rng, task, scans_each, held_out=False)
    rng.shuffle(problems)
    yield from problems


def held_out_text(*, seed: int = 0, count: int = search.HELD_OUT) -> Iterator[Row]:
    """The first `count` held-out puzzles as text, whatever the `seed`."""
    yield from map(text_problem, search.split()[0][:count])


def held_out_pictures(*, seed: int = 0, searches: int = 128, scans_each: int = 64) -> Iterator[Row]:
    """Held-out puzzles as pictures and held-out scans of both kinds, drawn the same way whatever the `seed`."""
    rng = random.Random(0)
    yield from [picture_problem(puzzle, rng) for puzzle in search.split()[0][:searches]]
    for task in SCANS:
        yield from _scan_problems(rng, task, scans_each, held_out=True)


def text_problem(puzzle: Puzzle) -> Row:
    return _search_problem(puzzle, "text", (puzzle.question, []))


def picture_problem(puzzle: Puzzle, rng: random.Random) -> Row:
    return _search_problem(puzzle, "picture", _picture_turn(draw_puzzle(puzzle, rng)))


def _search_problem(puzzle: Puzzle, task: str, turn: Turn) -> Row:
    shared = {"digits": puzzle.digits, "target": puzzle.target, "lines": ""}
    difficulty = 1.0 - len(puzzle.solutions) / len(search.CHOICES) + (PICTURED if task == "picture" else 0.0)
    return _problem(f"{task} {puzzle.question}", task, turn, difficulty, shared)


def _scan_problems(rng: random.Random, task: str, count: int, *, held_out: bool) -> list[Row]:
    """`count` scans with different pictures or questions."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        scan = scans.random_scan(rng, task, held_out=held_out)
        shown = " ".join("".join(f"{colour[0]}{shape[0]}" for colour, shape in row) for row in scan.grid) or "".join(map(str, scan.amounts))
        name = f"{task} {scan.question} {shown}"
        turn = _picture_turn(scan.draw(rng), scan.question)
        shared = {"digits": "", "target": scan.total, "lines": "\n".join(scan.lines)}
        rows.setdefault(name, _problem(name, task, turn, len(scan.amounts) / (scans.MAX_ROWS + 1), shared))
    return list(rows.values())


def _problem(name: str, task: str, turn: Turn, difficulty: float, shared: Row) -> Row:
    content, images = turn
    messages = [{"role": "user", "content": content}]
    return {"id": name, "messages": messages, "images": images, "task": task, "difficulty": difficulty, **shared}


# --- verifier and metrics, in TRL's reward signature ------------------------------------------------------------------------


def right_answer(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    task: Sequence[str],
    digits: Sequence[str],
    target: Sequence[int],
    **columns: Any,
) -> list[float]:
    """1 if the final answer is right: an expression of the digits with the target as its value, or the total of a scan."""
    texts = [_text(completion) for completion in completions]
    solved = search.operator_search(prompts, texts, digits, target)
    return [
        float(search.parts(text)[1] == str(total)) if kind in SCANS else score
        for score, text, kind, total in zip(solved, texts, task, target, strict=True)
    ]


def right_search(task: Sequence[str], **columns: Any) -> list[float | None]:
    """`right_answer` of searches; does not apply to scans."""
    scores = right_answer(task=task, **columns)
    return [None if kind in SCANS else score for score, kind in zip(scores, task, strict=True)]


def right_scan(task: Sequence[str], **columns: Any) -> list[float | None]:
    """`right_answer` of scans; does not apply to searches."""
    scores = right_answer(task=task, **columns)
    return [score if kind in SCANS else None for score, kind in zip(scores, task, strict=True)]


def gave_up(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1 if the thinking ends in the mark of giving up."""
    return search.gave_up([], [_text(completion) for completion in completions])


def flawed_thinking(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    task: Sequence[str],
    digits: Sequence[str],
    target: Sequence[int],
    lines: Sequence[str],
    **columns: Any,
) -> list[float]:
    """0 if a completion thinks as the demonstrations do, giving up included; else 1."""
    texts = [_text(completion) for completion in completions]
    searches = search.flawed_thinking(prompts, texts, digits, target)
    return [
        float(not scans.is_sound(*search.parts(text), right.split("\n"))) if kind in SCANS else flawed
        for flawed, text, kind, right in zip(searches, texts, task, lines, strict=True)
    ]


def _text(completion: Completion) -> str:
    """A completion with tiny_thinking's tags."""
    text = completion if isinstance(completion, str) else "".join(str(message["content"]) for message in completion)
    for plain, kimi in THINK_TAGS.items():
        text = text.replace(kimi, plain)
    return text
