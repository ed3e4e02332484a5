"""Assertion test cases without showing the program what is expected: its calls are evaluated in one sandbox, the assertions in another.

`assert f(2) == 4` becomes the expression `f(2)`, evaluated beside the program, and `assert 4 == 4` with its value put in, checked
where the program is not. Owns taking assertions apart and putting them together; scores are `rewards.code_tests`.
"""

from __future__ import annotations

import ast
import builtins
import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bregman.errors import RewardError

VALUE = "_value_"
"""What the names of values begin with."""

UNSTEADY = {"random", "secrets", "time", "uuid"}
"""Modules whose values differ each time: what an assignment draws from them is drawn once, on the program's side."""

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
out, sys.stdout = sys.stdout, sys.stderr
imported = {}
try:
    exec(imports, imported)
except BaseException as error:
    print(json.dumps({"imports": f"{type(error).__name__}: {error}"[:200]}), file=out)
    raise SystemExit(0)
verdicts = []
for check in checks:
    try:
        exec(check, dict(imported))
        verdicts.append(True)
    except BaseException as error:
        verdicts.append(False)
print(json.dumps(verdicts), file=out)
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

    What they assign stays on the checking side and is put into the calls that need it, unless it is what the program made itself.

    Args:
        tests: Python source each: imports, assignments, calls and `assert` statements.

    Raises:
        RewardError: no Python, no assertion, or one whose calls cannot be evaluated on their own.
    """
    apart = _Apart()
    for test in tests:
        for statement in _statements(test):
            apart.take(statement)
    if not apart.checks:
        raise _bad(str(list(tests)), "none of them has an assert")
    return Assertions(tuple(apart.steps), tuple(apart.checks), "\n".join(apart.imports))


class _Apart:
    """What was taken apart so far, and on which side each name is."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, str]] = []
        self.checks: list[tuple[str, tuple[int, ...]]] = []
        self.imports: list[str] = []
        self._known = set(dir(builtins))  # names that both sides have
        self._unsteady: set[str] = set()  # those of them whose value differs each time
        self._held: dict[str, ast.expr] = {}  # assigned names of the checking side
        self._drawn: set[str] = set()  # assigned names that only the program's side has although the program did not make them
        self._count = 0

    def take(self, statement: ast.stmt) -> None:
        """Add a statement.

        Raises:
            RewardError: it cannot be evaluated without showing the program more than the arguments of its calls.
        """
        whole = ast.unparse(statement)
        if isinstance(statement, ast.Import | ast.ImportFrom):
            self._import(statement, whole)
        elif isinstance(statement, ast.Assert):
            condition = self._cut(statement.test, whole, "value")
            if names := self._drawn & _loaded(condition):
                raise _bad(whole, f"`{min(names)}` is drawn anew; assign a value that is written out")
            needed = {int(name.removeprefix(VALUE)) for name in _loaded(condition) if name.startswith(VALUE)}
            self.checks.append((f"assert {ast.unparse(condition)}", tuple(sorted(needed))))
        elif isinstance(statement, ast.Assign):
            self._assign(statement, whole)
        elif isinstance(statement, ast.Expr):
            self._call(statement.value, whole)
        else:
            raise _bad(whole, "write `assert f(x) == value`, one for each value")

    def _import(self, statement: ast.Import | ast.ImportFrom, whole: str) -> None:
        names = {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
        modules = {statement.module or ""} if isinstance(statement, ast.ImportFrom) else {alias.name for alias in statement.names}
        self.steps.append(("run", whole))
        self._forget(names)
        if "solution" in modules:  # the program
            self._known -= names
            return
        self.imports.append(whole)
        self._known |= names
        self._unsteady |= names if modules & UNSTEADY else set()

    def _assign(self, statement: ast.Assign, whole: str) -> None:
        value = self._put_in(statement.value, whole)
        targets = [name for target in statement.targets for name in _targets(target)]
        if not all(isinstance(name, ast.Name) for name in targets):
            raise _bad(whole, "assign to names alone")
        names = [name.id for name in targets if isinstance(name, ast.Name)]
        if self._of_program(value) or _loaded(value) & (self._unsteady | self._drawn):
            self._to_program(value, whole)
            made = self._of_program(value)
            self.steps.append(("run", ast.unparse(ast.Assign(targets=statement.targets, value=value, lineno=0))))
            self._forget(names)
            self._known -= set(names)
            if not made:
                self._drawn |= set(names)
            return
        value = self._cut(value, whole, "value")
        self._forget(names)
        for target in statement.targets:
            parts = _targets(target)
            if isinstance(target, ast.Name):
                values = [value]
            elif isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(parts) and not any(map(_starred, value.elts)):
                values = list(value.elts)
            else:
                raise _bad(whole, "assign one name at a time")
            self._held |= {name.id: each for name, each in zip(parts, values, strict=True) if isinstance(name, ast.Name)}

    def _call(self, value: ast.expr, whole: str) -> None:
        """A statement for its effect; what it is given by name may change and is from now on the program's."""
        if isinstance(value, ast.Constant):
            return
        root = _root(value)
        if isinstance(root, ast.Name) and root.id in self._held:
            raise _bad(whole, "it changes an assigned value; write the value out")
        if isinstance(value, ast.Call) and self._of_program(value):
            for argument in [*value.args, *(keyword.value for keyword in value.keywords)]:
                if isinstance(argument, ast.Name) and argument.id in self._held:
                    held = self._held.pop(argument.id)
                    self._to_program(held, whole)
                    self._known.discard(argument.id)
                    self.steps.append(("run", f"{argument.id} = {ast.unparse(held)}"))
        if isinstance(root, ast.Name) and root.id in self._unsteady and not _loaded(value) & self._held.keys():
            self.steps.append(("run", whole))  # a seed, for instance
            return
        self._cut(value, whole, "run")

    def _cut(self, value: ast.expr, whole: str, kind: str) -> ast.expr:
        """What is left for the checking side; what only the program can evaluate becomes steps."""
        value = self._put_in(value, whole)
        known = self._known | self._drawn | {f"{VALUE}{index}" for index in range(self._count)}
        cut = _Cut(known, self._count)
        left: ast.expr = cut.visit(value)
        if cut.bound:
            raise _bad(whole, "its calls depend on a loop variable; write one assertion for each value")
        for part in cut.parts:
            self._to_program(part, whole)
            self.steps.append((kind, ast.unparse(part)))
        if kind == "value":
            self._count += len(cut.parts)
        return left

    def _put_in(self, value: ast.expr, whole: str) -> ast.expr:
        bound = {part.id for part in ast.walk(value) if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load)}
        bound |= {part.arg for part in ast.walk(value) if isinstance(part, ast.arg)}
        if names := bound & self._held.keys():
            raise _bad(whole, f"`{min(names)}` is a loop variable and an assigned name; rename one")
        changed: ast.expr = _PutIn(self._held).visit(copy.deepcopy(value))
        return ast.fix_missing_locations(changed)

    def _to_program(self, value: ast.expr, whole: str) -> None:
        """Raise where the program would see what it does not get as an argument, or would need a value of the checking side."""
        if any(name.startswith(VALUE) for name in _loaded(value)):
            raise _bad(whole, "it hands on a value that was computed; write the value out")
        for part in ast.walk(value):
            if not isinstance(part, ast.Attribute | ast.Subscript) or self._of_program(part):
                continue
            copied = isinstance(part, ast.Attribute) and part.attr == "copy"
            if not copied and any(hasattr(inner, "put_in") and not isinstance(inner, ast.Constant) for inner in ast.walk(part.value)):
                raise _bad(whole, "it hands over a part of a value; write the part out")

    def _of_program(self, value: ast.expr) -> bool:
        root, others = _root(value), self._known | self._held.keys() | self._drawn
        return isinstance(root, ast.Name) and root.id not in others and not root.id.startswith(VALUE)

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._held.pop(name, None)
            self._drawn.discard(name)
            self._unsteady.discard(name)


