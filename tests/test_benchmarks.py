"""
Every script in benchmarks/ runs: one command each, cut down to a step or two.

The scripts write their results beside themselves, so they run in a copy of the core and of benchmarks/.
Constants that no flag can change are made small by a line of Python before `main()`.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.conftest import ROOT
from tests.test_structure import core

LIMIT_S = 100           # of one script on a busy machine; alone, each takes less than ten seconds


@dataclass(frozen=True)
class Smoke:
    """A command: arguments after the script's name, and what is changed in its module `m` before."""
    arguments: str = ""
    changes: str = ""
    spawns: bool = False         # its workers are started as a user's are, not forked


TOY_MODELS = "--student {student} --teacher {teacher}"
PAIR = "m.models = lambda: {{'sharpening': dict(student='{student}', teacher='{teacher}')}}\n"
PAIR_OF_PEERS = """
m.toy_models = lambda root: ('{student}', '{teacher}')
m.PAIRS = dict(toy=m.Pair(task='toy', batch=4, max_prompt=8, max_response=8, steps=2, lr=1e-3, engines=('hf',),
                          max_running=8, max_ahead=1))
def of_trl(pair, job):                           # as if TRL had done what ours has just done
    m.shutil.copytree(m.folder_of('hf'), m.folder_of(m.TRL), dirs_exist_ok=True)
    return m.found
def in_this_process(commands, cwd):
    turns = []
    for command in commands:
        m.found = m.one(m.Job(**m.json.loads(command[-1])))
        turns.append(m.Turns([], [(0, 1e12)], m.json.dumps(m.found)))
    return turns
m.environment, m.trl, m.in_turns = lambda: None, of_trl, in_this_process
m.bare = lambda pair, job: dict(launched=0, began=1, cpu_s_per_1000=dict.fromkeys(m.ROLES, 1))    # its smoke is below
m.EVERY, m.STEPS, m.GOAL = 1, 2, 0
"""
SMOKES = {
    "apply.py": Smoke("--measure --root .", "m.CALLS = {{32: 2}}"),
    "audit.py": Smoke("--k 4", "m.DRIFTS = m.DRIFTS[:2]"),
    "designs.py": Smoke("variance --draws 50", "m.COUNTS, m.SHARPNESS = (1, 4), (1.0,)\n"
                                               "m.measure.__defaults__ = (50, (1, 4))"),
    "effopd.py": Smoke("--only sharpening;kl --seeds 1 --steps 2 --jobs 1 --out effopd.jsonl",
                       PAIR + "m.PAIRS = {{'sharpening': ['kl, x1']}}; m.FLAGS |= dict(eval__n=4)"),
    "gsm8k_lm.py": Smoke("run --data data --steps=2 --batch=4 --max-response=8 --max-running=4 --engine=hf "
                         "--eval.n=2 --save-every=1 --warmup=0",
                         "m.MODELS |= dict(words=300); m.MODELS['teacher'] |= dict(layers=1, hidden=64)\n"
                         "m.HELD_OUT = 2; m.MODELS['student'] |= dict(layers=1, hidden=64, epochs=1)"),
    "head.py": Smoke("8 2 --rounds 1", "m.M, m.V = 32, 64"),
    "oprd.py": Smoke("run head --steps 2 --seeds 1 --jobs 1 --out oprd.jsonl",
                     "m.models = lambda: dict(same=('{student}', '{student}'))\n"
                     "m.GROUPS = dict(head=dict(oprd=m.OPRD)); m.COMMON |= dict(eval__n=4)"),
    "packing.py": Smoke("", "m.torch.compile = lambda model, **how: model\n"
                            "m.segments = lambda n, *how, made=m.segments: made(min(n, 3), 8, 16)"),
    "peers.py": Smoke("race --seeds 0", PAIR_OF_PEERS + "m.FOLDER.mkdir(parents=True); m.accuracy([1e-3], [0])",
                      spawns=True),
    "peers_bare.py": Smoke('{{"student":"{student}","teacher":"{teacher}","engine":"hf","rows":2,"batch":2,'
                           '"prompts":[[3,4,5]],"max_response":4,"core":0}}'),
    "pipeline.py": Smoke("--smoke", spawns=True),
    "plot.py": Smoke("lag"),
    "precision.py": Smoke("", "m.BATCH, m.toy_models = 4, lambda root: ('{student}', '{teacher}')"),
    "prune.py": Smoke("grid --seeds 0 --rates 1e-3 --tokens 8 --batch=2 --max-prompt=100 --max-response=4 "
                      + TOY_MODELS,
                      "import data.everyday as e; e.FILE.write_text(e.as_json_lines())\n"
                      "m.METHODS = {{name: m.METHODS[name] for name in (m.SUPERVISED, 'reverse, all words')}}"),
    "processes.py": Smoke(),
    "push.py": Smoke("--layers 1 --rounds 1 --cpu --model 0.6B --dtype float32"),
    "rehearsal.py": Smoke("--cpu --steps=2 --rounds=1",
                          "import step; step.SHAPES['toy'] = (4, 12, step.SHAPES['toy'][2])"),
    "tables.py": Smoke(),
    "rock.py": Smoke("run bypassed --seeds=0 --steps=4 --jobs=1",
                     "m.MADE = {{k: how | dict(steps=2) for k, how in m.MADE.items()}}; m.FLAGS |= dict(eval__n=4)"),
    "same_weights.py": Smoke(".", "m.RUNS = dict(reverse=m.RUNS['reverse']); m.COMMON.append('--steps=2')\n"
                                    "m.main = lambda main=m.main: main(sys.argv[1:])"),
    "soak.py": Smoke("--steps 40", "sleep = m.time.sleep; m.time.sleep = lambda _: sleep(0.05)"),
    "splits.py": Smoke("--steps 2 --students Qwen/Qwen3-4B", "m.SHORTER = 1 / 2000\n"
                       "m.play = lambda *a, play=m.play, **k: play(*a, **k | dict(batch=8, filling=0))"),
    "step_off.py": Smoke("", "m.STEPS, m.LAG, m.toy_models = 3, 1, lambda root: ('{student}', '{teacher}')\n"
                             "m.TOY += ['--batch=4']"),
    "step.py": Smoke("toy", "m.toy = lambda pairs, toy=m.toy: toy(1)"),
    "teacher.py": Smoke("", "m.LENGTHS, m.ROUNDS = (12, 5), 1"),
    "turns.py": Smoke(),
    "toy.py": Smoke("run lag --engine=hf --steps=2 --batch=4 --eval.n=4 --max-prompt=8 --max-response=8 "
                    "--warmup=0 " + TOY_MODELS,
                    "m.groups = lambda groups=m.groups: {{'lag': dict(list(groups()['lag'].items())[:1])}}"),
}
ELSEWHERE = {
    "kills.py": "tests/test_faults.py runs it",
    "peers_trl.py": "needs TRL, in an environment of its own; peers.py starts it",
    "draws.py": "vLLM takes half a minute to start; its flags are parsed below",
}
DRIVER = """
import importlib.util, sys
sys.path[0] = {folder!r}                         # as if it were started by its path
spec = importlib.util.spec_from_file_location("smoke", {folder!r} + "/" + {script!r})
m = sys.modules["smoke"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(m)
{changes}
sys.argv[1:] = {arguments}
m.main()
"""

