"""The draw, and both engines: what they record is what they sampled, before and after a push and over a cut."""
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cache import Slots
from draws import BLOCK, DESIGNS, draw_iid, draw_optimal, shaped
from engines.hf import HFEngine
from engines.table import engine_class
from engines.uniforms import TRAINING, uniforms
from models.head import sequence_logp
from models.loading import load_model
from rollout import Worker
from tests.conftest import save_tiny
from tests.test_draws import expected_copies
from transport.link import Incurable
from transport.shared import SharedMemory
from transport.weights import Weights

# -- the draw --------------------------------------------------------------------------------------

def draw(logits, u):
    """Independent draws by the numbers u [R, n]: ids and their log-probs."""
    chosen = draw_iid(logits, u, u.shape[1])
    return chosen.ids, chosen.logpi - math.log(u.shape[1])


@pytest.mark.parametrize("V", [3, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
def test_a_draw_inverts_the_cumulative_distribution(V):
    g = torch.Generator().manual_seed(V)
    logits = torch.randn(4, V, generator=g) * 4
    u = torch.rand(4, 50, generator=g, dtype=torch.float64)
    ids, logp = draw(logits, u)
    edge = logits.double().softmax(-1).cumsum(-1)
    want = torch.searchsorted(edge, u * edge[:, -1:], right=True)
    # a draw within rounding of an edge may fall on either side of it
    distance = torch.minimum((edge.gather(1, ids) - u).abs(), (edge.gather(1, want) - u).abs())
    assert ((ids == want) | (distance < 1e-6)).all()
    torch.testing.assert_close(logp, logits.log_softmax(-1).gather(1, ids), rtol=0, atol=1e-5)


def chi_square(ids, p):
    """How far ids are from p [V], in standard deviations of chi-square; words too rare for a cell share one."""
    count, expected = torch.bincount(ids.flatten(), minlength=len(p)).double(), ids.numel() * p.double()
    big = expected >= 5
    assert 0 < (~big).sum() < len(p), "there are words too rare for a cell of their own"
    count, expected = (torch.cat([x[big], x[~big].sum()[None]]) for x in (count, expected))
    dof = len(count) - 1
    return (((count - expected) ** 2 / expected).sum().item() - dof) / (2 * dof) ** 0.5


def test_draws_follow_the_softmax_tail_words_included():
    """400,000 draws over 2,000 words whose probabilities span six orders of magnitude."""
    V, n = 2000, 400_000
    logits = torch.linspace(0, -14, V)[torch.randperm(V, generator=torch.Generator().manual_seed(0))]
    u = torch.from_numpy(np.random.default_rng(1).random((100, n // 100)))
    ids, _ = draw(logits.expand(100, V), u)
    assert abs(chi_square(ids, logits.softmax(-1))) < 5


def test_a_block_rounded_up_gives_nothing_to_its_last_word():
    """Blocks are summed in float32: half an ulp too much, 3e-8, is far more than the rare words of a block have."""
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        logits = torch.full((1, BLOCK), -30.0)
        logits[0, :40] = torch.randn(40, generator=g)
        u = 1 - torch.arange(1, 101, dtype=torch.float64)[None] * 1e-9
        assert (draw(logits, u)[0] < 40).all()


def test_words_of_probability_zero_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    u = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1 - 2.0 ** -53]], dtype=torch.float64)
    assert draw(logits, u)[0].tolist() == [[1, 1, 3, 3, 3]]


def test_the_logprob_is_that_of_the_distribution_really_sampled():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    u = torch.rand(1, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, logp = draw(shaped(logits, top_p=0.7), u)
    assert set(ids.flatten().tolist()) == {0, 1}
    torch.testing.assert_close(logp.exp(), torch.where(ids == 0, 0.5 / 0.8, 0.3 / 0.8))
    ids, logp = draw(shaped(logits, temperature=2.0), u)
    torch.testing.assert_close(logp, (logits / 2).log_softmax(-1).gather(1, ids))
    assert shaped(logits, top_p=0.5).isfinite().sum() == 1, "the smallest set that reaches top_p"


# -- the engines -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Both engines on one student, made once: vLLM takes a while to start."""
    from control.resolve import configure
    root = tmp_path_factory.mktemp("engines")
    student = save_tiny(root / "student", seed=3, layers=2)
    cfg = configure(["--task=toy", f"--student={student}", f"--teacher={student}", "--gpus=0", "--max-prompt=16",
                           "--max-response=24", "--max-running=16", "--mc-samples=3", "--inflight=keep"])
    made = {"hf": HFEngine(cfg, "cpu", torch.float32)}
    if cfg.engine == "vllm":
        made["vllm"] = engine_class("vllm")(cfg, "cpu", torch.float32)
    return student, made


@pytest.fixture(params=["hf", "vllm"])
def engine(request, engines):
    if request.param not in engines[1]:
        pytest.skip("vLLM is not installed")
    made = engines[1][request.param]
    made.load(parameters(engines[0]), 0)
    yield made
    made.take(list(getattr(made, "names", [])) or [r.key for r in getattr(made, "rows", [])])


def parameters(folder, scale=1.0):
    return {n: p.detach() * scale for n, p in load_model(folder, "cpu", torch.float32).named_parameters()}


def test_vllm_compiles_nothing_on_a_cpu(engines):
    """It would, at the first probe, while the run waits."""
    if "vllm" not in engines[1]:
        pytest.skip("vLLM is not installed")
    compiled = []
    increased = torch.compile(lambda x: x + 1, backend=lambda graph, inputs: compiled.append(graph) or graph)
    assert increased(torch.ones(1)) == 2 and not compiled


PROMPTS = [[3, 4, 13, 5, 14], [9, 9, 13, 3, 4, 14], [5, 14]]


def run(engine, prompts=PROMPTS, budget=24, steps=10_000):
    for key, prompt in enumerate(prompts):
        engine.add(key, prompt, budget, uid=key, position=0)
    out = {}
    for _ in range(steps):
        out |= engine.take(engine.step())          # what is finished leaves at once, as in the worker
        if len(out) == len(prompts):
            break
    return out | engine.take([key for key in range(len(prompts)) if key not in out])


def check(model, prompt, tokens, ids, logpi, logmu, _):
    """What is recorded is what the design says of `model` at its position, whatever else was in the batch."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens.tolist()])).logits[0]
    want = logits[len(prompt) - 1:len(prompt) - 1 + len(tokens)].log_softmax(-1)
    torch.testing.assert_close(logmu, want.gather(-1, tokens[:, None])[:, 0], rtol=0, atol=1e-4)
    pi = torch.stack([expected_copies(x.double().exp(), ids.shape[1], "optimal") for x in want])
    torch.testing.assert_close(logpi, pi.log().gather(-1, ids).float(), rtol=0, atol=2e-4)


def test_recorded_logprobs_are_the_models(engine, engines):
    model = load_model(engines[0], "cpu", torch.float32)
    for key, drawn in run(engine).items():
        tokens, ids, logpi, *_ = drawn
        assert ids.shape == logpi.shape == (len(tokens), 3) and torch.equal(ids[:, 0], tokens) and len(tokens) > 0
        assert (ids.sort(-1).values.diff() > 0).all(), "no word twice"
        check(model, PROMPTS[key], *drawn)


def test_both_engines_draw_the_same_tokens(engines):
    if len(engines[1]) < 2:
        pytest.skip("vLLM is not installed")
    for made in engines[1].values():
        made.load(parameters(engines[0]), 0)
    a, b = (run(made) for made in engines[1].values())
    for key in a:
        assert torch.equal(a[key][1], b[key][1])


def draws_and_softmax(engine, requests=2000, n=32, design="iid"):
    """The first position of many responses to one prompt, [requests, n], and what vLLM itself says of it, [V]."""
    prompt, words = PROMPTS[0], list(range(32))
    from vllm import SamplingParams
    params = SamplingParams(max_tokens=1, temperature=0, detokenize=False, logprob_token_ids=words)
    out = engine.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0].logprobs[0]
    p = torch.tensor([out[word].logprob for word in words], dtype=torch.float64).exp()
    before = engine.drawing
    engine.drawing = replace(before, n=n, design=design)
    try:
        drawn = run(engine, [prompt] * requests, budget=1)
    finally:
        engine.drawing = before
    return torch.stack([drawn[key][1][0] for key in range(requests)]), p


@pytest.fixture
def sharp(engines):
    """vLLM with an output head that tells common words from rare ones: random weights are close to uniform."""
    if "vllm" not in engines[1]:
        pytest.skip("vLLM is not installed")
    weights = parameters(engines[0])
    engines[1]["vllm"].load(weights | {"lm_head.weight": 25 * weights["lm_head.weight"]}, 0)
    return engines[1]["vllm"]


def test_candidates_follow_the_engines_own_softmax_tail_words_included(sharp):
    ids, p = draws_and_softmax(sharp)
    assert p.sum().item() == pytest.approx(1) and p.min() < 1e-4 < 0.1 < p.max()
    assert abs(chi_square(ids, p)) < 5 and abs(chi_square(ids[:, 0], p)) < 5
    pairs = (ids[:, 0] == ids[:, 1]).double().mean()
    assert abs(pairs - p.square().sum()) < 5 * (0.25 / len(ids)) ** 0.5, "the columns are drawn independently"


def test_the_optimal_words_follow_the_engines_own_softmax(sharp):
    """Emitted tokens by chi-square; every word as often as its expected number of copies, within 5 deviations."""
    ids, p = draws_and_softmax(sharp, n=4, design="optimal")
    assert abs(chi_square(ids[:, 0], p)) < 5
    pi = expected_copies(p, 4, "optimal")
    count = torch.bincount(ids.flatten(), minlength=len(p)).double()
    assert ((count - len(ids) * pi).abs() <= 5 * (len(ids) * pi * (1 - pi)).clamp(min=1).sqrt()).all()


@pytest.mark.parametrize("wrong", [lambda x, u, n: draw_iid(x, u ** 2, n),
                                   lambda x, u, n: draw_iid(x / 1.1, u, n),
                                   lambda x, u, n: draw_iid(shaped(x, top_p=0.995), u, n)],
                         ids=["numbers not uniform", "another temperature", "no tail"])
def test_the_check_above_can_fail(sharp, monkeypatch, wrong):
    monkeypatch.setitem(DESIGNS, "iid", replace(DESIGNS["iid"], choose=wrong))
    ids, p = draws_and_softmax(sharp)
    assert chi_square(ids, p) > 10


def test_after_a_push_the_engine_is_the_new_model_and_back(engine, engines):
    probe = [3, 4, 13, 5, 14, 6, 7]
    for scale in (1.0, 1.3, 1.0):
        engine.load(parameters(engines[0], scale), 1)
        model = load_model(engines[0], "cpu", torch.float32)
        model.load_state_dict(parameters(engines[0], scale))
        torch.testing.assert_close(engine.logp(probe), sequence_logp(model, probe).detach(), rtol=0, atol=1e-4)
        for key, drawn in run(engine).items():
            check(model, PROMPTS[key], *drawn)


def test_a_response_goes_on_under_new_weights_as_the_new_model(engine, engines):
    """Taken out half-way, weights replaced, added again with its tokens: its context is computed again."""
    first = run(engine, steps=5)
    assert all(0 < len(drawn.tokens) < 24 for drawn in first.values())
    engine.load(parameters(engines[0], 1.3), 1)
    model = load_model(engines[0], "cpu", torch.float32)
    model.load_state_dict(parameters(engines[0], 1.3))
    longer = [p + first[key][0].tolist() for key, p in enumerate(PROMPTS)]
    for key, drawn in run(engine, longer, budget=10).items():
        check(model, longer[key], *drawn)


def test_a_response_may_join_and_leave_between_steps(engine, engines):
    model = load_model(engines[0], "cpu", torch.float32)
    engine.add(0, PROMPTS[0], 24, uid=0, position=0)
    engine.step()
    engine.step()
    engine.add(1, PROMPTS[1], 24, uid=1, position=0)
    engine.step()
    engine.step()
    first = engine.take([0])
    engine.add(2, PROMPTS[2], 3, uid=2, position=0)
    while 2 not in engine.step():
        continue
    rest = engine.take([1, 2])
    assert len(rest[2][0]) <= 3 < len(rest[1][0])
    for key, drawn in (first | rest).items():
        check(model, PROMPTS[key], *drawn)


def test_greedy_answers_are_the_models_own(engine, engines):
    model = load_model(engines[0], "cpu", torch.float32)
    for prompt, answer in zip(PROMPTS, engine.complete(PROMPTS, 8)):
        want = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt):].tolist()
        assert answer == want


def test_drawn_answers_are_the_same_in_both_engines_and_training_draws_go_on_as_before(engines):
    answers, drawn = [], []
    for made in engines[1].values():
        made.load(parameters(engines[0]), 0)
        before = run(made, budget=6)
        answers.append(made.complete(PROMPTS, 8, 3, 1.0))
        drawn.append((before, run(made, budget=6)))
    assert all(a == answers[0] for a in answers) and len(answers[0]) == 3 * len(PROMPTS)
    assert len({tuple(a) for a in answers[0]}) > len(PROMPTS), "k answers to a prompt are k draws"
    for before, after in drawn:
        assert all(torch.equal(before[key][1], after[key][1]) for key in before)
        assert [before[key][0][0].item() for key in range(len(PROMPTS))] != [a[0] for a in answers[0][::3]], (
            "the first answers begin with the numbers of training")


# -- numbers by address ------------------------------------------------------------------------------

def test_a_response_taken_out_and_added_again_draws_what_it_would_have_drawn(engine):
    """Under the same weights an interruption leaves no trace in the tokens."""
    whole = run(engine)
    first = run(engine, steps=5)
    rest = {}
    cut = [key for key in first if len(first[key].tokens) < len(whole[key].tokens)]
    for key in reversed(cut):                          # whatever the order in which they are taken up again
        tokens = first[key][0]
        engine.add(key, PROMPTS[key] + tokens.tolist(), 24 - len(tokens), uid=key, position=len(tokens))
    while len(rest) < len(cut):
        rest |= engine.take(engine.step())
    assert cut
    for key in cut:
        assert torch.equal(torch.cat([first[key].ids, rest[key].ids]), whole[key].ids)


def test_answers_to_the_same_prompt_share_no_numbers(engine):
    answers = engine.complete([PROMPTS[0]], 24, 4, 1.0)
    assert len({tuple(a) for a in answers}) == 4
    assert all(a[1:9] != b[:8] for a in answers for b in answers if len(a) > 8), "one the other, a position later"


# -- weights that change while responses run ---------------------------------------------------------

def moved(folder, version):
    """Weights of this version: 0 is the student, the others are far from it and from each other."""
    g = torch.Generator().manual_seed(version)
    return {name: p if version == 0 else p + 0.7 * p.std().nan_to_num(1) * torch.randn(p.shape, generator=g)
            for name, p in parameters(folder).items()}


def logits_by_hand(folder, prompt, drawn, recompute=False):
    """[L, V] that each token was drawn from, read one by one: keys and values are those of the weights that had then
    been loaded, or with `recompute` those of the weights that draw the token."""
    from transformers import DynamicCache
    model = load_model(folder, "cpu", torch.float32)
    cache, before, found = DynamicCache(config=model.config), prompt, []
    for token, version in zip(drawn.tokens.tolist(), drawn.versions.tolist()):
        model.load_state_dict(moved(folder, version))
        with torch.no_grad():
            if recompute:
                cache, before = DynamicCache(config=model.config), prompt + drawn.tokens[:len(found)].tolist()
            found.append(model(torch.tensor([before]), past_key_values=cache, use_cache=True).logits[0, -1])
        before = [token]
    return torch.stack(found)


def logp_of(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def drawn_so_far(engine):
    """By key, how many tokens the responses have that are in the engine."""
    if isinstance(engine, HFEngine):
        return {r.key: r.length for r in engine.rows + engine.new}
    return {key: len(tokens) for key, tokens in engine.emitted.items()}


PROBE = [3, 4, 13, 5, 14, 6, 7]


def run_with_pushes(engine, folder, pushes, prompts=PROMPTS, budget=24):
    """Generate, with the weights of `version` after so many steps: pushes {steps: version}. Returns what was drawn, and
    of each response the versions that its tokens must have."""
    wanted = {key: [] for key in range(len(prompts))}
    version, steps, out = 0, 0, {}

    def count(lengths):
        for key, length in lengths.items():
            wanted[key] += [version] * (length - len(wanted[key]))

    for key, prompt in enumerate(prompts):
        engine.add(key, prompt, budget, uid=key, position=0)
    while len(out) < len(prompts):
        if steps in pushes:
            count(drawn_so_far(engine))
            version = pushes[steps]
            engine.load(moved(folder, version), version)
            engine.logp(PROBE)
        taken = engine.take(engine.step())
        count({key: len(drawn.tokens) for key, drawn in taken.items()})
        out |= taken
        steps += 1
    return out, wanted


def test_kept_responses_are_drawn_from_keys_and_values_of_older_weights(engine, engines):
    """What is recorded is what was sampled from, and no single version's; the numbers are those of uid and position."""
    calm = run(engine)
    drawn, wanted = run_with_pushes(engine, engines[0], {4: 1, 8: 2})
    mixed = 0
    for key, response in drawn.items():
        versions = response.versions.tolist()
        assert versions == wanted[key]
        mixed += len(set(versions)) == 3
        before = versions.count(0)
        assert torch.equal(response.ids[:before], calm[key].ids[:before]), "a push changes nothing that is drawn"
        logits = logits_by_hand(engines[0], PROMPTS[key], response)
        atol = 1e-5 if isinstance(engine, HFEngine) else 1e-4
        torch.testing.assert_close(response.logmu, logp_of(logits, response.tokens), rtol=0, atol=atol)
        u = uniforms(0, TRAINING, [key] * len(versions), range(len(versions)), 2)
        assert torch.equal(draw_optimal(logits, u, 3).ids, response.ids)
        if len(versions) > before + 1:
            again = logp_of(logits_by_hand(engines[0], PROMPTS[key], response, recompute=True), response.tokens)
            assert (response.logmu - again)[before:].abs().max() > 0.02, "the context is not computed again"
            assert (response.logmu - again)[:before].abs().max() < 1e-4
    assert mixed, "no response has seen both pushes"


def test_a_push_of_the_same_weights_changes_nothing_whether_kept_or_computed_again(engine, engines):
    kept, _ = run_with_pushes(engine, engines[0], {4: 0})
    first = run(engine, steps=5)
    engine.load(parameters(engines[0]), 0)
    cut = [key for key in first if len(first[key].tokens) < len(kept[key].tokens)]
    for key in cut:
        length = len(first[key].tokens)
        engine.add(key, PROMPTS[key] + first[key].tokens.tolist(), 24 - length, uid=key, position=length)
    rest = {}
    while len(rest) < len(cut):
        rest |= engine.take(engine.step())
    assert cut
    for key in cut:
        assert torch.equal(kept[key].ids, torch.cat([first[key].ids, rest[key].ids]))
        logmu = torch.cat([first[key].logmu, rest[key].logmu])
        torch.testing.assert_close(kept[key].logmu, logmu, rtol=0, atol=1e-5)


def test_a_response_that_ends_while_the_probe_is_read_is_returned_by_the_next_step(engine, monkeypatch):
    monkeypatch.setattr(engine, "ends", type(engine.ends)())         # at the third token and not before
    calm = run(engine, budget=3)
    for key, prompt in enumerate(PROMPTS):
        engine.add(key, prompt, 3, uid=key, position=0)
    done = [*engine.step(), *engine.step()]
    engine.logp(PROBE)
    done += engine.step()
    found = engine.take(done)
    assert sorted(done) == [0, 1, 2] and engine.step() == []
    assert all(torch.equal(found[key].ids, calm[key].ids) for key in calm)


def test_the_probe_waits_for_no_response_though_all_places_are_taken(engine, engines, monkeypatch):
    monkeypatch.setattr(engine, "ends", type(engine.ends)())         # nobody leaves a place before the 24th token
    prompts = [PROMPTS[i % 3] for i in range(40)]
    calm = run(engine, prompts)
    for key, prompt in enumerate(prompts):
        engine.add(key, prompt, 24, uid=key, position=0)
    out = engine.take(engine.step())
    assert set(engine.not_begun()) >= set(range(16, 40)), "there are 16 places"
    before = drawn_so_far(engine)
    model = load_model(engines[0], "cpu", torch.float32)
    torch.testing.assert_close(engine.logp(PROBE), sequence_logp(model, PROBE).detach(), rtol=0, atol=1e-4)
    assert all(length - before[key] <= 2 for key, length in drawn_so_far(engine).items())
    while len(out) < 40:
        out |= engine.take(engine.step())
    assert all(torch.equal(out[key].ids, calm[key].ids) for key in calm)


def test_weights_change_between_responses_only_unless_they_may_be_kept(engine, engines, monkeypatch):
    monkeypatch.setattr(engine, "keeps", False)
    engine.add(0, PROMPTS[0], 24, uid=0, position=0)
    engine.step()
    with pytest.raises(AssertionError, match="between responses"):
        engine.load(parameters(engines[0]), 1)


def test_a_worker_keeps_responses_over_its_pushes_and_stores_the_version_of_each_token(engine, engines, config):
    """From the slots: versions, and log-probs of what was sampled from; also of a response that was cut in between."""
    cfg = config(student=engines[0], teacher=engines[0], inflight="keep", mc_samples=3, max_response=24)
    layout = {name: x.shape for name, x in parameters(engines[0]).items()}
    weights = Weights(layout, PROBE, torch.float32)

    def publish(version):
        model = load_model(engines[0], "cpu", torch.float32)
        model.load_state_dict(moved(engines[0], version))
        weights.publish(moved(engines[0], version), version, sequence_logp(model, PROBE).detach())
    sent = []
    link = SimpleNamespace(send=lambda kind, **body: sent.append((kind, body)), span=lambda what: nullcontext())
    slots = Slots(3, 40, 24, 3)
    worker = Worker(cfg, link, SharedMemory(slots, weights), engine)
    publish(0)
    for s, prompt in enumerate(PROMPTS):
        slots.open(s, s, prompt, len(prompt), 0)
    worker.take([(None, s) for s in range(3)])
    for turn in range(60):
        if turn in (3, 6):
            publish(turn // 3)
        worker.turn()
        if not worker.running:
            break
    assert [body["version"] for kind, body in sent if kind == "pushed"] == [0, 1, 2]
    mixed = 0
    for s, prompt in enumerate(PROMPTS):
        x = slots.read(s)
        assert x.version.tolist() == sorted(x.version.tolist()) and int(slots.born[s]) == 0
        mixed += len(set(x.version.tolist())) == 3
        response = SimpleNamespace(tokens=x.new_tokens.long(), versions=x.version)
        want = logp_of(logits_by_hand(engines[0], prompt, response), response.tokens)
        torch.testing.assert_close(x.logmu, want, rtol=0, atol=1e-4)
    assert mixed


# -- pushes, with engines of their own -------------------------------------------------------------

@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_tied_embeddings_arrive_too(kind, models, tmp_path):
    """A push that returns normally and generates from the old output head is what the probe is for."""
    from control.resolve import configure
    cfg = configure(["--task=toy", f"--student={models['tied']}", f"--teacher={models['tied']}", "--gpus=0",
                           f"--engine={kind}", "--max-prompt=16", "--max-response=24", "--max-running=4"])
    engine = engine_class(kind)(cfg, "cpu", torch.float32)
    model = load_model(models["tied"], "cpu", torch.float32)
    tensors = {n: p.detach() * 1.3 for n, p in model.named_parameters()}
    assert "lm_head.weight" not in tensors
    model.load_state_dict(tensors, strict=False)
    engine.load(tensors, 1)
    probe = [3, 4, 5, 6]
    torch.testing.assert_close(engine.logp(probe), sequence_logp(model, probe).detach(), rtol=0, atol=1e-4)


def test_a_wrong_push_stops_the_worker(config, models):
    """Weights that do not match the probe published with them are refused, with the version and the size of the gap."""
    cfg = config()
    model = load_model(models["student"], "cpu", torch.float32)
    weights = Weights({n: p.shape for n, p in model.named_parameters()}, [3, 4, 5, 6], torch.float32)
    probe = sequence_logp(model, weights.probe).detach()
    tensors = dict(model.named_parameters())
    weights.publish(tensors, 0, probe)
    link = SimpleNamespace(send=lambda *a, **k: None, span=lambda what: nullcontext())
    shared = SharedMemory(Slots(1, 16, 12, 4), weights)
    worker = Worker(cfg, link, shared, HFEngine(cfg, "cpu", torch.float32))
    worker.load(None)
    weights.publish({n: p * 1.5 for n, p in tensors.items()}, 1, probe)
    with pytest.raises(RuntimeError, match="version 1 did not arrive"):
        worker.load(None)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_an_update_has_ruined_are_blamed_on_the_update(config, models, bad):
    cfg = config(lr=1, clip=7)
    model = load_model(models["student"], "cpu", torch.float32)
    model.lm_head.weight.data[5] = bad
    weights = Weights({n: p.shape for n, p in model.named_parameters()}, [3, 4, 5, 6], torch.float32)
    weights.publish(dict(model.named_parameters()), 4, sequence_logp(model, weights.probe).detach())
    link = SimpleNamespace(send=lambda *a, **k: None, span=lambda what: nullcontext())
    worker = Worker(cfg, link, SharedMemory(Slots(1, 16, 12, 4), weights), HFEngine(cfg, "cpu", torch.float32))
    with pytest.raises(Incurable, match=r"version 4 of the student is useless.*--lr 1, --clip 7; grad_norm") as e:
        worker.load(None)
    assert "arrive" not in str(e.value)


# -- a response that is put aside --------------------------------------------------------------------

BLOCKS, RESPONSES, LONG = 9, 8, 220       # one block is vLLM's own: a second block for each response is not there


@pytest.fixture(scope="module")
def tight(tmp_path_factory):
    """So few blocks of keys and values that vLLM takes responses out of its batch and reads them again later; its
    student and its Config."""
    pytest.importorskip("vllm")
    import engines.vllm as module
    from control.resolve import configure
    student = save_tiny(tmp_path_factory.mktemp("tight") / "student", seed=3, layers=2)
    cfg = configure(["--task=toy", f"--student={student}", f"--teacher={student}", "--gpus=0", "--max-prompt=16",
                     f"--max-response={LONG}", f"--max-running={RESPONSES}", "--mc-samples=3", "--inflight=keep"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LLM", partial(module.LLM, num_gpu_blocks_override=BLOCKS))
        made = engine_class("vllm")(cfg, "cpu", torch.float32)
    made.ends = []
    return made, student, cfg


def test_a_response_that_vllm_puts_aside_goes_on_with_its_own_numbers(tight):
    made, student, cfg = tight
    hf = HFEngine(cfg, "cpu", torch.float32)
    hf.ends = set()
    drawn = {kind: run(engine, [PROMPTS[0]] * RESPONSES, budget=LONG) for kind, engine in (("hf", hf), ("vllm", made))}
    assert made.preempted >= 3, "vLLM had room for all"
    model = load_model(student, "cpu", torch.float32)
    seen = set()
    for uid in range(RESPONSES):
        tokens, ids, *_ = drawn["vllm"][uid]
        assert len(tokens) == LONG and torch.equal(ids, drawn["hf"][uid][1]), "as without an interruption"
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[0] + tokens.tolist()])).logits[0, len(PROMPTS[0]) - 1:-1]
        u = uniforms(cfg.seed, TRAINING, [uid] * LONG, range(LONG), 2)
        assert torch.equal(draw_optimal(logits, u, 3).ids, ids), "every id follows from its own numbers"
        seen |= set(u.flatten().tolist())
    assert len(seen) == RESPONSES * LONG * 2, "no number is used twice"


def test_the_probe_gets_the_first_block_that_comes_free(tight, monkeypatch):
    """Before the responses that were put aside, which need two each."""
    made, student, _ = tight
    for key in range(RESPONSES):
        made.add(key, PROMPTS[0], LONG, uid=key, position=0)
    lengths = [0]
    while max(lengths) - min(lengths) < 3:                   # some are put aside
        assert made.step() == []
        lengths = list(drawn_so_far(made).values())
    made.take([lengths.index(max(lengths))])
    steps, advance = [], made.advance
    monkeypatch.setattr(made, "advance", lambda: (steps.append(0), advance()))
    want = sequence_logp(load_model(student, "cpu", torch.float32), PROBE).detach()
    torch.testing.assert_close(made.logp(PROBE), want, rtol=0, atol=1e-4)
    assert len(steps) <= 2
    out = {}
    while len(out) < RESPONSES - 1:
        out |= made.take(made.step())
    assert all(len(x.tokens) == LONG for x in out.values())
