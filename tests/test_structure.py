"""
The shape of the code, read with `ast`: imports, circles, statements, lengths, widths, names.

The core is every Python file outside tests, benchmarks and docs; examples are a part of it. The
layers stand once, in the import contract of pyproject.toml, which tests/lint_imports.py checks a
second time with import-linter.

While tests/structure_allowed.json exists, a rule fails only when it counts more offences than are
listed there. `python tests/test_structure.py` writes the list of today; without the file nothing
is allowed.
"""
import ast
import json
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = ROOT / "tests" / "structure_allowed.json"
OUTSIDE = {"tests", "benchmarks", "docs", "runs", "site"}     # and hidden folders: no core code

LONGEST = 50            # lines of a function, from `def` to its end, docstring included
COLUMNS = 99            # of a line ...
WIDE_SHARE = 0.02       # ... and the share of all lines that may be wider
ROOT_FILES = 9
FLAT_FLAGS = 48
IMPORTER = re.compile(r"(import_module|__import__)$")
PROCESSES = re.compile(r"multiprocessing(?!\.(?:connection|forkserver)\b)|concurrent\.futures\.Process")
PAPERS = re.compile("oprd|effopd|rock", re.IGNORECASE)


# -- the tree -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Module:
    """One file of the core: dotted name, path below the root, text and syntax tree."""
    name: str
    path: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def package(self) -> list[str]:
        """The dotted name that a relative import starts from, in parts."""
        parts = self.name.split(".")
        return parts if self.path.endswith("__init__.py") else parts[:-1]


@dataclass(frozen=True)
class Offence:
    path: str
    line: int
    what: str

    def __str__(self):
        return f"{self.path}:{self.line}: {self.what}"


Tree = dict[str, Module]


def is_core(path: Path) -> bool:
    return not any(part in OUTSIDE or part.startswith(".") for part in path.parts[:-1])


def read_tree(root: Path) -> Tree:
    """Every module of the core, by its dotted name."""
    tree = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if is_core(path):
            name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            text = file.read_text(encoding="utf-8")
            tree[name] = Module(name, path.as_posix(), text, ast.parse(text))
    return tree


