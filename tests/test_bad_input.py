"""What cannot be is refused with exit code 2, before anything is created, in one line that names the value.

A value that is not of its flag's type, and a word without a flag, is refused by tyro in a box of several lines.
"""
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import asyncopd
from config import Config
from control.preflight import prepare
from control.resolve import configure
from tests.conftest import ROOT, save_tiny

CASES = [      # (flags, what the line must name). {w} is a folder with the files below
    # flags
    ("--stepz=3", "--stepz: no such flag (did you mean --steps?)"),
    ("--step=3", "--step: no such flag (did you mean --steps?)"), ("--steps=three", "three"),
    ("--steps=2.5", "2.5"), ("--steps=0", "--steps 0"),
    ("--steps=", "--steps"), ("positional", "positional"), ("--lr=-1", "--lr -1"),
    ("--lr=fast", "fast"), ("--kl=sideways", "sideways"), ("--estimator=magic", "magic"), ("--top-p=0", "--top-p 0"),
    ("--top-p=1.5", "--top-p 1.5"), ("--max-ahead=-1", "--max-ahead -1"), ("--mc-samples=0", "--mc-samples 0"),
    ("--batch=2 --minibatches=3", "--minibatches 3"), ("--temperature=0", "--temperature 0"), ("--beta=2", "--beta 2"),
    ("--eval.tempature=1", "--eval.tempature: no such flag (did you mean --eval.temperature?)"),
    ("--data.promt-key=q", "--data.promt-key: no such flag (did you mean --data.prompt-key?)"),
    ("--faults.kep 1", "did you mean --faults.keep?"), ("--eval-n=4", "did you mean --eval.n?"),
    ("--nonsense", "--nonsense: no such flag"), ("--eval.no-teachr", "did you mean --eval.teacher?"),
    ("--eval.every=-1", "--eval.every -1"), ("--engine=sglang", "sglang"),
    ("--max-ahead=9 --max-lag=4", "--max-lag 4"), ("--overdue=forget", "forget"), ("--schedule=later", "later"),
    ("--clip=0", "--clip 0"), ("--faults.keep=-1", "--faults.keep -1"), ("--faults.stall-s=0", "--faults.stall-s 0"),
    ("--faults.skips=0", "--faults.skips 0"), ("--faults.restarts=-2", "--faults.restarts -2"),
    # numbers
    ("--lr=inf", "--lr inf: must be above 0, and at most 1"), ("--lr=nan", "--lr nan"), ("--clip=inf", "and finite"),
    ("--temperature=inf", "--temperature inf"), ("--weight-decay=inf", "--weight-decay inf"),
    ("--temperature=1e-300", "--temperature 1e-300: must be at least 0.01"), ("--gpus=-7", "--gpus -7: must be at"),
    ("--eval.temperature=1e-300", "--eval.temperature 1e-300"), ("--faults.stall-s=1e300", "at most 31,622,400"),
    ("--rollouts=100000000000000000000", "--rollouts 1000"), ("--teachers=1025", "at most 1,024"),
    ("--learners=2147483647", "at most 1,024"), ("--seed=4294967296", "at most 4,294,967,295"),
    ("--steps=2147483648", "at most 2,147,483,647"), ("--batch=" + "9" * 2000, "and at most 2,147,483,647"),
    ("--eval.n=1000000", "at most 100,000"), ("--eval.k=1000000 --eval.temperature=1", "at most 4,096"),
    ("--extend=oprd --estimator=none --oprd.weight=inf", "--oprd.weight inf"),
    # texts
    ("--out=a\0b", "--out 'a\\x00b': holds a null byte"), ("--task=a\0b", "--task 'a\\x00b': holds a null byte"),
    ("--data.suffix=\udcff", "--data.suffix '\\udcff': is not UTF-8"),
    ("--extend=a\0.py", "cannot be the prefix of flags"), ("--config=a\0.yaml", "null byte"),
    ("--resume --out=a\0b", "null byte"),
    ("--overwrite=maybe", "maybe"), ("--teacher-engine=oracle", "oracle"), ("--log=carrier-pigeon", "carrier-pigeon"),
    # extensions
    ("--extend=unknown", "--extend unknown: no such extension (there are: effopd, oprd, rock"),
    ("--extend={w}/absent.py", "absent.py"), ("--extend={w}/data.py", "data is already the name of a group of flags"),
    ("--extend={w}/nothing.py", "must define one subclass of extension.Extension, and it defines 0"),
    ("--extend=rock,rock", "rock appears twice"),
    ("--rock.k=3", "--rock.k: the extension rock is switched off (--extend rock switches it on)"),
    ("--estimator=none", "--estimator none: trains nothing by itself; switch on an extension that has a loss (--ext"),
    ("--estimator=none --extend=effopd", "--estimator none: trains nothing by itself"),
    # token types
    ("--extend=rock --rock.weight=1", "--rock.weight 1"), ("--extend=rock --rock.weight=-0.1", "--rock.weight -0.1"),
    ("--extend=rock --rock.weight=nan", "--rock.weight nan"), ("--extend=rock --rock.k=0", "--rock.k 0"),
    ("--extend=rock --rock.every=0", "--rock.every 0"), ("--extend=rock --rock.weight=all", "all"),
    ("--extend=rock --rock.evry=1", "did you mean --rock.every?"), ("--rock.types=+", "--rock.types: the extension"),
    ("--extend=rock --rock.types=+,teen", "'teen'"), ("--extend=rock --rock.types=99", "'99'"),
    ("--extend=rock --rock.types=+,", "''"),
    ("--extend=rock,oprd --estimator=none", "--estimator none has no loss at a token"),
    ("--data.eval-task={w}/good.jsonl", "good.jsonl"),
    # OPRD
    ("{oprd} --oprd.weight=-1", "--oprd.weight -1"), ("{oprd} --oprd.rank=-2", "--oprd.rank -2"),
    ("{oprd} --oprd.tokens=0", "--oprd.tokens 0"), ("--oprd.rank=4", "--oprd.rank: the extension oprd is switched off"),
    ("--oprd.bridge", "--oprd.bridge: the extension oprd"), ("--oprd.no-head", "--oprd.no-head: the extension oprd"),
    ("--oprd.layers=last", "--oprd.layers: the extension oprd"), ("{oprd} --oprd.layers=some", "some"),
    ("{oprd} --teacher-engine=vllm", "vllm: --extend oprd needs the teacher's hidden states"),
    ("--extend=oprd --oprd.weight=2 --teacher-engine=vllm", "--extend oprd needs the teacher's hidden states"),
    ("{oprd} --oprd.weight=0", "--oprd.weight 0"),
    ("{oprd} --oprd.rank=65", "--oprd.rank 65"), ("{oprd} --oprd.layers=odd", "--oprd.layers odd"),
    ("{oprd}", "the mean cosine of their states is"),
    # jumps
    ("--extend=effopd --effopd.gate=guess", "guess"), ("--extend=effopd --effopd.most=0", "--effopd.most 0"),
    ("--extend=effopd --schedule=step-off", "--schedule step-off"),
    ("--extend=effopd --lora-rank=4", "--lora-rank 4"),
    ("--extend=effopd --effopd.gate=accuracy --learners=2", "--learners 2"),
    ("--task={w}/good.jsonl --extend=effopd --effopd.gate=accuracy {m}", "needs rows with an answer, and no row of"),
    # machines
    ("--gpus=99", "--gpus 99"), ("--gpus=all", "all"), ("--teacher-gpus=2", "--teacher-gpus 2"),
    ("--batch=2000000 --max-response=400 --max-prompt=100", "GB"),
    # files of flags
    ("--config={w}/absent.yaml", "absent.yaml"), ("--config={w}", "--config"), ("--config={w}/list.yaml", "list.yaml"),
    ("--config={w}/broken.yaml", "broken.yaml"),
    ("--config={w}/unknown.yaml", "unknown.yaml: stepz: no such flag (did you mean steps?)"),
    ("--config={w}/empty.yaml", "empty.yaml"), ("--config={w}/null.yaml", "null.yaml: steps has no value"),
    ("--config={w}/binary.jsonl", "binary.jsonl"),
    ("--config={w}/nested.yaml", "nested.yaml: eval.tempature: no such flag (did you mean eval.temperature?)"),
    ("--config={w}/old.yaml", "old.yaml: eval_n: no such flag (did you mean eval.n?)"),
    ("--config={w}/switch.yaml", "switch.yaml: overwrite: 'maybe' is not true or false"),
    ("--config={w}/off.yaml", "off.yaml: rock.k: the extension rock is switched off"),
    ("--config={w}/three.yaml", "three"),
    # models
    ("--student={w}/absent", "{w}/absent"), ("--teacher={w}/absent", "{w}/absent"),
    ("--student={w}/list.yaml", "list.yaml"), ("--student={w}/noconfig", "noconfig"),
    ("--teacher={w}/badconfig", "badconfig"), ("--student={w}/noweights", "noweights"),
    ("--student={w}/pickle", ".safetensors"), ("--teacher={w}/cut", "model.safetensors"),
    ("--student={w}/notokenizer", "notokenizer"), ("--teacher={w}/otherwords", "vocabulary"),
    ("--max-prompt=400 --max-response=400", "512"), ("--task={w}/good.jsonl", "--student and --teacher"),
    # prompts
    ("--task={w}/absent.jsonl {m}", "absent.jsonl"), ("--task={w}/empty.jsonl {m}", "empty.jsonl"),
    ("--task={w}/malformed.jsonl {m}", "malformed.jsonl:3"), ("--task={w}/missing.jsonl {m}", "missing.jsonl:2"),
    ("--task={w}/numbers.jsonl {m}", "numbers.jsonl:1"), ("--task={w}/good.jsonl --data.prompt-key=q {m}", "'q'"),
    ("--task={w}/binary.jsonl {m}", "binary.jsonl"), ("--task={w}/lists.jsonl {m}", "lists.jsonl:1"),
    ("--task={w}/good.jsonl --max-prompt=1 {m}", "--max-prompt 1"),
    ("--task={w}/good.jsonl --max-prompt=5 --data.long-prompts=refuse {m}", "--data.long-prompts refuse: 1 of 3"),
    ("--task={w}/good.jsonl --data.eval-task={w}/absent.jsonl {m}", "absent.jsonl"),
    ("--task={w}/broken.parquet {m}", "broken.parquet"), ("--task={w} {m}", "{w}"),
    ("--data.template=plain", "plain"), ("--data.filter=level>>3", "level>>3"),
    # where it writes
    ("--out={w}/list.yaml", "list.yaml"), ("--out={w}/list.yaml/run", "list.yaml"), ("--out={w}/thesis", "--overwrite"),
    ("--out={w}/thesis --overwrite", "log.jsonl"), ("--out=/proc/run", "/proc"),
    # going on
    ("--resume --out=", "--out"), ("--resume --out={w}/nowhere", "nowhere/log.jsonl"),
    ("--resume --out={w}/thesis", "thesis/log.jsonl"), ("--resume --out={w}/stub", "stub/log.jsonl"),
]


