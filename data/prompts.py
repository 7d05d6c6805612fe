"""
From a file or a data set of the hub to token ids: reading rows, choosing among them, rendering
them as prompts, and the order in which prompts are handed out. Also the checks that two models
read a text as the same ids.

Left out: images, packing. Only the student's tokenizer and chat
template are used; the teacher reads the same ids. Tests: tests/test_prompts.py
"""
from __future__ import annotations

import codecs
import json
import operator
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

# -- rows ----------------------------------------------------------------------------------------

Message = dict[str, str]                   # role and content


@dataclass(frozen=True, slots=True)
class Row:
    prompt: str                            # of a chat: its messages as text, for people
    answer: str = ""                       # "": unknown, so the row is trained on but never graded
    messages: tuple[Message, ...] = ()     # of a chat, to be rendered by the chat template


def read_rows(name: str, prompt_key: str, answer_key: str, filter: str = "") -> list[Row]:
    """The rows of a file or data set that pass the filter (see `parse_filter`), in its order.

    A key may reach into a record (`reward.answer`, `messages.0.content`) and may list alternatives
    (`question,problem`). Raises ValueError, with the file and the number of the row, if the file
    cannot be read, if a row has no prompt, and if no row is left.
    """
    conditions = parse_filter(filter)
    rows = []
    number_read = 0
    for number, record in read_records(name, columns_of(prompt_key, answer_key, conditions)):
        where = f"{name}:{number}"
        number_read += 1
        # a record without keys cannot be filtered; row_of refuses it
        if isinstance(record, dict) and not all(passes(record, c, where) for c in conditions):
            continue
        rows.append(row_of(record, prompt_key, answer_key, where))
    if number_read == 0:
        raise ValueError(f"{name}: holds no rows")
    if not rows:
        raise ValueError(f"{name}: none of its {number_read:,} rows passes --data.filter {filter!r}")
    return rows


def row_of(record, prompt_key: str, answer_key: str, where: str) -> Row:
    """A row of a record. Its prompt is a text, or a chat: a list of messages."""
    prompt = lookup(record, prompt_key)
    answer = lookup(record, answer_key)
    messages = ()
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        messages = messages_of(prompt, where)
        prompt = text_of(messages)
    if not isinstance(prompt, str):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: no text under --data.prompt-key {prompt_key!r} (there is: "
                         f"{found})")
    row = Row(prompt, "" if answer is None else str(answer), messages)
    for what, text in (("prompt", row.prompt), ("answer", row.answer)):
        at = lone_surrogate(text)
        if at is not None:
            raise ValueError(f"{where}: its {what} holds {text[at]!r} at character {at + 1}, half "
                             "of a surrogate pair, which is no text")
    return row


def messages_of(chat: list, where: str) -> tuple[Message, ...]:
    """The messages of a chat that the student is to continue. Raises ValueError."""
    messages = []
    for number, m in enumerate(chat, 1):
        if not (isinstance(m, dict) and isinstance(m.get("role"), str)
                and isinstance(m.get("content"), str)):
            raise ValueError(f"{where}: message {number} of its prompt has no role and content "
                             "that are texts")
        messages.append({"role": m["role"], "content": m["content"]})
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: its prompt ends with a message of the assistant, which is "
                         "the student's to write")
    return tuple(messages)


def text_of(messages: tuple[Message, ...]) -> str:
    """A chat for people: one message as it is, several with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


def lone_surrogate(text: str) -> int | None:
    """The index of the first character that UTF-8 does not have; JSON can write one."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return e.start
    return None


def lookup(record, key: str):
    """The value under the first alternative of `key` that the record has; None if it has none."""
    for alternative in key.split(","):
        if isinstance(record, dict) and alternative in record:      # a column may have dots itself
            return record[alternative]
        value = record
        for part in alternative.split("."):
            if isinstance(value, dict):
                value = value.get(part)
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                value = None
        if value is not None:
            return value
    return None


# -- files and data sets -------------------------------------------------------------------------

def columns_of(prompt_key: str, answer_key: str, conditions: list[Condition]) -> set[str]:
    """Every column that the keys may refer to: each alternative, and the part before its dot."""
    columns = set()
    for key in (prompt_key, answer_key, *(c.key for c in conditions)):
        for alternative in key.split(","):
            columns |= {alternative, alternative.split(".")[0]}
    return columns


