"""
The recipes of docs/extending.md, followed to the letter: their code goes into a copy of the
repository, into the files that they name, and a run with all of them at once trains.

The first line of a block names its file: `# PATH: a new file` or `# PATH: the end of the file`. A
diff names it after `---`; what it replaces must be there exactly once.
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_structure import core

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """Code of a recipe, and where it goes."""
    path: str
    how: str            # "a new file", "the end of the file" or "diff"
    text: str

    def apply(self, root: Path) -> None:
        file = root / self.path
        if self.how == "a new file":
            assert not file.exists(), f"{self.path} exists"
            file.write_text(self.text, encoding="utf-8")
            return
        text = file.read_text(encoding="utf-8")
        if self.how == "the end of the file":
            file.write_text(f"{text}\n\n{self.text}", encoding="utf-8")
            return
        lines = self.text.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] in " -")
        new = "\n".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"{self.path} holds {text.count(old)} times:\n{old}"
        file.write_text(text.replace(old, new), encoding="utf-8")


def blocks(section: str) -> Iterator[Block]:
    for language, body in re.findall(r"^```(python|diff)\n(.*?)^```$", section, re.M | re.S):
        first, _, text = body.partition("\n")
        if language == "diff":
            yield Block(first.removeprefix("--- "), "diff", text)
        else:
            path, how = re.fullmatch(r"# (\S+): (.*)", first).groups()
            yield Block(path, how, text)


SECTIONS = re.findall(r"^## (\d)\. .*?\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
RECIPES = {int(number): list(blocks(text)) for number, text in SECTIONS}


def test_each_recipe_touches_as_many_files_as_its_table_says():
    promised = [int(n) for n in re.findall(r"^\| [^|]+ \| (\d) \| \[", PAGE, re.M)]
    assert promised == [1, 1, 1, 2, 2, 1, 1]
    touched = [len({block.path for block in RECIPES[n]}) for n in sorted(RECIPES)]
    assert touched == promised


@pytest.fixture(scope="module")
def followed(models, tmp_path_factory) -> dict:
    """One run of a repository in which all recipes were followed."""
    root = tmp_path_factory.mktemp("repository")
    for module in core().values():
        (root / module.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / module.path, root / module.path)
    shutil.copytree(ROOT / "configs", root / "configs")
    for recipe in RECIPES.values():
        for block in recipe:
            block.apply(root)
    scratch = root / "scratch"
    scratch.mkdir()
    flags = ["--gpus", "0", "--student", models["student"], "--teacher", models["teacher"],
             "--task", "doubles", "--estimator", "reverse_mc_capped", "--engine", "naive", "--transport", "files",
             "--extend", "emphasis,norms", "--emphasis.tokens", "3,4", "--emphasis.factor", "5",
             "--norms.weight", "0.5", "--log", "table", "--steps", "3", "--batch", "4",
             "--max-prompt", "12", "--max-response", "8", "--eval.n", "4", "--out", "run"]
    done = subprocess.run([sys.executable, "asyncopd.py", *flags], cwd=root, text=True,
                          env=os.environ | {"TMPDIR": str(scratch)}, capture_output=True,
                          timeout=240)
    log = root / "run" / "log.jsonl"
    lines = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
    return {"done": done, "lines": lines, "root": root, "scratch": scratch}


def test_a_run_with_all_recipes_at_once_trains(followed):
    done, lines = followed["done"], followed["lines"]
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line for line in lines if line["type"] == "step"]
    assert len(steps) == 3 and all(math.isfinite(step["loss"]) for step in steps)
    assert lines[0]["config"]["estimator"] == "reverse_mc_capped"
    assert all(step["engine_gap_max"] < 1e-4 for step in steps)           # of the naive engine
    assert sum(line["type"] == "eval" for line in lines) == 2             # of the doubles


def test_the_tracker_of_the_recipe_has_the_numbers_of_the_log(followed):
    text = (followed["root"] / "run" / "numbers.csv").read_text()
    last = [line for line in followed["lines"] if line["type"] == "step"][-1]
    assert f"3,step/loss,{last['loss']}\n" in text


def test_the_transport_of_the_recipe_carried_the_weights(followed):
    published = sorted(p.name for p in followed["scratch"].glob("weights-*/*.safetensors"))
    assert published == ["2.safetensors", "3.safetensors"]