@pytest.fixture(scope="module")
def world(models, tmp_path_factory):
    w = tmp_path_factory.mktemp("world")
    for name, text in {"list.yaml": "- steps\n", "broken.yaml": "steps: [3\n", "unknown.yaml": "stepz: 3\n",
                       "empty.yaml": "", "nested.yaml": "eval: {tempature: 1}\n", "old.yaml": "eval_n: 3\n",
                       "switch.yaml": "overwrite: maybe\n", "off.yaml": "rock: {k: 3}\n",
                       "three.yaml": "steps: three\n", "nothing.py": "",
                       "data.py": "import extension\nclass Data(extension.Extension):\n    pass\n",
                       "null.yaml": "steps:\n", "empty.jsonl": "\n\n",
                       "malformed.jsonl": '{"prompt": "1"}\n\n{"prompt": "2"\n', "numbers.jsonl": '{"prompt": 7}\n',
                       "missing.jsonl": '{"prompt": "1"}\n{"answer": "2"}\n', "lists.jsonl": "[1]\n",
                       "good.jsonl": '{"prompt": "1+1="}\n{"prompt": "2+2="}\n{"prompt": "222+222="}\n',
                       "broken.parquet": "PAR1"}.items():
        (w / name).write_text(text)
    (w / "binary.jsonl").write_bytes(bytes(range(256)))
    for name in ("noconfig", "badconfig", "noweights", "pickle", "cut", "notokenizer", "otherwords"):
        shutil.copytree(models["student"], w / name)
    (w / "noconfig" / "config.json").unlink()
    (w / "badconfig" / "config.json").write_text('{"model_type": "qwen3", ')
    (w / "noweights" / "model.safetensors").unlink()
    (w / "pickle" / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(2)}, w / "pickle" / "pytorch_model.bin")
    data = (w / "cut" / "model.safetensors").read_bytes()
    (w / "cut" / "model.safetensors").write_bytes(data[:len(data) // 2])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (w / "notokenizer" / name).unlink()
    from data import toy
    tokenizer = toy.toy_tokenizer()
    tokenizer.add_tokens(["ten"])
    tokenizer.save_pretrained(w / "otherwords")
    (w / "thesis").mkdir()
    (w / "thesis" / "thesis.tex").write_text("mine")
    (w / "stub").mkdir()
    (w / "stub" / "log.jsonl").write_text('{"type": "ru')
    return w


def outcome(argv, capsys) -> tuple[int, str]:
    """Exit code, and what the command has written on stderr."""
    capsys.readouterr()
    try:
        code = asyncopd.main(["--gpus=0", "--engine=hf", *argv])
    except SystemExit as e:
        code = e.code
    return code, capsys.readouterr().err.strip()


def is_one_line(err: str) -> bool:
    return err.startswith("asyncopd: ") and len(err.splitlines()) == 1


def is_box(err: str) -> bool:
    """What tyro draws around a value that it cannot read; without a terminal its frame is missing."""
    return len(err.splitlines()) > 1 and "asyncopd.py --help" in err


def listing(folder) -> list[str]:
    return sorted(str(p) for p in folder.rglob("*"))


@pytest.mark.parametrize("flags, named", CASES)
def test_it_is_refused(flags, named, world, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asyncopd, "Controller", lambda *_: pytest.fail("the run was begun"))
    both = f"--student={models['student']} --teacher={models['teacher']}"
    own = "--estimator=none --extend=oprd"
    given = [word for flag in flags.split(" ") for word in flag.format(w=world, m=both, oprd=own).split(" ")]
    if "{m}" in flags or "good.jsonl" not in flags:
        given = ["--task=toy", *both.split(), *given]
    monkeypatch.setattr(sys, "dont_write_bytecode", True)      # beside the file of an extension
    before, shared = listing(world), shared_files()
    code, err = outcome(["--max-prompt=16", "--max-response=16", "--out=run", *given], capsys)
    assert code == 2 and (is_one_line(err) or is_box(err)), err
    assert named.format(w=world) in err, err
    assert is_box(err) or len(err) < 500, "a line that a person reads"
    assert listing(tmp_path) == [] and listing(world) == before and shared_files() <= shared


def shared_files() -> set[str]:
    """In shared memory, without the semaphores of multiprocessing: other tests make some at the same time."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def test_there_are_enough_of_them():
    assert len({flags for flags, _ in CASES}) >= 50


def refused(capsys, *flags) -> str:
    code, err = outcome(["--task=toy", *flags], capsys)
    assert code == 2 and is_one_line(err), err
    return err


def test_a_full_disk_and_too_little_shared_memory(models, tmp_path, monkeypatch, capsys):
    flags = (f"--student={models['student']}", f"--teacher={models['teacher']}", f"--out={tmp_path}/run",
             "--max-prompt=16", "--max-response=16")
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage(p) if "shm" in str(p) else SimpleNamespace(free=9_999))
    assert "GB for the student" in refused(capsys, *flags) and listing(tmp_path) == []
    saving = (*flags, "--save-every=1", "--steps=9", "--overwrite")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage(p) if "shm" in str(p) else SimpleNamespace(free=900_000))
    assert "and 3 checkpoints (--faults.keep), where 0.0 are free" in refused(capsys, *saving)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "old").write_bytes(b"." * 2_000_000)       # goes, or is one of those counted
    cfg = configure(["--gpus=0", "--task=toy", *saving])
    assert prepare(cfg) and "GB" not in str(cfg)
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=1_000 if "shm" in str(p) else 1e12))
    assert "on shm" in refused(capsys, *flags) and listing(tmp_path) == []


def test_a_run_cannot_go_on_from_damaged_checkpoints_or_as_another(models, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-4").mkdir(parents=True)
    (folder / "checkpoints" / "step-4" / "state.json").write_text("{")
    config = dict(task="toy", student=models["student"], teacher=models["teacher"], seed=3, gpus=0, engine="hf")
    from dataclasses import asdict
    cfg = configure([f"--{k}={v}" for k, v in config.items()])
    (folder / "log.jsonl").write_text(json.dumps({"type": "run", "config": asdict(cfg)}) + "\n")
    assert "step-4: state.json is damaged" in refused(capsys, "--resume", f"--out={folder}")
    with open(folder / "log.jsonl", "a") as f:             # resumed once, with more steps
        f.write('{"type": "step"}\n' + json.dumps({"type": "run", "config": asdict(cfg) | {"steps": 777}}) + "\n")
    assert configure(["--resume", f"--out={folder}"]).steps == 777
    for flag, value in (("seed", 4), ("batch", 3), ("student", models["tied"]), ("schedule", "sync")):
        assert f"--{flag} {value}: --resume cannot change" in refused(capsys, "--resume", f"--out={folder}",
                                                                      f"--{flag}={value}")
    assert "--kl forward: --resume cannot change" in refused(capsys, "--resume", f"--out={folder}", "--kl=forward")
    file = tmp_path / "again.yaml"                         # a file may say it too, and is held to the same
    file.write_text(f"resume: true\nout: {folder}\nseed: 4\n")
    assert "--seed 4: --resume cannot change" in refused(capsys, f"--config={file}")
    file.write_text(f"resume: true\nout: {folder}\nsteps: 888\n")
    cfg = configure([f"--config={file}"])
    assert (cfg.seed, cfg.steps, cfg.student) == (3, 888, models["student"])
    assert "absent.yaml" in refused(capsys, "--resume", f"--out={folder}", "--config=absent.yaml")


@pytest.mark.parametrize("how, same", [
    ([], True), (["--extend=effopd", "--effopd.gate=accuracy"], True), (["--extend=effopd"], False),
    (["--extend=rock"], False)])
def test_another_teacher_cannot_go_on_with_what_the_first_has_said(how, same, models, tmp_path, capsys):
    from dataclasses import asdict
    cfg = configure(["--gpus=0", "--engine=hf", "--task=toy", f"--student={models['student']}",
                                    f"--teacher={models['teacher']}", *how])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps({"type": "run", "config": asdict(cfg)}) + "\n")
    other = ["--resume", f"--out={tmp_path}/run", f"--teacher={models['tied']}"]
    if same:
        assert configure(other).teacher == models["tied"]
    else:
        assert f"--teacher {models['tied']}: --resume cannot change" in refused(capsys, *other)


def test_what_is_on_the_hub_is_fetched_before_a_worker_starts(models, monkeypatch):
    import huggingface_hub

    from control import preflight_models as job
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append(name))
    cfg = Config(student=models["student"], teacher="org/large")
    job.fetch(cfg)
    assert asked == ["org/large"]

    def offline(*_, **__):
        raise OSError("no network\nat all")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"^--teacher org/large: could not be downloaded \(OSError: no network\)$"):
        job.fetch(cfg)


def test_the_command_itself_says_so_too(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "asyncopd.py"), "--gpus=0", "--stepz=3"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr == "asyncopd: --stepz: no such flag (did you mean --steps?)\n"
    assert listing(tmp_path) == []


@pytest.mark.parametrize("rows", [40, 20])
def test_a_tokenizer_with_more_words_than_the_head_has_rows(rows, models, tmp_path, capsys):
    """Rows beyond the words are padding and allowed; words beyond the rows are not."""
    from data import toy
    folder = tmp_path / "teacher"
    save_tiny(folder, seed=3)
    tokenizer = toy.toy_tokenizer()
    toy.small_model(tokenizer, layers=1, hidden=64, seed=3, vocab=rows).save_pretrained(folder)
    more = toy.toy_tokenizer()
    more.add_tokens([f"w{i}" for i in range(25 - len(more))])
    student = tmp_path / "student"
    shutil.copytree(models["student"], student)
    for f in (folder, student):
        more.save_pretrained(f)
    flags = (f"--student={student}", f"--teacher={folder}", "--max-prompt=16", "--max-response=16",
             f"--out={tmp_path}/run", "--data.long-prompts=refuse", "--max-prompt=1")
    err = refused(capsys, *flags)
    assert ("its head has 20 rows for 25 words" in err) == (rows == 20), err
