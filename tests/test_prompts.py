"""Reading and filtering rows, encoding prompts, their order; and comparing two tokenizers."""
import json

import pytest

from data import prompts, toy
from data.prompts import (
    Row,
    check_same_vocabulary,
    check_special_tokens,
    encode,
    parse_filter,
    prompt_number,
    read_rows,
)


def test_every_epoch_hands_out_every_prompt_once_in_an_order_of_its_own():
    def epoch(number: int, seed: int) -> list[int]:
        return [prompt_number(7 * number + i, 7, seed) for i in range(7)]
    epochs = [epoch(number, seed=3) for number in range(3)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and epochs[0] != epochs[1]
    assert epochs[0] == epoch(0, seed=3), "the order is a function of the seed"
    assert epochs[0] != epoch(0, seed=4)


def test_the_order_of_prompts_stays_the_same_from_version_to_version():
    """A resumed run must hand out what an undisturbed one would have handed out."""
    assert [prompt_number(uid, 5, seed=0) for uid in range(10)] == [0, 4, 3, 1, 2, 4, 3, 0, 2, 1]


def write(path, lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts))
    return str(path)


@pytest.mark.parametrize("lines, complaint", [
    ([{"prompt": "a"}, "{not json"], ":2: not JSON"),
    ([{"prompt": "a"}, {"text": "b"}], ":2: no text under --data.prompt-key 'prompt' .there is: text"),
    ([{"prompt": 3}], ":1: no text"),
    (["[1, 2]"], ":1: no text"),
    ([], "holds no rows"),
])
def test_a_bad_file_is_refused_with_its_line(tmp_path, lines, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_rows(write(tmp_path / "t.jsonl", lines), "prompt", "answer")


# -- keys and filters -----------------------------------------------------------------------------

RECORDS = [{"question": "a", "meta": {"answer": 1, "tags": [{"name": "easy"}]}, "difficulty": 5.5},
           {"problem": "b", "meta": {"answer": None}, "difficulty": "7", "a.b": "dotted"},
           {"question": "c", "meta": {}, "difficulty": 8, "level": "Level 5"}]


def test_a_key_goes_into_a_record_and_names_alternatives(tmp_path):
    rows = read_rows(write(tmp_path / "t.jsonl", RECORDS), "question,problem", "meta.answer")
    assert rows == [Row("a", "1"), Row("b", ""), Row("c", "")]
    assert prompts.lookup(RECORDS[0], "meta.tags.0.name") == "easy"
    assert prompts.lookup(RECORDS[0], "meta.tags.1.name") is None
    assert prompts.lookup(RECORDS[1], "a.b") == "dotted"
    assert prompts.lookup(3, "a.b") is None


@pytest.mark.parametrize("filter, kept", [
    ("", "abc"), ("difficulty>=6", "bc"), ("difficulty > 5.5", "bc"), ("difficulty<6", "a"),
    ("difficulty==7", "b"), ("difficulty!=7", "ac"), ("level==Level 5", "c"),
    ("level == 'Level 5'", "c"), ("level!=Level 4", "c"),
    ("difficulty>=6 and difficulty<=7.5", "b"), ("meta.answer==1", "a"),
    ("meta.tags.0.name==easy", "a"),
])
def test_a_filter_keeps_rows(tmp_path, filter, kept):
    name = write(tmp_path / "t.jsonl", RECORDS)
    rows = read_rows(name, "question,problem", "meta.answer", filter)
    assert "".join(r.prompt for r in rows) == kept


@pytest.mark.parametrize("filter, complaint", [
    ("difficulty", "not KEY OP VALUE"), ("difficulty=6", "not KEY OP VALUE"),
    ("__import__('os')", "not KEY OP VALUE"), ("difficulty>=6 and", "not KEY OP VALUE"),
    ("difficulty>=", "not KEY OP VALUE"), ("=<6", "not KEY OP VALUE"),
    ("level>=3", ":3: --data.filter level>=3: level is 'Level 5'"),
    ("difficulty>=hard", ":1: --data.filter"),
    ("difficulty>=9", "none of its 3 rows passes --data.filter"),
    ("absent==1", "none of its 3 rows passes"),
])
def test_a_filter_that_cannot_be_applied_is_refused(tmp_path, filter, complaint):
    name = write(tmp_path / "t.jsonl", RECORDS)
    with pytest.raises(ValueError, match=complaint):
        read_rows(name, "question,problem", "meta.answer", filter)


def test_a_filter_is_read_with_the_longest_comparison():
    assert parse_filter("a>=1 and b<2") == [("a", ">=", "1"), ("b", "<", "2")]


# -- tables ---------------------------------------------------------------------------------------

def test_parquet_and_a_hub_name_give_the_same_rows(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    import pyarrow.parquet
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for split, n in (("train", 6), ("test", 2)):
        table = pyarrow.table({"question": [f"{split}{i}" for i in range(n)],
                               "long": ["x" * 100] * n,
                               "meta": [{"answer": i} for i in range(n)]})
        pyarrow.parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    keys = ("question", "meta.answer")
    file = str(folder / "data" / "train-00000-of-00001.parquet")
    rows = [Row(f"train{i}", str(i)) for i in range(2, 6)]
    assert read_rows(file, *keys, "meta.answer>=2") == rows
    assert read_rows(f"hf:{folder}", *keys, "meta.answer>=2") == rows
    assert read_rows(f"hf:{folder}::test", *keys) == [Row("test0", "0"), Row("test1", "1")]
    assert read_rows(f"hf:{folder}:default:train[:1]", *keys) == [Row("train0", "0")]
    columns = prompts.columns_of(*keys, [])
    assert prompts.read_table(f"hf:{folder}", columns).column_names == ["question", "meta"]
    for name, complaint in ((f"hf:{folder}::absent", "absent"), (f"hf:{folder}:absent", "absent"),
                            ("hf:nobody/nothing", "nobody/nothing"),
                            ("hf:", "hf:: the name of the data set is missing"),
                            ("hf::main", "hf::main: the name of the data set is missing")):
        with pytest.raises(ValueError, match=complaint):
            read_rows(name, "question", "answer")
    complaint = r"no text under --data.prompt-key 'text' .there is: question, long, meta"
    with pytest.raises(ValueError, match=complaint):
        read_rows(f"hf:{folder}", "text", "answer")


def test_the_parts_of_a_hub_name_reach_the_library(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked, rows = [], datasets.Dataset.from_dict({"prompt": ["p"], "answer": ["1"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    for name in ("hf:a/b", "hf:a/b:main", "hf:a/b:main:test", "hf:a/b::test[:10%]"):
        assert read_rows(name, "prompt", "answer") == [Row("p", "1")]
    assert asked == [(("a/b", None), dict(split="train")),
                     (("a/b", "main"), dict(split="train")),
                     (("a/b", "main"), dict(split="test")),
                     (("a/b", None), dict(split="test[:10%]"))]


def test_a_parquet_file_that_is_absent_or_no_table_is_refused(tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "t.parquet"
    path.write_text("not a table")
    for name in (str(path), str(tmp_path / "absent.parquet")):
        with pytest.raises(ValueError, match=name):
            read_rows(name, "prompt", "answer")


# -- encoding -------------------------------------------------------------------------------------

CHAT = ("{% for m in messages %}{{ m.content }}{% endfor %}="
        "{% if enable_thinking %},{% else %};{% endif %}")


def decoded(tokenizer, *args, **how) -> list[str]:
    return [tokenizer.decode(ids) for ids in encode([Row(x) for x in args], tokenizer, **how)]


def test_prompts_go_through_template_suffix_and_chat_template():
    tokenizer = toy.toy_tokenizer()
    assert decoded(tokenizer, "12+34", "5") == ["12+34", "5"]
    assert decoded(tokenizer, "{1}", template="0{prompt}0", suffix="=") == ["0<unk>1<unk>0="]
    tokenizer.chat_template = CHAT
    assert decoded(tokenizer, "12", thinking=True) == ["12=,"]
    assert decoded(tokenizer, "12") == ["12=;"]
    assert encode([], tokenizer) == []
    tokenizer.chat_template = "{{ raise_exception('a system message first') }}"
    complaint = "chat template of --student fails: a system message first"
    with pytest.raises(ValueError, match=complaint):
        decoded(tokenizer, "12")


CHAT_OF_ROLES = "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}"


def test_a_prompt_may_be_a_chat(tmp_path):
    tokenizer = toy.toy_tokenizer()
    tokenizer.add_tokens(["s", "u"])
    messages = [{"role": "system", "content": "1", "name": "x"}, {"role": "user", "content": "2"}]
    name = write(tmp_path / "t.jsonl", [{"prompt": messages}, {"prompt": messages[1:]}, {"prompt": "3"}])
    rows = read_rows(name, "prompt", "answer")
    assert [row.prompt for row in rows] == ["system: 1\nuser: 2", "2", "3"]
    with pytest.raises(ValueError, match="--student has no chat template for prompts that are messages"):
        encode(rows, tokenizer)
    tokenizer.chat_template = CHAT_OF_ROLES
    texts = [tokenizer.decode(ids) for ids in encode(rows, tokenizer, template="0{prompt}", suffix="+")]
    assert texts == ["s1;u02+;", "u02+;", "u03+;"], "the last message is put into the template"


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}', encoding="utf-8-sig")
    assert read_rows(str(path), "prompt", "answer") == [Row("a"), Row("b")]


@pytest.mark.parametrize("line, complaint", [
    ('{"prompt": "a\\ud800"}', r":1: its prompt holds '\\ud800' at character 2, half of a surrogate pair"),
    ('{"prompt": "a", "answer": "\\udc00"}', ":1: its answer holds"),
    ({"prompt": [{"role": "user"}]}, ":1: message 1 of its prompt has no role and content that are texts"),
    ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
     ":1: its prompt ends with a message of the assistant"),
    ("[" * 100_000, ":1: is nested too deeply"), ('{"prompt": ' + "9" * 5000 + "}", ":1: "),
])
def test_a_row_that_no_model_can_read_is_refused_with_its_line(tmp_path, line, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_rows(write(tmp_path / "t.jsonl", [line]), "prompt", "answer")


# -- comparing two tokenizers ---------------------------------------------------------------------

def test_different_vocabularies_are_refused_with_the_first_differing_ids():
    a, b = toy.toy_tokenizer(), toy.toy_tokenizer()
    check_same_vocabulary(a, b, ["12+34="])
    b.add_tokens(["ten", "eleven"])
    complaint = "2 ids differ, 17 is None / 'ten', 18 is None / 'eleven'"
    with pytest.raises(ValueError, match=complaint):
        check_same_vocabulary(a, b)
    a.add_tokens(["eleven", "ten"])
    complaint = "2 ids differ, 17 is 'eleven' / 'ten', 18 is 'ten' / 'eleven'"
    with pytest.raises(ValueError, match=complaint):
        check_same_vocabulary(a, b)


def test_one_vocabulary_that_encodes_a_text_in_two_ways_is_refused():
    from tokenizers import normalizers
    a, b = toy.toy_tokenizer(), toy.toy_tokenizer()
    b.backend_tokenizer.normalizer = normalizers.Replace("+", "")
    with pytest.raises(ValueError, match=r"encode '12.34=' differently: from token 2 on"):
        check_same_vocabulary(a, b, ["12", "12+34="])


def test_special_tokens_that_differ_are_noted_and_ends_without_a_common_one_refused():
    a, b = toy.toy_tokenizer(), toy.toy_tokenizer()
    assert check_special_tokens(a, b, ([1], [1])) == []
    b.pad_token = "<eos>"
    ends, padding = check_special_tokens(a, b, ([1], [1, 2]))
    assert "ends with any of ['<eos>', '<unk>']" in ends
    assert "pad_token is '<pad>'" in padding
    complaint = r"ends a response with \['<eos>'\], --teacher with \['<unk>'\]"
    with pytest.raises(ValueError, match=complaint):
        check_special_tokens(a, b, ([1], [2]))
