"""
Is the answer in a text right? The graders, and the numbers of an evaluation: avg@k, pass@k and a
confidence interval.

A mathematical answer is what the last \\boxed{} holds, or what follows the last ####, or what
follows "the answer is", or else the last number of the text. It is right if it equals the expected
answer as text, as an exact number, or, where math-verify is installed, as an expression
(fractions, sets, units, roots). Words are compared as words: a computer algebra system reads them
as products of letters, and to it `listen` equals `silent`.

A text from a model can keep a computer algebra system busy for days (10^{10^{10}}) or fill the
memory, in code that no Python exception interrupts. Expressions are therefore compared in a
separate process. The kernel kills it after LIMIT_S seconds of work, and a new one starts for the
next pair: an answer that cannot be compared in time is wrong.

Left out: code execution, reward models. Tests: tests/test_graders.py
"""
from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import resource
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

# Limits of the comparing process. Its seconds are processor time, so that a busy machine changes
# no verdict; its memory is address space.
LIMIT_S = 2.0                    # for each pair
LIMIT_BYTES = 4 << 30
TAIL = 20_000                    # characters at the end of a text that are looked at
LONGEST = 500                    # characters of the longest answer that is compared

# -- the numbers of an evaluation ----------------------------------------------------------------

def summary(right: list[list[bool]], resamples: int = 2000) -> dict:
    """The numbers of an evaluation from the verdicts `right` [n][k]: n prompts, k answers to each.

    The formulas stand in EVAL of record/metrics.py.
    """
    import numpy as np
    n = len(right)
    k = len(right[0])
    counts = np.array([sum(answers) for answers in right])
    draws = np.random.default_rng(0).integers(n, size=(resamples, n))
    low, high = np.percentile(counts[draws].mean(1) / k, [2.5, 97.5])
    accuracy = float(counts.mean() / k)
    sizes = sorted({min(2 ** i, k) for i in range(k.bit_length() + 1)})
    return {"accuracy": accuracy, "n": n, "k": k, "avg_at_k": accuracy,
            "pass_at_k": {str(j): pass_at(j, k, counts.tolist()) for j in sizes},
            "ci": [float(low), float(high)]}


def pass_at(j: int, k: int, counts: list[int]) -> float:
    """Mean chance that one of j answers is right, where counts[i] of the k to prompt i are right.

    Unbiased: Chen et al., Evaluating Large Language Models Trained on Code (2021), Eq. 1.
    """
    return sum(1 - math.comb(k - c, j) / math.comb(k, j) for c in counts) / len(counts)


# -- from a text to its answer -------------------------------------------------------------------

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+]?\.\d+")
SIMPLE = re.compile(rf"({NUMBER.pattern})(?:/(\d+)|[eE]([-+]?\d{{1,2}}))?")       # also 3/4, 1e3
BRACE = re.compile(r"\\boxed *\{|\\.|[{}]", re.S)
SENTENCE = re.compile(r"answer(?: is|:)[ *:]*([^\n]{1,500})", re.I)
UNIT = re.compile(r"(\S*\d) ((?!pi|sqrt|sin|cos|tan|ln|log|exp)"
                  r"(?:[^\W\d_]{2,}|[a-z]/)[^\W\d_ /]*(?:[ /][^\W\d_]+)*)")


def marked_answer(text: str) -> str:
    """The answer that the text marks by \\boxed{}, else by ####, else by "answer is"; else ""."""
    boxed = last_boxed(text)
    if r"\boxed" in boxed:
        return marked_answer(boxed)
    if boxed or r"\boxed" in text:
        return boxed.strip()
    if "####" in text:
        lines = text.rsplit("####", 1)[1].strip().splitlines()
        return lines[0].strip() if lines else ""
    sentences = SENTENCE.findall(text)
    return sentences[-1].strip(" *.") if sentences else ""


def last_boxed(text: str) -> str:
    """What the \\boxed{} that closes last holds; "" if there is none."""
    opened: list[int | None] = []    # of every open brace the start of its answer; None: no \boxed
    found = ""
    for m in BRACE.finditer(text):
        if m[0] == "{":
            opened.append(None)
        elif m[0].startswith(r"\boxed"):
            opened.append(m.end())
        elif m[0] == "}" and opened:
            start = opened.pop()
            if start is not None:
                found = text[start:m.start()]
    return found


def bare(text: str) -> str:
    """The answer without $, \\text, \\left, a full stop and spaces, which are not part of it."""
    text = text.replace("−", "-")
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf) *\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\(?:left|right|displaystyle|[,!;: ])|\\?\$", "", text)
    return " ".join(text.split()).removesuffix(".").strip()