# Python imports a module of this name at its start. Workers that are forked need not import torch again.
SITECUSTOMIZE = """
import multiprocessing.context, multiprocessing.forkserver
fork = multiprocessing.context._concrete_contexts["fork"]
multiprocessing.get_context = lambda method=None: fork
multiprocessing.forkserver.ensure_running = lambda: None
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the core and of benchmarks/, with a few problems to train on."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copy(ROOT / "README.md", folder)
    for module in core().values():
        (folder / module.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / module.path).write_text(module.text, encoding="utf-8")
    (folder / "data").mkdir(exist_ok=True)
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}. #### {2 * i}"} for i in range(40)]
    for name in ("train", "test"):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "forks").mkdir()
    (folder / "forks" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return folder


def run(folder, command, spawns=False):
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                        "PYTHONPATH": "" if spawns else str(folder / "forks")}
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True,
                          timeout=LIMIT_S, env=env)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("record", sorted((ROOT / "benchmarks").glob("*.jsonl")), ids=lambda path: path.name)
def test_a_record_names_no_folder_of_the_machine_that_made_it(record):
    for line in record.read_text().splitlines():
        named = [word for word in json.loads(line).get("argv", []) if re.search(r"(^|=)/", word)]
        assert not named


@pytest.mark.parametrize("script", SMOKES)
def test_a_cut_down_run_ends_with_one_json_object(script, checkout, models):
    smoke = SMOKES[script]
    arguments = smoke.arguments.format(**models).split()
    if smoke.changes:
        code = DRIVER.format(folder=str(checkout / "benchmarks"), script=script,
                             changes=smoke.changes.format(**models), arguments=arguments)
        out = run(checkout, ["-c", code], smoke.spawns)
    else:
        out = run(checkout, [f"benchmarks/{script}", *arguments], smoke.spawns)
    assert isinstance(json.loads(out.splitlines()[-1]), dict)


def test_no_script_is_forgotten():
    assert {p.name for p in (ROOT / "benchmarks").glob("*.py")} == SMOKES.keys() | ELSEWHERE.keys()


def test_the_flags_of_a_script_that_is_too_slow_to_run_are_parsed(checkout):
    assert "--responses" in run(checkout, ["benchmarks/draws.py", "--help"])


def defined(module) -> set[str]:
    """The names at the top level of a module of the core."""
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
    return found


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "benchmarks").glob("*.py")))
def test_a_script_imports_only_what_is_there(script):
    """Whatever a function imports, too, even where no run above comes to it."""
    tree = core()
    for node in ast.walk(ast.parse((ROOT / "benchmarks" / script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in {n.split(".")[0] for n in tree}:
            assert node.module in tree, node.module
            for alias in node.names:
                there = f"{node.module}.{alias.name}" in tree or alias.name in defined(tree[node.module])
                assert there, f"{node.module}.{alias.name}"
