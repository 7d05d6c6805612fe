"""
YAML files of flags, and the type that a value in a file must have.

A file is a list of flags written down: `lr: 1e-4`, and `eval: {n: 50}` or `eval.n: 50`. Its key
`config` names another file beside it, whose flags it changes. A message names the file and the
key, never a flag that nobody typed.

What is left out: which names are flags (command_line.py).
Tests: tests/test_cli.py, tests/test_bad_input.py
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml

from config import check_bound, check_text, require

NUMBERS = {int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Written:
    """The value of a flag in a file."""
    value: Any                   # as YAML or JSON reads it
    text: str                    # as it stands there
    where: str                   # begins a message. Example: --config toy.yaml


def read_file(path: str, within: tuple[Path, ...] = ()) -> dict[str, Written]:
    """Flags of a YAML file by their names with dots, after those of the file it is based on."""
    if not path:
        return {}
    check_text("--config", path)
    where = f"--config {path}"
    file = Path(path).resolve()
    require(file not in within, f"{where}: names itself by its key config")
    found: dict[str, Written] = {}
    lines: dict[str, int] = {}
    for name, line, written in entries(root_of(where, path), where):
        require(name not in found, f"{where}: {name} stands there twice, on lines "
                                   f"{lines.get(name)} and {line}")
        found[name] = written
        lines[name] = line
    base = found.pop("config", None)
    if base is None:
        return found
    require(base.value is not None, f"{where}: config has no value")
    return read_file(str(Path(path).parent / base.text), (*within, file)) | found


def root_of(where: str, path: str) -> yaml.MappingNode:
    """The file as YAML's nodes, which know their lines and keep a key that stands there twice."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8-sig"), yaml.SafeLoader)
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise ValueError(f"{where}: {' '.join(str(e).split())}") from None
    require(isinstance(root, yaml.MappingNode), f"{where}: not a mapping of flags")
    return root


def entries(node: yaml.MappingNode, where: str,
            group: str = "") -> Iterator[tuple[str, int, Written]]:
    """(name with dots, line, value) of every flag."""
    for key, value in node.value:
        line = key.start_mark.line + 1
        require(isinstance(key, yaml.ScalarNode), f"{where}: line {line}: a key must be a name")
        name = group + key.value.replace("-", "_")
        if isinstance(value, yaml.MappingNode) and not group:
            yield from entries(value, where, f"{name}.")
            continue
        require(isinstance(value, yaml.ScalarNode),
                f"{where}: {name}: is a list or a mapping, not a number or a text")
        yield name, line, Written(scalar(value, f"{where}: {name}"), value.value, where)


def scalar(node: yaml.ScalarNode, what: str) -> Any:
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, yaml.YAMLError) as e:        # a day that does not exist, an unknown tag
        raise ValueError(f"{what}: {' '.join(str(e).split())}") from None


def typed(what: str, written: Written, hint: Any) -> Any:
    """The value as a flag of this type has it. `what` begins the message of a ValueError.

    A text is what stands in the file, since YAML reads `off` as false and 007 as 7.
    """
    kind = hint
    if get_origin(hint) is Annotated:
        kind = get_args(hint)[0]
    value, text = written.value, written.text
    require(value is not None, f"{what} has no value")
    if kind is bool:
        require(isinstance(value, bool), f"{what}: {text!r} is not true or false")
        return value
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        require(text in choices, f"{what}: {text!r} is none of {', '.join(choices)}")
        return text
    if kind not in NUMBERS:
        check_text(what, text)
        return text
    try:
        number = kind(str(value))                # 1e-4 is a text to YAML
    except ValueError:
        raise ValueError(f"{what}: {text!r} is not {NUMBERS[kind]}") from None
    check_bound(what, number, hint)
    return number
