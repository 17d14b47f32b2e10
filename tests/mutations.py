"""The small changes that `tests/mutants.py` makes in a source file. Messages, type hints, logging and `__repr__` stay as they are."""

import ast
from collections.abc import Iterator
from typing import Any, NamedTuple

PAIRS = [
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.In, ast.NotIn),
    (ast.Is, ast.IsNot),
    (ast.And, ast.Or),
]
PAIRS += [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr), (ast.LShift, ast.RShift)]
SWAPS = {
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    **dict(PAIRS),
    **{new: old for old, new in PAIRS},
}
LOGGERS = {"log", "logger", "logging", "warnings"}


class Mutant(NamedTuple):
    """One change of `file`: the bytes from `start` to `stop` become `new`. `line` is the text of the source line `number`."""

    file: str
    number: int
    line: str
    change: str
    start: int
    stop: int
    new: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.change}"

    @property
    def place(self) -> dict[str, object]:
        return {"file": self.file, "number": self.number, "line": self.line, "change": self.change}

    def apply(self, source: str) -> str:
        data = source.encode()
        return (data[: self.start] + self.new.encode() + data[self.stop :]).decode()


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Return all mutants of a source file, in the order of its lines."""
    lines = source.encode().splitlines(keepends=True)
    starts = [sum(map(len, lines[:number])) for number in range(len(lines))]
    mutants = []
    for node, new in _changes(ast.parse(source)):
        start, stop = (starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)
        code = f"({new})" if isinstance(node, ast.expr) else new  # parentheses keep the order of evaluation around it
        change = f"{ast.unparse(node)} → {new}"
        mutants.append(Mutant(file, node.lineno, lines[node.lineno - 1].decode().strip(), change, start, stop, code))
    return mutants


def _changes(node: Any) -> Iterator[tuple[Any, str]]:
    if _stays(node):
        return
    yield from ((node, new) for new in _replacements(node))
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list", "exc", "msg"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _changes(child)


def _stays(node: ast.AST) -> bool:
    match node:
        case ast.FunctionDef(name="__repr__" | "__str__") | ast.JoinedStr() | ast.Expr(value=ast.Constant()):
            return True
        case ast.If(test=ast.Name("TYPE_CHECKING")) | ast.If(test=ast.Compare(left=ast.Name("__name__"))):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(name)))):
            return name.strip("_") in LOGGERS
    return isinstance(node, ast.keyword) and node.arg == "strict"  # lengths that zip() checks agree in correct code


def _replacements(node: ast.AST) -> Iterator[str]:
    match node:
        case (
            ast.BinOp(left=ast.JoinedStr())
            | ast.BinOp(right=ast.JoinedStr())
            | ast.BinOp(left=ast.Constant(value=str()))
        ):
            return  # a message
        case ast.Compare(ops=[operator]) | ast.BinOp(op=operator) | ast.BoolOp(op=operator) if type(operator) in SWAPS:
            swapped = SWAPS[type(operator)]()
            changed = {"ops": [swapped]} if isinstance(node, ast.Compare) else {"op": swapped}
            yield ast.unparse(type(node)(**{**dict(ast.iter_fields(node)), **changed}))
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield ast.unparse(node.operand)
        case ast.Constant(value=bool() as value):
            yield str(not value)
        case ast.Constant(value=int() | float() as value):
            yield from (str(value + 1), str(value - 1))
        case ast.IfExp():
            yield f"{ast.unparse(node.orelse)} if {ast.unparse(node.test)} else {ast.unparse(node.body)}"
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield "return None"
        case ast.Raise() | ast.Continue() | ast.Break() | ast.AugAssign() | ast.Expr(value=ast.Call()):
            yield "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "pass"
