"""What is checked of models and texts before a process starts."""
import json

import pytest
import torch
from transformers import GenerationConfig

from control.preflight import prepare
from data import toy
from learner import Learner
from models.loading import stop_ids


def save(folder, *, vocab=32, ends=(1,), seed=5):
    tokenizer = toy.toy_tokenizer()
    model = toy.small_model(tokenizer, layers=1, hidden=64, seed=seed, vocab=vocab)
    model.generation_config.eos_token_id = list(ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_rows_beyond_the_words_are_padding_and_said(config, tmp_path):
    cfg, job = prepare(config(teacher=save(tmp_path / "wide", vocab=40)))
    assert job.notes == ("17 words in 32 rows of the student and 40 of the teacher: the others are padding",)
    assert prepare(config())[1].notes == ()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_head_with_fewer_rows_than_words_is_refused(config, tmp_path, role):
    with pytest.raises(ValueError, match=f"--{role} .*: its head has 16 rows for 17 words"):
        prepare(config(**{role: save(tmp_path / "narrow", vocab=16)}))


def test_a_response_ends_where_either_model_would_end_it_and_so_does_the_saved_students(config, tmp_path, models):
    cfg, job = prepare(config(teacher=save(tmp_path / "two", ends=(1, 16))))
    assert stop_ids(cfg.student) == [1] and stop_ids(cfg.student, cfg.teacher) == [1, 16]
    assert "a response ends with any of ['<eos>', ';']" in job.notes[0]
    Learner(cfg, "cpu", torch.float32).save(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [1, 16]
    assert job.grade([[[3, 4, 16, 1]]])[0] == [["01"]], "what ends a response is no part of its answer"


def test_the_first_prompt_is_the_one_that_is_handed_out_first_as_the_models_read_it(config, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}", "answer": "1"}) for i in range(30)))
    cfg, job = prepare(config(task=str(path), data__template="0{prompt}", data__suffix="=", seed=3))
    from data.prompts import prompt_number
    assert job.first_prompt == f"0{prompt_number(0, 27, seed=3)}=" and len(job.prompts) == 27


def test_long_prompts_are_left_out_and_counted_or_refused(config, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "1" * (5 + 20 * (i == 0))}) for i in range(30)))
    cfg, job = prepare(config(task=str(path)))
    assert len(job.prompts) == 29 and job.notes == (
        "1 of 30 prompts are longer than --max-prompt 16: left out",)
    with pytest.raises(ValueError, match="--data.long-prompts refuse: 1 of 30"):
        prepare(config(task=str(path), data__long_prompts="refuse"))


def test_empty_prompts_are_counted_apart_from_long_ones(config, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p}) for p in ("", " \n", "1" * 99, "1+1=")))
    cfg, job = prepare(config(task=str(path)))
    assert len(job.prompts) == 1 and job.notes == ("2 of 4 prompts are empty: left out",
                                                   "1 of 4 prompts are longer than --max-prompt 16: left out")
    path.write_text('{"prompt": ""}')
    with pytest.raises(ValueError, match="every prompt is empty"):
        prepare(config(task=str(path)))


def test_a_key_of_answers_that_is_given_must_be_somewhere(config, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}", "result": "1"}) for i in range(3)))
    assert prepare(config(task=str(path), data__answer_key="result,answer"))
    with pytest.raises(ValueError, match="--data.answer-key 'solution': no row of .* has an answer there"):
        prepare(config(task=str(path), data__answer_key="solution"))
    assert prepare(config(task=str(path))), "the default is a guess"
