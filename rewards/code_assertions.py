"""Assertion test cases without showing the program what is expected: its calls are evaluated in one sandbox, the assertions in another.

`assert f(2) == 4` becomes the expression `f(2)`, evaluated beside the program, and `assert 4 == 4` with its value put in, checked
where the program is not. Owns taking assertions apart and putting them together; scores are `rewards.code_tests`.
"""

from __future__ import annotations

import ast
import builtins
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bregman.errors import RewardError

EVALUATE = r'''
import json, os, sys, types
out = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
steps = json.load(sys.stdin)

def plain(value):
    """JSON of a value of built-in types; subclasses as what they are derived from, so that no __eq__ of the program survives."""
    if value is None or value is True or value is False: return value
    for kind, tag in ((int, "int"), (float, "float"), (complex, "complex")):
        if isinstance(value, kind): return {tag: kind.__repr__(kind(value))}
    if isinstance(value, str): return str.__str__(value)
    if isinstance(value, (bytes, bytearray)): return {"bytes": bytes(value).decode("latin-1")}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind): return {kind.__name__: [plain(item) for item in kind.__iter__(value)]}
    if isinstance(value, dict): return {"dict": [[plain(k), plain(v)] for k, v in dict.items(value)]}
    raise TypeError(f"a {type(value).__name__} cannot be compared outside the sandbox")

module = sys.modules["solution"] = types.ModuleType("solution")
names = module.__dict__
with open(os.path.join(os.path.dirname(sys.argv[0]), "solution.py"), encoding="utf-8") as file:
    exec(compile(file.read(), "solution.py", "exec"), names)
for kind, source in steps:
    try:
        if kind == "run": exec(source, names)
        else: print(json.dumps({"value": plain(eval(source, names))}), file=out, flush=True)
    except BaseException as error:
        if kind != "run": print(json.dumps({"error": f"{type(error).__name__}: {error}"[:200]}), file=out, flush=True)
os._exit(0)
'''
"""Runs beside the program. It could lie about values, but does not know which one is asked for."""

CHECK = r"""
import json, sys
imports, checks = json.load(sys.stdin)
verdicts = []
for check in checks:
    names = {}
    try:
        exec(imports, names)
        exec(check, names)
        verdicts.append(True)
    except BaseException as error:
        verdicts.append(False)
print(json.dumps(verdicts))
"""
"""Runs where the program is not."""


@dataclass(frozen=True, slots=True)
class Assertions:
    """Assertion cases taken apart.

    Attributes:
        steps: for the program's side, in order: `("run", statement)` or `("value", expression)`.
        checks: the assertions with `_value_[i]` where value i belongs, and which values those are.
        imports: the import statements, for the other side.
    """

    steps: tuple[tuple[str, str], ...]
    checks: tuple[tuple[str, tuple[int, ...]], ...]
    imports: str


