"""The whole pipeline on models of Qwen3's shape and vocabulary, tiny otherwise, and on GSM8K: vLLM generates."""
import json
from pathlib import Path

import pytest
import torch

from data import toy
from tests.conftest import ROOT
from tests.runs import lines, run, steps

DATA = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
ROWS = 151_936                     # of the heads, as in Qwen3; the tokenizer knows 2,048 words


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> dict[str, str]:
    """A student with tied embeddings and a teacher without, and 200 of GSM8K's problems."""
    pytest.importorskip("vllm")
    if not DATA.exists():
        pytest.skip(f"{DATA} is not here")
    from benchmarks.gsm8k_lm import bpe_tokenizer, problems
    root, rows = tmp_path_factory.mktemp("qwen3"), problems(DATA)
    tokenizer = bpe_tokenizer([text for r in rows for text in r.values()], 2048)
    for name, how in dict(student=dict(layers=2, tied=True, seed=0), teacher=dict(layers=3, seed=1)).items():
        model = toy.small_model(tokenizer, hidden=64, vocab=ROWS, **how)
        model.get_output_embeddings().weight.data *= 8           # random heads are close to uniform
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "problems.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:200]))
    return {name: str(root / name) for name in ("student", "teacher", "problems.jsonl")}


def test_five_steps_on_gsm8k_graded_saved_and_loaded_again(qwen3, tmp_path):
    flags = dict(gpus=0, student=qwen3["student"], teacher=qwen3["teacher"], task=qwen3["problems.jsonl"],
                 data__prompt_key="question", data__answer_key="answer", engine="vllm", steps=5, batch=8,
                 max_prompt=300, max_response=24, max_ahead=1, max_running=16, lr=1e-3, eval__n=8,
                 out=str(tmp_path / "run"))
    done = run(flags, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [s["step"] for s in steps(flags)] == [1, 2, 3, 4, 5]
    assert all(s["engine_gap_max"] <= 1e-4 and s["kl"] > 0 for s in steps(flags))
    graded = {e["step"]: e for e in lines(flags) if e["type"] == "eval"}
    assert graded.keys() == {0, 5} and all(e["n"] == 8 and 0 <= e["accuracy"] <= 1 for e in graded.values())
    loaded_again_by_both(f"{flags['out']}/student", qwen3["student"])


def loaded_again_by_both(folder: str, before: str) -> None:
    """What was saved gives the same log-probs in transformers and in vLLM, and others than before the run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from config import Config
    from engines.table import engine_class
    from models.head import sequence_logp
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "What is 12 + 30?"}], tokenize=False,
                                         add_generation_prompt=True)
    tokens = tokenizer(text + "It is 42.\n#### 42")["input_ids"] + [2047, 100_000, ROWS - 1]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text == \
        "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    with torch.no_grad():
        saved, old = (sequence_logp(AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32), tokens)
                      for f in (folder, before))
    cfg = Config(estimator="reverse_mc", student=folder, teacher=folder, max_prompt=64, max_response=8,
                 max_running=4)
    engine = engine_class("vllm")(cfg, "cpu", torch.float32)
    torch.testing.assert_close(engine.logp(tokens), saved, rtol=0, atol=1e-4)
    assert (saved - old).abs().max() > 1e-2 and (Path(folder) / "model.safetensors").exists()
