"""README.md and docs/: every command, link, flag, file and table in them."""
import ast
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from config import Config, each_flag, flag_of
from control.resolve import configure
from extension import default_flags, known_extensions
from record.report import table
from record.timeline import Trace
from tests.conftest import ROOT
from tests.test_structure import core

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
EXTENSION_PAGES = [page for page in TEXT if page.startswith("docs/extensions/")]
ARCHITECTURE = TEXT["docs/architecture.md"]
FILES = [module.path for module in core().values() if not module.path.endswith("__init__.py")]

# Flags of earlier days, in commands that are stored in benchmarks/*.jsonl
EARLIER = {"--oprd-weight", "--oprd-rank", "--oprd-bridge", "--prompt-key", "--effopd", "--effopd-max", "--rock",
           "--rock-set"}


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_the_readme_is_short():
    assert len(TEXT["README.md"].splitlines()) <= 200


# -- tables ----------------------------------------------------------------------------------------

def test_tables_are_those_that_the_code_and_the_raw_results_print():
    """To renew them: python benchmarks/tables.py"""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import tables
    for page in tables.PAGES:
        text = TEXT[f"docs/{page}"]
        assert tables.renewed(page, text) == text, f"docs/{page}"


def test_the_figures_in_the_readme_are_those_of_the_tables():
    results, readme = TEXT["docs/results.md"], TEXT["README.md"]
    rows = re.findall(r"\| reverse, seed \d \| ([\d.]+%) → ([\d.]+%) .*\| (\d+) \|", results)
    before, after, seconds = zip(*rows)
    assert len(set(before)) == 1 and f"{before[0]} right answers to {after[0]}, {after[1]} and {after[2]}" in readme
    limit = int(re.search(r"less than (\d+) seconds", readme)[1])
    assert limit - 10 < max(map(int, seconds)) < limit
    assert f"trains {re.search(r'median ([0-9.]+)', results)[1]} times as many" in " ".join(readme.split())


# -- commands --------------------------------------------------------------------------------------

def commands(text: str) -> list[str]:
    """Everything that a reader may paste into a shell: lines of code blocks, and code within a sentence."""
    lines = [line.split(" #")[0].strip() for line in text.splitlines() if re.match(r"    (\.venv/bin|make )", line)]
    return lines + re.findall(r"`((?:\.venv/bin/|make )[^`]+)`", text)


COMMANDS = sorted({(page, command) for page, text in TEXT.items() for command in commands(text)})


@pytest.mark.parametrize("page,command", COMMANDS)
def test_every_command_parses(page, command):
    program, script, *flags = shlex.split(command)
    if program == "make":
        assert f"\n{script}:" in (ROOT / "Makefile").read_text()
        return
    assert program == ".venv/bin/python" and (ROOT / script).exists()
    if script == "asyncopd.py" and page != "docs/extending.md":        # those need their recipes: test_docs.py
        configure([f if f != "8" else "0" for f in flags])       # eight GPUs are not here to be counted


def test_no_command_uses_a_python_that_may_lack_torch():
    printed = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}      # by --help, or in a card
    printed |= {f"configs/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "configs").glob("*.yaml")}
    found = [f"{page}: {match}" for page, text in (TEXT | printed).items()
             for match in re.findall(r"(?<![\w/.])python3? \S+\.py|(?<![\w/.])pytest -", text)]
    assert found == []


# -- links, files, functions, flags ----------------------------------------------------------------

LINKS = sorted({(page, target) for page, text in TEXT.items() for target in re.findall(r"\]\(([^)]+)\)", text)
                if not target.startswith("https://")})


@pytest.mark.parametrize("page,target", LINKS)
def test_every_link_and_picture_is_there(page, target):
    name, _, anchor = target.partition("#")
    path = (ROOT / page).parent / name if name else ROOT / page
    assert path.is_file() and path.stat().st_size < 1_000_000
    if anchor:
        assert anchor in [slug(h) for h in re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.M)]