def imported_names(module: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that the module imports, in functions too.

    `from a import b` counts as `a` and as `a.b`, because b may be a module.
    The name in `import_module("a")` counts as well.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = module.package[:len(module.package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            if base:
                yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}" if base else alias.name
        elif isinstance(node, ast.Call) and IMPORTER.search(ast.unparse(node.func)):
            target = node.args[0] if node.args else None
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield node.lineno, target.value


def imports(module: Module, tree: Tree) -> dict[str, int]:
    """The modules of the tree that this one imports, each with the first line that does so."""
    found: dict[str, int] = {}
    for line, name in imported_names(module):
        while name and name not in tree:
            name = name.rpartition(".")[0]
        if name and name != module.name:
            found.setdefault(name, line)
    return found


# -- rules: what each reports ---------------------------------------------------------------------

def circles(tree: Tree) -> list[Offence]:
    """Modules that reach themselves by imports; those under `TYPE_CHECKING` count."""
    arrows = {name: set(imports(module, tree)) for name, module in tree.items()}
    reached = {name: reachable(name, arrows) for name in tree}
    offences = []
    for name, module in tree.items():
        others = sorted(o for o in reached[name] if name in reached[o] and o != name)
        if others:
            line = min(line for other, line in imports(module, tree).items() if other in others)
            offences.append(Offence(module.path, line, f"in a circle with {', '.join(others)}"))
    return offences


def reachable(start: str, arrows: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for name in arrows[todo.pop()] - seen:
            seen.add(name)
            todo.append(name)
    return seen


@cache
def contract() -> tuple[dict[str, int], set[str]]:
    """The import contract: the layer of each room, 0 at the top, and the arrows it excuses."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        options = tomllib.load(file)["tool"]["importlinter"]
    layers = next(c for c in options["contracts"] if c["type"] == "layers")
    prefix = options["root_package"] + "."
    level = {room.strip(" ()"): i
             for i, layer in enumerate(layers["layers"]) for room in layer.split("|")}
    return level, {arrow.replace(prefix, "") for arrow in layers["ignore_imports"]}


def direction(tree: Tree) -> list[Offence]:
    """Imports that do not point down, and modules that belong to no room."""
    level, excused = contract()
    offences = []
    for module in tree.values():
        room = module.name.split(".")[0]
        if room not in level:
            offences.append(Offence(module.path, 1, "in no layer of the import contract"))
            continue
        for other, line in imports(module, tree).items():
            target = other.split(".")[0]
            down = level[room] < level.get(target, len(level)) and target != "examples"
            if target != room and not down and not is_excused(module.name, other, excused):
                offences.append(Offence(module.path, line, f"{room} may not import {other}"))
    return offences


def is_excused(importer: str, imported: str, excused: set[str]) -> bool:
    """`from models import footprint` also imports the package, whose __init__.py is one line."""
    arrow = f"{importer} -> {imported}"
    return any(one == arrow or one.startswith(f"{arrow}.") for one in excused)


def branches(tree: Tree) -> list[Offence]:
    """Expressions that stand as a statement and branch or pack several: a branch is an `if`."""
    kinds = (ast.BoolOp, ast.IfExp, ast.Tuple, ast.Compare)
    return [Offence(module.path, node.lineno, f"as a statement: {ast.unparse(node)[:60]}")
            for module in tree.values() for node in ast.walk(module.tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, kinds)]


def long_functions(tree: Tree) -> list[Offence]:
    offences = []
    for module in tree.values():
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST:
                    what = f"{node.name} has {lines} lines"
                    offences.append(Offence(module.path, node.lineno, what))
    return offences


def wide_lines(tree: Tree) -> list[Offence]:
    """All wide lines, if they are more than a small share of the core's."""
    total = sum(len(module.lines) for module in tree.values())
    wide = [Offence(module.path, i, f"{len(line)} columns") for module in tree.values()
            for i, line in enumerate(module.lines, 1) if len(line) > COLUMNS]
    return wide if len(wide) > WIDE_SHARE * total else []


def root_files(tree: Tree) -> list[Offence]:
    """All files at the root, if they are too many."""
    at_root = [Offence(module.path, 1, "at the root")
               for module in tree.values() if "/" not in module.path]
    return at_root if len(at_root) > ROOT_FILES else []


def papers(tree: Tree) -> list[Offence]:
    """Lines outside `extensions` that name one of them."""
    return [Offence(module.path, i, line.strip()[:80]) for module in tree.values()
            if not module.path.startswith("extensions/")
            for i, line in enumerate(module.lines, 1) if PAPERS.search(line)]


def processes(tree: Tree) -> list[Offence]:
    """Processes and pipes come from `torch.multiprocessing`, which has no `connection` and no `forkserver`."""
    offences = []
    for module in tree.values():
        for node in ast.walk(module.tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            offences += [Offence(module.path, node.lineno, f"{name}, not torch.multiprocessing")
                         for name in names if PROCESSES.match(name)]
    life = tree.get("transport.process")
    if life and not any(name == "torch.multiprocessing" for _, name in imported_names(life)):
        offences.append(Offence(life.path, 1, "does not import torch.multiprocessing"))
    return offences


def flat_flags(tree: Tree) -> list[Offence]:
    """All flat fields of config.Config, if they are too many; groups are classes there."""
    if "config" not in tree:
        return []
    module = tree["config"]
    classes = {node.name: node for node in module.tree.body if isinstance(node, ast.ClassDef)}
    fields = classes["Config"].body if "Config" in classes else []
    flat = [node for node in fields if isinstance(node, ast.AnnAssign)
            and ast.unparse(node.annotation) not in classes and node.target.id != "extensions"]
    if len(flat) <= FLAT_FLAGS:
        return []
    return [Offence(module.path, node.lineno, f"flag {node.target.id}") for node in flat]


RULES: dict[str, Callable[[Tree], list[Offence]]] = {
    rule.__name__: rule for rule in (circles, direction, branches, long_functions, wide_lines,
                                     root_files, papers, processes, flat_flags)}


# -- the core keeps them --------------------------------------------------------------------------

@cache
def core() -> Tree:
    return read_tree(ROOT)


@cache
def allowed() -> dict[str, dict[str, int]]:
    """Rule -> file -> number of offences that may be there today."""
    return json.loads(ALLOWED.read_text()) if ALLOWED.exists() else {}


def excess(offences: list[Offence], listed: dict[str, int]) -> list[Offence]:
    """Nothing while there are no more offences than are listed, else those in files with too many.

    The sum decides, because files move.
    """
    if len(offences) <= sum(listed.values()):
        return []
    count = Counter(o.path for o in offences)
    return [o for o in offences if count[o.path] > listed.get(o.path, 0)]


@pytest.mark.parametrize("rule", RULES)
def test_the_core_keeps_the_rule(rule):
    found = excess(RULES[rule](core()), allowed().get(rule, {}))
    assert not found, f"{rule}: {len(found)} too many\n" + "\n".join(map(str, found))


# -- every rule is seen to fail -------------------------------------------------------------------

def grow(root: Path, files: dict[str, str]) -> Tree:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return read_tree(root)


def function(name: str, lines: int) -> str:
    return f"def {name}():\n" + "    pass\n" * (lines - 1)


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


GUARDED = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
NARROW = "x = 1\n" * 97
WIDE = f"x = {'1' * 96}\n"
CONFIG = "class Data:\n    key: str\n\nclass Config:\n    extensions: dict\n    data: Data\n"

BAD = [
    ("circles", {"a.py": "import b", "b.py": "import a"}, ["a.py:1", "b.py:1"]),
    ("circles", {"a.py": "import b", "b.py": "import c", "c.py": "import a", "d.py": "import a"},
     ["a.py:1", "b.py:1", "c.py:1"]),
    ("circles", {"a.py": GUARDED + "from b import B", "b.py": "x = 1\nfrom a import A"},
     ["a.py:3", "b.py:2"]),
    ("circles", {"a.py": "def f():\n    import b.c", "b/c.py": "from a import f"},
     ["a.py:2", "b/c.py:1"]),
    ("circles", {"a.py": "import importlib\nimportlib.import_module('b')", "b.py": "import a"},
     ["a.py:2", "b.py:1"]),
    ("circles", {"r/a.py": "from . import b", "r/b.py": "from .a import x", "r/__init__.py": ""},
     ["r/a.py:1", "r/b.py:1"]),
    ("circles", {"examples/a.py": "import examples.b", "examples/b.py": "import examples.a"},
     ["examples/a.py:1", "examples/b.py:1"]),
    ("direction", {"run.py": "", "learner.py": "import run"}, ["run.py:1"]),
    ("direction", {"helpers/a.py": ""}, ["helpers/a.py:1"]),
    ("direction", {"learner.py": "import rollout", "rollout.py": ""}, ["learner.py:1"]),
    ("direction", {"rollout.py": "from teacher import x", "teacher.py": ""}, ["rollout.py:1"]),
    ("direction", {"control/plan.py": "import extensions.a", "extensions/a.py": ""},
     ["control/plan.py:1"]),
    ("direction", {"models/a.py": "def f():\n    from record import log", "record/log.py": ""},
     ["models/a.py:2"]),
    ("direction", {"cache.py": GUARDED + "from config import Config", "config.py": ""},
     ["cache.py:3"]),
    ("direction", {"cache.py": "import estimators", "estimators.py": ""}, ["cache.py:1"]),
    ("direction", {"config.py": "import data.toy", "data/toy.py": ""}, ["config.py:1"]),
    ("direction", {"extension.py": "from models import head", "models/__init__.py": "",
                   "models/head.py": ""}, ["extension.py:1"]),
    ("direction", {"models/a.py": "import extension", "extension.py": ""}, ["models/a.py:1"]),
    ("direction", {"examples/one.py": "import control.plan", "control/plan.py": ""},
     ["examples/one.py:1"]),
    ("direction", {"asyncopd.py": "import examples.a", "examples/a.py": ""}, ["asyncopd.py:1"]),
    ("branches", {"a.py": "x = f() or g()\nx or f()"}, ["a.py:2"]),
    ("branches", {"a.py": "def f():\n    x and g()"}, ["a.py:2"]),
    ("branches", {"a.py": "f() if x else g()"}, ["a.py:1"]),
    ("branches", {"a.py": "f(), g()"}, ["a.py:1"]),
    ("branches", {"a.py": "f() == g()"}, ["a.py:1"]),
    ("long_functions", {"a.py": function("f", 51)}, ["a.py:1"]),
    ("long_functions", {"a.py": "class A:\n" + indented("@property\nasync " + function("f", 51))},
     ["a.py:3"]),
    ("long_functions", {"a.py": "def f():\n" + indented(function("g", 51))}, ["a.py:1", "a.py:2"]),
    ("long_functions", {"a.py": 'def f():\n    """\n' + "\n" * 48 + '    """\n'}, ["a.py:1"]),
    ("wide_lines", {"a.py": NARROW + WIDE * 3}, ["a.py:98", "a.py:99", "a.py:100"]),
    ("root_files", {f"{c}.py": "" for c in "abcdefghij"}, [f"{c}.py:1" for c in "abcdefghij"]),
    ("papers", {"a.py": "x = 1\n# EffOPD"}, ["a.py:2"]),
    ("papers", {"models/a.py": "import extensions.rock\nbedrock = OPRD"},
     ["models/a.py:1", "models/a.py:2"]),
    ("papers", {"my_extensions/a.py": "oprd = 1"}, ["my_extensions/a.py:1"]),
    ("processes", {"a.py": "import multiprocessing"}, ["a.py:1"]),
    ("processes", {"transport/process.py": "import torch"}, ["transport/process.py:1"]),
    ("processes", {"a.py": "def f():\n    from multiprocessing import Pipe"}, ["a.py:2"]),
    ("processes", {"a.py": "from multiprocessing.context import SpawnProcess"}, ["a.py:1"]),
    ("processes", {"a.py": "from concurrent.futures import ProcessPoolExecutor"}, ["a.py:1"]),
    ("flat_flags", {"config.py": CONFIG + "    a: int\n" * 49},
     [f"config.py:{i}" for i in range(7, 56)]),
]


@pytest.mark.parametrize("rule, files, wanted", BAD)
def test_an_offence_is_found_where_it_is(tmp_path, rule, files, wanted):
    found = [f"{o.path}:{o.line}" for o in RULES[rule](grow(tmp_path, files))]
    assert found == wanted


ROOMS = {
    "asyncopd.py": "import control.plan, extensions.a, cache",
    "control/plan.py": "import learner, config",
    "extensions/a.py": "import extension",
    "examples/one.py": "import rollout, learner",
    "rollout.py": "import transport.link",
    "learner.py": "import models.head",
    "models/__init__.py": "",
    "models/head.py": "import models.footprint, estimators, data.toy",
    "models/footprint.py": "",
    "transport/link.py": "",
    "extension.py": "from models import footprint\nimport models.footprint",
    "data/toy.py": "import config",
    "config.py": "import estimators",
    "estimators.py": "import torch",
    "cache.py": "",
    "tests/test_a.py": "import asyncopd",
    ".hidden/a.py": "",
}
GOOD = {
    "circles": ROOMS | {"learner.py": "import tests.a", "tests/a.py": "import learner"},
    "direction": ROOMS,
    "branches": {"a.py": '"""Text."""\nf()\nx = a or b\nassert a and b, (a, b)\n'
                         "if a or b:\n    f()\n...\nasync def g():\n    await f()\n    yield\n"},
    "long_functions": {"a.py": "@d\n" + function("f", 50) + "\nclass A:\n"
                               + indented(function("g", 30) * 2)},
    "wide_lines": {"a.py": NARROW + "x\n" + WIDE * 2},
    "root_files": {f"{c}.py": "" for c in "abcdefghi"} | {"r/j.py": ""},
    "papers": {"extensions/oprd.py": "OPRD, rock", "tests/a.py": "rock", "a.py": "x = 'roc opd'"},
    "processes": {"transport/process.py": "import torch.multiprocessing as mp\n"
                                          "from multiprocessing.connection import wait",
                  "a.py": "from torch.multiprocessing import Pipe\n"
                          "from multiprocessing import connection\n"
                          "import multiprocessing.connection"},
    "flat_flags": {"config.py": CONFIG + "    a: int\n" * 48},
}


@pytest.mark.parametrize("rule", RULES)
def test_a_clean_tree_has_no_offence(tmp_path, rule):
    assert RULES[rule](grow(tmp_path, GOOD[rule])) == []


def test_more_than_the_list_allows_fails_and_names_the_file():
    a, b = Offence("a.py", 1, ""), Offence("b.py", 2, "")
    assert excess([a], {"a.py": 1}) == excess([b], {"a.py": 1}) == excess([a], {"a.py": 2}) == []
    assert excess([a, b], {"a.py": 1}) == excess([b], {}) == [b]


if __name__ == "__main__":
    counts = {rule: dict(Counter(o.path for o in check(core()))) for rule, check in RULES.items()}
    some = {rule: count for rule, count in counts.items() if count}
    ALLOWED.write_text(json.dumps(some, indent=1) + "\n")
    for rule, count in counts.items():
        sys.stdout.write(f"{rule}: {sum(count.values())} in {len(count)} files\n")
