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
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml

import extension
from config import GROUPS, NESTED, Config, check_values, each_flag, flag_of, require
from record.run_folder import recorded_flags

ROOT = Path(__file__).resolve().parent.parent
DESCRIPTION = """Asynchronous on-policy distillation: a student writes, a teacher scores, a learner
updates, all at the same time. Where neither a model nor --config is given, it trains the toy if
there is no GPU, Qwen2.5-0.5B on GSM8K with a few GPUs, and the setting of the paper with eight.

    asyncopd.py --gpus 8 --kl reverse --mc-samples 4
    asyncopd.py --gpus 0
    asyncopd.py --config configs/gsm8k.yaml --dry-run
    asyncopd.py --extend NAME --help          with the flags of an extension"""


def parse(argv: Sequence[str]) -> Config:
    """The flags, not yet resolved.

    Raises ValueError for bad input. Raises SystemExit after --help (0), and where tyro has drawn a
    box that says what is wrong with a flag (2).
    """
    file = scan(argv, "--config")
    written = read_file(file)
    extend = switched_on(argv, written)
    if not file:
        written = read_file(default_file(read(argv, extend)))
    config = read([*as_flags(written, f"--config {file}", extend), *argv], extend)
    if config.resume:
        config = resumed(config, argv, file, written)
    check_values(config)
    for name, flags in extension_flags(config).items():
        check_values(flags, f"{name}.")
    return config


def switched_on(argv: Sequence[str], written: dict[str, Any]) -> str:
    """The value of --extend, before the other flags can be read; with --resume, that of the run."""
    extend = scan(argv, "--extend") or str(written.get("extend", ""))
    out = scan(argv, "--out") or str(written.get("out", ""))
    resume = "--resume" in argv or written.get("resume", False)
    if resume and out and not extend:
        extend = str(recorded_flags(out).get("extend", ""))
    return extend


def resumed(config: Config, argv: Sequence[str], file: str, written: dict[str, Any]) -> Config:
    """The flags of the run in --out, changed by those of a file that is named, and by `argv`."""
    before = recorded_flags(config.out)
    extend = config.extend or str(before.get("extend", ""))
    flags = as_flags(before, f"--resume {config.out}", extend)
    if file:
        flags += as_flags(written, f"--config {file}", extend)
    return read([*flags, *argv], extend)


def extension_flags(config: Config) -> dict[str, Any]:
    """By name, the flags of the extensions that are switched on."""
    return {name: type(flags)(**config.extensions[name])
            for name, flags in extension.default_flags(config.extend).items()}


# -- tyro ----------------------------------------------------------------------------------------

def read(argv: Sequence[str], extend: str) -> Config:
    """Parse flags; those of the extensions in `extend` are known."""
    import tyro  # here, since every worker imports this file too
    check_words(argv, extend)
    found = tyro.cli(flags_class(extend), args=list(argv), prog="asyncopd.py",
                     description=DESCRIPTION, use_underscores=False)
    flat: dict[str, Any] = {}
    for name, group in GROUPS.items():
        values = getattr(found, name)
        flat |= {f.name: getattr(values, f.name) for f in dataclasses.fields(group)}
    nested = {name: group(**vars(getattr(found, name))) for name, group in NESTED.items()}
    own = {name: dataclasses.asdict(getattr(found, name)) for name in
           extension.default_flags(extend)}
    return Config(**flat, **nested, extensions=own)


def flags_class(extend: str) -> type:
    """A dataclass of all flags: the flat groups, the nested ones, those of extensions."""
    import tyro
    members: list[tuple[str, Any, Any]] = []
    for name, group in GROUPS.items():
        shown = without_blanks(group)
        flat = tyro.conf.OmitArgPrefixes[shown]
        members.append((name, flat, dataclasses.field(default=shown())))
    for name, group in NESTED.items():
        shown = without_blanks(group)
        members.append((name, shown, dataclasses.field(default=shown())))
    for item in extension.split_names(extend):
        kind = extension.extension_class(item)
        name = extension.name_of(item)
        require(name not in (*GROUPS, *NESTED),
                f"--extend {item}: {name} is already the name of a group of flags")
        shown = without_blanks(kind.Flags, extension.summary(kind))
        members.append((name, shown, dataclasses.field(default=shown())))
    return dataclasses.make_dataclass("Flags", members, frozen=True)


