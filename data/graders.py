"""
Is the answer of a text right? Graders, and what an evaluation says: avg@k, pass@k and how sure they are.

A mathematical answer is what the last \\boxed{} holds, what follows the last ####, or "the answer is", else the
text's last number. It is right if it equals the expected one as text, as an exact number, or, where math-verify is
installed, as an expression (fractions, sets, units, roots). Words compare as words: to a computer algebra system
they are products of letters, and `listen` equals `silent`.

Text from a model can make a computer algebra system run for days (10^{10^{10}}) or fill the memory, in code that no
Python exception interrupts. So expressions are compared in a process of their own, which the kernel ends after LIMIT_S
seconds of work and which starts anew for the next pair: an answer that cannot be compared in time is wrong.
What is left out: code execution, reward models. Tests: tests/test_graders.py
"""
from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import multiprocessing
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

LIMIT_S = 2.0                    # per pair, processor time of the comparing process: a busy machine changes no verdict
LIMIT_BYTES = 4 << 30            # its address space
TAIL, LONGEST = 20_000, 500      # characters: of a text that are looked at, of an answer that can be compared

# -- what an evaluation says -----------------------------------------------------------------------

def summary(right: list[list[bool]], resamples: int = 2000) -> dict:
    """Of n prompts with k graded answers each, right [n][k]: n, k and what follows from them (EVAL)."""
    import numpy as np
    n, k = len(right), len(right[0])
    counts = np.array([sum(answers) for answers in right])
    draws = np.random.default_rng(0).integers(n, size=(resamples, n))
    low, high = np.percentile(counts[draws].mean(1) / k, [2.5, 97.5])
    sizes = sorted({min(2 ** i, k) for i in range(k.bit_length() + 1)})
    return {"accuracy": float(counts.mean() / k), "n": n, "k": k, "avg_at_k": float(counts.mean() / k),
            "pass_at_k": {str(j): sum(1 - math.comb(k - c, j) / math.comb(k, j) for c in counts.tolist()) / n
                          for j in sizes},
            "ci": [float(low), float(high)]}


# -- from a text to its answer ---------------------------------------------------------------------

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+]?\.\d+")
SIMPLE = re.compile(rf"({NUMBER.pattern})(?:/(\d+)|[eE]([-+]?\d{{1,2}}))?")       # also 3/4 and 1e3


def marked_answer(text: str) -> str:
    """What the last closed \\boxed{} holds, else what follows the last ####, else "answer is"; else nothing."""
    opened, found = [], ""
    for m in re.finditer(r"\\boxed *\{|\\.|[{}]", text, re.S):
        if m[0] == "}":
            start = opened.pop() if opened else 0
            found = text[start:m.start()] if start else found
        elif m[0] == "{" or m[0].startswith(r"\boxed"):
            opened.append(m.end() if m[0] != "{" else 0)
    if found or r"\boxed" in text:
        return marked_answer(found) if r"\boxed" in found else found.strip()
    if "####" in text:
        return (text.rsplit("####", 1)[1].strip().splitlines() or [""])[0].strip()
    said = re.findall(r"answer(?: is|:)[ *:]*([^\n]{1,500})", text, re.I)
    return said[-1].strip(" *.") if said else ""