def test_architecture_names_every_file():
    assert [name for name in FILES if f"`{name}`" not in ARCHITECTURE] == []


def test_every_file_that_is_named_exists():
    named = {(page, name) for page, text in TEXT.items()
             for name in re.findall(r"`([\w./-]+\.(?:py|yaml|toml|cff|json|jsonl))`", text)}
    of_a_run = {"log.jsonl", "trace.json", "rocks.json", "prompts.jsonl", "evaluation.json"}
    missing = sorted((page, name) for page, name in named
                     if name not in of_a_run and not name.endswith("/NAME.py") and not (ROOT / name).exists())
    assert missing == []


def defined(path: Path) -> set[str]:
    """Classes, functions and methods of a file, these as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)}
    return names


def test_the_trip_of_a_slot_names_functions_that_exist():
    stops = re.findall(r"^\|[^|]*\|[^|]*\| `([\w.]+)` \| `([\w/.]+)` \|$", ARCHITECTURE, re.M)
    assert len(stops) >= 10
    missing = [stop for stop in stops if not (ROOT / stop[1]).exists() or stop[0] not in defined(ROOT / stop[1])]
    assert missing == []


def test_every_flag_that_the_pages_name_exists():
    extensions = ",".join(known_extensions())
    own = {name: vars(flags) for name, flags in default_flags(extensions).items()}
    known = {flag_of(name) for name, _ in each_flag(Config(extensions=own))}
    known |= {"--help", "--run", "--data"}                 # the last two: of benchmarks/audit.py and gsm8k_lm.py
    known |= {"--drop", "--mlp-width", "--held-out"}       # of examples/prune_and_distil.py
    if_only_there = {"docs/extending.md": ("--emphasis.", "--norms.", "--NAME.")}
    named = {(page, flag) for page, text in TEXT.items()
             for flag in re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", text)
             if not flag.startswith(if_only_there.get(page, ("-- ",)))}
    missing = sorted((page, flag) for page, flag in named if flag not in known | EARLIER)
    assert missing == []
    raw_results = [page for page in ("docs/results.md", *EXTENSION_PAGES)
                   if re.search("flag names of their time|earlier flag names", " ".join(TEXT[page].split()))]
    assert {page for page, flag in named if flag in EARLIER} <= set(raw_results)


# -- the code --------------------------------------------------------------------------------------

def test_one_shift_and_no_broad_except():
    code = "\n".join((ROOT / name).read_text() for name in FILES)
    assert len(re.findall(r"\[:, *(1:|:-1)\]", code)) <= 1
    assert not re.search(r"except( Exception)?: *(pass)?$", code, flags=re.M)
    assert "**kwargs" not in code


def test_busy_time_counts_work_within_the_run_and_averages_workers(tmp_path):
    spans = [("rollout0", "generate", 0.0, 6.0), ("rollout1", "generate", 9.0, 12.0),
             ("rollout1", "evaluate", 0.0, 9.0), ("teacher0", "score", 1.0, 2.0),
             ("learner", "step", 2.0, 4.0), ("learner", "wait", 4.0, 10.0)]
    trace = Trace(tmp_path / "trace.json", {
        "rollout0": "rollout", "rollout1": "rollout", "teacher0": "teacher", "teacher1": "teacher",
        "learner": "learner"})
    for i, span in enumerate(spans):                                                # teacher1 never has work
        trace.span(*span)
        if i == 0:
            trace.fold(1.0)
    trace.close()
    assert trace.busy(1.0, 11.0) == {"rollout": pytest.approx(0.35), "teacher": pytest.approx(0.05),
                                     "learner": pytest.approx(0.2)}
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["name"] for e in events if e["ph"] == "X"] == [what for _, what, _, _ in spans]


def test_a_table_is_aligned():
    assert table([["a", "bb"], ["ccc", "d"]]) == "  a    bb\n  ccc   d"
