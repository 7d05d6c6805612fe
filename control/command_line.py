"""
From the command line and a YAML file to a `Config`: default < file < flag.

tyro reads the dataclasses of config.py and, for every extension that --extend names, its `Flags`.
With --resume the flags of the run that continues come first. `Given` keeps who wrote what, for
messages and for what follows where nobody wrote anything.

What is left out: files (control/flag_files.py); what the flags mean together (control/resolve.py).
Tests: tests/test_cli.py, tests/test_bad_input.py
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import torch

import extension
from config import GROUPS, NESTED, Config, check_values, each_flag, each_type, flag_of, require
from control.flag_files import Written, read_file, typed
from record.run_folder import recorded_flags

ROOT = Path(__file__).resolve().parent.parent
DESCRIPTION = """Asynchronous on-policy distillation: a student writes, a teacher scores, a learner
updates, all at the same time. Where neither a model nor --config is given, it trains the toy if
there is no GPU, Qwen2.5-0.5B on GSM8K with a few GPUs, and the setting of the paper with eight.

    .venv/bin/python asyncopd.py --gpus 8 --kl reverse --mc-samples 4
    .venv/bin/python asyncopd.py --gpus 0
    .venv/bin/python asyncopd.py --config configs/gsm8k.yaml --dry-run
    .venv/bin/python asyncopd.py --extend NAME --help      with the flags of an extension"""


@dataclass(frozen=True)
class Given:
    """The flags that somebody wrote, by their names with dots: values as they stand there.

    `below`: what a file is based on, and the file that runs where none is named; what stands there
    is meant as a default, to be overridden.
    """
    line: dict[str, Any] = field(default_factory=dict)
    file: dict[str, Any] = field(default_factory=dict)
    below: dict[str, Any] = field(default_factory=dict)
    path: str = ""

    @property
    def meant(self) -> dict[str, Any]:
        """Flags of the command line and of the file that it names."""
        return self.file | self.line

    def __contains__(self, name: str) -> bool:
        return name in self.line or name in self.file or name in self.below

    def shown(self, name: str) -> str:
        """Examples: --beta 0.2, or: beta 0.2 in toy.yaml."""
        if name in self.line:
            return as_flag(name, self.line[name]).replace("=", " ", 1)
        return f"{name} {self.file[name]} in {self.path}"


NOTHING = Given()


def parse(argv: Sequence[str]) -> tuple[Config, Given]:
    """The flags, not yet resolved, and which of them were given.

    Raises ValueError for bad input. Raises SystemExit after --help (0), and where tyro has drawn a
    box that says what is wrong with a flag (2).
    """
    file = scan(argv, "--config")
    written = read_file(file)
    extend = switched_on(argv, written)
    check_words(argv, extend)
    line = on_the_line(argv, extend)
    check_line(line, extend)
    if not file:
        written = read_file(default_file(line))
    config = read([*as_flags(written, extend), *argv], extend)
    if config.resume:
        config = resumed(config, argv, file, written)
    check_values(config)
    for name, flags in extension_flags(config).items():
        check_values(flags, f"{name}.")
    return config, given(line, file, written)


def given(line: dict[str, Any], path: str, written: Mapping[str, Written]) -> Given:
    """Who wrote what. `path`: the value of --config."""
    own, below = {}, {}
    for name, w in written.items():
        if path and w.where == f"--config {path}":
            own[name] = w.text
        else:
            below[name] = w.text
    return Given(line, own, below, path)


def on_the_line(argv: Sequence[str], extend: str) -> dict[str, Any]:
    """The flags in `argv` by their names with dots: texts, and whether a switch is on."""
    known = known_flags(extend)
    found: dict[str, Any] = {}
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        switch = positive(name)
        if not word.startswith("--"):
            continue
        if isinstance(known.get(switch), bool):
            found[switch] = switch == name
        elif equals:
            found[name] = value
        else:
            found[name] = " ".join(argv[i + 1:i + 2])
    return found


def switched_on(argv: Sequence[str], written: Mapping[str, Written]) -> str:
    """The value of --extend, before the other flags can be read; with --resume, that of the run."""
    extend = scan(argv, "--extend") or written_text(written, "extend")
    out = scan(argv, "--out") or written_text(written, "out")
    resume = "--resume" in argv or written_text(written, "resume") == "true"
    if resume and out and not extend:
        extend = str(recorded_flags(out).get("extend", ""))
    return extend


def written_text(written: Mapping[str, Written], name: str) -> str:
    """What a file has as this flag; "" where it has nothing."""
    if name not in written:
        return ""
    return written[name].text


def resumed(config: Config, argv: Sequence[str], file: str,
            written: Mapping[str, Written]) -> Config:
    """The flags of the run in --out, changed by those of a file that is named, and by `argv`."""
    recorded = recorded_flags(config.out)
    extend = config.extend or str(recorded.get("extend", ""))
    where = f"--resume {config.out}"
    before = {name: Written(value, str(value), where) for name, value in recorded.items()}
    flags = as_flags(before, extend)
    if file:
        flags += as_flags(written, extend)
    return read([*flags, *argv], extend)


def extension_flags(config: Config) -> dict[str, Any]:
    """By name, the flags of the extensions that are switched on."""
    return {name: type(flags)(**config.extensions[name])
            for name, flags in extension.default_flags(config.extend).items()}


# -- tyro ----------------------------------------------------------------------------------------

def read(argv: Sequence[str], extend: str) -> Config:
    """Parse flags; those of the extensions in `extend` are known."""
    import tyro  # here, since every worker imports this file too
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


def check_line(line: Mapping[str, Any], extend: str) -> None:
    """Refuse a value that is not of its flag's type, in one line, where tyro draws a box."""
    types = known_types(extend)
    for name, value in line.items():
        if name in types and not isinstance(value, bool):
            typed(flag_of(name), Written(value, value, ""), types[name])


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

def default_file(line: Mapping[str, Any]) -> str:
    """What runs when neither a model nor --config is given: the toy where there is no GPU, the
    setting of the paper on eight GPUs. `line`: the flags of the command line."""
    task = line.get("task", "")
    if line.get("student") or task not in ("", "toy"):
        return ""
    gpus = int(line.get("gpus", -1))
    if gpus < 0:
        gpus = torch.cuda.device_count()
    name = "gsm8k"
    if task == "toy" or gpus == 0:
        name = "toy"
    elif gpus >= 8:
        name = "deepmath_1.7b"
    return str(ROOT / "configs" / f"{name}.yaml")


def as_flags(written: Mapping[str, Written], extend: str) -> list[str]:
    """The same as words of a command line. Raises ValueError for a key that is no flag, and for a
    value that is not of the flag's type."""
    known = known_flags(extend)
    types = known_types(extend)
    flags = []
    for name, w in written.items():
        what = f"{w.where}: {name}"
        check_known(what, name, known)
        flags.append(as_flag(name, typed(what, w, types[name])))
    return flags


def known_types(extend: str) -> dict[str, Any]:
    """The type of every flag by its name with dots, the extensions' flags included."""
    types = dict(each_type(Config))
    for name, flags in extension.default_flags(extend).items():
        types |= dict(each_type(type(flags), f"{name}."))
    return types


def as_flag(name: str, value: Any) -> str:
    """("eval.teacher", False) -> --eval.no-teacher, ("lr", 1e-4) -> --lr=0.0001."""
    group, dot, last = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        switch = last if value else f"no-{last}"
        return f"--{group}{dot}{switch}"
    return f"--{group}{dot}{last}={value}"
