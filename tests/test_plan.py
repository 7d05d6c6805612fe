"""Who runs where, what it takes, and that what cannot fit is refused before anything is loaded."""
import sys
from dataclasses import replace

import pytest
import torch

from config import Config, Eval, most_running
from control import plan, preflight_memory
from control.plan import check, memory, split
from extension import SlotTensor
from models import footprint
from models.footprint import Shape, chunk_size, gpu_share
from models.sharding import compute_in, recompute
from tests.conftest import ROOT
from tests.runs import complete

QWEN = dict(P=4_022_468_096, V=151_936, L=36, H=2560, I=9728, A=4096, K=1024)      # Qwen3-4B


def config(gpus, **more):
    rollouts, teachers, learners = split(gpus, 0, 0, 0)
    return Config(**dict(gpus=gpus, rollouts=rollouts, teachers=teachers, learners=learners, estimator="reverse_mc",
                         engine="vllm") | more)


def test_eight_gpus_are_split_as_in_the_paper_and_what_is_said_stays():
    assert split(8, 0, 0, 0) == (4, 1, 3)
    assert split(8, 0, 2, 4) == (2, 2, 4) and split(8, 5, 0, 0) == (5, 1, 2) and split(0, 2, 0, 2) == (2, 1, 2)
    assert all(sum(split(g, 0, 0, 0)) == g for g in range(3, 33)), "no GPU is left over"


def test_every_worker_has_a_device_of_its_own_where_there_are_enough():
    where = {w.name: w.device for w in plan.plan(config(8))}
    assert " ".join(where) == "rollout0 rollout1 rollout2 rollout3 teacher0 learner learner1 learner2"
    assert list(where.values()) == [f"cuda:{i}" for i in range(8)]
    assert {w.device for w in plan.plan(config(1))} == {"cuda:0"} and "paper" in plan.why(config(8))


def test_vllm_starts_first_and_by_itself_on_a_gpu_that_it_shares_and_takes_less_of_it():
    def order(cfg):
        return [[p.name for p in wave] for wave in plan.waves(cfg, plan.plan(cfg))]
    one = config(1)
    assert order(one) == [["rollout0"], ["teacher0", "learner"]]
    assert order(replace(one, teacher_engine="vllm")) == [["rollout0"], ["teacher0"], ["learner"]]
    assert order(replace(one, engine="hf")) == [["rollout0", "teacher0", "learner"]]
    assert order(replace(config(0), teacher_engine="vllm")) == [["rollout0", "teacher0", "learner"]], "on a CPU"
    two = replace(config(2), teacher_engine="vllm")              # rollouts have a GPU of their own
    assert order(two) == [["teacher0"], ["rollout0", "learner"]]
    assert len(order(config(8))) == 1
    shares = {gpus: [gpu_share(config(gpus), role) for role in ("rollout", "teacher")] for gpus in (1, 2, 3, 8)}
    assert shares == {1: [0.3, 0.3], 2: [0.85, 0.3], 3: [0.85, 0.85], 8: [0.85, 0.85]}


def test_what_is_published_twice_lies_on_the_first_learners_gpu_with_nccl():
    shape = Shape(**QWEN)
    by_worker = {transport: {n.worker: n.parts.get("weights", 0) for n in memory(cfg, shape, shape)}
                 for transport in ("shared", "nccl") for cfg in [config(8, transport=transport)]}
    more = {worker: by_worker["nccl"][worker] - gb for worker, gb in by_worker["shared"].items()}
    twice = 2 * 2 * shape.P / 1e9
    assert more["learner"] == pytest.approx(twice) == -more["shared"] and more["learner1"] == more["teacher0"] == 0
    assert more["rollout3"] == pytest.approx(2 * 2 * shape.V * shape.H / 1e9), "two parcels with the embedding"


def test_a_learner_holds_16_bytes_per_parameter_and_shares_them_out():
    shape = Shape(**QWEN)
    for learners in (1, 3):
        need = next(n for n in memory(config(8, learners=learners), shape, shape) if n.worker == "learner").parts
        compute = need["weights"] - 4 * shape.P / learners / 1e9
        assert need["gradients"] + need["optimizer"] == pytest.approx(12 * shape.P / learners / 1e9)
        assert compute <= 2.1 * shape.P / 1e9, "one bf16 copy at most"


