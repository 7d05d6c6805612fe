"""Rows, which of them, how they are asked, in what order; and whether two tokenizers are one."""
import json

import pytest

from data import prompts, toy
from data.prompts import Row, encode, parse_filter, prompt_number, read_rows, same_specials, same_words


def test_every_epoch_hands_out_every_prompt_once_in_an_order_of_its_own():
    epochs = [[prompt_number(uid, 7, seed=3) for uid in range(e * 7, e * 7 + 7)] for e in range(3)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and epochs[0] != epochs[1]
    assert epochs[0] == [prompt_number(uid, 7, seed=3) for uid in range(7)], "the order is a function of the seed"
    assert epochs[0] != [prompt_number(uid, 7, seed=4) for uid in range(7)]


def write(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


@pytest.mark.parametrize("lines, complaint", [
    ([{"prompt": "a"}, "{not json"], ":2: not JSON"),
    ([{"prompt": "a"}, {"text": "b"}], ":2: no text under --prompt-key 'prompt' .there is: text"),
    ([{"prompt": 3}], ":1: no text"),
    (["[1, 2]"], ":1: no text"),
    ([], "holds no rows"),
])
def test_a_bad_file_is_refused_with_its_line(tmp_path, lines, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_rows(write(tmp_path / "t.jsonl", lines), "prompt", "answer")


# -- keys and filters ------------------------------------------------------------------------------

RECORDS = [{"question": "a", "meta": {"answer": 1, "tags": [{"name": "easy"}]}, "difficulty": 5.5},
           {"problem": "b", "meta": {"answer": None}, "difficulty": "7", "a.b": "dotted"},
           {"question": "c", "meta": {}, "difficulty": 8, "level": "Level 5"}]


def test_a_key_goes_into_a_record_and_names_alternatives(tmp_path):
    rows = read_rows(write(tmp_path / "t.jsonl", RECORDS), "question,problem", "meta.answer")
    assert rows == [Row("a", "1"), Row("b", ""), Row("c", "")]
    assert prompts.lookup(RECORDS[0], "meta.tags.0.name") == "easy" and prompts.lookup(RECORDS[1], "a.b") == "dotted"
    assert prompts.lookup(RECORDS[0], "meta.tags.1.name") is None and prompts.lookup(3, "a.b") is None


@pytest.mark.parametrize("filter, kept", [
    ("", "abc"), ("difficulty>=6", "bc"), ("difficulty > 5.5", "bc"), ("difficulty<6", "a"), ("difficulty==7", "b"),
    ("difficulty!=7", "ac"), ("level==Level 5", "c"), ("level == 'Level 5'", "c"), ("level!=Level 4", "c"),
    ("difficulty>=6 and difficulty<=7.5", "b"), ("meta.answer==1", "a"), ("meta.tags.0.name==easy", "a"),
])
def test_a_filter_keeps_rows(tmp_path, filter, kept):
    rows = read_rows(write(tmp_path / "t.jsonl", RECORDS), "question,problem", "meta.answer", filter)
    assert "".join(r.prompt for r in rows) == kept


@pytest.mark.parametrize("filter, complaint", [
    ("difficulty", "not KEY OP VALUE"), ("difficulty=6", "not KEY OP VALUE"), ("__import__('os')", "not KEY OP VALUE"),
    ("difficulty>=6 and", "not KEY OP VALUE"), ("difficulty>=", "not KEY OP VALUE"), ("=<6", "not KEY OP VALUE"),
    ("level>=3", ":3: --filter level>=3: level is 'Level 5'"), ("difficulty>=hard", ":1: --filter"),
    ("difficulty>=9", "none of its 3 rows passes --filter"), ("absent==1", "none of its 3 rows passes"),
])
def test_a_filter_that_cannot_be_is_refused(tmp_path, filter, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_rows(write(tmp_path / "t.jsonl", RECORDS), "question,problem", "meta.answer", filter)


def test_a_filter_is_read_with_the_longest_comparison():
    assert parse_filter("a>=1 and b<2") == [("a", ">=", "1"), ("b", "<", "2")]


# -- tables ----------------------------------------------------------------------------------------

def test_parquet_and_a_hub_name_give_the_same_rows(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    import pyarrow.parquet
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for split, n in (("train", 6), ("test", 2)):
        table = pyarrow.table({"question": [f"{split}{i}" for i in range(n)], "long": ["x" * 100] * n,
                               "meta": [{"answer": i} for i in range(n)]})
        pyarrow.parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    file = read_rows(str(folder / "data" / "train-00000-of-00001.parquet"), "question", "meta.answer", "meta.answer>=2")
    assert file == [Row(f"train{i}", str(i)) for i in range(2, 6)]
    assert read_rows(f"hf:{folder}", "question", "meta.answer", "meta.answer>=2") == file
    assert read_rows(f"hf:{folder}::test", "question", "meta.answer") == [Row("test0", "0"), Row("test1", "1")]
    assert read_rows(f"hf:{folder}:default:train[:1]", "question", "meta.answer") == [Row("train0", "0")]
    assert prompts.table(f"hf:{folder}", ["question", "meta.answer"]).column_names == ["question", "meta"]
    for name, complaint in ((f"hf:{folder}::absent", "absent"), (f"hf:{folder}:absent", "absent"),
                            ("hf:nobody/nothing", "nobody/nothing"), ("hf:", "no data set is named"),
                            ("hf::main", "no data set is named")):
        with pytest.raises(ValueError, match=complaint):
            read_rows(name, "question", "answer")
    with pytest.raises(ValueError, match=r"no text under --prompt-key 'text' .there is: question, long, meta"):
        read_rows(f"hf:{folder}", "text", "answer")


def test_what_a_hub_name_asks_of_the_library(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked, rows = [], datasets.Dataset.from_dict({"prompt": ["p"], "answer": ["1"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    for name in ("hf:a/b", "hf:a/b:main", "hf:a/b:main:test", "hf:a/b::test[:10%]"):
        assert read_rows(name, "prompt", "answer") == [Row("p", "1")]
    assert asked == [(("a/b", None), dict(split="train")), (("a/b", "main"), dict(split="train")),
                     (("a/b", "main"), dict(split="test")), (("a/b", None), dict(split="test[:10%]"))]


def test_a_table_that_is_none_is_refused(tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "t.parquet"
    path.write_text("not a table")
    for name in (str(path), str(tmp_path / "absent.parquet")):
        with pytest.raises(ValueError, match=name):
            read_rows(name, "prompt", "answer")


# -- how they are asked ----------------------------------------------------------------------------

CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}={% if enable_thinking %},{% else %};{% endif %}"


def decoded(tokenizer, *args, **how) -> list[str]:
    return [tokenizer.decode(ids) for ids in encode([Row(x) for x in args], tokenizer, **how)]


def test_prompts_go_through_template_suffix_and_chat_template():
    tokenizer = toy.toy_tokenizer()
    assert decoded(tokenizer, "12+34", "5") == ["12+34", "5"]
    assert decoded(tokenizer, "{1}", template="0{prompt}0", suffix="=") == ["0<unk>1<unk>0="]
    tokenizer.chat_template = CHAT
    assert decoded(tokenizer, "12", thinking=True) == ["12=,"] and decoded(tokenizer, "12") == ["12=;"]
    assert encode([], tokenizer) == []
    tokenizer.chat_template = "{{ raise_exception('a system message first') }}"
    with pytest.raises(ValueError, match="chat template of --student fails: a system message first"):
        decoded(tokenizer, "12")


# -- whether two models read them alike ------------------------------------------------------------

def test_different_vocabularies_are_refused_with_the_first_differing_ids():
    a, b = toy.toy_tokenizer(), toy.toy_tokenizer()
    same_words(a, b, ["12+34="])
    b.add_tokens(["ten", "eleven"])
    with pytest.raises(ValueError, match="2 ids differ, 17 is None / 'ten', 18 is None / 'eleven'"):
        same_words(a, b)
    a.add_tokens(["eleven", "ten"])
    with pytest.raises(ValueError, match="2 ids differ, 17 is 'eleven' / 'ten', 18 is 'ten' / 'eleven'"):
        same_words(a, b)


def test_the_same_words_read_differently_are_refused():
    from tokenizers import normalizers
    a, b = toy.toy_tokenizer(), toy.toy_tokenizer()
    b.backend_tokenizer.normalizer = normalizers.Replace("+", "")
    with pytest.raises(ValueError, match=r"read '12.34=' differently: from id 2 on"):
        same_words(a, b, ["12", "12+34="])


def test_ends_and_special_words_that_differ_are_told_and_without_a_common_end_refused():
    a, b = toy.toy_tokenizer(), toy.toy_tokenizer()
    assert same_specials(a, b, ([1], [1])) == []
    b.pad_token = "<eos>"
    notes = same_specials(a, b, ([1], [1, 2]))
    assert len(notes) == 2 and "ends with any of ['<eos>', '<unk>']" in notes[0] and "pad_token is '<pad>'" in notes[1]
    with pytest.raises(ValueError, match=r"ends a response with \['<eos>'\], --teacher with \['<unk>'\]"):
        same_specials(a, b, ([1], [2]))
