"""Every flag with every kind of odd value, contradictions, files of flags and files of rows, up to the start of a run.

Each case is refused (exit code 2, one line or tyro's box, nothing created), or it is valid, or the run names the flag
that cannot act. None ends in a traceback, and none hangs. The run itself, and what starts a process, is replaced.
"""
import contextlib
import functools
import io
import json
import signal
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args, get_origin

import pytest
import transformers

import asyncopd
from config import Config, each_type, flag_of
from control import command_line
from extension import extension_class, known_extensions
from tests.test_bad_input import is_box, is_one_line, listing

SECONDS = 20             # for one case, on a machine that does other things too
ANY = "refused, named or valid"


@dataclass(frozen=True)
class Case:
    name: str
    flags: list[str]
    expected: str = ANY
    says: str = ""                             # in the line that refuses, or in the note
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    case: Case
    kind: str                                  # refused, named, valid, traceback, hang, or what else went wrong
    text: str


class Hang(BaseException):
    """Not an Exception, so that nobody takes it for an error of a library."""


# -- flags ----------------------------------------------------------------------------------------

WHOLE = ["-7", "0", "9" * 20, "9" * 5000, "1e20", "2.5", "nan", "inf", "", "three", "a\0b", "\u00fc", "/tmp"]
REAL = ["-7", "0", "1e-300", "1e300", "9" * 400, "nan", "inf", "-inf", "", "fast", "a\0b", "\u00fc", "/tmp"]
CHOICE = ["", "none of them", "a\0b", "-1"]
TEXT = ["", "\u00fc\u2603", "a\0b", "\udcff", "/tmp", "-1", "x" * 5000]
SWITCH = ["maybe", "", "2"]
ANY_NUMBER = {"clip", "oprd.weight"}            # a gradient may have any norm


def kind_of(hint) -> type:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def expected(name: str, kind, value: str) -> str:
    """What must be refused, whatever the other flags are."""
    if "\0" in value or "\udcff" in value:
        return "refused"
    if kind is str:
        return ANY
    if kind is int and value == "0":
        return ANY
    if kind is float and (value in ("0", "1e-300") or value == "1e300" and name in ANY_NUMBER):
        return ANY
    return "refused"


def odd_values() -> list[Case]:
    flags = [(name, hint, []) for name, hint in each_type(Config)]
    for extension in known_extensions():
        own = each_type(extension_class(extension).Flags, f"{extension}.")
        flags += [(name, hint, [f"--extend={extension}"]) for name, hint in own]
    cases = []
    for name, hint, before in flags:
        kind = kind_of(hint)
        values = {int: WHOLE, float: REAL, bool: SWITCH, str: TEXT}.get(kind, CHOICE)
        assert values is not CHOICE or get_origin(kind) is Literal, f"{name}: what are the odd values of {kind}?"
        cases += [Case(f"{name}={value[:12]!r}", [*before, f"{flag_of(name)}={value}"], expected(name, kind, value))
                  for value in values]
    return cases


# -- contradictions -------------------------------------------------------------------------------

