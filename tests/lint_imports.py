"""
The import contract of pyproject.toml, checked by import-linter: `make lint`.

import-linter reads packages, and the root of this project holds modules. So the core is copied to
a package for the check, with that package's name put before every import of a module of the core;
line numbers stay. Which files are the core: tests/test_structure.py.

    python tests/lint_imports.py            exit code 1 when an import breaks the contract

Tests: tests/test_lint_imports.py
"""
import ast
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.test_structure import ALLOWED, Tree, read_tree  # noqa: E402

CONTRACT = ROOT / "pyproject.toml"
LINT = """import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports(sys.argv[1], no_cache=True, no_logo=True))
"""


def package_name() -> str:
    with CONTRACT.open("rb") as file:
        return tomllib.load(file)["tool"]["importlinter"]["root_package"]


def prefixed(text: str, rooms: set[str], package: str) -> str:
    """The source with `package.` before every absolute import of one of the rooms."""
    lines = text.encode().splitlines(keepends=True)     # ast counts columns in bytes
    places = []                                         # (line, column) of a name
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            places += [(alias.lineno - 1, alias.col_offset)
                       for alias in node.names if alias.name.split(".")[0] in rooms]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            word = re.match(rb"from\s+", lines[node.lineno - 1][node.col_offset:])
            if node.module.split(".")[0] in rooms:
                places.append((node.lineno - 1, node.col_offset + word.end()))
    for line, column in sorted(places, reverse=True):
        lines[line] = lines[line][:column] + f"{package}.".encode() + lines[line][column:]
    return b"".join(lines).decode()


def stage(tree: Tree, folder: Path, package: str) -> None:
    """Write the tree as a package into the folder."""
    rooms = {name.split(".")[0] for name in tree}
    for module in tree.values():
        file = folder / package / module.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(prefixed(module.text, rooms, package), encoding="utf-8")
    for directory in [folder / package, *(p for p in (folder / package).rglob("*") if p.is_dir())]:
        (directory / "__init__.py").touch()


def check(root: Path) -> subprocess.CompletedProcess:
    """import-linter's verdict on the tree below root, by the contract of this project."""
    with tempfile.TemporaryDirectory() as folder:
        stage(read_tree(root), Path(folder), package_name())
        return subprocess.run(
            [sys.executable, "-c", LINT, str(CONTRACT)], cwd=folder,
            text=True, capture_output=True,
            env=os.environ | {"PYTHONPATH": folder, "COLUMNS": "100"})


def main() -> int:
    verdict = check(ROOT)
    sys.stdout.write(verdict.stdout + verdict.stderr)
    if verdict.returncode and ALLOWED.exists():
        sys.stdout.write(f"Not fatal while {ALLOWED.relative_to(ROOT)} exists.\n")
        return 0
    return verdict.returncode


if __name__ == "__main__":
    sys.exit(main())
