"""What `bregman rewards new NAME` writes: a folder with a reward, its test and a README.

Owns the three texts.
"""

from __future__ import annotations

import keyword
from pathlib import Path
from string import Template

from bregman.errors import UserError
from rewards.loader import BUILT_IN

_REWARD = Template('''\
"""Reward `$name`: says what a good response is. docs/rewards.md has the whole contract."""

from rewards.sample import RewardSample, single_sample


@single_sample
def $name(sample: RewardSample, partial: float = 0.0) -> float | None:
    """1.0 for the gold answer, `partial` for any other answer, 0.0 for none; None where the data has no gold answer.

    `sample.prompt` and `sample.completion` are the conversation and the response, `sample.thinking` and `sample.final` the two
    parts of the response, `sample.columns["..."]` any column of the problem, `sample.images` its images.
    """
    if sample.answer is None:
        return None
    if not sample.final:
        return 0.0
    return 1.0 if sample.final == str(sample.answer).strip() else partial
''')

_TEST = Template('''\
"""`$name` on responses whose score is known. Run it with: python -m pytest test_$name.py"""

import pytest
from $name import $name

from rewards.sample import RewardSample


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("<think>6 * 7</think>42", "42", 1.0),
        ("42", "42", 1.0),  # no thinking
        ("<think>6 * 7</think>41", "42", 0.1),
        ("<think>42", "42", 0.0),  # the thinking never ends: no answer
        ("", "42", 0.0),
        ("42", None, None),  # nothing to compare with: not applicable
    ],
)
def test_$name(completion, answer, score):
    sample = RewardSample(prompt=({"role": "user", "content": "6 * 7?"},), completion=completion, answer=answer, columns={})
    assert $name(sample, partial=0.1) == score
''')

_README = Template("""\
# $name

`$name.py` is the reward, `test_$name.py` its test (`python -m pytest test_$name.py` in this folder). In a recipe, with the path
relative to the recipe's folder:

    rewards:
      functions:
        - {function: "$name.py:$name", args: {partial: 0.1}, timeout: 10}

Before training on it: `bregman rewards test RECIPE --on RUN/rollouts/STAGE` runs it over saved rollouts, isolated as in a run.
""")


def write_plugin(name: str, folder: Path) -> Path:
    """Write the reward `name` into the new folder `folder` and return the folder.

    Raises:
        UserError: `name` is not a name for a function or is taken, or `folder` exists or cannot be made.
    """
    if not name.isidentifier() or not name.isascii() or keyword.iskeyword(name) or name.startswith("_"):
        raise UserError(name, "not a name for a Python function", "use letters, digits and underscores, e.g. my_reward")
    if name in BUILT_IN:
        raise UserError(name, "a built-in reward has this name", "choose another")
    try:
        folder.mkdir(parents=True)
        (folder / f"{name}.py").write_text(_REWARD.substitute(name=name))
        (folder / f"test_{name}.py").write_text(_TEST.substitute(name=name))
        (folder / "README.md").write_text(_README.substitute(name=name))
    except FileExistsError:
        raise UserError(str(folder), "exists already", "give a folder that does not with --to") from None
    except OSError as error:
        raise UserError(str(folder), f"cannot be made ({error.strerror})", "give another with --to") from None
    return folder
