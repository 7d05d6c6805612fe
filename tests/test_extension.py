"""The seam: extensions that these tests write themselves, in one process and as runs of the real command."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cache import Segment, Slots
from config import Config
from control.preflight import prepare
from control.resolve import configure
from extension import Extension, Extensions, ModelPair, Outcome, Step
from learner import Learner
from models.loading import load_model
from record.metrics import METRICS
from tests.conftest import ROOT
from tests.runs import command, complete, lines, run, steps

ENTROPY = '''
"""The student's entropy is a part of what is maximised."""
from dataclasses import dataclass

import torch

from config import NotNegative
from extension import Extension, Outcome


class Entropy(Extension):
    METRICS = {"bonus": "entropy of the student, mean over positions, nats"}
    student_layers = (0,)

    @dataclass(frozen=True)
    class Flags:
        bonus: NotNegative = 0.0
        """weight of the entropy"""

    def attach(self, learner, saved):
        self.head = learner.student.head

    def loss(self, states, segments):
        logp = self.head(states[0]).log_softmax(-1)
        return self.flags.bonus * (logp.exp() * logp).sum(-1)

    def after_step(self, step):
        entropy = torch.cat([part["entropy"] for part in step.measured]).mean().item()
        return Outcome([{"what": "entropy", "nats": entropy}], {"bonus": entropy})
