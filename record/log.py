"""
What a run leaves behind and what a person sees: log.jsonl, the start-up table, the bar, the final table.

Only the parent prints, and only through this file. The keys of a step line are defined in metrics.py; the other
lines are: run (provenance), eval, event, done. For people: report.py. Tests: tests/test_readme.py
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import math
import sys
from pathlib import Path

from record.report import evaluation_line, numbers, samples, thousands


class Log:
    """log.jsonl, one object a line, flushed as it is written; and the progress bar."""

    def __init__(self, folder: Path, steps: int, quiet: bool = False, done: int = 0):
        from tqdm import tqdm
        self.file = open(folder / "log.jsonl", "a", encoding="utf-8")
        fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)      # `taken`: the kernel lets go of it with the process
        self.samples, self.tracker = folder / "samples.txt", None      # tracker: see report.py
        self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, smoothing=0.1, disable=quiet,
                        mininterval=0.2 if sys.stderr.isatty() else 10.0)

    @staticmethod
    def taken(folder: Path) -> bool:
        """Is a run writing this log?"""
        with open(folder / "log.jsonl", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def write(self, type: str, **record) -> None:
        """One line. A number that is not finite is written as null: JSON has no other word for it."""
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps({"type": type, **record}) + "\n")
        self.file.flush()
        if self.tracker and type in ("step", "eval", "done"):
            self.tracker.write(record.get("step", record.get("steps")), numbers(type, record))

    def warn(self, text: str, /, **event) -> None:
        """An event that a person should see at once."""
        self.write("event", **event)
        self.say(text)

    def say(self, text: str) -> None:
        self.bar.write(f"asyncopd: {text}", file=sys.stderr)

    def step(self, m: dict) -> None:
        self.write("step", **m)
        self.bar.set_postfix_str(f"kl {m['kl']:.3f}  lag {m['lag_min']}/{m['lag_mean']:.1f}/{m['lag_max']}  "
                                 f"w_max {m['w_max']:.1f}  gen {thousands(m['gen_tok_s'])} tok/s  "
                                 f"learn {thousands(m['train_tok_s'])} tok/s", refresh=False)
        self.bar.update()

    def evaluation(self, step: int, who: str, said: dict, answered: list[tuple]) -> None:
        """The line, and what a person reads: `answered` holds of every prompt its row, its k texts, right or not."""
        self.write("eval", step=step, who=who, **said)
        with open(self.samples, "a", encoding="utf-8") as f:
            f.write(samples(step, who, answered))
        self.bar.disable or self.bar.write(evaluation_line(step, who, said, answered))

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.tracker:
            self.tracker.close()


def cut_log(path: Path, step: int) -> list[dict]:
    """Take back from a log what a run that goes on from `step` will write again; the lines that stay."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):            # the last line of a killed run may be half written
            lines.append(json.loads(text))
    lines = [x for x in lines if x["type"] != "done" and x.get("step", 0) <= step
             and not (x.get("what") == "cut" and x["version"] >= step)]
    partial = path.with_name(".log.jsonl")
    partial.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    partial.rename(path)
    return lines
