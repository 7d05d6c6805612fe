"""Who gets how many GPUs follows from the estimate, as far as nobody has said it, and only if it fits."""
from dataclasses import replace
from pathlib import Path

import pytest

from control import controller, dryrun, plan, preflight
from control.advice import AFTER, advice
from control.command_line import Given
from control.estimate import SHARES, batch_seconds, fit_split, fits, splits
from control.resolve import configure
from extension import ModelPair
from learner import learner_worker
from rollout import rollout_worker
from teacher import teacher_worker
from tests.conftest import ROOT
from tests.runs import lines
from tests.test_dryrun import laptop

NOBODY, EMPTY = Given(), {}


@pytest.fixture(autouse=True)
def on_a_laptop(monkeypatch):
    laptop(monkeypatch)


def setting(name="deepmath_1.7b", gpus=8, **more):
    cfg = configure([f"--config={ROOT}/configs/{name}.yaml", f"--gpus={gpus}", "--dry-run"])
    student, teacher = (dryrun.known_model(role, getattr(cfg, role)) for role in ("student", "teacher"))
    return replace(cfg, **more), ModelPair(student=student.shape, teacher=teacher.shape,
                                           student_config=student.config, teacher_config=teacher.config)


def counts(cfg):
    return cfg.rollouts, cfg.teachers, cfg.learners


def seconds_of(cfg, models, share=0.5, gpu_gb=80.0):
    return batch_seconds(cfg, models, plan.memory(cfg, models.student, models.teacher, gpu_gb), share)


def fits_in(cfg, models, gpu_gb, free=EMPTY):
    return fits(plan.memory(cfg, models.student, models.teacher, gpu_gb), cfg.gpus, free, gpu_gb)


@pytest.mark.parametrize("gpus, teacher_gpus", [(3, 1), (8, 1), (8, 2), (5, 3)])
def test_every_way_to_use_all_gpus_is_tried_once(gpus, teacher_gpus):
    cfg, _ = setting(gpus=gpus, teacher_gpus=teacher_gpus)
    found = [counts(x) for x in splits(cfg, NOBODY)]
    assert len(found) == len(set(found))
    assert set(found) == {(r, t, n) for r in range(1, 9) for t in range(1, 9) for n in range(1, 9)
                          if r + t * teacher_gpus + n == gpus}


def test_counts_that_somebody_has_given_stay():
    cfg, models = setting(learners=2, rollouts=5)
    for given in (Given(line={"learners": 2}), Given(file={"learners": 2}), Given(below={"learners": 2})):
        assert {x.learners for x in splits(cfg, given)} == {2}
    fitted, notes = fit_split(cfg, Given(line=dict(learners=2, rollouts=5, teachers=1)), models, EMPTY, 80.0)
    assert fitted == cfg and not notes


@pytest.mark.parametrize("name, best", [("deepmath_1.7b", (5, 1, 2)), ("deepmath_4b", (4, 1, 3))])
def test_a_split_is_taken_that_is_good_for_short_and_for_long_responses(name, best):
    cfg, models = setting(name)
    fitted, notes = fit_split(cfg, NOBODY, models, EMPTY, 80.0)
    assert counts(cfg) == (4, 1, 3) and counts(fitted) == best
    seconds = {counts(x): [seconds_of(x, models, share) for share in SHARES] for x in splits(cfg, NOBODY)
               if fits_in(x, models, 80.0)}
    least = [min(times) for times in zip(*seconds.values())]
    worst = {split: max(s / best for s, best in zip(times, least)) for split, times in seconds.items()}
    assert worst[best] == min(worst.values())
    if fitted == cfg:
        assert not notes
    else:
        [note] = notes
        assert note.startswith("--rollouts {} --teachers {} --learners {}: ".format(*best))
        assert f"{worst[best]:.2f} x" in note and f"4, 1 and 3: up to {worst[4, 1, 3]:.2f} x" in note
        assert "2,048 to 8,192 tokens" in note


def test_what_does_not_fit_is_not_taken():
    """One learner of 4B parameters needs more than three that share its shards."""
    cfg, models = setting("deepmath_4b")
    for gpu_gb in (66.0, 70.0, 80.0):
        fitted, _ = fit_split(cfg, NOBODY, models, EMPTY, gpu_gb)
        assert fits_in(fitted, models, gpu_gb)
    one = replace(cfg, rollouts=6, learners=1)
    assert not fits_in(one, models, 66.0) and fits_in(one, models, 200.0)
    assert fit_split(cfg, NOBODY, models, EMPTY, 10.0) == (cfg, []), "then the table says what does not fit"


