"""Rooms import only downwards, heavy libraries stay in the engines room, and the light rooms import fast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"bregman", "rewards", "samplers", "evals", "sft", "rl", "recipes"}
MAY_IMPORT = {
    "bregman": set(),
    "rewards": {"bregman"},
    "samplers": {"bregman"},
    "evals": {"bregman", "rewards"},
    "sft": {"bregman", "rewards", "evals"},
    "rl": {"bregman", "rewards", "samplers", "evals", "sft"},
    "recipes": ROOMS,
}
EXCEPTIONS = {"bregman/engines/reward_workers.py": {"rewards"}}  # turns the rewards room's pool into Ray actors
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Dotted names of every import in a file, those inside functions and TYPE_CHECKING blocks included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_between_rooms(path):
    relative = path.relative_to(ROOT)
    room = relative.parts[0]
    allowed = MAY_IMPORT[room] | {room} | EXCEPTIONS.get(relative.as_posix(), set())
    imported = {name.split(".")[0] for name in _imports(path)} & ROOMS
    assert imported <= allowed, f"{room} must not import {imported - allowed}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_engines_room_knows_ray_vllm_and_torch_distributed(path):
    if path.is_relative_to(ROOT / "bregman" / "engines"):
        return
    heavy = {n for n in _imports(path) if n.split(".")[0] in {"ray", "vllm"} or n.startswith("torch.distributed")}
    assert not heavy


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_owns(path):
    if path.stat().st_size:
        assert ast.get_docstring(ast.parse(path.read_text())), "a module opens with what it owns"


@pytest.mark.parametrize("module", ["rewards.loader", "rewards.scorer", "samplers.build", "recipes.schema", "bregman.protocols"])
def test_light_modules_stay_light(module):
    """No torch, ray or vllm; and in well under a second of CPU time."""
    code = (
        f"import sys, time; import {module}; heavy = {{'torch', 'ray', 'vllm', 'transformers', 'datasets'}} & set(sys.modules); "
        "print(sorted(heavy), time.process_time())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    heavy, seconds = output.strip().rsplit(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 2.0  # goal 1 s; slack for a busy machine