def take_apart(tests: Sequence[str]) -> Assertions:
    """Split assertion cases.

    Args:
        tests: Python source each: imports, assignments, calls and `assert` statements.

    Raises:
        RewardError: no Python, no assertion, or one whose calls cannot be evaluated on their own.
    """
    steps: list[tuple[str, str]] = []
    checks: list[tuple[str, tuple[int, ...]]] = []
    imports: list[str] = []
    known = set(dir(builtins))
    count = 0
    for test in tests:
        for statement in _statements(test):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                imports.append(ast.unparse(statement))
                known |= {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
                steps.append(("run", ast.unparse(statement)))
            elif isinstance(statement, ast.Assert):
                cut = _Cut(known, count)
                whole = ast.unparse(statement)
                condition = ast.unparse(cut.visit(statement.test))
                if cut.bound:
                    raise _bad(whole, "its calls depend on a loop variable; write one assertion for each value")
                steps += [("value", source) for source in cut.sources]
                checks.append((f"assert {condition}", tuple(range(count, count + len(cut.sources)))))
                count += len(cut.sources)
            elif isinstance(statement, ast.Assign | ast.Expr):
                steps.append(("run", ast.unparse(statement)))
            else:
                raise _bad(ast.unparse(statement), "write `assert f(x) == value`, one for each value")
    if not checks:
        raise _bad(str(list(tests)), "none of them has an assert")
    return Assertions(tuple(steps), tuple(checks), "\n".join(imports))


def read_values(stdout: bytes) -> list[str | None]:
    """The values that came back, as Python source; None where evaluating failed. As many as there are."""
    values: list[str | None] = []
    for line in stdout.splitlines():
        try:
            answer = json.loads(line)
            values.append(_source(answer["value"]) if "value" in answer else None)
        except (ValueError, KeyError, TypeError, RecursionError):
            values.append(None)
    return values


def put_together(assertions: Assertions, values: Sequence[str | None]) -> list[str | None]:
    """Every assertion with the values put in; None where one of its values is missing."""
    whole: list[str | None] = []
    for check, needed in assertions.checks:
        given = [values[index] if index < len(values) else None for index in needed]
        if any(value is None for value in given):
            whole.append(None)
            continue
        lines = [f"_value_{index} = {value}" for index, value in zip(needed, given, strict=True)]
        whole.append("\n".join([*lines, check]))
    return whole


def _statements(test: str) -> list[ast.stmt]:
    try:
        return ast.parse(test).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _bad(test, "no Python") from None


def _bad(test: str, why: str) -> RewardError:
    return RewardError("column `tests`", f"assertion `{' '.join(test.split())[:80]}` cannot be used", why)


class _Cut(ast.NodeTransformer):
    """Replaces the largest parts that only the program can evaluate by names of values."""

    def __init__(self, known: set[str], first: int) -> None:
        self._known, self._next = known, first
        self.sources: list[str] = []
        self.bound = False
        self._local: set[str] = set()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        root: ast.expr = node
        while isinstance(root, ast.Call | ast.Attribute | ast.Subscript):
            root = root.func if isinstance(root, ast.Call) else root.value
        if isinstance(root, ast.Name) and root.id not in self._known and root.id not in self._local:
            return self._replace(node)
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return self._own(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        return self._own(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._own(node)

    def _own(self, node: ast.Attribute | ast.Subscript | ast.Name) -> ast.AST:
        root: ast.expr = node
        while isinstance(root, ast.Attribute | ast.Subscript | ast.Call):
            root = root.func if isinstance(root, ast.Call) else root.value
        if isinstance(root, ast.Name):
            return node if root.id in self._known or root.id in self._local else self._replace(node)
        return self.generic_visit(node)

    def _comprehension(self, node: Any) -> ast.AST:
        before = set(self._local)
        self._local |= {name.id for each in node.generators for name in ast.walk(each.target) if isinstance(name, ast.Name)}
        result = self.generic_visit(node)
        self._local = before
        return result

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        before = set(self._local)
        self._local |= {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        result = self.generic_visit(node)
        self._local = before
        return result

    def _replace(self, node: ast.expr) -> ast.AST:
        self.bound |= any(isinstance(part, ast.Name) and part.id in self._local for part in ast.walk(node))
        self.sources.append(ast.unparse(node))
        self._next += 1
        return ast.Name(id=f"_value_{self._next - 1}", ctx=ast.Load())


def _source(value: Any) -> str:
    """Python source of a value; nothing but literals of built-in types can come out."""
    if value is None or isinstance(value, bool | str):
        return repr(value)
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("not an encoded value")
    [(tag, content)] = value.items()
    if tag == "dict":
        return "{" + ", ".join(f"{_source(k)}: {_source(v)}" for k, v in content) + "}"
    if tag in ("list", "tuple", "set", "frozenset"):
        return f"{tag}([{', '.join(_source(item) for item in content)}])"
    if tag == "bytes":
        return repr(content.encode("latin-1"))
    if tag in ("int", "float", "complex") and isinstance(content, str):
        return f"{tag}({content!r})"
    raise ValueError("not an encoded value")