'''


def written(folder: Path, name: str, body: str, base: str = "Extension") -> str:
    """The path of a file with an extension whose class has this body."""
    head = ("import torch\nfrom dataclasses import dataclass\nfrom pathlib import Path\n"
            "from extension import Extension, Outcome, SlotTensor\n\n")
    file = folder / f"{name}.py"
    lines = "\n".join(f"    {line}" if line else "" for line in body.strip().splitlines())
    file.write_text(f"{head}\nclass Made({base}):\n{lines}\n")
    return str(file)


UNSEEN = ModelPair(student=None, teacher=None)       # enough for hooks that do not look


def filled(cfg, extra=None, sparse=False) -> tuple[Slots, list[Segment]]:
    """Four responses as they reach the learner, scored by nobody: the teacher's log-probs are random numbers."""
    slots = Slots(4, cfg.max_prompt, cfg.max_response, cfg.mc_samples, extra=extra, sparse=sparse)
    g = torch.Generator().manual_seed(4)
    for s, n in enumerate((3, 5, 1, 7)):
        slots.open(s, s, [3, 4 + s], 2, 0)
        ids = torch.randint(3, 17, (n, cfg.mc_samples), generator=g)
        logpi = -3 * torch.rand(n, cfg.mc_samples, generator=g)
        slots.append(s, ids[:, 0], ids, logpi, logpi[:, 0], torch.zeros(n))
        slots.logq[s, :n] = -3 * torch.rand(n, cfg.mc_samples, generator=g)
    return slots, [slots.read(s) for s in range(4)]


def gradient(cfg, segments) -> torch.Tensor:
    learner = Learner(cfg, "cpu", torch.float32)
    learner.backward(segments, sum(map(len, segments)))
    return torch.cat([p.grad.flatten() for p in learner.student.model.parameters()])


def trained_weights(cfg, segments, count=2) -> dict[str, torch.Tensor]:
    learner = Learner(cfg, "cpu", torch.float32)
    for version in range(count):
        learner.step(segments, version)
    return {name: p.detach() for name, p in learner.student.model.named_parameters()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- which extensions there are --------------------------------------------------------------------

@pytest.mark.parametrize("extend, said", [
    ("ghost", "--extend ghost: no such extension .there are: effopd, oprd, rock;"),
    ("absent/file.py", "--extend absent/file.py: no such extension"),
    ("rock,rock", "--extend rock,rock: rock appears twice"),
    ("rock,{folder}/rock.py", "rock appears twice"),
    ("{folder}/none.py", "must define one subclass of extension.Extension, and it defines 0"),
    ("{folder}/both.py", "must define one subclass of extension.Extension, and it defines 2"),
    ("{folder}/two-words.py", "'two-words' cannot be the prefix of flags"),
    ("{folder}/data.py", "data is already the name of a group of flags")])
def test_a_name_or_file_that_is_no_extension_is_refused(config, tmp_path, extend, said):
    (tmp_path / "none.py").write_text("from extension import Extension\nclass Other: pass\n")
    (tmp_path / "both.py").write_text("from extension import Extension\nclass A(Extension): pass\n"
                                      "class B(Extension): pass\n")
    for name in ("rock", "two-words", "data"):
        written(tmp_path, name, "pass")
    with pytest.raises(ValueError, match=said):
        config(extend=extend.format(folder=tmp_path))


def test_its_flags_are_read_from_everywhere_and_have_bounds(config, tmp_path):
    file = tmp_path / "entropy.py"
    file.write_text(ENTROPY)
    assert config(extend=str(file)).extensions == {"entropy": {"bonus": 0.0}}
    assert config(extend=str(file), entropy__bonus=0.25).extensions == {"entropy": {"bonus": 0.25}}
    for text in (f"extend: {file}\nentropy: {{bonus: 0.5}}", f"extend: {file}\nentropy.bonus: 0.5"):
        (tmp_path / "run.yaml").write_text(text + "\n")
        assert config(config=str(tmp_path / "run.yaml")).extensions == {"entropy": {"bonus": 0.5}}
        assert config(config=str(tmp_path / "run.yaml"), entropy__bonus=1).extensions == {"entropy": {"bonus": 1.0}}
    with pytest.raises(ValueError, match="--entropy.bonus -1.0: must not be negative"):
        config(extend=str(file), entropy__bonus=-1)
    made, = Extensions.load(config(extend=str(file), entropy__bonus=0.25))
    assert (made.name, made.flags.bonus) == ("entropy", 0.25)


def test_the_flags_of_an_extension_that_is_off_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match=r"^--rock.k: the extension rock is switched off \(--extend rock"):
        config(rock__k=3)
    with pytest.raises(ValueError, match="--oprd.weight: the extension oprd is switched off"):
        config(extend="rock", oprd__weight=2)
    (tmp_path / "run.yaml").write_text("rock: {k: 3}\n")
    with pytest.raises(ValueError, match="rock.k: the extension rock is switched off"):
        config(config=str(tmp_path / "run.yaml"))
    with pytest.raises(ValueError, match="--entropy.bonus: no such flag"):      # of a file that is not known at all
        config(entropy__bonus=1)


def test_names_that_two_extensions_share_are_refused(config, tmp_path):
    tensor = "def slot_tensors(self, models):\n    return {'mine': SlotTensor((4,))}"
    shared = "def shared_tensors(self, models):\n    return {'ours': torch.zeros(3)}"
    for what, body in (("slot_tensors", tensor), ("shared_tensors", shared)):
        both = ",".join(written(tmp_path, name, body) for name in (f"{what}_a", f"{what}_b"))
        loaded = Extensions.load(config(extend=both))
        with pytest.raises(ValueError, match="two extensions use the name"):
            getattr(loaded, what)(UNSEEN)
        with pytest.raises(ValueError, match="two extensions use the name"):
            prepare(config(extend=both))
    both = ",".join(written(tmp_path, name, "METRICS = {'number': 'of'}") for name in ("m1", "m2"))
    with pytest.raises(ValueError, match="two extensions use the name 'number'"):
        prepare(config(extend=both))
    with pytest.raises(ValueError, match="kl in METRICS is a key that every step line has"):
        prepare(config(extend=written(tmp_path, "m3", "METRICS = {'kl': 'of'}")))


def test_a_metric_that_is_promised_is_filled(config, tmp_path):
    cfg = config(extend=written(tmp_path, "forgets", "METRICS = {'number': 'of'}"))
    with pytest.raises(ValueError, match=r"--extend forgets: after_step must fill its METRICS \['number'\], and"):
        Learner(cfg, "cpu", torch.float32).step(filled(cfg)[1], 0)


# -- what a learner makes of them ------------------------------------------------------------------

NOTHING = "pass"
HALF = "def weight(self, tokens):\n    return torch.where(tokens % 2 == 0, 0.5, 1.0)"
THIRD = "def weight(self, tokens):\n    return torch.where(tokens % 3 == 0, 0.25, 1.0)"
PRODUCT = ("def weight(self, tokens):\n"
           "    return torch.where(tokens % 2 == 0, 0.5, 1.0) * torch.where(tokens % 3 == 0, 0.25, 1.0)")
SQUARE = "student_layers = (0,)\n\ndef loss(self, states, segments):\n    return 3 * states[0].square().sum(-1)"
LINEAR = "student_layers = (0,)\n\ndef loss(self, states, segments):\n    return states[0].sum(-1)"


def test_an_extension_that_overrides_nothing_changes_nothing(config, tmp_path):
    """Of two that override nothing, one has been given every service of the base class."""
    empty = ",".join(written(tmp_path, name, NOTHING) for name in ("a", "b"))
    plain = config(minibatches=2)
    _, segments = filled(plain)
    assert same(trained_weights(plain, segments), trained_weights(config(minibatches=2, extend=empty), segments))
    made = Extensions.load(config(extend=empty))
    assert made.weight(torch.arange(3)) is None and made.stored({}, torch.arange(3), 0, 0) is None
    assert made.after_step(Step([], [], 0)) == Outcome() and made.after_flush([], None) == set()
    assert (made.sparse, made.metrics, made.validation_rows) == (False, {}, 0)
    assert made.teacher_layers == made.student_layers == made.fixed_on_resume() == list(made.state()) == []
    assert made.slot_tensors(UNSEEN) == made.shared_tensors(UNSEEN) == made.extra_gb(UNSEEN) == {}
    _, job = prepare(config(extend=empty))
    _, without = prepare(config())
    assert (job.slot_tensors, job.shared_tensors, job.metrics, job.memory[0], job.notes) == (
        without.slot_tensors, without.shared_tensors, without.metrics, without.memory[0], without.notes)


def test_weights_multiply(config, tmp_path):
    half, third, product = (written(tmp_path, name, body) for name, body in
                            (("half", HALF), ("third", THIRD), ("product", PRODUCT)))
    _, segments = filled(config())
    both = gradient(config(extend=f"{half},{third}"), segments)
    assert torch.equal(both, gradient(config(extend=product), segments))
    for other in ("", half, third):
        assert not torch.allclose(both, gradient(config(extend=other), segments), rtol=1e-3)


def test_losses_add_and_each_has_its_own_denominator(config, tmp_path):
    square, linear = (written(tmp_path, name, body) for name, body in (("square", SQUARE), ("linear", LINEAR)))
    over = written(tmp_path, "over", "loss_over = 'mine'\n" + LINEAR)
    cfg = config()
    slots, segments = filled(cfg, extra={"mine": ((4,), torch.float32)})
    slots.used["mine"][:2] = 1
    plain = gradient(cfg, segments)
    first, second, both = (gradient(config(extend=x), segments) for x in (square, linear, f"{square},{linear}"))
    torch.testing.assert_close(both - plain, (first - plain) + (second - plain), rtol=1e-4, atol=1e-4)
    assert (first - plain).norm() > 1 and (second - plain).norm() > 1
    model = load_model(cfg.student, "cpu", torch.float32)
    states = [model.model(s.tokens[None].long()).last_hidden_state[0, s.start - 1:-1] for s in segments]
    total = torch.cat(states).square().sum()
    (3 * total / sum(map(len, segments))).backward()
    want = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()])
    torch.testing.assert_close(first - plain, want, rtol=1e-3, atol=1e-3)

    def divided_by(extend) -> torch.Tensor:
        learner = Learner(config(extend=extend, clip=1e9), "cpu", torch.float32)
        return learner.step([slots.read(s) for s in range(4)], 0).metrics["grad_norm"]
    alone, by_rows, by_tokens = divided_by(""), divided_by(over), divided_by(linear)
    assert by_rows > 5 * by_tokens > 5 * alone, "16 tokens, but 2 rows"


def test_events_metrics_and_flushes_of_all_are_in_the_step(config, tmp_path):
    body = ("METRICS = {{'of_{0}': 'a number'}}\n\ndef after_step(self, step):\n"
            "    return Outcome([{{'what': '{0}', 'at': step.version}}], {{'of_{0}': {1}}}, flush={2})")
    a, b = (written(tmp_path, name, body.format(name, *x)) for name, x in (("a", (1.5, False)), ("b", (2, True))))
    cfg = config(extend=f"{a},{b}")
    _, segments = filled(cfg)
    trained = Learner(cfg, "cpu", torch.float32).step(segments, 7)
    assert trained.events == [{"what": "a", "at": 7}, {"what": "b", "at": 7}] and trained.flush
    assert (trained.metrics["of_a"], trained.metrics["of_b"]) == (1.5, 2)
    assert not Learner(config(extend=a), "cpu", torch.float32).step(segments, 7).flush


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_slot_tensor_that_is_not_finite_skips_its_update(config, value):
    cfg = config(minibatches=2)
    extra = {"mine": ((7, 2), torch.bfloat16), "whole": ((7,), torch.int64)}
    slots, segments = filled(cfg, extra)
    slots.used["mine"][:] = slots.used["whole"][:] = slots.length
    slots.extra["mine"][1, 5] = value                         # not in use
    learner = Learner(cfg, "cpu", torch.float32)
    assert learner.step([slots.read(s) for s in range(4)], 0).skipped == []
    slots.extra["mine"][1, 4, 1] = value
    trained = learner.step([slots.read(s) for s in range(4)], 1)
    assert [x["slots"] for x in trained.skipped] == [[1]] and trained.skipped[0]["why"].startswith("mine: ")


def test_what_is_stored_is_what_all_of_them_store(config, tmp_path):
    body = "sparse = True\n\ndef stored(self, shared, tokens, uid, first):\n    return tokens % {} > 0"
    files = [written(tmp_path, name, body.format(n)) for name, n in (("twos", 2), ("threes", 3))]
    silent = written(tmp_path, "silent", NOTHING)
    made = Extensions.load(config(extend=",".join([*files, silent])))
    assert made.stored({}, torch.arange(12), 0, 0).nonzero().flatten().tolist() == [1, 5, 7, 11]
    assert Extensions.load(config(extend=files[0])).stored({}, torch.arange(4), 0, 0).tolist() == [False, True] * 2
    assert Extensions.load(config(extend=silent)).stored({}, torch.arange(4), 0, 0) is None


def test_layers_are_given_in_the_order_that_an_extension_asks_for(config, tmp_path):
    class Wants(Extension):
        def record(self, states, segments, slots):
            self.seen = states
    first, second, third = (Wants(name, Config(), None) for name in "abc")
    first.teacher_layers, second.teacher_layers = (2, 0), (1,)
    both = Extensions([first, second, third])
    assert both.teacher_layers == [0, 1, 2]
    both.record({layer: f"states of {layer}" for layer in range(3)}, [], None)
    assert first.seen == ["states of 2", "states of 0"] and second.seen == ["states of 1"]
    assert not hasattr(third, "seen")


# -- runs ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def short(tmp_path_factory, models):
    """short(**flags) -> (its flags, its last weights) of a run of five synchronous steps."""
    def make(**more):
        out = tmp_path_factory.mktemp("runs") / "run"
        flags = dict(task="toy", student=models["student"], teacher=models["teacher"], gpus=0, engine="hf", batch=8,
                     max_prompt=8, max_response=16, max_running=64, lr=1e-3, eval__n=8, schedule="sync", steps=5,
                     out=str(out)) | more
        done = run(flags)
        assert done.returncode == 0, done.stderr
        return flags, load_file(out / "student" / "model.safetensors")
    return make


@pytest.fixture(scope="module")
def plain(short):
    return short()


def events(flags, what) -> list[dict]:
    return [line for line in lines(flags) if line.get("what") == what]


def test_a_file_of_some_lines_trains_the_toy_without_a_line_of_the_core(short, plain, tmp_path):
    file = tmp_path / "entropy.py"
    file.write_text(ENTROPY)
    assert "entropy" not in [path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    flags, weights = short(extend=str(file), entropy__bonus=0.1)
    log = steps(flags)
    assert len(log) == 5 and all(line.keys() == METRICS.keys() | {"type", "bonus"} for line in log)
    assert all(line["bonus"] == pytest.approx(line["entropy"]) and line["bonus"] > 0 for line in log)
    assert [(e["step"], e["nats"]) for e in events(flags, "entropy")] == [(s["step"], s["bonus"]) for s in log]
    assert lines(flags)[0]["config"]["extensions"] == {"entropy": {"bonus": 0.1}}
    assert not same(weights, plain[1]), "the flag matters"
    assert log[-1]["entropy"] > steps(plain[0])[-1]["entropy"], "in the direction that it says"
    assert "bonus" not in steps(plain[0])[0] and events(plain[0], "entropy") == []
    _, without = short(extend=str(file))
    assert same(without, plain[1]), "a bonus of 0 is none"


def test_a_run_with_an_extension_that_does_nothing_ends_as_one_without(short, plain, tmp_path):
    flags, weights = short(extend=written(tmp_path, "nothing", NOTHING))
    assert same(weights, plain[1])
    assert [s["loss"] for s in steps(flags)] == [s["loss"] for s in steps(plain[0])]


SERVICES = '''
METRICS = {"by_teacher": "", "by_rollout": "", "by_learner": "", "share": ""}
sparse = True
validation_rows = 3
teacher_layers = (0,)
n = 0