TOGETHER = [     # (flags, what happens, what is said)
    ("--kl=forward --estimator=reverse_mc", "refused", "--kl forward: contradicts --estimator reverse_mc"),
    ("--kl=reverse --estimator=forward_topk", "refused", "--kl reverse: contradicts --estimator forward_topk"),
    ("--kl=forward --estimator=forward_topk", "valid", ""),
    ("--schedule=step-off --max-ahead=0", "refused", "--max-ahead 0"),
    ("--max-lag=2", "refused", "--max-lag 2"), ("--eval.k=4", "refused", "--eval.k 4"),
    ("--batch=2 --minibatches=3", "refused", "--minibatches 3"), ("--resume", "refused", "--resume"),
    ("--learners=2 --lora-rank=2", "refused", "--learners 1"), ("--teacher-gpus=2", "refused", "--teacher-gpus 2"),
    ("--data.template={question}{prompt}", "refused", "{question} would stay"),
    ("--data.template={prompt} --data.suffix={question}", "valid", ""),
    ("--data.template=\\boxed{x}{prompt}", "valid", ""), ("--data.template=\\frac{a}{b}{prompt}", "valid", ""),
    ("--data.answer-key=solution", "refused", "--data.answer-key 'solution': no row of"),
    ("--task=toy --student=", "valid", ""), ("--task=toy --teacher=", "refused", "--teacher is missing"),
    ("--schedule=sync --max-ahead=4", "named", "--max-ahead 4 has no effect with --schedule sync"),
    ("--schedule=sync --max-lag=16", "named", "--max-lag 16 has no effect with --schedule sync"),
    ("--schedule=step-off --max-lag=16", "named", "--max-lag 16 has no effect with --schedule step-off"),
    ("--overdue=keep --max-lag=16", "named", "--max-lag 16 has no effect with --overdue keep"),
    ("--schedule=sync --overdue=drop", "named", "--overdue drop has no effect with --schedule sync"),
    ("--schedule=step-off --overdue=wait", "named", "--overdue wait has no effect with --schedule step-off"),
    ("--schedule=sync --inflight=finish", "named", "--inflight finish has no effect with --schedule sync"),
    ("--beta=0.2", "named", "--beta 0.2 has no effect with reverse_mc"),
    ("--kl=forward --beta=0.2", "named", "--beta 0.2 has no effect with forward_topk"),
    ("--estimator=jsd_dense --beta=0.2", "valid", ""),
    ("--estimator=reverse_ppo --mc-samples=8", "named", "--mc-samples 8 has no effect with reverse_ppo"),
    ("--mc-samples 8 --estimator reverse_ppo", "named", "--mc-samples 8 has no effect with reverse_ppo"),
    ("--estimator=forward_mc --mc-samples=8", "valid", ""),
    ("--top-k=8", "named", "--top-k 8 has no effect with reverse_mc"),
    ("--estimator=reverse_topk --top-k=8", "valid", ""),
    ("--estimator=forward_topk --top-k=8000", "named", "--top-k 8000: as many as there are words, 32"),
    ("--steps=5 --warmup=9", "named", "--warmup 9 outlasts this run of 5 x 1 updates"),
    ("--steps=5 --minibatches=2 --warmup=9", "valid", ""),
    ("--micro-tokens=8", "named", "--micro-tokens 8 has no effect on a longer sequence"),
    ("--steps=5 --save-every=9", "named", "--save-every 9 has no effect in a run of 5 steps"),
    ("--steps=5 --eval.every=5", "named", "--eval.every 5 has no effect in a run of 5 steps"),
    ("--eval.n=0 --eval.every=5", "named", "--eval.every 5 has no effect with --eval.n 0"),
    ("--eval.n=0 --eval.teacher", "named", "--eval.teacher has no effect with --eval.n 0"),
    ("--eval.n=0 --eval.k=4 --eval.temperature=1", "named", "--eval.k 4 has no effect with --eval.n 0"),
    ("--data.thinking", "named", "--data.thinking has no effect: --student has no chat template"),
    ("--no-data.thinking", "refused", "--no-data.thinking: no such flag"), ("--data.no-thinking", "valid", ""),
    ("--task=toy --data.prompt-key=q", "named", "--data.prompt-key q has no effect with --task toy"),
    ("--overwrite --no-overwrite", "valid", ""), ("--", "refused", ""), ("-x", "refused", ""), ("--=1", "refused", ""),
    ("--steps", "refused", "steps"), ("--config", "refused", ""), ("--extend=,,", "valid", ""),
]


# -- files of flags -------------------------------------------------------------------------------