def read_records(name: str, columns: set[str]) -> Iterator[tuple[int, object]]:
    """Number (from 1) and record of each row.

    Of a table only `columns` are read, since the others may be gigabytes.
    """
    if name.startswith("hf:") or name.endswith(".parquet"):
        return enumerate(read_table(name, columns), 1)
    if not Path(name).is_file():
        raise ValueError(f"{name}: no such file (a task is toy, FILE.jsonl, FILE.parquet or "
                         "hf:DATASET)")
    return read_json_lines(name)


def read_json_lines(name: str) -> Iterator[tuple[int, object]]:
    with open(name, "rb") as f:
        for number, line in enumerate(f, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
            except RecursionError:
                raise ValueError(f"{name}:{number}: is nested too deeply") from None
            except json.JSONDecodeError as e:
                reason = f"not JSON: {e.msg} at column {e.colno}"
                raise ValueError(f"{name}:{number}: {reason}") from None
            except UnicodeDecodeError as e:
                reason = f"not UTF-8: {e.reason} at byte {e.start}"
                raise ValueError(f"{name}:{number}: {reason}") from None
            except ValueError as e:                      # a number of thousands of digits
                raise ValueError(f"{name}:{number}: {e}") from None
            yield number, record


def read_table(name: str, columns: set[str]) -> Iterable[dict]:
    """Rows of FILE.parquet or hf:NAME[:CONFIG][:SPLIT]; NAME is a hub data set or a folder."""
    try:
        import datasets  # needed for these formats only, and pyarrow with it
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{name}: to read it, run `pip install datasets`") from None
    try:
        if name.startswith("hf:"):
            repo, subset, split = parse_hub_name(name)
            rows = datasets.load_dataset(repo, subset or None, split=split or "train")
            return rows.select_columns(chosen(rows.column_names, columns))
        names = pyarrow.parquet.read_schema(name).names
        return pyarrow.parquet.read_table(name, columns=chosen(names, columns)).to_pylist()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        reason = " ".join(str(e).split())[:300]          # on one line
        raise ValueError(f"{name}: {reason}") from None


def parse_hub_name(name: str) -> tuple[str, str, str]:
    """`hf:NAME[:CONFIG][:SPLIT]` -> (NAME, CONFIG, SPLIT); a part that is not given is empty."""
    parts = name.removeprefix("hf:").split(":", 2)
    repo, subset, split = parts + [""] * (3 - len(parts))
    if not repo.strip("/. "):
        raise ValueError("the name of the data set is missing (hf:NAME[:CONFIG][:SPLIT])")
    return repo, subset, split


def chosen(there: list[str], columns: set[str]) -> list[str]:
    """Those of the wanted columns that are there. If there are none, all: an error lists them."""
    return [c for c in there if c in columns] or there


# -- filters -------------------------------------------------------------------------------------

COMPARISONS = {"==": operator.eq, "!=": operator.ne, ">=": operator.ge, "<=": operator.le,
               ">": operator.gt, "<": operator.lt}
CONDITION = re.compile(r"\s*([\w.-]+)\s*(==|!=|>=|<=|>|<)\s*([^=<>].*?)\s*")


class Condition(NamedTuple):
    key: str
    comparison: str                        # a key of COMPARISONS
    value: str


def parse_filter(text: str) -> list[Condition]:
    """The conditions of a filter such as `difficulty>=6 and source!=aime`. Raises ValueError."""
    if not text.strip():
        return []
    conditions = []
    for part in re.split(r"\s+and(?:\s+|$)", text.strip()):
        m = CONDITION.fullmatch(part)
        if m is None:
            raise ValueError(
                f"--data.filter {text!r}: {part!r} is not KEY OP VALUE, where OP is one of "
                f"{' '.join(COMPARISONS)} (example: difficulty>=6 and source!=aime)")
        conditions.append(Condition(m[1], m[2], m[3].strip("'\"")))
    return conditions


def passes(record: dict, condition: Condition, where: str) -> bool:
    """Numbers compare as numbers, anything else as text; a row without the key does not pass.

    Raises ValueError if <, <=, > or >= meets something that is not a number.
    """
    key, comparison, value = condition
    compare = COMPARISONS[comparison]
    found = lookup(record, key)
    if found is None:
        return False
    try:
        return compare(float(found), float(value))
    except (TypeError, ValueError, OverflowError):
        if comparison in ("==", "!="):
            return compare(str(found), value)
    raise ValueError(f"{where}: --data.filter {key}{comparison}{value}: {key} is {found!r} here, and "
                     f"{comparison} compares numbers only")


# -- prompts -------------------------------------------------------------------------------------

def encode(rows: list[Row], tokenizer, template: str = "{prompt}", suffix: str = "",
           thinking: bool = False) -> list[list[int]]:
    """Token ids of each prompt, put into the template and then into the chat template, if any. Of
    a chat the last message is put into the template.

    `thinking` goes to the chat template as enable_thinking; templates of models that do not think
    ignore it. Raises ValueError if the chat template fails, and for a chat without one.
    """
    if not rows:
        return []

    def framed(text: str) -> str:
        return template.replace("{prompt}", text) + suffix

    if not tokenizer.chat_template:
        if any(row.messages for row in rows):
            raise ValueError("--student has no chat template for prompts that are messages "
                             "(--data.prompt-key prompt.0.content takes the first one's text)")
        texts = [framed(row.prompt) for row in rows]
        return tokenizer(texts, add_special_tokens=True)["input_ids"]
    texts = []
    for row in rows:
        *before, last = row.messages or ({"role": "user", "content": row.prompt},)
        last = last | {"content": framed(last["content"])}
        texts.append(apply_chat_template(tokenizer, [*before, last], thinking))
    return tokenizer(texts, add_special_tokens=False)["input_ids"]      # the template wrote them


def apply_chat_template(tokenizer, messages: list[Message], thinking: bool) -> str:
    from jinja2 import TemplateError
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    except (TemplateError, TypeError, ValueError) as e:
        raise ValueError(f"the chat template of --student fails: {e}") from None


def prompt_number(uid: int, n: int, seed: int) -> int:
    """The index, among n prompts, of the uid-th prompt that a run hands out.

    Each epoch goes through all n prompts in an order that depends on the seed and the epoch alone.
    """
    epoch, i = divmod(uid, n)
    return epoch_order(n, seed, epoch)[i]


@lru_cache(maxsize=2)          # where an epoch ends, a run may ask for both epochs in turn
def epoch_order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(n))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return tuple(order)