def slot_tensors(self, models):
    return {"from_teacher": SlotTensor((1,), torch.float64)}

def shared_tensors(self, models):
    return {"from_rollout": torch.zeros(1, dtype=torch.float64), "published": torch.zeros(1, dtype=torch.int64)}

def prepare(self, prompts, device, dtype):
    import os
    return {"x": torch.rand(1, dtype=torch.float64), "pid": torch.tensor([os.getpid(), len(prompts)])}

def stored(self, shared, tokens, uid, first):
    shared["from_rollout"][0] = self.prepared()["x"][0]
    return torch.ones(len(tokens), dtype=torch.bool)

def record(self, states, segments, slots):
    for s in segments:
        slots.extra["from_teacher"][s.slot, 0] = self.prepared()["x"][0]
        slots.used["from_teacher"][s.slot] = 1

def attach(self, learner, saved):
    from transformers import AutoTokenizer
    self.tokenizer = AutoTokenizer.from_pretrained(self.cfg.student)
    self.began = bool(saved)
    self.n = int(saved.get("n", torch.tensor(0)))

def published(self, shared):
    shared["published"] += 1
    self.shared = shared

def after_step(self, step):
    self.n += 1
    answers = [self.tokenizer.encode(f";{eval(self.tokenizer.decode(p)[:-1])}") for p in self.validation_prompts]
    answers[1] = self.tokenizer.encode(";5")
    step.link.send("validation_answers", answers=answers)
    metrics = {"by_teacher": {s.extra["from_teacher"].item() for s in step.segments}.pop(),
               "by_rollout": self.shared["from_rollout"].item(), "by_learner": self.prepared()["x"].item(),
               "share": step.link.answer("validation_share")}
    return Outcome([{"what": "seen", "n": self.n, "resumed": self.began, "asked": len(answers),
                     "published": self.shared["published"].item(), "pid": self.prepared()["pid"].tolist()}], metrics)

