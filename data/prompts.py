"""
From a file or a hub name to token ids: rows, which of them, how they are asked, in what order; and whether two models
read them alike.

What is left out: prompts of several messages, images, and packing. Only the student's tokenizer and chat template are
ever used; the teacher reads the same ids. Tests: tests/test_prompts.py
"""
from __future__ import annotations

import json
import operator
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# -- rows ------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Row:
    prompt: str
    answer: str = ""                       # "" = unknown: the row is trained on and never graded


def read_rows(name: str, prompt_key: str, answer_key: str, filter: str = "") -> list[Row]:
    """The rows of a file or data set that pass the filter. Raises ValueError with the row and the remedy.

    A key may go into a record, `reward.answer` or `messages.0.content`, and name alternatives, `question,problem`.
    """
    conditions, rows, read = parse_filter(filter), [], 0
    keys = [k for key in (prompt_key, answer_key, *(c[0] for c in conditions)) for k in key.split(",")]
    for n, record in records(name, keys):
        read += 1
        if isinstance(record, dict) and not all(passes(record, c, f"{name}:{n}") for c in conditions):
            continue
        prompt = lookup(record, prompt_key)
        if not isinstance(prompt, str):
            there = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{name}:{n}: no text under --prompt-key {prompt_key!r} (there is: {there})")
        answer = lookup(record, answer_key)
        rows.append(Row(prompt, "" if answer is None else str(answer)))
    if not rows:
        raise ValueError(f"{name}: " + (f"none of its {read:,} rows passes --filter {filter!r}" if read else
                                        "it holds no rows"))
    return rows


def records(name: str, keys: list[str]) -> Iterator[tuple[int, object]]:
    """(number, record) of every row; of a table only the columns that hold `keys`: others may be gigabytes."""
    if name.startswith("hf:") or name.endswith(".parquet"):
        yield from enumerate(table(name, keys), 1)
        return
    if not Path(name).is_file():
        raise ValueError(f"{name}: no such file (a task is toy, FILE.jsonl, FILE.parquet or hf:DATASET)")
    with open(name, "rb") as f:
        for n, line in enumerate(f, 1):
            if line.strip():
                try:
                    record = json.loads(line.decode())
                except json.JSONDecodeError as e:
                    raise ValueError(f"{name}:{n}: not JSON: {e.msg} at column {e.colno}") from None
                except UnicodeDecodeError as e:
                    raise ValueError(f"{name}:{n}: not UTF-8: {e.reason} at byte {e.start}") from None
                yield n, record


def table(name: str, keys: list[str]):
    """Rows of a parquet file, or of hf:NAME[:CONFIG][:SPLIT] of the hub, through `datasets`; NAME may be a folder."""
    def wanted(columns: list[str]) -> list[str]:
        return [c for c in columns if c in keys or c in {k.split(".")[0] for k in keys}] or columns
    try:
        import datasets  # and pyarrow with it: only who asks for such a file needs them
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{name}: reading it needs `pip install datasets`") from None
    try:
        if not name.startswith("hf:"):
            columns = wanted(pyarrow.parquet.read_schema(name).names)
            return pyarrow.parquet.read_table(name, columns=columns).to_pylist()
        repo, subset, split = (name[3:].split(":", 2) + ["", ""])[:3]
        if not repo.strip("/. "):
            raise ValueError("no data set is named (hf:NAME[:CONFIG][:SPLIT])")
        rows = datasets.load_dataset(repo, subset or None, split=split or "train")
        return rows.select_columns(wanted(rows.column_names))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        raise ValueError(f"{name}: {' '.join(str(e).split())[:300]}") from None


def lookup(record, key: str):
    """What a record holds under the first of a key's alternatives that it has; None where it has none."""
    for alternative in key.split(","):
        value = record
        if isinstance(record, dict) and alternative in record:
            return record[alternative]
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


# -- which rows ------------------------------------------------------------------------------------

COMPARISONS = {"==": operator.eq, "!=": operator.ne, ">=": operator.ge, "<=": operator.le, ">": operator.gt,
               "<": operator.lt}