YAML = [         # (the file, what happens, what is said)
    ("stepz: 3\n", "refused", "c.yaml: stepz: no such flag (did you mean steps?)"),
    ("kl: off\n", "refused", "c.yaml: kl: 'off' is none of reverse, forward"),
    ("steps: true\n", "refused", "c.yaml: steps: 'true' is not a whole number"),
    ("steps: three\n", "refused", "c.yaml: steps: 'three' is not a whole number"),
    ("steps: 2.5\n", "refused", "c.yaml: steps: '2.5' is not a whole number"),
    ("steps: 0\n", "refused", "c.yaml: steps 0: must be above 0"), ("lr: .nan\n", "refused", "c.yaml: lr nan"),
    ("lr: .inf\n", "refused", "c.yaml: lr inf"), ("lr: fast\n", "refused", "c.yaml: lr: 'fast' is not a number"),
    ("lr: 1e-4\n", "valid", ""), ("steps: 2020-01-01\n", "refused", "'2020-01-01' is not a whole number"),
    ("steps: 2020-13-45\n", "refused", "c.yaml: steps"), ("steps: " + "9" * 5000 + "\n", "refused", "c.yaml: steps"),
    ("steps: 3\nlr: 1e-4\nsteps: 4\n", "refused", "c.yaml: steps stands there twice, on lines 1 and 3"),
    ("eval: {n: 3}\neval.n: 4\n", "refused", "c.yaml: eval.n stands there twice, on lines 1 and 2"),
    ("max_lag: 20\nmax-lag: 30\n", "refused", "c.yaml: max_lag stands there twice"),
    ("eval: 3\n", "refused", "c.yaml: eval: no such flag"), ("eval: {n: {n: 3}}\n", "refused", "eval.n: is a list or"),
    ("steps: [3]\n", "refused", "c.yaml: steps: is a list or a mapping"), ("steps:\n", "refused", "steps has no value"),
    ("out:\n", "refused", "out has no value"), ("? [a]\n: 3\n", "refused", "line 1: a key must be a name"),
    ("a: &x {b: *x}\n", "refused", "c.yaml: a.b: is a list or a mapping"),
    ("<<: {steps: 3}\n", "refused", "c.yaml: <<"),
    ("a: &b [1]\nc: [*b, *b]\n", "refused", "a: is a list"),
    ("{" * 2000, "refused", "c.yaml: is nested too deeply"), ("steps: 3\n---\nsteps: 4\n", "refused", "c.yaml"),
    ("\t", "refused", "c.yaml"),
    ("steps: !!python/name:os.system 3\n", "refused", "c.yaml: steps"), ("", "refused", "not a mapping of flags"),
    ("\ufeffsteps: 3\n", "valid", ""), ("data: {thinking: on}\n", "named", "--data.thinking has no effect"),
    ("data.suffix: 007\n", "valid", ""), ("data.suffix: \"a\\0b\"\n", "refused", "suffix 'a\\x00b': holds a null byte"),
    ("overwrite: 1\n", "refused", "'1' is not true or false"), ("config: c.yaml\n", "refused", "names itself"),
    ("config: ./x/../c.yaml\n", "refused", "names itself"), ("config: absent.yaml\n", "refused", "absent.yaml"),
    ("config:\n", "refused", "config has no value"), ("config: [1]\n", "refused", "config: is a list or a mapping"),
    ("beta: 0.2\n", "named", "beta 0.2 in {w}/c.yaml has no effect with reverse_mc"),
    ("kl: forward\nestimator: reverse_mc\n", "refused", "kl forward in {w}/c.yaml: contradicts --estimator reverse_mc"),
    ("rock: {k: 3}\n", "refused", "the extension rock is switched off"),
    ("extend: [rock]\n", "refused", "extend: is a"),
    ("resume: true\n", "refused", ""), ("steps: 3 # three\n", "valid", ""),
    ("seed: -1\n", "refused", "c.yaml: seed -1"),
]


# -- files of rows --------------------------------------------------------------------------------

def rows(*records) -> bytes:
    return "\n".join(json.dumps(r) for r in records).encode()


def chat(*messages, **more) -> dict:
    return {"prompt": [dict(zip(("role", "content"), m)) for m in messages]} | more


