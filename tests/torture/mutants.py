"""Small faults to put into the package: each is one piece of its source, replaced by another."""

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "lightning_plasticity"
# Text for people, imports, and what only tells the type checker something.
SILENT = (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Assert)
COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {"any": "all", "all": "any", "min": "max", "max": "min", "sum": "max"}


@dataclass(frozen=True)
class Mutant:
    """The piece ``source[start:stop]`` of a file, given as bytes, becomes another."""

    file: str  # inside the package
    line: int
    start: int
    stop: int
    before: str
    after: str

    def of(self, source: bytes) -> bytes:
        """The source with the fault in it."""
        return source[: self.start] + self.after.encode() + source[self.stop :]


def sample(count: int, seed: int = 0) -> list[Mutant]:
    """So many faults, drawn from all that there are; with the same seed and source always the same."""
    return random.Random(seed).sample(all_mutants(), count)


@cache
def all_mutants() -> list[Mutant]:
    """All faults that can be put into the package."""
    return [m for file in sorted(PACKAGE.rglob("*.py")) for m in mutants(file.relative_to(PACKAGE).as_posix())]


def mutants(file: str) -> Iterator[Mutant]:
    """All faults that can be put into a file of the package."""
    source = (PACKAGE / file).read_bytes()
    begins = [0]
    for line in source.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    for node in _deciding(ast.parse(source)):
        for changed, after in _changes(node):
            start = begins[changed.lineno - 1] + changed.col_offset
            stop = begins[changed.end_lineno - 1] + changed.end_col_offset
            yield Mutant(file, changed.lineno, start, stop, source[start:stop].decode(), after)


def _deciding(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree that decide what happens."""
    if isinstance(node, SILENT) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return  # of zip: an assertion, too
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _deciding(child)


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """What to write in the place of which node."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield node, ast.unparse(ast.Compare(node.left, [COMPARED[type(node.ops[0])]()], node.comparators))
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        yield node, f"({ast.unparse(ast.BinOp(node.left, COMPUTED[type(node.op)](), node.right))})"
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield node, f"({ast.unparse(ast.BoolOp(other, node.values))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield node, repr(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        yield node.func, NAMES[node.func.id]
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield node, "pass"
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.Continue):
        yield node, "break"
