"""From the text in a recipe to a reward function: built-in, `path.py:name`, `module:name`, or installed entry point.

Owns finding and importing; runs in the processes that call rewards, never in the driver. Calling is `rewards.call`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from bregman.errors import RewardError

ENTRY_POINT_GROUP = "bregman.rewards"

BUILT_IN = {
    "code": "rewards.code_tests:code",
    "choice": "rewards.choice:choice",
    "exact_answer": "rewards.exact:exact_answer",
    "judge": "rewards.judge:judge",
    "math": "rewards.math_answer:math_answer",
    "mathvision": "rewards.vision_benchmarks:mathvision",
    "mathvista": "rewards.vision_benchmarks:mathvista",
    "mmmu": "rewards.vision_benchmarks:mmmu",
    "overlong_penalty": "rewards.overlong:overlong_penalty",
    "repetition_penalty": "rewards.repetition:repetition_penalty",
    "think_format": "rewards.think_format:think_format",
}


def load(function: str, base_folder: Path) -> Callable[..., Any]:
    """The reward function that `function` names.

    Args:
        function: as in `RewardConfig.function`.
        base_folder: the folder of the recipe; relative paths start there.

    Raises:
        RewardError: nothing of that name, or importing it failed.
    """
    place, colon, name = BUILT_IN.get(function, function).rpartition(":")
    if not colon:
        if function.endswith(".py") or os.sep in function:
            raise RewardError(_where(function), "a file, but not which function of it", f"write {function}:NAME")
        return _from_entry_point(function)
    module = _import_file(function, base_folder / place) if place.endswith(".py") else _import_module(function, place)
    return _callable(function, module, name)


def _where(function: str) -> str:
    return f"reward `{function}`"


def _from_entry_point(name: str) -> Callable[..., Any]:
    installed = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in installed:
        known = [*BUILT_IN, *installed]
        otherwise = f"choose one of {', '.join(known)}, or write path.py:name"
        raise RewardError(_where(name), "no built-in or installed reward of this name", _suggest(name, known, otherwise))
    return _load_entry_point(name, installed[name])


def _load_entry_point(name: str, point: EntryPoint) -> Callable[..., Any]:
    try:
        found = point.load()
    except (Exception, SystemExit) as error:
        raise _import_failed(name, f"entry point {point.value}", error) from error
    if not callable(found):
        raise RewardError(_where(name), f"entry point {point.value} is a {type(found).__name__}, not a function")
    return found


def _import_file(function: str, path: Path) -> ModuleType:
    """Import by path, under a name that stays the same for the file, so that it loads once and its classes pickle."""
    path = path.resolve()
    if not path.is_file():
        folder = path.parent
        if not folder.is_dir():
            raise RewardError(_where(function), f"no folder {folder}", "paths are relative to the recipe's folder")
        nearby = sorted(p.name for p in folder.glob("*.py"))
        raise RewardError(_where(function), f"no file {path}", _suggest(path.name, nearby, "paths are relative to the recipe's folder"))
    name = f"bregman_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file always has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _import_failed(function, path.name, error) from error
    return module


def _import_module(function: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise RewardError(_where(function), f"no module `{error.name}`", "install it, or write path.py:name for a file") from None
        raise _import_failed(function, name, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(function, name, error) from error


def _callable(function: str, module: ModuleType, name: str) -> Callable[..., Any]:
    place = os.path.basename(module.__file__ or module.__name__)
    try:
        found = getattr(module, name)
    except AttributeError:
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        otherwise = f"it has {', '.join(own[:8])}" if own else "it has no functions"
        raise RewardError(_where(function), f"no function `{name}` in {place}", _suggest(name, own, otherwise)) from None
    except (Exception, SystemExit) as error:  # a lazy module imports at this point
        raise _import_failed(function, f"{place}: {name}", error) from error
    if not callable(found):
        raise RewardError(_where(function), f"`{name}` in {place} is a {type(found).__name__}, not a function")
    return found


def _import_failed(function: str, what: str, error: BaseException) -> RewardError:
    return RewardError(_where(function), f"importing {what} failed: {describe(error)}")


def _suggest(name: str, known: Iterable[str], otherwise: str) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else otherwise


def describe(error: BaseException, file: str | None = None) -> str:
    """`ValueError: what it says (file.py:12)`: one line, never fails, whatever the exception.

    Args:
        file: the innermost line in this file is named if there is one, else the innermost line of all.
    """
    try:
        text = " ".join(str(error).split())[:300]
    except Exception:
        text = "(its message cannot be printed)"
    if isinstance(error, SyntaxError) and error.filename:
        text, place = error.msg, f"{os.path.basename(error.filename)}:{error.lineno}"
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
        own = [frame for frame in frames if frame.filename == file]
        place = next((f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in reversed(own or frames)), "")
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{line} ({place})" if place else line
