"""Two learners (gloo, two processes) are one: the same gradients, the same weights, the same numbers in the log."""
import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from cache import Segment
from learner import Learner, Trained
from models.loading import load_model
from models.sharding import Ranks
from tests.conftest import save_tiny
from tests.runs import in_two
from tests.test_supports import config, filled
from tests.test_supports import models as folders  # noqa: F401
from transport.weights import Weights

CASES = {"untied, two minibatches": ("reverse_mc", dict(minibatches=2, micro_tokens=20)),
         "what a whole batch knows": ("m2po", dict(minibatches=2, micro_tokens=20)),
         "all words, a segment at a time": ("forward_dense", dict(micro_tokens=1)),
         "embedding and head are one": ("forward_topk", dict(micro_tokens=20)),
         "layers computed again, clipped": ("reverse_mc", dict(gradient_checkpointing=True, clip=1e-3))}


def train(cfg, segments, folder, ranks) -> dict:
    """The gradient, two steps, a publish, a checkpoint, and a step more from the checkpoint."""
    learner = Learner(cfg, "cpu", torch.float32, ranks=ranks)
    layout = {name: p.shape for name, p in learner.student.model.named_parameters()}
    learner.batch_context = learner.prepass(segments)
    for group in ranks.groups(segments, cfg.micro_tokens):
        learner.backward(group, sum(map(len, segments)))
    gradient = ranks.collect((name, p.grad) for name, p in learner.student.model.named_parameters())
    learner.optimizer.zero_grad()
    metrics = [unskipped(learner.step(segments, 2)) for _ in range(2)]
    weights = Weights(layout, [3, 4, 5, 6], torch.float32)
    learner.publish(weights, 2)
    learner.checkpoint(folder)
    learner.save(folder / "student")
    resumed = Learner(cfg, "cpu", torch.float32, str(folder), ranks)
    metrics.append(unskipped(resumed.step(segments, 2)))              # goes on from the moments of the optimizer
    return dict(gradient=gradient, metrics=metrics, weights=weights.flat[0].clone(), updates=resumed.updates,
                probe=weights.probe_logp[0].clone())


def unskipped(trained: Trained) -> dict:
    """The metrics of a step in which nothing went wrong."""
    assert trained.skipped == trained.events == [] and not trained.flush
    return trained.metrics


def one_of_two(rank, work, root):
    torch.set_num_threads(1)
    ranks = Ranks(rank, 2, str(root / "meeting"))
    ports = [line.split()[1] for table in ("tcp", "tcp6") for line in open(f"/proc/net/{table}").readlines()[1:]
             if line.split()[3] == "0A" and line.split()[9] in sockets()]
    torch.save({name: train(cfg, segments, root / "two" / name, ranks) for name, (cfg, segments) in work.items()}
               | {"ports": ports}, root / f"{rank}.pt")
    cfg, segments = next(iter(work.values()))
    torch.save(half_gradient(cfg, segments, ranks), root / f"half{rank}.pt")
    ranks.leave()


def in_a_hurry(rank, meeting):
    """The end right behind a collective, with gloo's threads so far behind that they still hold its tensors."""
    ranks = Ranks(rank, 2, meeting)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    cores = sorted(os.sched_getaffinity(0))
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, {cores[rank % len(cores)]})
        if thread != os.getpid():
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    for _ in range(5):
        ranks.gather(DTensor.from_local(torch.ones(3), mesh, [Shard(0)]))
    ranks.leave()


def test_a_learner_among_several_leaves_in_peace(tmp_path):
    """What gloo's threads still hold does not abort the process."""
    for i in range(3):
        in_two(in_a_hurry, str(tmp_path / f"{i}"))


def half_gradient(cfg, segments, ranks) -> dict:
    """The gradient in bf16, as on a GPU."""
    learner = Learner(cfg, "cpu", torch.bfloat16, ranks=ranks)
    for group in ranks.groups(segments, cfg.micro_tokens):
        learner.backward(group, sum(map(len, segments)))
    return ranks.collect((name, p.grad) for name, p in learner.student.model.named_parameters())


