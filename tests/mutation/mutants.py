"""Small wrong edits of a module's syntax tree: what a careless change could have been, one at a time."""

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_OPPOSITES = {
    one: other
    for pair in (
        ("min", "max"),
        ("amin", "amax"),
        ("argmin", "argmax"),
        ("minimum", "maximum"),
        ("clamp_min", "clamp_max"),
        ("floor", "ceil"),
        ("any", "all"),
        ("startswith", "endswith"),
    )
    for one, other in (pair, pair[::-1])
}
# Calls without arguments that give nearly the same: left off, they hide until a value is reused, negative or rounded.
_UNWRAPPED = frozenset({"abs", "clone", "double", "float", "resolve", "sqrt", "square", "strip"})
# Keywords that change what is printed or how an object may be misused, not what is computed.
_SILENT_KEYWORDS = frozenset({"description", "encoding", "frozen", "help", "indent", "repr", "strict"})
_LISTENERS = frozenset({"log", "logger", "progress", "warnings"})

Path = tuple[tuple[str, int | None], ...]
Edit = Callable[[ast.AST], ast.AST]


@dataclass(frozen=True)
class Mutant:
    """One edit.

    Attributes:
        key: where and what, by text that survives moved lines: scope, statement, expression before and after.
        line: of the statement, in the file as it is.
        tree: the module with the edit.
        in_function: the edit lies in a function's body, not in what an import evaluates.
    """

    key: str
    line: int
    tree: ast.Module
    in_function: bool


def make_mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of a module, in the source's order."""
    tree = ast.parse(source)
    seen: dict[str, int] = {}
    for path, edit in _edits(tree, (), ""):
        mutated = copy.deepcopy(tree)
        spot, parent = _follow(mutated, path)
        new = edit(spot)
        _put(parent, path[-1], ast.copy_location(new, spot) if hasattr(spot, "lineno") else new)
        ast.fix_missing_locations(mutated)
        scope, statement, line = _statement(tree, path)
        before, after = ast.unparse(_follow(tree, path)[0]), ast.unparse(_follow(mutated, path)[0])
        key = f"{scope}: {_cut(statement)}: {_cut(before)} -> {_cut(after)}"
        seen[key] = seen.get(key, 0) + 1
        yield Mutant(key if seen[key] == 1 else f"{key} #{seen[key]}", line, mutated, _in_function(tree, path))


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:97] + "..."


def _follow(tree: ast.AST, path: Path) -> tuple[ast.AST, ast.AST]:
    """The node at the end of a path, and its parent."""
    parent = node = tree
    for field, index in path:
        parent, value = node, getattr(node, field)
        node = value if index is None else value[index]
    return node, parent


def _in_function(tree: ast.AST, path: Path) -> bool:
    node = tree
    for field, index in path:
        if isinstance(node, ast.FunctionDef) and field == "body":
            return True
        value = getattr(node, field)
        node = value if index is None else value[index]
    return False


def _put(parent: ast.AST, step: tuple[str, int | None], new: ast.AST) -> None:
    field, index = step
    if index is None:
        setattr(parent, field, new)
    else:
        getattr(parent, field)[index] = new


def _statement(tree: ast.AST, path: Path) -> tuple[str, str, int]:
    """(names of the enclosing classes and functions, the innermost statement's text without its body, its line)."""
    scope: list[str] = []
    statement, node = tree, tree
    for field, index in path:
        value = getattr(node, field)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope.append(node.name)
        node = value if index is None else value[index]
        if isinstance(node, ast.stmt):
            statement = node
    shown = copy.deepcopy(statement)
    if hasattr(shown, "body"):
        shown.body = [ast.Pass()]
    for field in ("orelse", "finalbody", "handlers", "decorator_list"):
        if getattr(shown, field, None) and isinstance(shown, ast.stmt) and not isinstance(shown, ast.Expr):
            setattr(shown, field, [])
    text = ast.unparse(ast.fix_missing_locations(shown)).removesuffix("\n    pass")
    return ".".join(scope) or "module", text, getattr(statement, "lineno", 1)


def _edits(node: ast.AST, path: Path, keyword: str) -> Iterator[tuple[Path, Edit]]:
    """Edits of a node, then of what lies in it."""
    if _is_left_alone(node):
        if isinstance(node, ast.Expr) and _listener_method(node) == "say":
            yield path, lambda old: ast.Pass()
        return
    for edit in _own_edits(node):
        yield path, edit
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "ctx", "args") and _names_types(node, field):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                yield from _edits(child, (*path, (field, index)), keyword)


def _names_types(node: ast.AST, field: str) -> bool:
    """Whether a field holds annotations, decorators or base classes; a function's ``args`` keep their defaults."""
    return field != "args" or not isinstance(node, ast.Call | ast.FunctionDef | ast.Lambda | ast.arguments)