def parse_filter(text: str) -> list[tuple[str, str, str]]:
    """`difficulty>=6 and source!=aime` -> (key, comparison, value) of each condition."""
    found = []
    for part in re.split(r"\s+and(?:\s+|$)", text.strip()) if text.strip() else ():
        m = re.fullmatch(r"\s*([\w.-]+)\s*(==|!=|>=|<=|>|<)\s*([^=<>].*?)\s*", part)
        if not m:
            raise ValueError(f"--filter {text!r}: {part!r} is not KEY OP VALUE, OP one of {' '.join(COMPARISONS)} "
                             f"(example: difficulty>=6 and source!=aime)")
        found.append((m[1], m[2], m[3].strip("'\"")))
    return found


def passes(record: dict, condition: tuple[str, str, str], where: str) -> bool:
    """Numbers compare as numbers, everything else as text; a row without the key does not pass."""
    key, comparison, value = condition
    have = lookup(record, key)
    if have is None:
        return False
    try:
        return COMPARISONS[comparison](float(have), float(value))
    except (TypeError, ValueError):
        if comparison in ("==", "!="):
            return COMPARISONS[comparison](str(have), value)
        raise ValueError(f"{where}: --filter {key}{comparison}{value}: {key} is {have!r} there, and no number compares "
                         f"with it") from None


# -- how they are asked ----------------------------------------------------------------------------

def encode(rows: list[Row], tokenizer, template: str = "{prompt}", suffix: str = "",
           thinking: bool = False) -> list[list[int]]:
    """Token ids of each prompt: put into the template, then into the tokenizer's chat template where it has one.

    `thinking` is the chat template's enable_thinking, which templates of models that do not think ignore.
    """
    texts = [template.replace("{prompt}", row.prompt) + suffix for row in rows]
    if tokenizer.chat_template:
        from jinja2 import TemplateError
        try:
            texts = [tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False,
                                                   add_generation_prompt=True, enable_thinking=thinking) for t in texts]
        except TemplateError as e:
            raise ValueError(f"the chat template of --student fails: {e}") from None
    return tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"] if texts else []


def prompt_number(uid: int, n: int, seed: int) -> int:
    """Which of n prompts is the uid-th to be handed out: every epoch is a permutation of its own, by seed."""
    epoch, i = divmod(uid, n)
    order = PERMUTATIONS.get((n, seed, epoch))
    if order is None:
        order = list(range(n))
        random.Random(f"{seed}-{epoch}").shuffle(order)
        PERMUTATIONS.clear()               # one epoch at a time is all that is ever asked for
        PERMUTATIONS[n, seed, epoch] = order
    return order[i]


PERMUTATIONS: dict[tuple[int, int, int], list[int]] = {}


# -- whether two models read them alike --------------------------------------------------------------

def same_words(student, teacher, texts: list[str] = ()) -> None:
    """Distillation compares probabilities id by id: both tokenizers must give every id the same word, and read a text
    as the same ids. How many rows the models have beyond their words is their own affair."""
    s, t = ({i: word for word, i in tokenizer.get_vocab().items()} for tokenizer in (student, teacher))
    if differing := sorted(i for i in s.keys() | t.keys() if s.get(i) != t.get(i)):
        first = ", ".join(f"{i} is {s.get(i)!r} / {t.get(i)!r}" for i in differing[:3])
        raise ValueError(f"--student and --teacher do not share a vocabulary: {len(differing):,} ids differ, {first} "
                         "(None: no such id); distillation needs two models of one tokenizer")
    for text in texts:
        a, b = (x(text, add_special_tokens=False)["input_ids"] for x in (student, teacher))
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            raise ValueError(f"--student and --teacher have the same words and read {text[:40]!r} differently: from id "
                             f"{at} on, {a[at:at + 4]} and {b[at:at + 4]}")


def same_specials(student, teacher, ends: tuple[list[int], list[int]]) -> list[str]:
    """Refuse two models that never end a response alike; what else differs, a line each, for a person to read."""
    ours, theirs = ends
    words = student.convert_ids_to_tokens
    if ours and theirs and not set(ours) & set(theirs):
        raise ValueError(f"--student ends a response with {words(ours)}, --teacher with {words(theirs)}: put one of "
                         "them into eos_token_id of the other's generation_config.json")
    notes = [] if ours == theirs else [
        f"a response ends with any of {words(sorted({*ours, *theirs}))}: {words(ours)} end the student's, "
        f"{words(theirs)} the teacher's"]
    for role in ("bos_token", "unk_token", "pad_token"):
        a, b = getattr(student, role, None), getattr(teacher, role, None)
        if a != b:
            notes.append(f"{role} is {a!r} to the student and {b!r} to the teacher: prompts are read by the student's")
    return notes