def without_blanks(group: type, title: str = "") -> type:
    """The same dataclass; in its help no default is shown where it is an empty text."""
    import tyro
    nothing = tyro.conf.arg(help_behavior_hint="")
    members = [(f.name, Annotated[str, nothing], dataclasses.field(default=""))
               for f in dataclasses.fields(group) if f.default == ""]
    return dataclasses.make_dataclass(
        group.__name__, members, bases=(group,), frozen=True, kw_only=True,
        namespace={"__doc__": title or group.__doc__})


def check_words(argv: Sequence[str], extend: str) -> None:
    """Refuse a word that looks like a flag and is none, with the nearest one."""
    known = known_flags(extend)
    for word in argv:
        if not word.startswith("--") or word == "--help":
            continue
        flag = word.partition("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        if isinstance(known.get(positive(name)), bool):
            continue
        check_known(flag, name, known, spelt=flag_of)


def positive(name: str) -> str:
    """The switch that a flag turns on or off. Example: eval.no_teacher -> eval.teacher."""
    group, dot, last = name.rpartition(".")
    return f"{group}{dot}{last.removeprefix('no_')}"


def known_flags(extend: str) -> dict[str, Any]:
    """Every flag by its name with dots, and its default; the extensions' flags included."""
    own = {name: dataclasses.asdict(flags)
           for name, flags in extension.default_flags(extend).items()}
    return dict(each_flag(Config(extensions=own)))


def check_known(where: str, name: str, known: Mapping[str, Any],
                spelt: Callable[[str], str] = str) -> None:
    """Raise ValueError for a name that is no flag. The message begins with `where` and offers the
    nearest one, spelt as on the command line or in a file."""
    if name in known:
        return
    group, dot, _ = name.partition(".")
    is_on = any(other.startswith(f"{group}.") for other in known)
    require(not dot or is_on or group not in extension.known_extensions(),
            f"{where}: the extension {group} is switched off (--extend {group} switches it on)")
    near = get_close_matches(name, known, n=1)
    if not near:
        raise ValueError(f"{where}: no such flag (asyncopd.py --help lists all)")
    raise ValueError(f"{where}: no such flag (did you mean {spelt(near[0])}?)")


def scan(argv: Sequence[str], flag: str) -> str:
    """The last value of a flag that decides how the others are read; "" if it is not there."""
    value = ""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            value = argv[i + 1]
        if word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


# -- files ---------------------------------------------------------------------------------------

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
    """Flags of a YAML file by their names with dots, after those of the file it is based on."""
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


def as_flags(written: dict[str, Any], where: str, extend: str) -> list[str]:
    """The same as words of a command line. Raises ValueError for a key that is no flag; `where`
    begins the message."""
    known = known_flags(extend)
    flags = []
    for name, value in written.items():
        check_known(f"{where}: {name}", name, known)
        require(value is not None, f"{where}: {name} has no value")
        if isinstance(known[name], bool):
            require(isinstance(value, bool), f"{where}: {name}: {value!r} is not true or false")
        else:
            require(not isinstance(value, (bool, list)),
                    f"{where}: {name}: {value!r} is not a number or a text")
        flags.append(as_flag(name, value))
    return flags


def as_flag(name: str, value: Any) -> str:
    """("eval.teacher", False) -> --eval.no-teacher, ("lr", 1e-4) -> --lr=0.0001."""
    group, dot, last = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        switch = last if value else f"no-{last}"
        return f"--{group}{dot}{switch}"
    return f"--{group}{dot}{last}={value}"
