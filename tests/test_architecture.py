"""The rules of the layout that a reader relies on, checked on the syntax trees of all our Python files."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "datastore", "actors", "jobs", "benchmarks", "tests")
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 70

# What each package may not import. Its own kind and whatever is below it are free.
FORBIDDEN = {
    "pipeline": {"ray", "faiss", "pyarrow", "datasets", "datastore", "actors", "jobs"},
    "datastore": {"ray", "actors", "jobs"},
    "actors": {"jobs"},
    "jobs": set[str](),
}
TEST_ONLY = {"pytest", "hypothesis", "tests", "benchmarks"}
# Inside datastore, torch and transformers are the embedder's alone.
EMBEDDER = "datastore/embedder.py"

FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in zip(NAMES, FILES, strict=True)}
PACKAGE_FILES = [name for name in NAMES if name.split("/")[0] in FORBIDDEN]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every import, those inside functions and `TYPE_CHECKING` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "").split(".")[0]


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and last name of every call: `print(...)` is `print`, `np.testing.assert_equal(...)` is `assert_equal`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.lineno, node.func.id
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.lineno, node.func.attr


def test_the_packages_are_there() -> None:
    assert {name.split("/")[0] for name in PACKAGE_FILES} == set(FORBIDDEN)


def test_imports_follow_the_arrows() -> None:
    found = []
    for name in PACKAGE_FILES:
        forbidden = FORBIDDEN[name.split("/")[0]] | TEST_ONLY
        if name.startswith("datastore/") and name != EMBEDDER:
            forbidden |= {"torch", "transformers"}
        found += [f"{name}:{line} imports {module}" for line, module in imports(TREES[name]) if module in forbidden]
    assert not found


def test_imports_name_the_package() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name in NAMES
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert not found, f"relative imports: {found}"


def test_files_are_small() -> None:
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in NAMES}
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE_LINES}


def test_functions_are_small() -> None:
    lengths = {
        f"{name}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for name in NAMES
        for node in functions(TREES[name])
    }
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}


def test_only_commands_print() -> None:
    found = [
        f"{name}:{line}"
        for name in NAMES
        for line, called in calls(TREES[name])
        if called == "print" and name.split("/")[0] not in {"jobs", "benchmarks"}
    ]
    assert not found, f"use logging instead of print: {found}"


def test_broad_excepts_reraise() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name in NAMES
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ExceptHandler) and is_broad(node.type) and not is_reraising(node)
    ]
    assert not found, f"catch what can be handled, or re-raise: {found}"


def is_broad(caught: ast.expr | None) -> bool:
    kinds = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(
        kind is None or (isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"}) for kind in kinds
    )


def is_reraising(handler: ast.ExceptHandler) -> bool:
    """Whether the handler's own last statement raises: a raise in a branch, or in a nested function, is not enough."""
    return isinstance(handler.body[-1], ast.Raise)


def test_every_test_checks_something() -> None:
    idle = []
    for name in NAMES:
        if not Path(name).name.startswith("test_"):
            continue
        helpers = {node.name for node in functions(TREES[name]) if is_checking(node, set())}
        tests = (node for node in functions(TREES[name]) if node.name.startswith("test_"))
        idle += [f"{name}:{node.lineno} {node.name}" for node in tests if not is_checking(node, helpers)]
    assert not idle


def is_checking(function: Function, helpers: set[str]) -> bool:
    """Whether it asserts, expects an error, or calls a function of `helpers` or one named for checking."""
    if any(isinstance(node, ast.Assert) for node in ast.walk(function)):
        return True
    called = {name for _, name in calls(function)}
    return bool(called & helpers) or any(name.startswith(("raises", "assert_", "check_")) for name in called)


def test_every_module_says_what_it_is_for() -> None:
    assert not [name for name in NAMES if ast.get_docstring(TREES[name]) is None]
