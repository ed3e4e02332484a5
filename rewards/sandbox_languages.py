"""Programs in the languages that the sandbox runs: how they are compiled and started. Compiling is done shut in, too."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bregman.errors import RewardError
from rewards.sandbox import Result, run_in
from rewards.sandbox_tiers import SEARCH, Limits, Way, python_command

LANGUAGES: Mapping[str, tuple[str, ...]] = {"python": ("python", "python3", "py"), "cpp": ("cpp", "c++", "cc", "cxx")}
"""Languages by the name in the recipe, each with the labels of its fenced blocks."""

COMPILE_LIMITS = Limits(cpu_seconds=30, wall_seconds=60, memory_mib=2048, processes=32, file_mib=64, output_kib=32 * 1024)
COMPILE = "TMPDIR=$PWD g++ -x c++ -std=c++17 -O2 -o a.out {source} 1>&2 && cat a.out"


START = """
import builtins, sys
from _sitebuiltins import Quitter
builtins.exit, builtins.quit = Quitter("exit", "end of file"), Quitter("quit", "end of file")
del sys.argv[0], builtins, Quitter
__file__ = sys.argv[0]
exec(compile(open(__file__, "rb").read(), __file__, "exec"))
"""
"""Runs a program without `site`, which would search installed packages and takes longer than most programs, but with `exit`."""


class DoesNotCompile(Exception):
    """The program is not one: what the compiler says, in a line."""


@dataclass(frozen=True, slots=True)
class Program:
    """A program ready to run any number of times."""

    way: Way
    language: str
    files: Mapping[str, bytes]

    def run(self, stdin: bytes, limits: Limits) -> Result:
        """One run.

        Raises:
            SandboxError: it was not started.
        """
        return run_in(self.way, self._command, self.files, stdin, limits)

    def _command(self, box: Path) -> Sequence[str]:
        if self.language == "cpp":
            return [str(box / "program")]
        python = python_command(self.way)
        assert python is not None  # a way without one is not available
        return [*python, "-c", START, str(box / "main.py")]


def prepare(code: str, language: str, way: Way) -> Program:
    """The program of `code`, compiled where the language is.

    Raises:
        DoesNotCompile: the compiler refused it, or used too much.
        RewardError: no such language, or no compiler on this machine.
        SandboxError: the compiler was not started.
    """
    source = code.encode(errors="replace")
    if language == "python":
        return Program(way, language, {"main.py": source})
    if language != "cpp":
        raise RewardError("reward `code`", f"no language `{language}`", f"choose one of {', '.join(LANGUAGES)}")
    if shutil.which("g++", path=SEARCH) is None:
        raise RewardError("reward `code`", "no C++ compiler on this machine", "install g++ (`apt-get install g++`)")
    result = run_in(
        way,
        lambda box: ["/bin/sh", "-c", COMPILE.format(source=box / "main.cpp")],
        {"main.cpp": source},
        b"",
        COMPILE_LIMITS,
    )
    if not result.ok:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or ["no binary"]
        raise DoesNotCompile(result.limit or lines[0][:200])
    return Program(way, language, {"program": result.stdout})