def state(self):
    yield "n", torch.tensor(self.n)
'''


def test_state_prepared_tensors_and_graded_answers_in_a_run_and_after_a_resumption(short, plain, tmp_path):
    flags, weights = short(extend=written(tmp_path, "services", SERVICES), save_every=2)
    bare = short(extend=written(tmp_path, "bare", "sparse = True"))[1]       # the emitted token is no candidate
    assert same(weights, bare) and not same(weights, plain[1]), "nothing but `sparse` touches the weights"
    done = complete([*command(dict(out=flags["out"], steps=7)), "--resume"])
    assert done.returncode == 0, done.stderr
    log, seen = steps(flags), events(flags, "seen")
    values = {line[key] for line in log for key in ("by_teacher", "by_rollout", "by_learner")}
    assert len(values) == 1 and 0 < values.pop() < 1, "the same random number everywhere, also after the resumption"
    assert len({tuple(e["pid"]) for e in seen}) == 1, "prepared once"
    pid, prompts = seen[0]["pid"]
    assert pid not in lines(flags)[0]["pids"].values() and prompts > 100, "in a process of its own"
    assert {line["share"] for line in log} == {2 / 3} and {e["asked"] for e in seen} == {3}
    assert [e["step"] for e in seen] == [e["n"] for e in seen] == list(range(1, 8))
    assert [e["resumed"] for e in seen] == [False] * 4 + [True] * 3, "from the checkpoint of step 4"
    assert [e["published"] for e in seen] == [1, 2, 3, 4, 1, 2, 3]
    assert all(line["stored"] == 1 for line in log)
    other = ["--resume", f"--out={flags['out']}", f"--extend={written(tmp_path, 'nothing', NOTHING)}"]
    with pytest.raises(ValueError, match="--extend .*: --resume cannot change"):
        configure(other)


def test_flags_that_a_resumption_may_not_change(short, tmp_path):
    body = ("fixed_on_resume = ('a', 'teacher')\n\n@dataclass(frozen=True)\nclass Flags:\n"
            "    a: int = 1\n    b: int = 1")
    flags, _ = short(extend=written(tmp_path, "holds", body), holds__a=2, steps=2, save_every=1)
    again = ["--resume", f"--out={flags['out']}"]
    assert configure([*again, "--holds.b=5"]).extensions == {"holds": {"a": 2, "b": 5}}
    with pytest.raises(ValueError, match=r"^--holds.a 3: --resume cannot change the 2 of the run"):
        configure([*again, "--holds.a=3"])
    with pytest.raises(ValueError, match="--teacher .*: --resume cannot change"):
        configure([*again, f"--teacher={flags['student']}"])
