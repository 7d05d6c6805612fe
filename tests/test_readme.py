"""The README and the files it speaks of: names, tables, commands, links."""
import json
import re
import shlex
import sys

import pytest

from asyncopd import Config
from record.report import table
from record.timeline import Trace
from tests.conftest import ROOT
from tests.test_structure import core

README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = [module.path for module in core().values() if not module.path.endswith("__init__.py")]


def test_the_readme_names_every_file():
    assert [name for name in FILES if f"`{name}`" not in README] == []


def test_one_shift_and_no_broad_except():
    code = "\n".join((ROOT / name).read_text() for name in FILES)
    assert len(re.findall(r"\[:, *(1:|:-1)\]", code)) <= 1
    assert not re.search(r"except( Exception)?: *(pass)?$", code, flags=re.M)
    assert "**kwargs" not in code


def test_tables_are_those_that_the_code_and_the_raw_results_print():
    """To renew them: python benchmarks/readme.py"""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import readme
    assert readme.renewed(README) == README


COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if re.match(r"\s*python \S+\.py", line)]
COMMANDS += re.findall(r"`(python [^`]+)`", README)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    _, script, *flags = shlex.split(command)
    assert (ROOT / script).exists()
    if script == "asyncopd.py":
        Config.from_cli([f if f != "8" else "0" for f in flags])       # eight GPUs are not here to be counted


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)]+)\)", README))
def test_every_link_and_picture_is_there(target):
    assert (ROOT / target).exists() and (ROOT / target).stat().st_size < 1_000_000


def test_every_flag_that_the_readme_names_exists():
    known = {f"--{f.replace('_', '-')}" for f in Config.__dataclass_fields__} | {"--config"}
    known |= {flag.replace("--", "--no-") for flag in known} | {"--run", "--data", "--resume", "--teacher-engine"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def test_busy_time_counts_work_within_the_run_and_averages_workers(tmp_path):
    spans = [("rollout0", "generate", 0.0, 6.0), ("rollout1", "generate", 9.0, 12.0),
             ("rollout1", "evaluate", 0.0, 9.0), ("teacher0", "score", 1.0, 2.0),
             ("learner", "step", 2.0, 4.0), ("learner", "wait", 4.0, 10.0)]
    trace = Trace(tmp_path / "trace.json", ["rollout0", "rollout1", "teacher0", "teacher1", "learner"])
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