def test_a_gpu_that_somebody_else_uses_takes_no_large_learner():
    cfg, models = setting()
    used = {f"cuda:{i}": 80.0 for i in range(7)} | {"cuda:7": 30.0}
    fitted, _ = fit_split(cfg, NOBODY, models, used, 80.0)
    assert fitted.learners > 1 and fits_in(fitted, models, 80.0, used)
    assert not fits_in(replace(cfg, rollouts=6, learners=1), models, 80.0, used)


@pytest.mark.parametrize("more", [dict(resume=True), dict(extend="rock")])
def test_a_resumed_run_and_one_with_an_extension_keep_their_split(more):
    cfg, models = setting(**more)
    assert fit_split(cfg, NOBODY, models, EMPTY, 80.0) == (cfg, [])


def test_lora_keeps_its_one_learner():
    cfg, models = setting(lora_rank=8, learners=1, rollouts=6, teachers=1, max_prompt=4096, max_response=512)
    assert {x.learners for x in splits(cfg, NOBODY)} == {1}
    assert fit_split(cfg, NOBODY, models, EMPTY, 80.0)[0].learners == 1
    assert "--learners 1" in advice(cfg, {"rollout": 0.1, "teacher": 1.0, "learner": 0.9})


def test_roles_that_take_turns_are_added_up():
    cfg, models = setting()
    together = replace(cfg, schedule="sync", max_ahead=0)
    assert seconds_of(together, models) > seconds_of(cfg, models)


def test_a_gain_that_an_estimate_cannot_tell_changes_nothing():
    cfg, models = setting()
    best, _ = fit_split(cfg, NOBODY, models, EMPTY, 80.0)
    assert fit_split(best, NOBODY, models, EMPTY, 80.0) == (best, [])


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_fewer_than_three_gpus_have_nothing_to_split(gpus):
    cfg, models = setting("gsm8k", gpus)
    assert fit_split(cfg, NOBODY, models, EMPTY, 80.0) == (cfg, [])


def test_a_run_takes_the_split_and_its_note(config, models, monkeypatch, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "12+34="}\n')
    monkeypatch.undo()
    monkeypatch.setattr(preflight, "fit_split", lambda cfg, *_: (replace(cfg, rollouts=2), ["because"]))
    cfg, job = preflight.prepare(config(task=str(tmp_path / "rows.jsonl"), batch=2, max_ahead=1))
    assert cfg.rollouts == 2 and "because" in job.notes
    assert sum(n.worker.startswith("rollout") for n in job.memory[0]) == 2, "and the memory that goes with it"


# -- advice ----------------------------------------------------------------------------------------

def test_advice_moves_gpus_to_the_role_that_the_others_wait_for():
    cfg, _ = setting()
    said = advice(cfg, {"rollout": 0.99, "teacher": 0.4, "learner": 0.3})
    assert said == ("busy so far: rollout 99%, teacher 40%, learner 30%. --rollouts 5 --teachers 1 --learners 2 would "
                    "be up to 1.2 x faster, if it fits (--dry-run)")
    assert "--learners 5 would be up to 1.7 x" in advice(cfg, {"rollout": 0.3, "teacher": 0.2, "learner": 1.0})


@pytest.mark.parametrize("busy, more", [
    ({"rollout": 0.99, "teacher": 0.9, "learner": 0.95}, {}),             # nobody has a GPU to spare
    ({"rollout": 0.7, "teacher": 0.1, "learner": 0.1}, {}),               # something else is what they wait for
    ({"rollout": 0.99, "teacher": 0.1, "learner": 0.1}, dict(schedule="sync")),
    ({"rollout": 0.99, "teacher": 0.1, "learner": 0.1}, dict(gpus=2, rollouts=1, learners=1)),
    ({"rollout": 0.99, "teacher": 0.1, "learner": 0.1}, dict(gpus=0))])
def test_no_advice_where_none_is_known(busy, more):
    cfg, _ = setting()
    assert advice(replace(cfg, **more), busy) == ""


def test_advice_is_said_once(config, monkeypatch):
    """On a CPU, where the real one has nothing to say."""
    asked = []
    monkeypatch.undo()
    monkeypatch.setattr(controller, "WORKERS", {"rollout": rollout_worker, "teacher": teacher_worker,
                                                "learner": learner_worker})      # benchmarks/ put stand-ins there
    monkeypatch.setattr(controller, "advice", lambda cfg, busy: asked.append(busy) or "another split")
    cfg, job = preflight.prepare(config(steps=AFTER + 3, eval__n=0, max_response=4))
    Path(cfg.out).mkdir()
    run = controller.Controller(cfg, job, plan.plan(cfg), quiet=True)
    try:
        run.start()
        run.loop()
        run.finish()
    finally:
        run.close()
    told = [x for x in lines(dict(out=cfg.out)) if x.get("what") == "advice"]
    assert len(told) == len(asked) == 1 and told[0]["why"] == "another split"
    assert set(asked[0]) == {"rollout", "teacher", "learner"} and all(0 < x <= 1 for x in asked[0].values())
