"""Reading problems and conversations from every kind of source, and every way in which a source can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import TypeAdapter

from bregman.data.config import SourceConfig
from bregman.data.sources import read_conversations, read_problems, read_rows, source_name
from bregman.errors import DataError
from bregman.models.tiny.tokenizer import character_tokenizer

GENERATOR = """
import random

def problems(count, seed):
    random.seed(seed)
    for index in range(count):
        a = random.randrange(10)
        yield {"question": f"{a}+{index}=?", "answer": a + index, "level": index / count, "extra": [index]}

def no_rows(seed):
    return []

def not_rows(seed):
    return ["1+1=?"]

def fails(seed):
    yield {"prompt": "1", "answer": "1"}
    raise RuntimeError("the abacus\\nbroke")

def quits(seed):
    raise SystemExit(3)

constant = 3
"""


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer("0123456789+-*=?,yn abc")


@pytest.fixture(autouse=True)
def _no_shared_cache(tmp_path, monkeypatch):
    datasets = sys.modules.get("datasets")
    if datasets:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def source(**fields) -> SourceConfig:
    return TypeAdapter(SourceConfig).validate_python(fields)


def write_jsonl(folder, *rows, name="data.jsonl"):
    (folder / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return source(kind="jsonl", path=name)


def write_parquet(folder, rows, name="data.parquet"):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return source(kind="parquet", path=name)


def chat(*contents):
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]


def problems_of(config, folder, tokenizer, limit=100):
    return read_problems(config, folder, tokenizer, seed=0, max_prompt_tokens=limit)


def python_source(folder, function="problems", **fields):
    (folder / "task.py").write_text(GENERATOR)
    return source(kind="python", path=f"task.py:{function}", **fields)


def test_python_problems(tmp_path, tokenizer):
    config = python_source(tmp_path, args={"count": 5}, columns={"prompt": "question", "difficulty": "level"}, name="sums")
    problems = problems_of(config, tmp_path, tokenizer)
    assert len(problems) == 5 and len({problem.id for problem in problems}) == 5
    first = problems[1]
    assert first.messages == ({"role": "user", "content": first.columns["question"]},)
    assert first.answer == str(first.columns["answer"]) and isinstance(first.columns["answer"], int)
    assert first.difficulty == 0.2 and first.source == "sums"
    assert first.columns["prompt"] == first.columns["question"] and first.columns["extra"] == [1]
    assert tokenizer.decode(list(first.prompt_ids)) == f"<|im_start|>user\n{first.columns['question']}<|im_end|>\n<|im_start|>assistant\n"
    assert problems == problems_of(config, tmp_path, tokenizer)
    assert problems != read_problems(config, tmp_path, tokenizer, seed=1, max_prompt_tokens=100)


def test_a_seed_among_the_arguments_wins(tmp_path):
    fixed = python_source(tmp_path, args={"count": 5, "seed": 7})
    assert list(read_rows(fixed, tmp_path, 0)) == list(read_rows(fixed, tmp_path, 1))


@pytest.mark.parametrize("kind", ["python", "jsonl"])
def test_python_and_jsonl_sources_start_fast(tmp_path, kind):
    config = python_source(tmp_path, args={"count": 5}) if kind == "python" else write_jsonl(tmp_path, {"prompt": "1"})
    code = (
        "import sys; from pathlib import Path; from pydantic import TypeAdapter; from bregman.data.config import SourceConfig\n"
        "from bregman.data.sources import read_rows\n"
        f"assert len(read_rows(TypeAdapter(SourceConfig).validate_python({config.model_dump()!r}), Path({str(tmp_path)!r}), 0))\n"
        "print([name for name in ('datasets', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_text_that_looks_like_a_date_stays_text(tmp_path, tokenizer):
    config = write_jsonl(tmp_path, {"prompt": "1", "answer": "2020-01-01"}, {"prompt": "2", "answer": "2020-01-02"})
    assert [problem.answer for problem in problems_of(config, tmp_path, tokenizer)] == ["2020-01-01", "2020-01-02"]


def test_jsonl_and_parquet_agree(tmp_path, tokenizer):
    rows = [
        {"id": "a", "messages": [{"role": "system", "content": "abc"}, {"role": "user", "content": "1+1=?"}], "answer": "2", "n": 1},
        {"id": "b", "messages": chat("1+1=?", "2", "2+2=?"), "answer": "4", "n": 2},
    ]
    lines = problems_of(write_jsonl(tmp_path, rows[0], "", rows[1]), tmp_path, tokenizer)
    table = problems_of(write_parquet(tmp_path, rows), tmp_path, tokenizer)
    assert [problem.id for problem in lines] == ["a", "b"]
    for left, right in zip(lines, table, strict=True):
        assert (left.messages, left.prompt_ids, left.answer, left.columns) == (
            right.messages,
            right.prompt_ids,
            right.answer,
            right.columns,
        )


def test_files_named_by_a_pattern_are_read_in_order(tmp_path):
    write_jsonl(tmp_path, {"prompt": "1"}, name="part-1.jsonl")
    write_jsonl(tmp_path, {"prompt": "2"}, {"prompt": "3"}, name="part-2.jsonl")
    rows = read_rows(source(kind="jsonl", path="part-*.jsonl"), tmp_path, 0)
    assert [row["prompt"] for row in rows] == ["1", "2", "3"] and rows[2] == {"prompt": "3"}
    assert rows.where(2) == "part-*.jsonl row part-2.jsonl:2"


def test_hub_source_reads_a_local_folder(tmp_path):
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set", {"prompt": "1", "answer": "x"}, name="train.jsonl")
    rows = read_rows(source(kind="hub", path="set", columns={"solution": "answer"}), tmp_path, 0)
    assert list(rows) == [{"prompt": "1", "answer": "x", "solution": "x"}]


def test_trl_conversational_columns(tmp_path, tokenizer):
    config = write_jsonl(tmp_path, {"prompt": chat("1+1=?"), "completion": [{"role": "assistant", "content": "2"}]})
    assert problems_of(config, tmp_path, tokenizer)[0].messages == tuple(chat("1+1=?"))
    assert read_conversations(config, tmp_path, seed=0)[0].messages == tuple(chat("1+1=?", "2"))


def test_conversations(tmp_path):
    config = write_jsonl(tmp_path, {"prompt": "1", "completion": "2"}, "", {"messages": chat("1", "2", "3", "4"), "id": 9})
    first, second = read_conversations(config, tmp_path, seed=0)
    assert first.messages == tuple(chat("1", "2")) and (first.id, first.source) == ("1", "data.jsonl")
    assert second.messages == tuple(chat("1", "2", "3", "4")) and second.id == "9"


def test_keys_that_columnar_files_fill_in_are_dropped(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "1", "name": "b"}, {"role": "assistant", "content": "2", "name": None}]}]
    (conversation,) = read_conversations(write_parquet(tmp_path, rows), tmp_path, seed=0)
    assert conversation.messages == ({"role": "user", "content": "1", "name": "b"}, {"role": "assistant", "content": "2"})


def test_text_parts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "+1"}]
    config = write_jsonl(tmp_path, {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "2"}]})
    assert read_conversations(config, tmp_path, seed=0)[0].messages == tuple(chat("1+1", "2"))


def test_source_names(tmp_path):
    assert source_name(source(kind="python", path="x/task.py:problems")) == "task.py:problems"
    assert source_name(source(kind="hub", path="org/set")) == "org/set"
    assert source_name(source(kind="jsonl", path="x/data.jsonl", name="mine")) == "mine"


PYTHON_ERRORS = {
    "no function": ({"path": "task.py:problms"}, "has no function `problms`; did you mean `problems`"),
    "not a function": ({"path": "task.py:constant"}, "has no function `constant`"),
    "no such file": ({"path": "tusk.py:problems"}, r"no such file; did you mean `task.py`"),
    "no such folder": ({"path": "x/task.py:problems"}, "no such file; its folder .* does not exist"),
    "not of the form": ({"path": "task.py"}, "not of the form `file.py:function`"),
    "missing argument": ({"path": "task.py:problems"}, r"missing a required argument: 'count'; its arguments are \(count, seed\)"),
    "unknown argument": ({"path": "task.py:problems", "args": {"count": 1, "cuont": 2}}, "unexpected keyword argument 'cuont'"),
    "generator raises": ({"path": "task.py:fails"}, r"task.py:18: RuntimeError: the abacus broke"),
    "generator exits": ({"path": "task.py:quits"}, r"task.py:21: SystemExit: 3"),
    "no rows": ({"path": "task.py:no_rows"}, "has no rows"),
    "rows are not dicts": ({"path": "task.py:not_rows"}, "row 0: is a str; yield a dict"),
    "syntax error": ({"path": "broken.py:problems"}, r"broken.py:2: SyntaxError: "),
    "import error": ({"path": "needs.py:problems"}, r"needs.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
    "missing column": (
        {"path": "task.py:problems", "args": {"count": 1}, "columns": {"prompt": "qestion"}},
        "row 0: no column `qestion`, mapped to `prompt`; did you mean `question`.*there is: answer, extra, level, question",
    ),
}


@pytest.mark.parametrize("case", PYTHON_ERRORS)
def test_python_errors(tmp_path, case):
    fields, expected = PYTHON_ERRORS[case]
    (tmp_path / "task.py").write_text(GENERATOR)
    (tmp_path / "broken.py").write_text("x = 1\ndef problems(:\n")
    (tmp_path / "needs.py").write_text("import no_such_module\n")
    with pytest.raises(DataError, match=expected) as caught:
        list(read_rows(source(kind="python", **fields), tmp_path, 0))
    assert "\n" not in str(caught.value)


FILE_ERRORS = {
    "missing": ("jsonl", "dota.jsonl", b"", r"dota.jsonl: no such file; did you mean `data.jsonl`"),
    "folder": ("jsonl", ".", b"", "is a folder"),
    "empty": ("jsonl", "data.jsonl", b"\n\n", "data.jsonl: has no rows"),
    "malformed": ("jsonl", "data.jsonl", b'{"a": 1}\n\n{"a": }\n', r"data.jsonl:3: is not valid JSON \(Expecting value at column 7\)"),
    "cut": ("jsonl", "data.jsonl", b'{"a": 1}\n{"a": "x', r"data.jsonl:2: is not valid JSON"),
    "not objects": ("jsonl", "data.jsonl", b"[1]\n", "data.jsonl:1: is a JSON list, not an object"),
    "huge integer": (
        "jsonl",
        "data.jsonl",
        b'{"a": 1}\n{"a": ' + b"7" * 5000 + b"}\n",
        r"data.jsonl:2: has an integer of more than 4300 digits",
    ),
    "nested": ("jsonl", "data.jsonl", b"[" * 100_000 + b"\n", "data.jsonl:1: is not valid JSON"),
    "binary": ("jsonl", "data.jsonl", b'{"a": "\xff"}\n', "is not UTF-8 text"),
    "not parquet": ("parquet", "data.parquet", b"hello", "data.parquet: is not a Parquet file"),
    "missing parquet": ("parquet", "x.parquet", b"", "x.parquet: no such file"),
    "hub": ("hub", "nobody/nothing", b"", "hub data set `nobody/nothing`: cannot be loaded .*; check the id"),
}


@pytest.mark.parametrize("case", FILE_ERRORS)
def test_file_errors(tmp_path, case, monkeypatch):
    kind, path, content, expected = FILE_ERRORS[case]
    if kind == "hub":
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "data.jsonl").write_bytes(content)
    (tmp_path / "data.parquet").write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        list(read_rows(source(kind=kind, path=path), tmp_path, 0))
    assert "\n" not in str(caught.value)


def test_empty_parquet_and_missing_parquet_column(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="has no rows"):
        read_rows(source(kind="parquet", path="empty.parquet"), tmp_path, 0)
    write_parquet(tmp_path, [{"question": "1", "answer": "2"}])
    with pytest.raises(DataError, match="no column `qeustion`, mapped to `prompt`; did you mean `question`"):
        list(read_rows(source(kind="parquet", path="data.parquet", columns={"prompt": "qeustion"}), tmp_path, 0))


OK_ROW = {"prompt": "3+3=?", "answer": "6"}
PROBLEM_ERRORS = {
    "no prompt": ({"promt": "1", "answer": "1"}, r"needs `prompt` or `messages` \(no such column\); .*did you mean `promt`"),
    "prompt is null": ({"prompt": None, "answer": "1"}, r"needs `prompt` or `messages` \(is empty\)"),
    "prompt is a number": ({"prompt": 3}, "`prompt` is a int"),
    "messages are empty": ({"messages": []}, "`messages` is an empty list"),
    "turn is not an object": ({"messages": ["1"]}, r"`messages\[0\]` is a str"),
    "unknown role": ({"messages": [{"role": "human", "content": "1"}]}, r"`messages\[0\]` has the role 'human'; choose one of system"),
    "ShareGPT": ({"messages": [{"from": "human", "value": "1"}]}, "convert ShareGPT turns"),
    "content is null": ({"messages": [{"role": "user", "content": None}]}, "has None as its content"),
    "image part": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "1 places for images and its `images` column has 0"),
    "last turn is an answer": ({"messages": chat("1", "2")}, "its last turn is the assistant's"),
    "answer is an object": ({"prompt": "1", "answer": {"a": 1}}, "`answer` is a dict; give a text, a number, or a list of them"),
    "answers are lists": ({"prompt": "1", "answer": ["1", ["2"]]}, r"`answer\[1\]` is a list"),
    "half a character": ({"prompt": "1 \ud800"}, r"turn 0 has half a character \(surrogate\) at position 2; remove it"),
    "difficulty above 1": ({"prompt": "1", "difficulty": 5}, "`difficulty` is 5; give a number from 0"),
    "difficulty is text": ({"prompt": "1", "difficulty": "hard"}, "`difficulty` is 'hard'"),
    "difficulty is NaN": ({"prompt": "1", "difficulty": float("nan")}, "`difficulty` is nan"),
    "images": ({"prompt": "1", "images": ["x.png"]}, "has images"),
    "duplicate content": (OK_ROW, r"has the id `[0-9a-f]{16}` of data.jsonl row 1; drop one"),
    "unknown character": ({"prompt": "8/2=?"}, "no token for '/' in .*8/2"),
    "too long": ({"prompt": "1" * 100}, "its prompt has 108 tokens and the limit is 100"),
}


@pytest.mark.parametrize("case", PROBLEM_ERRORS)
def test_problem_errors_name_the_row(tmp_path, tokenizer, case):
    row, expected = PROBLEM_ERRORS[case]
    with pytest.raises(DataError, match=rf"^data.jsonl row 3: .*{expected}") as caught:
        problems_of(write_jsonl(tmp_path, OK_ROW, "", row), tmp_path, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [lambda folder, rows: write_jsonl(folder, *rows), write_parquet], ids=["jsonl", "parquet"])
def test_several_acceptable_answers(tmp_path, tokenizer, write):
    rows = [{"prompt": "1", "answer": ["1", "é"]}, {"prompt": "2", "answer": []}, {"prompt": "1", "answer": ["1"]}]
    problems = problems_of(write(tmp_path, rows), tmp_path, tokenizer)
    assert [problem.answer for problem in problems] == ['["1", "é"]', None, '["1"]']
    assert [problem.columns["answer"] for problem in problems] == [row["answer"] for row in rows]
    assert len({problem.id for problem in problems}) == 3


def test_duplicate_ids(tmp_path, tokenizer):
    config = write_jsonl(tmp_path, {"id": 1, "prompt": "1"}, {"id": "1", "prompt": "2"})
    with pytest.raises(DataError, match="row 2: has the id `1` of data.jsonl row 1; ids must differ"):
        problems_of(config, tmp_path, tokenizer)


def test_prompt_at_the_limit_is_accepted(tmp_path, tokenizer):
    config = write_jsonl(tmp_path, {"prompt": "1" * 92})
    assert len(problems_of(config, tmp_path, tokenizer)[0].prompt_ids) == 100
    with pytest.raises(DataError, match="100 tokens and the limit is 99"):
        problems_of(config, tmp_path, tokenizer, limit=99)


def test_ids_depend_on_content_only(tmp_path, tokenizer):
    one = problems_of(write_jsonl(tmp_path, {"prompt": "1", "answer": "2"}, {"prompt": "2", "answer": "3"}), tmp_path, tokenizer)
    two = problems_of(write_jsonl(tmp_path, {"answer": "3", "prompt": "2"}, {"prompt": "1", "answer": "4"}), tmp_path, tokenizer)
    assert one[1].id == two[0].id and one[0].id != two[1].id


CONVERSATION_ERRORS = {
    "no completion": ({"prompt": "1", "complation": "2"}, r"needs `completion` \(no such column\); .*did you mean `complation`"),
    "no columns": ({"text": "1"}, "needs `prompt` or `messages`"),
    "no assistant": ({"messages": chat("1")}, "no assistant turn"),
    "ends with a question": ({"messages": chat("1", "2", "3")}, "its last turn is the user's"),
    "starts with an answer": ({"messages": chat("1", "2")[1:]}, "its first turn is the assistant's"),
    "empty answer": ({"prompt": "1", "completion": " \n"}, "the assistant's answer in turn 1 is empty"),
    "unknown role": ({"messages": [*chat("1"), {"role": "gpt", "content": "2"}]}, r"`messages\[1\]` has the role 'gpt'"),
    "two questions": ({"messages": [*chat("1"), *chat("2", "3")]}, "turns 0 and 1 are both the user's; join them"),
    "two answers": ({"messages": [*chat("1", "2"), *chat("3", "4")[1:]]}, "turns 1 and 2 are both the assistant's"),
    "tool without a call": ({"messages": [*chat("1"), {"role": "tool", "content": "2"}, *chat("1", "2")[1:]]}, "turn 1 follows the user's"),
    "nothing to train": (
        {"messages": [*chat("1"), {"role": "assistant", "content": "2", "train": False}]},
        "no assistant turn to train on: all have `train: false`",
    ),
    "train is no flag": ({"messages": [*chat("1"), {"role": "assistant", "content": "2", "train": 0.5}]}, "has 0.5 as `train`"),
    "tools are no list": ({"prompt": "1", "completion": "2", "tools": {"name": "f"}}, "`tools` is dict, not a list"),
    "tools are no JSON": ({"prompt": "1", "completion": "2", "tools": "[{"}, "`tools` is not valid JSON"),
    "images are no list": ({"prompt": "1", "completion": "2", "images": "x.png"}, "0 places for images and its `images` column has 1"),
}


@pytest.mark.parametrize("case", CONVERSATION_ERRORS)
def test_conversation_errors_name_the_row(tmp_path, case):
    row, expected = CONVERSATION_ERRORS[case]
    with pytest.raises(DataError, match=rf"^data.jsonl row 2: .*{expected}"):
        read_conversations(write_jsonl(tmp_path, {"prompt": "1", "completion": "2"}, row), tmp_path, seed=0)


@pytest.mark.parametrize("write", [lambda folder, rows: write_jsonl(folder, *rows), write_parquet], ids=["jsonl", "parquet"])
def test_tools_and_calls(tmp_path, write):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        *chat("1+1"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        *chat("", "2")[1:],
    ]
    schema = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    rows = [{"messages": turns, "tools": [schema]}, {"messages": chat("1", "2"), "tools": None}]
    first, second = read_conversations(write(tmp_path, rows), tmp_path, seed=0)
    assert first.tools == (schema,) and second.tools == ()
    assert first.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert second.messages == tuple(chat("1", "2"))  # no key that only another row has
