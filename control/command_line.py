"""
From the command line and a YAML file to a `Config`: default < file < flag.

tyro reads the dataclasses of config.py and, for every extension that --extend names, its `Flags`.
A YAML file is a list of flags written down: `lr: 1e-4`, and `eval: {n: 50}` or `eval.n: 50`. Its
key `config` names another file beside it, whose flags it changes. With --resume the flags of the
run that continues come first.

What is left out: what the flags mean together (control/resolve.py).
Tests: tests/test_cli.py, tests/test_bad_input.py
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
import yaml

import extension
from config import GROUPS, NESTED, Config, check_bounds, each_flag, require
from record.run_folder import recorded_flags

ROOT = Path(__file__).resolve().parent.parent
DESCRIPTION = """Asynchronous on-policy distillation: a student writes, a teacher scores, a learner
updates, all at the same time. Example: asyncopd.py --gpus 8 --kl reverse --mc-samples 4"""


def parse(argv: Sequence[str]) -> Config:
    """The flags, not yet resolved.

    Raises ValueError for bad input. Raises SystemExit after --help (0), and where tyro has drawn a
    box that says what is wrong with a flag (2).
    """
    file = scan(argv, "--config")
    written = read_file(file)
    extend = scan(argv, "--extend") or str(written.get("extend", ""))
    if not file:
        written = read_file(default_file(read(argv, extend)))
    config = read([*as_flags(written, file, extend), *argv], extend)
    if config.resume:
        config = resumed(config, argv, file, written)
    check_bounds(config)
    for name, flags in extension_flags(config).items():
        check_bounds(flags, f"{name}.")
    return config


def resumed(config: Config, argv: Sequence[str], file: str, written: dict[str, Any]) -> Config:
    """The flags of the run in --out, changed by those of a file that is named, and by `argv`."""
    before = recorded_flags(config.out)
    extend = config.extend or str(before.get("extend", ""))
    flags = as_flags(before, f"{config.out}/log.jsonl", extend)
    if file:
        flags += as_flags(written, file, extend)
    return read([*flags, *argv], extend)


def extension_flags(config: Config) -> dict[str, Any]:
    """By name, the flags of the extensions that are switched on."""
    return {name: type(flags)(**config.extensions[name])
            for name, flags in extension.default_flags(config.extend).items()}


# -- tyro ------------------------------------------------------------------------------------------

def read(argv: Sequence[str], extend: str) -> Config:
    """Parse flags; those of the extensions in `extend` are known."""
    check_switched_on(argv, extend)
    found = tyro.cli(flags_class(extend), args=list(argv), prog="asyncopd.py",
                     description=DESCRIPTION, use_underscores=False)
    flat: dict[str, Any] = {}
    for name, group in GROUPS.items():
        values = getattr(found, name)
        flat |= {f.name: getattr(values, f.name) for f in dataclasses.fields(group)}
    nested = {name: getattr(found, name) for name in NESTED}
    own = {name: dataclasses.asdict(getattr(found, name)) for name in
           extension.default_flags(extend)}
    return Config(**flat, **nested, extensions=own)


def flags_class(extend: str) -> type:
    """A dataclass of all flags: the flat groups, the nested ones, those of extensions."""
    members: list[tuple[str, Any, Any]] = []
    for name, group in GROUPS.items():
        flat = Annotated[group, tyro.conf.arg(name="")]
        members.append((name, flat, dataclasses.field(default=group())))
    for name, group in NESTED.items():
        members.append((name, group, dataclasses.field(default=group())))
    for name, flags in extension.default_flags(extend).items():
        require(name not in (*GROUPS, *NESTED),
                f"--extend {extend}: {name} is the name of a group of flags")
        members.append((name, type(flags), dataclasses.field(default=flags)))
    return dataclasses.make_dataclass("Flags", members, frozen=True)


def check_switched_on(argv: Sequence[str], extend: str) -> None:
    """Refuse the flag of an extension that is off: tyro could only say that it does not know it."""
    on = [extension.name_of(item) for item in extension.split_names(extend)]
    for flag in argv:
        name, dot, _ = flag.removeprefix("--").partition(".")
        known = flag.startswith("--") and dot and name in extension.known_extensions()
        require(not known or name in on,
                f"{flag}: the extension {name} is switched off (--extend {name} switches it on)")


def scan(argv: Sequence[str], flag: str) -> str:
    """The last value of a flag that decides how the others are read; "" if it is not there."""
    value = ""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            value = argv[i + 1]
        if word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


# -- files -----------------------------------------------------------------------------------------

def default_file(given: Config) -> str:
    """What runs when neither a model nor --config is given: the toy where there is no GPU, the
    setting of the paper on eight GPUs."""
    if given.student or given.task not in ("", "toy"):
        return ""
    gpus = torch.cuda.device_count() if given.gpus < 0 else given.gpus
    name = "gsm8k"
    if given.task == "toy" or gpus == 0:
        name = "toy"
    elif gpus >= 8:
        name = "deepmath_1.7b"
    return str(ROOT / "configs" / f"{name}.yaml")


def read_file(path: str, within: tuple[str, ...] = ()) -> dict[str, Any]:
    """Flags of a YAML file by their names with dots; those of the file that it is based on first."""
    if not path:
        return {}
    require(path not in within, f"--config {path}: names itself by its key config")
    try:
        written = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise ValueError(f"--config {path}: {' '.join(str(e).split())}") from None
    require(isinstance(written, dict), f"--config {path}: not a mapping of flags")
    base = str(written.pop("config", ""))
    found = {}
    if base:
        found = read_file(str(Path(path).parent / base), (*within, path))
    return found | flattened(written)


def flattened(written: dict, prefix: str = "") -> dict[str, Any]:
    """{"eval": {"n": 50}} -> {"eval.n": 50}."""
    found: dict[str, Any] = {}
    for key, value in written.items():
        name = prefix + str(key).replace("-", "_")
        if isinstance(value, dict):
            found |= flattened(value, f"{name}.")
        else:
            found[name] = value
    return found


def as_flags(written: dict[str, Any], path: str, extend: str) -> list[str]:
    """The same as words of a command line. Raises ValueError for a key that is no flag."""
    defaults = dict(each_flag(Config(extensions={
        name: dataclasses.asdict(flags) for name, flags in
        extension.default_flags(extend).items()})))
    flags = []
    for name, value in written.items():
        where = f"--config {path}: {name}"
        near = get_close_matches(name, defaults, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        require(name in defaults, f"{where}: no such flag{hint}")
        require(value is not None, f"{where} has no value")
        is_switch = isinstance(defaults[name], bool)
        require(isinstance(value, bool) == is_switch,
                f"{where}: {value!r} is {'not' if is_switch else ''} true or false".replace("  ", " "))
        flags.append(as_flag(name, value))
    return flags


def as_flag(name: str, value: Any) -> str:
    """("eval.teacher", False) -> --eval.no-teacher, ("lr", 1e-4) -> --lr=0.0001."""
    group, dot, last = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        switch = last if value else f"no-{last}"
        return f"--{group}{dot}{switch}"
    return f"--{group}{dot}{last}={value}"
