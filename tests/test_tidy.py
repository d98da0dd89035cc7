"""The shape of the project, held over its syntax trees: who may import what, sizes, names,
and what must not appear.

Each message says why the rule is there. An exception to a rule is listed here, with its reason.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.security.attacks import attack

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "achilles"
GENERATED = {".git", ".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__", "build"}

FILE_LINES = 600
FUNCTION_LINES = 70
LONG_FILES = {  # path: why it is longer
    "achilles/core/scheduler.py": "each message that can change what becomes of a task, with the order of what follows",
    "achilles/core/protocol.py": "the vocabulary and its bounds: whoever adds a message sees what is checked of it",
    "tests/sim/mutants.py": "a list, and nothing else",
}
LONG_FUNCTIONS: dict[str, str] = {}  # path::qualified.name: why it is longer

# Rooms by height. A room may import its own modules and lower ones;
# rooms of one height do not know each other.
HEIGHTS = {
    "errors": 0,
    "task_errors": 0,
    "core": 1,
    "runtime": 1,
    "bundles": 2,
    "callbacks": 2,
    "failures": 2,
    "futures": 2,
    "letters": 2,
    "mailbox": 2,
    "backends": 3,
    "handles": 3,
    "sources": 1,
    "local": 3,
    "maps": 3,
    "nested": 3,
    "options": 3,
    "aio": 3,
    "net": 3,
    "executor": 4,
    "pool": 5,
    "pool_calls": 5,
    "joblib_backend": 5,
    "compat": 5,
    "cli": 6,
    "register": 6,
    "__main__": 7,
}
ONE_ROOM = [
    {"errors", "task_errors"},
    {"bundles", "callbacks", "failures", "futures", "mailbox"},
    {"pool", "pool_calls"},
    {"maps", "aio"},
    {"register", "joblib_backend"},
]  # of one height, and may know each other
CONFIG_USERS = {"config", "executor", "joblib_backend", "pool", "cli"}
ALLOWED_EDGES = {
    (
        "achilles.runtime.host",
        "achilles.core.protocol",
    ): "its effects and events are the agent's own",
    (
        "achilles.runtime.hosted",
        "achilles.core.protocol",
    ): "so are those of each of its runners",
}

# Third-party and delicate standard modules: in which rooms they may be imported,
# and why nowhere else.
HOMES: dict[str, tuple[set[str], str]] = {
    "zmq": ({"net"}, "sockets are made in one place, with keys, limits and a loop around them"),
    "cloudpickle": (
        {"runtime"},
        "the broker must never unpickle, and start-up must not pay for it",
    ),
    "psutil": (
        {"runtime"},
        "it is slow to import, and only the host of runners looks at processes",
    ),
    "click": ({"cli"}, "executors and runners must not depend on how a command line is read"),
    "joblib": (
        {"joblib_backend", "register"},
        "it is an extra, and slow to import",
    ),
    "tomllib": ({"config"}, "settings are read in one place, which can say where each came from"),
    "tomli": ({"config"}, "settings are read in one place, which can say where each came from"),
    "msgspec": (
        {"core", "net", "executor", "cli"},
        "the codec is in one module; a runner must not import it",
    ),
    "pickle": (
        # task_errors: its classes derive from the standard pickling errors
        {"runtime", "executor", "mailbox", "task_errors"},
        "unpickling is code execution: it must not be within reach of the broker",
    ),
}

# What a pure core may use: nothing here has a clock, a thread, randomness,
# the OS or a pickle in it.
PURE = {
    *(
        "__future__",
        "abc",
        "bisect",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "hashlib",
        "heapq",
    ),
    *("itertools", "math", "msgspec", "operator", "re", "struct", "types", "typing"),
}
IMPURE_BUILTINS = {"__import__", "breakpoint", "compile", "eval", "exec", "input", "open", "print"}

# What the import of a module must not bring in, by our own imports, and why.
UNREACHABLE = [
    ("achilles.net.broker", {"pickle", "cloudpickle", "marshal"}, "the broker never unpickles"),
    (
        "achilles.runtime.runner",
        {
            *("zmq", "click", "msgspec", "psutil", "cloudpickle", "asyncio", "concurrent"),
            *("logging", "typing"),
        },
        "a runner's start is the floor of start-up and of recovery",
    ),
    ("achilles.executor", {"zmq", "click"}, "embedded mode needs neither, and should start fast"),
    (
        "achilles",
        {"zmq", "click", "msgspec", "concurrent", "multiprocessing"},
        "runners import it too",
    ),
]

UNSAFE_NAMES = {
    "recv_pyobj": "it unpickles what anybody sent",
    "send_pyobj": "its other end would unpickle what anybody sent",
}
UNSAFE_TEXTS = {
    "tcp://*": "it would listen on every network of the host",
    "0.0.0.0": "it would listen on every network of the host",
}
ALLOWED_TEXTS: dict[tuple[str, str], str] = {}  # (module, text): why it may name that address

# Modules without a test module of their own, and what tests them instead.
UNTESTED = {
    "achilles/backends.py": "the executor's tests, whose half it is, and those of programs that end (tests/integration)",
    "achilles/__main__.py": "three lines, which every test of a command runs",
    "achilles/core/dispatch.py": "the scheduler's tests and the simulation, of which it is the half that gives out",
    "achilles/core/runners.py": "the agent's tests and the simulation, whose data it is",
}


class Import(NamedTuple):
    module: str  # absolute
    line: int
    is_at_import: bool  # not inside a function


class Source(NamedTuple):
    """A Python file, read once."""

    path: Path
    name: str  # relative to the root
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        parts = list(Path(self.name).with_suffix("").parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        """The part of the package that it belongs to: "core", "executor", ...
        and "" for the package itself.
        """
        return (self.module.split(".") + [""])[1]


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name in GENERATED or path.name.endswith(".egg-info"):
            continue
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


@cache
def project() -> tuple[Source, ...]:
    sources = []
    for path in _files(ROOT):
        if path.suffix == ".py":
            text = path.read_text("utf-8")
            name = path.relative_to(ROOT).as_posix()
            sources.append(Source(path, name, text, ast.parse(text, name)))
    return tuple(sources)


def package() -> list[Source]:
    return [source for source in project() if source.module.split(".")[0] == "achilles"]


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(source: Source) -> list[Import]:
    """All imports but those for the type checker, which make no dependency."""
    found: list[Import] = []
    modules = {other.module for other in package()}

    def walk(node: ast.AST, is_at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, is_at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # our style is absolute, but a rule must not be evaded by a dot
                is_package = source.path.name == "__init__.py"
                parts = source.module.split(".")
                up = parts[: len(parts) - node.level + is_package]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                longer = f"{base}.{alias.name}"
                is_lazy = base == "achilles" and alias.name != "__version__"  # what it loads on use
                module = longer if is_lazy or longer in modules else base
                found.append(Import(module, node.lineno, is_at_import))
        elif _is_for_types(node):
            assert isinstance(node, ast.If)
            for otherwise in node.orelse:
                walk(otherwise, is_at_import)
        else:
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                walk(child, is_at_import and not is_function)

    walk(source.tree, True)
    return found


def top(module: str) -> str:
    """The distribution or standard module that it belongs to; ``_pickle`` is ``pickle`` in C."""
    first = module.split(".")[0]
    bare = first.lstrip("_")
    return bare if bare in sys.stdlib_module_names and first != "__future__" else first


def check(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_every_room_has_a_height() -> None:
    rooms = {source.room for source in package()} - {"", "config"}
    assert rooms <= HEIGHTS.keys(), f"say in HEIGHTS who may import {rooms - HEIGHTS.keys()}"


def test_imports_go_one_way() -> None:
    problems = []
    for source in package():
        for found in imports(source):
            if found.module.split(".")[0] != "achilles" or found.module == "achilles":
                continue
            if (source.module, found.module) not in ALLOWED_EDGES and not _may_know(
                source.room, found.module.split(".")[1]
            ):
                problems.append(
                    f"{source.name}:{found.line}: imports {found.module}. Imports go one way: cli -> pool -> executor "
                    "-> local | net -> mailbox -> runtime | core -> errors (config: from executor and cli), so that "
                    "each part can be understood, tested and simulated without those above and beside it."
                )
    check(problems)


def _may_know(room: str, other: str) -> bool:
    if room == other or any({room, other} <= one for one in ONE_ROOM):
        return True
    if other == "config":
        return room in CONFIG_USERS
    if room == "config":
        return HEIGHTS.get(other) == 0
    if room == "":
        return False  # the package itself is lazy
    return HEIGHTS.get(other, 99) < HEIGHTS[room]  # 99: a lazy name; import it from its own module


def test_allowed_edges_are_used() -> None:
    edges = {(source.module, found.module) for source in package() for found in imports(source)}
    assert ALLOWED_EDGES.keys() <= edges, "an exception that nobody needs any more"


def test_cores_are_pure() -> None:
    reason = "A core has no clock, thread, randomness, OS or pickle, so that it can be simulated by seed."
    problems = []
    for source in package():
        if source.room != "core":
            continue
        for found in imports(source):
            if found.module.split(".")[0] not in PURE | {"achilles"}:
                problems.append(f"{source.name}:{found.line}: imports {found.module}. {reason}")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Name) and node.id in IMPURE_BUILTINS:
                problems.append(f"{source.name}:{node.lineno}: uses {node.id}. {reason}")
    check(problems)


@attack("T35")
def test_delicate_modules_stay_in_their_rooms() -> None:
    problems = []
    for source in package():
        for found in imports(source):
            rooms, reason = HOMES.get(top(found.module), ({source.room}, ""))
            if source.room not in rooms:
                where = " and ".join(sorted(rooms))
                problems.append(
                    f"{source.name}:{found.line}: imports {found.module}, which belongs in {where} only: {reason}."
                )
    check(problems)


def test_third_party_modules_are_declared() -> None:
    problems = [
        f"{source.name}:{found.line}: imports {found.module}, which is no dependency in pyproject.toml."
        for source in package()
        for found in imports(source)
        if top(found.module) not in sys.stdlib_module_names | HOMES.keys() | {"achilles"}
    ]
    check(problems)


@pytest.mark.parametrize(
    ("module", "unwanted", "reason"), UNREACHABLE, ids=[rule[0] for rule in UNREACHABLE]
)
def test_import_does_not_bring_in(module: str, unwanted: set[str], reason: str) -> None:
    sources = {source.module: source for source in package()}
    problems = []
    seen: set[str] = set()
    waiting: list[tuple[str, tuple[str, ...]]] = [(module, (module,))]
    while waiting:
        name, chain = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if "." in name:  # a package's __init__ runs before its modules
            parent = name.rpartition(".")[0]
            waiting.append((parent, (*chain, parent)))
        for found in imports(sources[name]):
            if found.is_at_import and found.module in sources:
                waiting.append((found.module, (*chain, found.module)))
            elif found.is_at_import and top(found.module) in unwanted:
                way = " -> ".join((*chain, found.module))
                problems.append(f"{sources[name].name}:{found.line}: {way}. Here {reason}.")
    check(problems)


@attack("T35")
def test_nothing_unpickles_from_a_socket_or_listens_to_the_world() -> None:
    problems = []
    for source in package():
        docstrings = {
            id(node.value) for node in ast.walk(source.tree) if isinstance(node, ast.Expr)
        }
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and node.attr in UNSAFE_NAMES:
                problems.append(
                    f"{source.name}:{node.lineno}: {node.attr}: {UNSAFE_NAMES[node.attr]}."
                )
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
            if not is_text or id(node) in docstrings:
                continue
            assert isinstance(node, ast.Constant)
            text = (
                node.value.decode("latin-1") if isinstance(node.value, bytes) else str(node.value)
            )
            problems.extend(
                f"{source.name}:{node.lineno}: {unsafe!r}: {reason}."
                for unsafe, reason in UNSAFE_TEXTS.items()
                if unsafe in text and (source.module, unsafe) not in ALLOWED_TEXTS
            )
    check(problems)


def test_files_are_short() -> None:
    problems = []
    for source in project():
        lines = len(source.text.splitlines())
        if lines > FILE_LINES and source.name not in LONG_FILES:
            problems.append(
                f"{source.name}: {lines} lines. Past {FILE_LINES} a file holds more than one thing; split it, or say in "
                "LONG_FILES why not."
            )
    check(problems)


def test_functions_are_short() -> None:
    problems = []
    for source in project():
        for name, function in _functions(source.tree, ""):
            lines = _length(function)
            if lines > FUNCTION_LINES and f"{source.name}::{name}" not in LONG_FUNCTIONS:
                problems.append(
                    f"{source.name}:{function.lineno}: {name} has {lines} lines. Past {FUNCTION_LINES} (without its "
                    "docstring) a function does more than one thing; split it, or say in LONG_FUNCTIONS why not."
                )
    check(problems)


def _functions(
    node: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{prefix}.{child.name}" if prefix else child.name
            if not isinstance(child, ast.ClassDef):
                yield name, child
        yield from _functions(child, name)


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    docstring = 0
    if isinstance(first, ast.Expr) and ast.get_docstring(function, clean=False) is not None:
        docstring = (first.end_lineno or first.lineno) - first.lineno + 1
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def test_every_module_has_a_test_module() -> None:
    problems = []
    for source in package():
        has_code = any(not isinstance(node, ast.Expr) for node in source.tree.body)
        if source.path.name == "__init__.py" or source.name in UNTESTED or not has_code:
            continue
        inside = source.path.relative_to(PACKAGE)
        wanted = Path("tests", "unit", inside.parent, f"test_{inside.name}")
        if not (ROOT / wanted).exists():
            problems.append(
                f"{source.name}: {wanted.as_posix()} is missing. One module, one test module: whoever changes the one "
                "finds the other; or say in UNTESTED what tests it instead."
            )
    check(problems)


def test_every_test_is_run() -> None:
    """By a plain run or, in tests/clients, by ``make clients``."""
    pattern = r"^testpaths = \[.*?\n\]"
    listed = re.search(pattern, (ROOT / "pyproject.toml").read_text("utf-8"), re.M | re.S)
    assert listed is not None
    roots = [Path(name) for name in [*re.findall(r'"(.+?)"', listed[0]), "tests/clients"]]
    assert all((ROOT / root).exists() for root in roots)
    tests = [Path(source.name) for source in project() if source.path.name.startswith("test_")]
    check(
        [
            f"{test}: testpaths in pyproject.toml does not lead to it, so it never runs."
            for test in tests
            if not any(root in (test, *test.parents) for root in roots)
        ]
    )


def _texts() -> Iterator[tuple[str, str]]:
    for path in _files(ROOT):
        try:
            yield path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
        except UnicodeDecodeError:
            continue


def _lines_with(pattern: str, reason: str) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:100]!r}: {reason}"
        for name, text in _texts()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_no_paths_of_one_machine() -> None:
    # Written so that this file does not match itself.
    work, temporary, home = r"/(?:work)", r"/(?:tmp)/", r"/(?:root)/"
    pattern = rf"(?<![\w.}}]){work}(?![\w-])|(?<![\w.}}]){temporary}|(?<![\w.}}]){home}"
    check(
        _lines_with(
            pattern, "a path that exists on one machine; use tempfile, tmp_path or $ACHILLES_HOME."
        )
    )


def test_no_marks_of_unfinished_work() -> None:
    check(_lines_with(r"\b(?:FIX(?:ME)|X(?:XX))\b", "finish it, or write it into an issue."))


def test_installation_names_no_registry() -> None:
    pattern = r"index(?:-)url|find(?:-)links|py(?:pi)\.|python(?:hosted)"
    reason = "where packages come from is the user's setting."
    names = ("Makefile", ".ci/", "pyproject.toml")
    check([line for line in _lines_with(pattern, reason) if line.startswith(names)])