def bare(text: str) -> str:
    """Without what surrounds an answer and is not part of it: $ signs, spaces, a full stop, \\text, \\left."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf) *\{([^{}]*)\}", r" \1", text.replace("−", "-"))
    text = re.sub(r"\\(?:left|right|displaystyle|[,!;: ])|\\?\$", "", text)
    return " ".join(text.split()).removesuffix(".").strip()


def as_number(text: str) -> Fraction | None:
    """Exact, so that two huge numbers are not both infinity."""
    if len(text) > LONGEST or not (m := SIMPLE.fullmatch(text.replace("\\%", "").rstrip("% "))):
        return None
    number = Fraction(m[1].replace(",", "")) * Fraction(10) ** int(m[3] or 0)
    return number if m[2] is None else number / int(m[2]) if int(m[2]) else None


UNIT = re.compile(r"(\S*\d) ((?!pi|sqrt|sin|cos|tan|ln|log|exp)(?:[^\W\d_]{2,}|[a-z]/)[^\W\d_ /]*(?:[ /][^\W\d_]+)*)")


def split_unit(text: str) -> tuple[str, str]:
    """`10 m/s` -> 10, m/s. A single letter may be a variable and stays."""
    m = UNIT.fullmatch(text) if len(text) <= LONGEST else None
    return (m[1], m[2].casefold()) if m and as_number(m[1]) is not None else (text, "")


def last_number(text: str) -> str:
    found = [m[0] for m in SIMPLE.finditer(text)]
    return found[-1] if found else ""


def is_words(text: str) -> bool:
    return re.search(r"[^\W\d_]{2}", text) is not None and re.search(r"[\d\\^_=+*/<>{}|-]", text) is None


# -- graders ---------------------------------------------------------------------------------------

class MathGrader:
    """(text, answer) -> right? `answer` is the expected one, or a worked solution that ends in it.

    The comparing process starts with the first pair that needs it and ends with its standard input, so that it
    outlives nobody.
    """

    def __init__(self):
        self.alone = threading.Lock()                    # one pair at a time, whoever asks
        self.symbolic = importlib.util.find_spec("math_verify") is not None
        self.process: subprocess.Popen | None = None

    def __call__(self, text: str, answer: str) -> bool:
        text, answer = text[-TAIL:], answer[-TAIL:]
        expected, marked = marked_answer(answer) or answer, marked_answer(text)
        want, want_unit = split_unit(bare(expected))
        number = as_number(want)
        got, unit = split_unit(bare(marked or (text if number is None else last_number(text))))
        if not got or not want or (unit and want_unit and unit != want_unit):
            return False
        if got == want or (number is not None and as_number(got) == number):
            return True
        if is_words(want):
            return got.strip("()").casefold() == want.strip("()").casefold()
        if number is not None and as_number(got) is not None and "%" not in got + want:
            return False
        given = marked or text[-LONGEST:]
        if not self.symbolic or max(len(expected), len(given)) > LONGEST or is_words(got):
            return False
        return self.compare(rf"\boxed{{{expected}}}", rf"\boxed{{{given}}}" if marked else given)

    def compare(self, want: str, got: str) -> bool:
        with self.alone:
            return self.ask(want, got)

    def ask(self, want: str, got: str) -> bool:
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, "-I", str(Path(__file__).resolve())], text=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            if self.process.stdout.readline() != "ready\n":
                raise RuntimeError(f"the grader's process did not start: run `{sys.executable} {__file__}` to see why")
        verdict = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([want, got]) + "\n")
            self.process.stdin.flush()
            verdict = self.process.stdout.readline()
        if not verdict:                                  # out of time: the kernel has ended it
            self.close()
        return verdict == "true\n"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close(), self.process.stdout.close()
            self.process = None


class Grading(threading.Thread):
    """Judges an evaluation's answers beside the run. When `done` can be read, `outcome` is there; None: it failed."""

    def __init__(self, grade: Callable, answers: list, who: str, step: int):
        super().__init__(daemon=True)
        self.grade, self.answers, self.who, self.step, self.outcome = grade, answers, who, step, None
        self.done, self.end = multiprocessing.Pipe(duplex=False)
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self.grade(self.answers)
        finally:
            self.end.send(None)


# -- the comparing process -------------------------------------------------------------------------

def equal(want: str, got: str) -> bool:
    from math_verify import parse, verify
    return verify(parse(want, parsing_timeout=None), parse(got, parsing_timeout=None), timeout_seconds=None,
                  allow_set_relation_comp=True)


def serve() -> None:
    """Pairs come in, verdicts go out, a line each. SIGPROF keeps its default action: the kernel ends the process,
    whatever code it is in. A pair that raises ends it too, which is a verdict as well."""
    import logging
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # for the parent, whose end ends our input
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    equal("1", "2")                                      # imports, and builds its parsers
    logging.disable(logging.CRITICAL)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        right = equal(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("true" if right else "false", flush=True)


if __name__ == "__main__":
    serve()
