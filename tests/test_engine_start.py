"""An engine that cannot work ends the run at once, with the remedy: before the start where that is known, else at its
first token."""
import ast
import importlib.util
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

import rollout
from cache import Slots
from control.preflight import prepare
from control.preflight_models import check_head_size
from data import toy
from engines.table import CPU_HEAD_SIZES
from transport.link import Incurable
from transport.shared import SharedMemory
from transport.weights import Weights

UNSUPPORTED = "Unsupported CPU attention configuration: head_dim=8\nand 40 lines more"


class Engine:
    """Works until the `first` of its methods, or its step number `first`."""

    def __init__(self, first):
        self.first, self.steps = first, 0
        if first == "start":
            raise RuntimeError(UNSUPPORTED)

    def load(self, tensors, version):
        pass

    def checksums(self, layout, version):
        return []

    def logp(self, tokens):
        if self.first == "push":
            raise RuntimeError(UNSUPPORTED)
        return torch.zeros(len(tokens) - 1)

    def add(self, *_, **__):
        pass

    def take(self, keys):
        return {}

    def step(self):
        self.steps += 1
        if self.steps == self.first:
            raise RuntimeError(UNSUPPORTED)
        return []


def run_worker(config, monkeypatch, engine: str, first) -> list:
    """What a rollout worker reports before its engine fails."""
    monkeypatch.setattr(rollout, "engine_class", lambda name: lambda *_: Engine(first))
    weights = Weights({"w": torch.Size([2])}, [3, 4, 5], torch.float32)
    weights.publish({"w": torch.zeros(2)}, 0, torch.zeros(2))
    slots = Slots(1, 16, 12, 4)
    reports, orders = [], [[("take", [(None, 0)])]]
    link = SimpleNamespace(send=lambda kind, **_: reports.append(kind), span=lambda what: nullcontext(),
                           orders=lambda wait: orders.pop() if orders else [])
    cfg = config()
    object.__setattr__(cfg, "engine", engine)
    try:
        rollout.rollout_worker(cfg, link, SharedMemory(slots, weights), "cpu", torch.float32)
    finally:
        assert (reports == []) == (first == "start")
    return reports


@pytest.mark.parametrize("first", ["push", 1])
def test_a_failure_before_the_first_token_is_incurable_and_names_the_remedy(config, monkeypatch, first):
    with pytest.raises(Incurable) as e:
        run_worker(config, monkeypatch, "vllm", first)
    assert str(e.value) == ("--engine vllm has failed before its first token: RuntimeError: Unsupported CPU attention "
                            "configuration: head_dim=8 (--engine hf runs without it)")
    with pytest.raises(Incurable) as e:
        run_worker(config, monkeypatch, "hf", first)
    assert str(e.value).endswith("head_dim=8"), "there is no other engine"


def test_an_engine_that_does_not_start_names_the_remedy_too(config, monkeypatch):
    with pytest.raises(RuntimeError, match=r"--engine vllm has not started: .*head_dim=8 \(--engine hf"):
        run_worker(config, monkeypatch, "vllm", "start")


def test_a_later_failure_may_be_cured_by_a_restart(config, monkeypatch):
    with pytest.raises(RuntimeError, match="^Unsupported") as e:
        run_worker(config, monkeypatch, "vllm", 2)
    assert not isinstance(e.value, Incurable)


# -- before the start ------------------------------------------------------------------------------

def narrow(models, folder, width: int) -> str:
    """The tiny student with attention heads of this width. Only its configuration counts here."""
    tokenizer = toy.toy_tokenizer()
    model = toy.small_model(tokenizer, layers=1, hidden=64, seed=0)
    config = AutoConfig.from_pretrained(models["student"], head_dim=width)
    type(model)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("role, flag", [("student", "engine"), ("teacher", "teacher_engine")])
def test_heads_of_a_width_that_vllm_does_not_know_on_a_cpu_are_refused(role, flag, config, models, tmp_path):
    pytest.importorskip("vllm")
    name = narrow(models, tmp_path / "narrow", 8)
    spelt = flag.replace("_", "-")
    with pytest.raises(ValueError, match=rf"^--{spelt} vllm: .* 32, 64, .* --{role} \S+ are 8 wide \(--{spelt} hf\)$"):
        check_head_size(config(**{flag: "vllm", role: name}))
    check_head_size(config(**{role: name}))


def test_that_is_checked_before_the_start(config, models, tmp_path):
    pytest.importorskip("vllm")
    with pytest.raises(ValueError, match="are 8 wide"):
        prepare(config(engine="vllm", student=narrow(models, tmp_path / "narrow", 8)))


def test_the_widths_are_those_of_the_installed_vllm():
    found = importlib.util.find_spec("vllm")
    if found is None:
        pytest.skip("vLLM is not installed")
    file = Path(found.submodule_search_locations[0]) / "v1" / "attention" / "backends" / "cpu_attn.py"
    method = next(node for node in ast.walk(ast.parse(file.read_text()))
                  if isinstance(node, ast.FunctionDef) and node.name == "get_supported_head_sizes")
    assert tuple(ast.literal_eval(method.body[-1].value)) == CPU_HEAD_SIZES
