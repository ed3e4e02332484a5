"""Reading configuration: YAML, `--set a.b=c` overrides, and pydantic errors turned into one line with a suggestion.

Owns the base class of every config section and how mistakes in one are reported. Sections live beside what they configure.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from bregman.errors import RecipeError


class Config(pydantic.BaseModel):
    """Base of every config section: immutable, unknown keys are errors, defaults are checked too."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


C = TypeVar("C", bound=Config)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        RecipeError: the file is missing, is not YAML, or is not a mapping at its top.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise RecipeError(str(path), "no such file", "give the path of a recipe YAML") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), f"cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(place, f"not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(data, dict):
        raise RecipeError(str(path), "expected a mapping of keys at the top of the recipe")
    return data


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`data` with every `a.b=value` applied; list items are named by index or by their `name:`; values are YAML.

    Raises:
        RecipeError: an override is not of that form, or names a place that does not exist.
    """
    result = _copy(data)
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not path:
            raise RecipeError(f"--set {override}", "expected KEY=VALUE", "for example --set seed=1")
        *parents, last = path.split(".")
        node: Any = result
        for key in parents:
            node = _child(node, key, override)
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"--set {override}", "the value is not valid YAML", "quote it") from None
        if not isinstance(node, dict | list):
            raise RecipeError(f"--set {override}", f"`{last}` is inside a value that is not a section")
        if isinstance(node, list):
            node[_index(node, last, override)] = parsed
        else:
            node[last] = parsed
    return result


def parse(section: type[C], data: Mapping[str, Any], origin: str) -> C:
    """Validate `data` as `section`.

    Raises:
        RecipeError: the first mistake found, as `origin: key: what is wrong; how to fix it`.
    """
    try:
        return section.model_validate(data)
    except pydantic.ValidationError as error:
        raise _explain(error, section, origin) from None


def _copy(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list) else node


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, override)]
    if not isinstance(node, dict):
        raise RecipeError(f"--set {override}", f"`{key}` is inside a value that is not a section")
    if node.get(key) is None:  # absent, or written without a value
        node[key] = {}
    return node[key]


def _index(items: list[Any], key: str, override: str) -> int:
    names = [str(item["name"]) for item in items if isinstance(item, dict) and "name" in item]
    for index, item in enumerate(items):
        if key == str(index) or (isinstance(item, dict) and str(item.get("name")) == key):
            return index
    known = ", ".join(names) or f"0..{len(items) - 1}"
    raise RecipeError(f"--set {override}", f"no list item `{key}`", f"choose one of {known}")


def _explain(error: pydantic.ValidationError, section: type[Config], origin: str) -> RecipeError:
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    place, _ = _walk(section, first["loc"])
    where = f"{origin}: {place}" if place else origin
    match first["type"]:
        case "extra_forbidden":
            key = str(first["loc"][-1])
            known = [name for candidate in _walk(section, first["loc"][:-1])[1] for name in candidate.model_fields]
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            return RecipeError(where, f"unknown key `{key}`", f"did you mean `{close[0]}`?" if close else "remove it")
        case "missing":
            return RecipeError(where, "this key is required", "add it")
        case "union_tag_invalid":
            context = first["ctx"]
            tags = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
            close = difflib.get_close_matches(str(context["tag"]), tags, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"choose one of {', '.join(tags)}"
            return RecipeError(f"{where}.kind", f"unknown kind `{context['tag']}`", hint)
        case "union_tag_not_found":
            return RecipeError(f"{where}.kind", "this key is required", "it says which variant is meant")
        case "value_error":
            return RecipeError(where, str(first["ctx"]["error"]))
        case _:
            message = first["msg"][0].lower() + first["msg"][1:]
            return RecipeError(where, f"{message}, found {first['input']!r}")


def _walk(section: type[Config], loc: Sequence[int | str]) -> tuple[str, list[type[Config]]]:
    """Follow a pydantic error location: its dotted form `stages[2].rollout`, without the union tags that pydantic puts in, and the
    sections it leads to (all members of a union where that is undecided)."""
    text, candidates = "", [section]
    for part in loc:
        tagged = [candidate for candidate in candidates if _tag_of(candidate) == part]
        if isinstance(part, int):
            text += f"[{part}]"
        elif tagged and len(candidates) > 1:
            candidates = tagged
        else:
            text += f".{part}" if text else part
            annotations = [candidate.model_fields[part].annotation for candidate in candidates if part in candidate.model_fields]
            candidates = [found for annotation in annotations for found in _configs_in(annotation)]
    return text, candidates


def _tag_of(section: type[Config]) -> str | None:
    kind = section.model_fields.get("kind")
    return typing.get_args(kind.annotation)[0] if kind is not None and typing.get_args(kind.annotation) else None


def _configs_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, Config):
        return [annotation]
    return [found for argument in typing.get_args(annotation) for found in _configs_in(argument)]