def test_a_learner_reads_no_more_at_once_than_an_optimizer_batch_and_a_teacher_the_whole():
    shape = Shape(**QWEN)
    small = dict(batch=8, max_prompt=10, max_response=90, micro_tokens=10_000)
    one, four = ({n.worker: n.parts["activations"] for n in memory(config(8, **small, minibatches=m), shape, shape)
                  if "activations" in n.parts} for m in (1, 4))
    assert four["learner"] == pytest.approx(one["learner"] / 4) and four["teacher0"] == one["teacher0"]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_the_bytes_a_layer_keeps_are_those_that_autograd_keeps(half, again):
    """Counted on the real model: every tensor saved for the backward pass, parameters and their bf16 copies aside."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    B, T, kept = 2, 50, {}          # 50 and 100 are the width of no matrix

    def saved(layers):
        c = Qwen3Config(vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
                        num_attention_heads=4, num_key_value_heads=2, head_dim=32)
        model = Qwen3ForCausalLM(c).eval()
        if again:
            recompute(model)
        if half:
            compute_in(model, torch.bfloat16)
        kept.clear()

        def pack(x):
            if not any(x.shape[-2:] in (p.shape, p.shape[::-1]) for p in model.parameters() if p.dim() == 2):
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x        # held, so not reused
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), \
                torch.autocast("cpu", torch.bfloat16, enabled=half):
            model.base_model(input_ids=torch.zeros(B, T, dtype=torch.long), use_cache=False)
        return sum(size for size, _ in kept.values()) / (B * T), Shape.of(c)
    (one, a), (two, b) = saved(1), saved(3)
    assert (two - one) / 2 == pytest.approx((b.activations(half, again) - a.activations(half, again)) / 2, rel=0.03)


@pytest.mark.parametrize("rollouts, max_running, most", [(1, 320, 192), (1, 64, 64), (2, 320, 96), (5, 320, 39),
                                                         (0, 320, 320)])
def test_as_many_responses_run_as_there_are_slots_for(rollouts, max_running, most):
    cfg = Config(rollouts=rollouts, max_running=max_running, max_ahead=2, batch=64)
    assert most_running(cfg) == most, "without a rollout worker an engine is used alone, and needs no slots"


def test_the_chunk_is_bounded_by_what_is_free():
    cfg = config(0)
    assert chunk_size(cfg, 151_936) * 151_936 * 4 <= 1e9 * footprint.CHUNK_GB["cpu"]
    on_gpu = chunk_size(config(8), 151_936) * 151_936 * 6
    assert 4 * 1e9 * footprint.CHUNK_GB["cpu"] < on_gpu <= 1e9 * footprint.CHUNK_GB["gpu"]
    assert chunk_size(cfg, 151_936, free_gb=0.8) * 151_936 * 4 <= 1e8 and chunk_size(cfg, 151_936, free_gb=0) == 16
    assert chunk_size(replace(cfg, estimator="reverse_dense"), 151_936) < chunk_size(cfg, 151_936) / 5


def test_what_cannot_fit_is_refused_with_the_part_and_the_remedy():
    shape = Shape(**QWEN)
    with pytest.raises(ValueError, match=r"learner: 193.1 GB on cuda:5, where 80.0 are free.*activations.*--gradient"):
        check(memory(config(8, learners=1), shape, shape, 80), {"cuda:5": 80.0})
    needs = memory(config(8, gradient_checkpointing=True), shape, shape, 80)
    check(needs, {f"cuda:{i}": 80.0 for i in range(8)})
    with pytest.raises(ValueError, match=r"loading, shared: 7\d.* GB on cpu.*loading's weights, 56.3 GB"):
        check(needs, {"cpu": 64.0})


def test_who_reads_the_teacher_and_what_its_answers_take():
    shape = Shape(**QWEN)

    def needs(**more):
        return {n.worker: n.parts for n in memory(config(8, **more), shape, shape, 80)}
    one, dense = (needs(estimator=e)["loading"]["weights"] for e in ("reverse_mc", "reverse_dense"))
    cfg = config(8)
    assert dense - one == pytest.approx(cfg.learners * 2 * shape.P / 1e9), "each learner, for its head"
    assert "cache" not in needs()["teacher0"]
    answers = needs(eval=Eval(teacher=True))["teacher0"]["cache"] * 1e9
    assert answers == (cfg.max_prompt + cfg.max_response) * shape.cached(2)


def test_what_extensions_add_is_counted_where_it_lies():
    shape = Shape(**QWEN)
    cfg = config(8)
    added = plan.Additions(slot_tensors={"states": SlotTensor((100, 6), torch.bfloat16)}, states=True,
                           gb={"host": 2.0, "learner": 3.0, "checkpoint": 5.0})
    before = {n.worker: n for n in memory(cfg, shape, shape, 80)}
    after = {n.worker: n for n in memory(cfg, shape, shape, 80, added)}
    slots = (cfg.max_ahead + 1) * cfg.batch
    grown = after["shared"].parts["cache"] - before["shared"].parts["cache"]
    assert grown * 1e9 == pytest.approx(slots * 100 * 6 * 2)
    assert after["extensions"].device == "cpu" and after["extensions"].gb == 2.0
    assert after["learner1"].parts["extensions"] == 3.0 and "extensions" not in before
    tokens = cfg.max_prompt + cfg.max_response

    def activations(needs: dict, worker: str) -> float:
        return needs[worker].parts["activations"] * 1e9
    assert activations(after, "learner") - activations(before, "learner") == pytest.approx(tokens * 4 * 6)
    assert activations(after, "teacher0") - activations(before, "teacher0") == pytest.approx(
        tokens * 2 * shape.L * shape.H)
    assert "extensions" in plan.rows(list(after.values()), {})[0]
    assert "extensions" not in plan.rows(list(before.values()), {})[0]
    assert plan.row_bytes(added.slot_tensors) == {"states": 12}


def test_a_checkpoint_has_room_for_what_extensions_save(tmp_path, monkeypatch):
    cfg = config(0, out=str(tmp_path), save_every=1, steps=4)
    shape = Shape(**QWEN | dict(P=10 ** 6))
    monkeypatch.setattr(preflight_memory, "free_bytes", lambda cfg: 4 * 10 ** 6 * (1 + 3 * 3) + 10 ** 9)
    preflight_memory.check_disk(cfg, shape, plan.Additions())
    preflight_memory.check_disk(cfg, shape, plan.Additions(gb={"checkpoint": 0.3}))
    with pytest.raises(ValueError, match="and 3 checkpoints .--faults.keep., where 1.0 are free"):
        preflight_memory.check_disk(cfg, shape, plan.Additions(gb={"checkpoint": 0.4}))


def test_a_plan_that_does_not_fit_ends_before_anything_is_loaded(models, tmp_path):
    done = complete([sys.executable, str(ROOT / "asyncopd.py"), "--gpus=0", "--task=toy", "--batch=100000000",
                     "--max-prompt=16", "--max-response=32", f"--student={models['student']}", "--out=run",
                     f"--teacher={models['teacher']}"], cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "GB" in done.stderr and "--batch" in done.stderr and list(tmp_path.iterdir()) == []
