"""The full-size recipes read their data as they say: `check` passes with a tiny Kimi-VL in place of the model and small Parquet files
where the recipes name theirs, and its counts are those of the rows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image

from bregman.models.config import TinyKimiVLConfig
from bregman.models.tiny.kimi_vl import make_tiny_kimi_vl
from recipes import cli

FULL_SIZE = Path(__file__).parents[2] / "recipes" / "kimi_vl_thinking"
RECIPES = sorted(FULL_SIZE.glob("*.yaml"))
ANSWER = "◁think▷one, two◁/think▷2"
SFT_LINES = ("  text: 2 rows, ", "  vision: 2 rows, ", "    4 images in 2 of 2 rows: 2 tokens each on average", "the largest 4")
RL_LINES = (
    "  rl: prompts against the 256 tokens",
    "  held_out: prompts against the 256 tokens",
    "    8 images in 8 of 9 rows: 1 tokens each",
    "    1 images in 1 of 2 rows: 1 tokens each",
    "  rewards on the gold answer of problem",
    "math = 1",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 1, "num_experts": 2, "expert_size": 32, "vision_layers": 1}
    folder = tmp_path_factory.mktemp("full_size") / "model"
    make_tiny_kimi_vl(TinyKimiVLConfig(**sizes), 0, folder)
    for name, auto in (("config", "AutoConfig"), ("tokenizer_config", "AutoTokenizer"), ("preprocessor_config", "AutoImageProcessor")):
        file = folder / f"{name}.json"  # as published: they point at code, which nothing here may ask for
        file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": {auto: "remote.Code"}}))
    return folder


def drawn(width: int, height: int) -> dict[str, Any]:
    """A `datasets` image."""
    content = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def asked(text: str, images: int = 0, answer: str | None = None) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": "<image>" * images + text}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def conversations() -> dict[str, list[dict[str, Any]]]:
    """Rows by what the recipes call their source. Tokens of the images: 1, 2 and 4 (28 x 28, 28 x 40 and 50 x 50 pixels)."""
    several = [
        *asked("first?", 1, ANSWER),
        {"role": "user", "content": "and <image> or <image>?"},
        {"role": "assistant", "content": ANSWER},
    ]
    return {
        "text": [{"messages": asked("1+1?", answer=ANSWER)}, {"messages": asked("2+0?", answer=ANSWER)}],
        "vision": [
            {"messages": asked("how many?", 1, ANSWER), "images": [drawn(28, 28)]},
            {"messages": several, "images": [drawn(28, 28), drawn(28, 40), drawn(50, 50)]},
        ],
    }


def problems() -> list[dict[str, Any]]:
    with_image = [
        {"messages": asked("how many?", 1), "images": [drawn(28, 28)], "answer": str(n), "difficulty": n / 10} for n in range(1, 9)
    ]
    return [*with_image, {"messages": asked("1+1?"), "images": None, "answer": "2", "difficulty": 0.0}]


def write(pattern: Path, rows: list[dict[str, Any]]) -> None:
    """`rows` in a file whose name fits `pattern`."""
    path = Path(str(pattern).replace("*", "00000"))
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    if "images" in table.column_names:
        table = table.cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(path)


def replaced(path: Path, model: Path, tmp_path: Path) -> list[str]:
    """The recipe at `path` and its data in `tmp_path`; the `--set` arguments that make it small."""
    (tmp_path / path.name).write_text(path.read_text())
    (stage,) = yaml.safe_load(path.read_text())["stages"]
    changes = [f"model.path={model}", "engine.max_model_len=512", "learner.tokens_per_micro_batch=512"]
    if stage["kind"] == "sft":
        rows = conversations()
        assert [source["name"] for source in stage["sources"]] == list(rows)
        for source in stage["sources"]:
            write(tmp_path / source["path"], rows[source["name"]])
        changes += ["stages.0.max_length=512", "stages.0.tokens_per_step=4096"]
    else:
        write(tmp_path / stage["problems"]["path"], problems())
        write(tmp_path / stage["evaluation"]["problems"]["path"], problems()[-2:])
        changes += ["stages.0.num_problems=4", "stages.0.rollout.max_tokens=256", "stages.0.evaluation.sampling.max_tokens=256"]
    return [argument for change in changes for argument in ("--set", change)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_data_is_read_as_the_recipe_says(
    path: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where the run folder goes
    changes = replaced(path, model, tmp_path)
    capsys.readouterr()
    code = cli.main(["check", str(tmp_path / path.name), *changes])
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    assert "the recipe is ready to run" in printed.out
    for line in SFT_LINES if "sft" in path.stem else RL_LINES:
        assert line in printed.out


def test_a_row_without_its_image_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = replaced(FULL_SIZE / "4_rl.yaml", model, tmp_path)
    write(tmp_path / "data/rl/*.parquet", [*problems(), {**problems()[0], "images": []}])
    assert cli.main(["check", str(tmp_path / "4_rl.yaml"), *changes]) == 2
    assert "rl row 9: its messages have 1 places for images and its `images` column has 0" in capsys.readouterr().err