def _is_left_alone(node: ast.AST) -> bool:
    """Docstrings, error texts, f-strings, imports, messages to a listener, aliases of types."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or _listener_method(node) is not None
    if isinstance(node, ast.keyword):
        return node.arg in _SILENT_KEYWORDS
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        # `Bits = Literal[2, 3]` is a rule; `Rows = dict[str, Tensor]` is not.
        name = node.targets[0].id
        text = ast.unparse(node.value)
        return name[0].isupper() and not name.isupper() and "Literal" not in text
    return isinstance(node, ast.arg | ast.Import | ast.ImportFrom | ast.JoinedStr | ast.Raise)


def _listener_method(node: ast.Expr) -> str | None:
    call = node.value
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        return call.func.attr if call.func.value.id in _LISTENERS else None
    return None


def _own_edits(node: ast.AST) -> Iterator[Edit]:
    for kind, edits in _EDITS.items():
        if isinstance(node, kind):
            yield from edits(node)


def _of_comparison(node: ast.Compare) -> Iterator[Edit]:
    for index, operator in enumerate(node.ops):
        for other in _COMPARISONS[type(operator)]:
            yield lambda old, index=index, other=other: _with_operator(old, index, other())


def _of_arithmetic(node: ast.BinOp | ast.AugAssign) -> Iterator[Edit]:
    if other := _ARITHMETIC.get(type(node.op)):
        yield lambda old: _replaced(old, op=other())
    if isinstance(node, ast.AugAssign):
        yield lambda old: ast.Pass()


def _of_and_or(node: ast.BoolOp) -> Iterator[Edit]:
    yield lambda old: _replaced(old, op=ast.Or() if isinstance(old.op, ast.And) else ast.And())
    for index in range(len(node.values)):
        yield lambda old, index=index: _without_arm(old, index)


def _of_not(node: ast.UnaryOp) -> Iterator[Edit]:
    # -1 as an axis is 1 in two dimensions; the number itself is edited below.
    if not isinstance(node.op, ast.UAdd) and not isinstance(node.operand, ast.Constant):
        yield lambda old: old.operand


def _of_number(node: ast.Constant) -> Iterator[Edit]:
    if isinstance(node.value, bool):
        yield lambda old: ast.Constant(not old.value)
    elif isinstance(node.value, int | float):
        yield lambda old: ast.Constant(old.value + 1)
        yield lambda old: ast.Constant(old.value - 1)


def _of_return(node: ast.Return) -> Iterator[Edit]:
    if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
        yield lambda old: ast.Return(ast.Constant(None))


def _of_condition(node: ast.If | ast.IfExp | ast.While) -> Iterator[Edit]:
    if not isinstance(node, ast.While):
        yield lambda old: _replaced(old, test=ast.Constant(True))
    yield lambda old: _replaced(old, test=ast.Constant(False))


def _of_comprehension(node: ast.comprehension) -> Iterator[Edit]:
    for index in range(len(node.ifs)):
        yield lambda old, index=index: _replaced(old, ifs=old.ifs[:index] + old.ifs[index + 1 :])


def _of_slice(node: ast.Slice) -> Iterator[Edit]:
    for bound in ("lower", "upper"):
        end = getattr(node, bound)
        if end is not None and not isinstance(end, ast.Constant):
            yield lambda old, bound=bound: _replaced(old, **{bound: _one_more(getattr(old, bound))})


def _of_statement(node: ast.Expr | ast.Break | ast.Continue) -> Iterator[Edit]:
    if not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call):
        yield lambda old: ast.Pass()


def _of_call(node: ast.Call) -> Iterator[Edit]:
    if isinstance(node.func, ast.Name):
        if node.func.id in _OPPOSITES:
            yield lambda old: _replaced(old, func=ast.Name(_OPPOSITES[old.func.id], ast.Load()))
        elif node.func.id == "sorted" and not node.keywords:
            yield lambda old: _replaced(old, func=ast.Name("list", ast.Load()))
    elif isinstance(node.func, ast.Attribute):
        if node.func.attr in _OPPOSITES:
            yield lambda old: _replaced(old, func=_replaced(old.func, attr=_OPPOSITES[old.func.attr]))
        if node.func.attr in _UNWRAPPED and not node.args and not node.keywords:
            yield lambda old: old.func.value


def _replaced(old: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(old)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _with_operator(old: ast.AST, index: int, operator: ast.cmpop) -> ast.AST:
    return _replaced(old, ops=[*old.ops[:index], operator, *old.ops[index + 1 :]])


def _without_arm(old: ast.AST, index: int) -> ast.AST:
    rest = [value for number, value in enumerate(old.values) if number != index]
    return rest[0] if len(rest) == 1 else _replaced(old, values=rest)


def _one_more(bound: ast.AST) -> ast.AST:
    return ast.BinOp(bound, ast.Add(), ast.Constant(1))


_EDITS: dict[type | tuple[type, ...], Callable[..., Iterator[Edit]]] = {
    ast.Compare: _of_comparison,
    (ast.BinOp, ast.AugAssign): _of_arithmetic,
    ast.BoolOp: _of_and_or,
    ast.UnaryOp: _of_not,
    ast.Constant: _of_number,
    ast.Return: _of_return,
    (ast.If, ast.IfExp, ast.While): _of_condition,
    ast.comprehension: _of_comprehension,
    ast.Slice: _of_slice,
    (ast.Expr, ast.Break, ast.Continue): _of_statement,
    ast.Call: _of_call,
}