def sockets() -> set[str]:
    """Inodes of this process's sockets."""
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if
             os.path.islink(f"/proc/self/fd/{fd}")]
    return {link[8:-1] for link in links if link.startswith("socket:")}


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):       # noqa: F811
    """case -> (by one learner, by learner 0 of two, by learner 1); and the folder with what they saved."""
    root, work = tmp_path_factory.mktemp("shards"), {}
    for name, (estimator, flags) in CASES.items():
        cfg = config(folders, estimator, lr=5e-3, learners=2, **flags)
        _, segments = filled(cfg, folders, responses=5)
        if "are one" in name:
            cfg = dataclasses.replace(cfg, student=save_tiny(root / "tied", seed=4, tied=True))
        work[name] = cfg, segments
        for learners in ("one", "two"):
            (root / learners / name).mkdir(parents=True)
    in_two(one_of_two, work, root)
    both = [torch.load(root / f"{rank}.pt") for rank in (0, 1)]
    one = {name: train(cfg, segments, root / "one" / name, Ranks()) for name, (cfg, segments) in work.items()}
    half = half_gradient(*next(iter(work.values())), Ranks()), torch.load(root / "half0.pt")
    return {name: (one[name], both[0][name], both[1][name]) for name in CASES}, root, both[0]["ports"], half


@pytest.mark.parametrize("name", CASES)
def test_two_learners_have_the_gradient_of_one(trained, name):
    one, two, other = trained[0][name]
    assert one["gradient"].keys() == two["gradient"].keys() and not other["gradient"], "learner 0 collects"
    for key, g in one["gradient"].items():
        assert (two["gradient"][key] - g).norm() <= 1e-5 * g.norm(), key


def assert_trained_alike(x, y):
    """Weights after some updates, up to rounding. AdamW divides the gradient of an element by its own size: where that
    is near 0, the rounding is as large as it is. So one element in a thousand may differ by more, of a step of 5e-3."""
    apart = (x - y).abs()
    assert (apart > 1e-5).float().mean() <= 1e-3 and apart.max() <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_two_learners_train_publish_and_log_as_one(trained, name):
    one, two, other = trained[0][name]
    assert_trained_alike(two["weights"], one["weights"])
    torch.testing.assert_close(two["probe"], one["probe"], rtol=0, atol=1e-4)
    assert not other["weights"].any(), "learner 0 alone publishes"
    for a, b, c in zip(one["metrics"], two["metrics"], other["metrics"]):
        assert b == c, "all of them know the same"
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_two_learners_save_is_whole_and_goes_on_as_from_one(trained, name):
    (one, two, _), root = trained[0][name], trained[1]
    assert two["updates"] == one["updates"] == 3 * CASES[name][1].get("minibatches", 1)
    a, b = (load_model(str(root / x / name / "student"), "cpu", torch.float32) for x in ("one", "two"))
    assert a.config.architectures == b.config.architectures == ["Qwen3ForCausalLM"]
    for x, y in zip(a.parameters(), b.parameters()):
        assert_trained_alike(x, y)


def test_in_bf16_two_learners_differ_from_one_by_rounding_and_add_up_in_float32(trained):
    one, two = trained[3]
    for name, g in one.items():
        assert two[name].dtype == torch.float32 and (two[name] - g).norm() < 0.005 * g.norm(), name
    assert any(not two[name].equal(g) for name, g in one.items()), "these are sums in another order"


def test_learners_listen_on_loopback_alone(trained):
    addresses = {port.split(":")[0] for port in trained[2]}
    assert addresses and addresses <= {"0100007F", "00000000000000000000000001000000"}, addresses


def test_shares_are_alike_and_everyone_has_as_many_micro_batches():
    lengths = [9, 1, 4, 4, 30, 2, 8]
    segments = [Segment(slot=i, tokens=torch.zeros(n + 1), prompt=1, start=1, version=torch.zeros(n),
                        ids=torch.zeros(n, 1), logpi=torch.zeros(n, 1), logmu=torch.zeros(n), logq=torch.zeros(n, 1))
                for i, n in enumerate(lengths)]
    mine = []
    for rank in range(3):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, 3
        mine.append(ranks.groups(segments, 10))
    assert len({len(groups) for groups in mine}) == 1
    seen = [s.slot for groups in mine for group in groups for s in group if len(s)]
    assert sorted(seen) == list(range(7)), "every segment once"
    assert all(len(s.tokens) == 1 for groups in mine for group in groups for s in group if not len(s))