def as_number(text: str) -> Fraction | None:
    """Exact, so that two huge numbers are not both infinity."""
    if len(text) > LONGEST:
        return None
    m = SIMPLE.fullmatch(text.replace("\\%", "").rstrip("% "))
    if m is None:
        return None
    mantissa, denominator, exponent = m.groups()
    number = Fraction(mantissa.replace(",", ""))
    if exponent is not None:
        return number * Fraction(10) ** int(exponent)
    if denominator is None:
        return number
    if int(denominator) == 0:
        return None
    return number / int(denominator)


def split_unit(text: str) -> tuple[str, str]:
    """`10 m/s` -> (10, m/s). A single letter may be a variable and stays with the number."""
    if len(text) > LONGEST:
        return text, ""
    m = UNIT.fullmatch(text)
    if m is None or as_number(m[1]) is None:
        return text, ""
    return m[1], m[2].casefold()


def last_number(text: str) -> str:
    found = [m[0] for m in SIMPLE.finditer(text)]
    return found[-1] if found else ""


def is_words(text: str) -> bool:
    has_word = re.search(r"[^\W\d_]{2}", text) is not None
    has_symbol = re.search(r"[\d\\^_=+*/<>{}|-]", text) is not None
    return has_word and not has_symbol


# -- graders -------------------------------------------------------------------------------------

class MathGrader:
    """(text, answer) -> is it right? `answer` is the expected one, or a worked solution that ends
    with it.

    The comparing process starts with the first pair that needs it and ends when its standard input
    does, so it never outlives its parent.
    """

    def __init__(self):
        self.lock = threading.Lock()                     # one pair at a time, whoever asks
        self.symbolic = importlib.util.find_spec("math_verify") is not None
        self.process: subprocess.Popen | None = None

    def __call__(self, text: str, answer: str) -> bool:
        text, answer = text[-TAIL:], answer[-TAIL:]
        expected = marked_answer(answer) or answer
        marked = marked_answer(text)
        want, want_unit = split_unit(bare(expected))
        want_number = as_number(want)
        unmarked = text if want_number is None else last_number(text)
        got, got_unit = split_unit(bare(marked or unmarked))
        got_number = as_number(got)
        if not got or not want:
            return False
        if got_unit and want_unit and got_unit != want_unit:
            return False
        if got == want:
            return True
        if want_number is not None and got_number == want_number:
            return True
        if is_words(want):
            return got.strip("()").casefold() == want.strip("()").casefold()
        percent = "%" in got + want                      # 50% may equal 0.5: an expression
        if want_number is not None and got_number is not None and not percent:
            return False
        given = marked or text[-LONGEST:]
        if not self.symbolic or max(len(expected), len(given)) > LONGEST or is_words(got):
            return False
        return self.compare(rf"\boxed{{{expected}}}", rf"\boxed{{{given}}}" if marked else given)

    def compare(self, want: str, got: str) -> bool:
        """Are two expressions equal? RuntimeError if the comparing process does not start."""
        with self.lock:
            if self.process is None:
                self.start()
            verdict = ""
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps([want, got]) + "\n")
                self.process.stdin.flush()
                verdict = self.process.stdout.readline()
            if not verdict:                              # out of time: the kernel has killed it
                self.close()
            return verdict == "true\n"

    def start(self) -> None:
        command = [sys.executable, "-I", str(Path(__file__).resolve())]      # runs `serve` below
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if self.process.stdout.readline() != "ready\n":
            self.close()
            raise RuntimeError("the comparing process of the grader did not start: run "
                               f"`{sys.executable} {__file__}` to see why")

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


# -- the comparing process -----------------------------------------------------------------------

def equal(want: str, got: str) -> bool:
    from math_verify import parse, verify
    return verify(parse(want, parsing_timeout=None), parse(got, parsing_timeout=None),
                  timeout_seconds=None, allow_set_relation_comp=True)


def serve() -> None:
    """Reads pairs from standard input and writes verdicts to standard output, one per line.

    SIGPROF keeps its default action, so the kernel kills the process whatever code it is running.
    A pair that raises an exception ends the process too, which counts as the verdict "wrong".
    """
    import logging
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # for the parent: its end closes our input
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    equal("1", "2")                                      # imports math-verify, builds its parsers
    logging.disable(logging.CRITICAL)
    print("ready", flush=True)
    for line in sys.stdin:
        want, got = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        right = equal(want, got)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("true" if right else "false", flush=True)


if __name__ == "__main__":
    serve()