# -- two models, one vocabulary ------------------------------------------------------------------

def check_same_vocabulary(student, teacher, texts: Sequence[str] = ()) -> None:
    """Raises ValueError unless both tokenizers give each id the same token and encode each of the
    texts as the same ids: distillation compares probabilities id by id.

    The models' heads may have more rows than the vocabulary has tokens; that is not checked here.
    """
    students = {i: token for token, i in student.get_vocab().items()}
    teachers = {i: token for token, i in teacher.get_vocab().items()}
    ids = students.keys() | teachers.keys()
    differing = sorted(i for i in ids if students.get(i) != teachers.get(i))
    if differing:
        examples = ", ".join(f"{i} is {students.get(i)!r} / {teachers.get(i)!r}"
                             for i in differing[:3])
        raise ValueError(
            f"--student and --teacher do not share a vocabulary: {len(differing):,} ids differ, "
            f"{examples} (None: no such id); distillation needs models with the same tokenizer")
    for text in texts:
        ours = student(text, add_special_tokens=False)["input_ids"]
        theirs = teacher(text, add_special_tokens=False)["input_ids"]
        if ours != theirs:
            at = first_difference(ours, theirs)
            raise ValueError(
                f"--student and --teacher have the same vocabulary but encode {text[:40]!r} "
                f"differently: from token {at} on, {ours[at:at + 4]} and {theirs[at:at + 4]}")


def first_difference(a: Sequence, b: Sequence) -> int:
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


def check_special_tokens(student, teacher, ends: tuple[list[int], list[int]]) -> list[str]:
    """How the special tokens of two models differ: one line per difference, for a person to read.

    `ends` holds the ids that end a response, first the student's, then the teacher's. Raises
    ValueError if both models have such ids and none in common.
    """
    ours, theirs = ends
    tokens = student.convert_ids_to_tokens
    notes = []
    if ours and theirs and not set(ours) & set(theirs):
        raise ValueError(
            f"--student ends a response with {tokens(ours)}, --teacher with {tokens(theirs)}: add "
            "a token of the one to eos_token_id in the other's generation_config.json")
    if ours != theirs:
        either = sorted({*ours, *theirs})
        notes.append(f"a response ends with any of {tokens(either)}: the student uses "
                     f"{tokens(ours)}, the teacher {tokens(theirs)}")
    for role in ("bos_token", "unk_token", "pad_token"):
        our_token = getattr(student, role, None)
        their_token = getattr(teacher, role, None)
        if our_token != their_token:
            notes.append(f"{role} is {our_token!r} for the student and {their_token!r} for the "
                         "teacher: the student's tokenizer encodes the prompts")
    return notes