def _root(value: ast.expr) -> ast.expr:
    while isinstance(value, ast.Call | ast.Attribute | ast.Subscript):
        value = value.func if isinstance(value, ast.Call) else value.value
    return value


def _loaded(value: ast.expr) -> set[str]:
    return {part.id for part in ast.walk(value) if isinstance(part, ast.Name)}


def _starred(value: ast.expr) -> bool:
    return isinstance(value, ast.Starred)


def _targets(target: ast.expr) -> list[ast.expr]:
    return list(target.elts) if isinstance(target, ast.Tuple | ast.List) else [target]


class _PutIn(ast.NodeTransformer):
    """Puts assigned values in the place of their names, and parts of written-out values in the place of subscripts."""

    def __init__(self, held: Mapping[str, ast.expr]) -> None:
        self._held = held

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if not isinstance(node.ctx, ast.Load) or node.id not in self._held:
            return node
        value = copy.deepcopy(self._held[node.id])
        value.put_in = True  # type: ignore[attr-defined]  # read by `_Apart._to_program`
        return value

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        bounds = [node.slice.lower, node.slice.upper, node.slice.step] if isinstance(node.slice, ast.Slice) else [node.slice]
        try:
            whole, at = ast.literal_eval(node.value), [None if bound is None else ast.literal_eval(bound) for bound in bounds]
            part = whole[slice(*at) if isinstance(node.slice, ast.Slice) else at[0]]
            written = ast.parse(repr(part), mode="eval").body
            return written if ast.literal_eval(written) == part else node
        except (ValueError, TypeError, LookupError, SyntaxError):
            return node


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
        lines = [f"{VALUE}{index} = {value}" for index, value in zip(needed, given, strict=True)]
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
        self.parts: list[ast.expr] = []
        self.bound = False
        self._local: set[str] = set()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        root = _root(node)
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
        root = _root(node)
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
        self.parts.append(node)
        self._next += 1
        return ast.Name(id=f"{VALUE}{self._next - 1}", ctx=ast.Load())


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
