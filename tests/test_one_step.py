"""The lecture is the algorithm: examples/one_step.py ends with the weights of a synchronous run, to the bit."""
import re

import pytest
import torch

from config import Config
from examples.one_step import main
from models.loading import load_model
from tests.runs import run


@pytest.mark.parametrize("seed", [0, 7])
def test_it_equals_one_step_of_a_synchronous_run_to_the_bit(models, tmp_path, capsys, seed):
    common = dict(student=models["student"], teacher=models["teacher"], batch=12, mc_samples=4, lr=1e-3, seed=seed,
                  max_prompt=8, max_response=20, max_running=12)
    done = run(common | dict(task="toy", gpus=0, engine="hf", schedule="sync", steps=1, out=str(tmp_path / "run")))
    assert done.returncode == 0, done.stderr
    before = load_model(models["student"], "cpu", torch.float32)
    after = load_model(str(tmp_path / "run" / "student"), "cpu", torch.float32)
    threads = torch.get_num_threads()
    ours = main(Config(estimator="reverse_mc", draws="optimal", **common))
    torch.set_num_threads(threads)               # for the other tests
    for name, p in after.named_parameters():
        assert torch.equal(p, ours[name]), name
    assert any(not torch.equal(p, ours[name]) for name, p in before.named_parameters()), "it has learnt"
    said = capsys.readouterr().out
    assert re.search(r"KL\(p \|\| q\) \d+\.\d+ nats per token", said)