GOOD = [{"prompt": f"{i}+{i}=", "answer": f"{2 * i}"} for i in range(3)]
JSONL = [        # (name, the file, flags, what happens, what is said)
    ("good", rows(*GOOD), "", "valid", ""), ("BOM", b"\xef\xbb\xbf" + rows(*GOOD), "", "valid", ""),
    ("two BOMs", b"\xef\xbb\xbf" * 2 + rows(*GOOD), "", "refused", "r.jsonl:1"),
    ("UTF-16", rows(*GOOD).decode().encode("utf-16"), "", "refused", "r.jsonl:1: not UTF-8"),
    ("chat", rows(chat(("user", "1+1="))), "", "refused", "no chat template for prompts that are messages"),
    ("chat, key", rows(chat(("user", "1+1="))), "--data.prompt-key=prompt.0.content", "valid", ""),
    ("chat, template", rows(chat(("system", "1"), ("user", "1+1="))), "--student={chat}", "valid", ""),
    ("chat, answered", rows(chat(("user", "1"), ("assistant", "2"))), "--student={chat}", "refused", "r.jsonl:1: its"),
    ("chat, no role", rows({"prompt": [{"content": "1"}]}), "", "refused", "r.jsonl:1: message 1 of its prompt has no"),
    ("chat, picture", rows(chat(("user", [{"type": "image"}]))), "", "refused", "r.jsonl:1: message 1"),
    ("chat, mixed", rows({"prompt": [{"role": "user", "content": "1"}, "2"]}), "", "refused", "message 2 of its"),
    ("empty list", rows({"prompt": []}), "", "refused", "r.jsonl:1: no text under"),
    ("empty prompts", rows({"prompt": ""}, {"prompt": " \n"}), "", "refused", "every prompt is empty"),
    ("an empty prompt", rows({"prompt": ""}, *GOOD), "", "named", "1 of 4 prompts are empty: left out"),
    ("a long prompt", rows({"prompt": "1" * 99}, *GOOD), "", "named", "1 of 4 prompts are longer than --max-prompt 16"),
    ("long prompts", rows({"prompt": "1" * 99}), "", "refused", "--max-prompt 16: every prompt of"),
    ("surrogate", b'{"prompt": "1"}\n{"prompt": "a\\ud800"}', "", "refused", "r.jsonl:2: its prompt holds '\\ud800'"),
    ("surrogate in a chat", b'{"prompt": [{"role": "user", "content": "\\udfff"}]}', "", "refused", "r.jsonl:1: its"),
    ("surrogate answer", b'{"prompt": "1", "answer": "\\ud800"}', "", "refused", "r.jsonl:1: its answer holds"),
    ("a pair", b'{"prompt": "\\ud83d\\ude00"}', "", "valid", ""), ("null", b'{"prompt": "\\u0000"}', "", "valid", ""),
    ("deep", b"[" * 99_999, "", "refused", "r.jsonl:1: is nested too deeply"),
    ("digits", b'{"prompt": "1", "answer": ' + b"9" * 5000 + b"}", "", "refused", "r.jsonl:1: "),
    ("a large number", b'{"prompt": "1", "n": ' + b"9" * 400 + b"}", "--data.filter=n>3", "refused", "r.jsonl:1: "),
    ("NaN", b'{"prompt": "1", "n": NaN}', "--data.filter=n>3", "refused", "none of its 1 rows"),
    ("a list", rows([1]), "", "refused", "r.jsonl:1"), ("a number", b"3", "", "refused", "r.jsonl:1"),
    ("null prompt", rows({"prompt": None}), "", "refused", "r.jsonl:1"), ("empty", b"", "", "refused", "holds no rows"),
    ("binary", bytes(range(256)), "", "refused", "r.jsonl:1"),
    ("no key", rows(*GOOD), "--data.prompt-key=", "refused", "''"),
    ("answer key", rows(*GOOD), "--data.answer-key=result", "refused", "--data.answer-key 'result': no row of"),
    ("answer keys", rows(*GOOD), "--data.answer-key=result,answer", "valid", ""),
    ("filter", rows(*GOOD), "--data.filter=a==b==c", "refused", "--data.filter"),
    ("eval of itself", rows(*GOOD), "--data.eval-task={w}/r.jsonl", "refused", "none is left to train on"),
]


def cases(w, chat_student: str) -> list[Case]:
    found = odd_values()
    found += [Case(flags, flags.split(), *rest) for flags, *rest in TOGETHER]
    found += [Case(f"YAML {text[:30]!r}", [f"--config={w}/c.yaml"], kind, says.format(w=w), {"c.yaml": text.encode()})
              for text, kind, says in YAML]
    for name, data, flags, kind, says in JSONL:
        given = [flag.replace("{w}", str(w)).replace("{chat}", chat_student) for flag in flags.split()]
        found.append(Case(f"JSONL {name}", [f"--task={w}/r.jsonl", *given], kind, says, {"r.jsonl": data}))
    return found


# -- running them ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def outcomes(models, tmp_path_factory) -> list[Outcome]:
    """All of them, once. Prints how many of each kind there are."""
    from data import toy
    from tests.conftest import save_tiny
    w, cwd, student = (tmp_path_factory.mktemp(name) for name in ("world", "cwd", "chat"))
    save_tiny(student, seed=0)
    tokenizer = toy.toy_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(student)
    (w / "good.jsonl").write_bytes(rows(*GOOD))
    base = [f"--task={w}/good.jsonl", f"--student={models['student']}", f"--teacher={models['teacher']}", "--gpus=0",
            "--engine=hf", "--max-prompt=16", "--max-response=16", "--out=run"]
    jobs = []

    def train(cfg, job, resume, prepared) -> int:
        jobs.append(job)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        for module, name in ((command_line, "flags_class"), (transformers.AutoConfig, "from_pretrained"),
                             (transformers.AutoTokenizer, "from_pretrained")):
            patch.setattr(module, name, functools.cache(getattr(module, name)))         # once, not 800 times
        patch.setattr("tyro._docstrings.get_field_docstring", lambda *_: None)           # nor the help texts
        patch.setattr(asyncopd, "train", train)
        patch.setattr(asyncopd, "start_server", lambda: None)
        patch.setattr(asyncopd, "prepare_extensions", lambda cfg, job: {})
        patch.setattr("control.preflight.toy.toy_models", lambda root: (models["student"], models["teacher"]))
        found = [outcome(case, base, w, cwd, jobs) for case in cases(w, str(student))]
    counts = Counter(o.kind for o in found)
    print(f"\n{len(found)} cases: " + ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
    return found


def outcome(case: Case, base: list[str], w, cwd, jobs: list) -> Outcome:
    for name, data in case.files.items():
        (w / name).write_bytes(data)
    jobs.clear()
    err = io.StringIO()

    def ring(*_):
        raise Hang
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            code = asyncopd.main([*base, *case.flags])
    except SystemExit as e:
        code = e.code
    except Hang:
        return Outcome(case, "hang", f"more than {SECONDS} s")
    except Exception as e:
        return Outcome(case, "traceback", f"{type(e).__name__}: {str(e)[:300]}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Outcome(case, *judged(code, err.getvalue().strip(), jobs, listing(cwd)))


def judged(code: int, err: str, jobs: list, created: list[str]) -> tuple[str, str]:
    """Kind and text."""
    if created:
        return "something was created", str(created)
    if code == 2 and (is_one_line(err) and len(err) < 500 or is_box(err)):
        return "refused", err
    if code != 0 or not jobs or err:
        return f"exit code {code}", err[:300]
    notes = "\n".join(jobs[0].notes)
    return ("named" if notes else "valid"), notes


def wrong(found: list[Outcome], *kinds: str) -> list[str]:
    return [f"{o.case.name}: {o.kind}: {o.text}" for o in found if o.kind in kinds]


def test_there_are_no_tracebacks_and_no_hangs(outcomes):
    assert wrong(outcomes, "traceback", "hang") == []


def test_every_case_is_refused_in_one_line_or_valid_or_named(outcomes):
    odd = {o.kind for o in outcomes} - {"refused", "named", "valid"}
    assert wrong(outcomes, *odd) == []


def test_what_must_be_refused_is_and_what_cannot_act_is_named(outcomes):
    assert [f"{o.case.name}: {o.kind}, not {o.case.expected}: {o.text}" for o in outcomes
            if o.case.expected not in (ANY, o.kind)] == []
    silent = [o for o in outcomes if o.case.says not in o.text]
    assert [f"{o.case.name}: {o.text!r} does not say {o.case.says!r}" for o in silent] == []


def test_there_are_enough_of_each_kind(outcomes):
    counts = Counter(o.kind for o in outcomes)
    assert len(outcomes) >= 300 and counts["refused"] >= 200 and counts["named"] >= 25 and counts["valid"] >= 25, counts
