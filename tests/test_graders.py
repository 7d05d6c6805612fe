"""Verdicts against those of a person, hostile texts, and the numbers of an evaluation."""
import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from data import graders
from data.graders import MathGrader, marked_answer, summary
from tests.conftest import ROOT

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"
SYMBOLIC = importlib.util.find_spec("math_verify") is not None


@pytest.fixture(scope="module")
def grade():
    grader = MathGrader()
    yield grader
    grader.close()


def boxed(answer: str) -> str:
    return rf"... so the answer is $\boxed{{{answer}}}$."


WORKED = ("Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n"
          "Working 50 minutes, she earned 0.2 x 50 = $10.\n#### 10")
BY_TEXT_AND_NUMBER = [      # text, expected answer (or a worked solution), right?
    # marks, and no marks
    ("so it is 72", "#### 72", True), ("#### 72", "48/2 = 24\n#### 72", True),
    ("#### 10", WORKED, True), ("#### 11", WORKED, False), (boxed("72"), "72", True),
    (boxed("71"), "72", False), ("The answer is 72.", "72", True), ("**Answer:** 72", "72", True),
    ("it is 72", "72", True), ("72 or 73", "72", False), ("so it's 1/2", "1/2", True),
    ("first \\boxed{1}, no: \\boxed{2}", "2", True),
    ("first \\boxed{2}, no: \\boxed{1}", "2", False), ("\\boxed{\\boxed{5}}", "5", True),
    ("####", "72", False), ("\\boxed{", "72", False), ("\\boxed{}", "72", False),
    ("#### 5\n#### 6", "6", True), ("the total is 12, and so \\boxed{7}", "12", False),
    # numbers
    ("#### 72.0", "72", True), ("#### 72.5", "72", False), ("$1,234", "1234", True),
    ("#### 1234", "1,234", True), ("#### 12", "1,2", False), ("-5", "5", False),
    ("#### -5", "-5", True), ("#### −5", "-5", True), ("#### +5", "5", True),
    ("#### -0", "0", True), ("#### .5", "0.5", True), ("#### 1e3", "1000", True),
    ("#### 0.3333", "1/3", False), ("#### 2/4", "1/2", True), ("#### 007", "7", True),
    ("#### 1/0", "1", False), ("#### 12345678901234567890", "12345678901234567891", False),
    ("#### " + "9" * 400, "8" * 400, False), ("#### 1_000", "1000", False),
    ("#### inf", "72", False), ("#### nan", "nan", True), ("#### $18", "18", True),
    # units, where only what is around the number differs
    ("#### 18 dollars", "18 dollars", True), ("#### $18.00", "$18", True),
    ("#### 50%", "50", True), (boxed("5 dollars"), "5", True),
    (boxed(r"10 \text{ m/s}"), "10", True), (boxed(r"5\text{cm}"), "5", True),
    (boxed("5 cm"), "5 m/s", False), (boxed("6 cm"), "5", False), (boxed("5 pi"), "5", False),
    (boxed("2.5 square feet"), "5/2", True), (boxed("5 cm"), "5 km", False),
    (boxed("5 cm"), "5 CM", True),
    # words
    (boxed("Yes"), "yes", True), (boxed("Paris"), "London", False),
    (boxed("listen"), "silent", False), (boxed(r"\text{even}"), "even", True),
    (boxed(r"\text{(A)}"), "A", True), ("(B)", "A", False),
    # nothing
    ("", "72", False), ("   ", "72", False), ("no number", "", False), ("", "", False),
    ("\0", "72", False),
]
BY_EXPRESSION = [
    # fractions
    (boxed(r"\frac{1}{2}"), "0.5", True), (boxed("0.5"), r"\frac12", True),
    (boxed(r"\dfrac{3}{4}"), "3/4", True), (boxed(r"-\frac{3}{4}"), r"\frac{-3}{4}", True),
    (boxed(r"\frac{2}{3}"), r"\frac{3}{2}", False),
    (boxed(r"1\frac{1}{2}"), r"\frac{3}{2}", True),
    (boxed(r"\frac{10}{20}"), r"\frac{1}{2}", True),
    ("The answer is $\\frac{1}{2}$.", "1/2", True), (boxed(r"\tfrac{7}{8}"), "0.875", True),
    # units
    (boxed(r"\frac{5}{2}\text{ cm}"), "2.5", True), (boxed(r"90^\circ"), "90", True),
    (boxed("50\\%"), "0.5", True),
    # LaTeX
    (boxed(r"3\sqrt{2}"), r"\sqrt{18}", True), (boxed(r"2\sqrt{3}"), r"3\sqrt{2}", False),
    (boxed("2^{10}"), "1024", True), (boxed(r"x=5"), "5", True), (boxed("3+2x"), "2x+3", True),
    (boxed("(x+1)^2"), "x^2+2x+1", True), (boxed("(x-1)^2"), "x^2+2x+1", False),
    (boxed(r"2\pi"), r"\pi \cdot 2", True), (boxed(r"\left(1,\,2\right)"), "(1, 2)", True),
    (boxed(r"\infty"), r"\infty", True), (boxed(r"i"), "j", False),
    (boxed(r"\binom{5}{2}"), "10", True), (boxed(r"\sin(\pi/6)"), "1/2", True),
    (boxed(r"\pm 2"), "2, -2", True), (boxed(r"10^{-3}"), "0.001", True),
    (boxed(r"2\cdot 10^3"), "2000", True), (boxed("1{,}234"), "1234", True),
    (boxed(r"\frac{\sqrt{2}}{2}"), r"\frac{1}{\sqrt 2}", True), (boxed("3.14"), r"\pi", False),
    # lists, sets, intervals
    (boxed("2, 1"), "1, 2", True), (boxed(r"\{1,2\}"), "1,2", True),
    (boxed("1,2,3"), "1,2", False), (boxed(r"x \le 2"), r"(-\infty,2]", True),
    (boxed(r"x < 2"), r"(-\infty,2]", False), (boxed("(1,2)"), "(2,1)", False),
    (boxed("[1,2]"), "(1,2)", False), (boxed("(-\\infty, 2]"), r"(-\infty,2]", True),
    # hostile: as right answers and as wrong ones
    (boxed("("), "5", False), (boxed("x" * 400), "y+1", False),
    (boxed("\0x+1"), r"\frac{1}{2}", False),
    (boxed(r"\frac{" * 60 + "1" + "}{2}" * 60), "5", False),
    (boxed("__import__('os').abort()"), "5", False), (boxed("\\u{d800}\ud800"), "5x", False),
    (boxed("1+" * 240 + "1"), "241", True),
]


# Right answers that are judged wrong: the algebra system does not see that they are equal.
TOO_STRICT = [(boxed(r"e^{i\pi}"), "-1"), (boxed(r"\sqrt{-1}"), "i"),
              (boxed(r"\ln 2"), r"\log_e 2"),
              (boxed(r"\begin{pmatrix}1\\2\end{pmatrix}"), "(1,2)")]


@pytest.mark.parametrize("text, answer, right", BY_TEXT_AND_NUMBER)
def test_answers_that_need_no_algebra(grade, text, answer, right):
    assert grade(text, answer) is right


@pytest.mark.skipif(not SYMBOLIC, reason="math-verify is not installed")
@pytest.mark.parametrize("text, answer, right", BY_EXPRESSION)
def test_answers_that_are_expressions(grade, text, answer, right):
    assert grade(text, answer) is right


@pytest.mark.parametrize("text, answer", TOO_STRICT)
def test_known_cases_that_are_judged_too_strictly(grade, text, answer):
    assert not grade(text, answer)


LONG = [
    "(" * 100_000, "9" * 10 ** 5, "{" * 100_000, "\\boxed{" * 100_000, "#" * 100_000,
    "\0" * 100_000, "\\frac{" * 20_000 + "1" + "}{2}" * 20_000, "answer is " * 10_000,
    " " * 100_000, "-" * 100_000, "1," * 50_000, "1/" * 50_000, "answer:" + "*" * 100_000,
    "\\" * 100_000, "\ud800" * 1000, "1e9999999", "$" * 100_000,
]


@pytest.mark.parametrize("text", LONG)
def test_long_and_odd_texts_are_judged_wrong_at_once(grade, text):
    grade("", "warm")
    start = time.monotonic()
    assert not grade(text, "5x+1")
    assert not grade(f"\\boxed{{{text}}}", "5")
    assert not grade("5", text)
    assert time.monotonic() - start < 3


@pytest.mark.skipif(not SYMBOLIC, reason="math-verify is not installed")
def test_a_comparison_without_end_is_ended_and_the_next_pair_judged(grade, monkeypatch):
    """In a thread, with the parent's signals masked and its timers its own: as a run grades."""
    verdicts, rung = [], []
    old = signal.signal(signal.SIGPROF, lambda *_: rung.append(1))
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        def judge():
            verdicts.append(grade(boxed("10^{10^{10}}"), "5"))
            verdicts.append(grade(boxed("100000000!"), r"\frac{5}{3}"))
            verdicts.append(grade(boxed("2^{3}"), "8"))
        start = time.monotonic()
        thread = threading.Thread(target=judge)
        thread.start()
        thread.join(60)
        assert verdicts == [False, False, True]
        assert time.monotonic() - start < 30 and not rung
        assert signal.getsignal(signal.SIGPROF) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGPROF, old)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)


@pytest.mark.skipif(not SYMBOLIC, reason="math-verify is not installed")
def test_the_comparing_process_ends_with_its_parent():
    code = ("import os; from data import graders; "
            "g = graders.MathGrader(); g(r'\\boxed{2^2}', '4'); "
            "print(g.process.pid, flush=True); os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    limit = time.monotonic() + 5
    while os.path.exists(f"/proc/{int(done.stdout)}") and time.monotonic() < limit:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{int(done.stdout)}")


def test_a_comparing_process_that_cannot_start_is_an_error_not_a_wrong_answer(monkeypatch):
    grader = MathGrader()
    monkeypatch.setattr(graders, "__file__", "/absent.py")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="did not start"):
            grader.compare("1", "1")


def test_without_math_verify_text_and_numbers_still_count():
    grader = MathGrader()
    grader.symbolic = False
    assert grader(boxed("0.50"), "1/2") and grader(boxed(r"\sqrt 2"), r"\sqrt 2")
    assert not grader(boxed("2^2"), "4x") and grader.process is None


def test_braces_inside_an_answer_are_kept():
    assert marked_answer(r"\boxed{\frac{a}{b}} and \boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert marked_answer(r"\boxed{\frac{a}{b}} and \boxed{never closed") == r"\frac{a}{b}"


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
def test_every_solution_of_gsm8k_is_right_for_its_own_problem_and_not_for_the_next(grade):
    solutions = [json.loads(line)["answer"] for line in open(GSM8K)]
    finals = [solution.split("####")[1].strip() for solution in solutions]
    for say in ("#### {}", "So the answer is \\boxed{{{}}}.", "That leaves ${} in all."):
        texts = [say.format(final) for final in finals]
        assert all(grade(text, solution) for text, solution in zip(texts, solutions))
        of_the_next = [grade(text, solution) for text, solution in zip(texts[1:], solutions)]
        assert of_the_next == [a == b for a, b in zip(finals[1:], finals)]


# -- the numbers of an evaluation -----------------------------------------------------------------

@pytest.mark.parametrize("k, right", [(6, 0), (6, 1), (6, 3), (6, 6), (5, 2)])
def test_pass_at_j_is_the_mean_over_every_choice_of_j_answers(k, right):
    answers = [i < right for i in range(k)]
    pass_at_k = summary([answers])["pass_at_k"]
    assert set(pass_at_k) == {str(j) for j in {1, 2, 4, k}}
    for j, value in pass_at_k.items():
        chosen = [any(c) for c in itertools.combinations(answers, int(j))]
        assert value == pytest.approx(sum(chosen) / len(chosen), abs=1e-12)


def test_the_interval_covers_the_truth_in_about_95_cases_of_100():
    """Prompts of their own difficulty, 4 answers each: 200 evaluations of 100 prompts."""
    rng, held = random.Random(0), 0
    for _ in range(200):
        difficulty = [rng.random() for _ in range(100)]
        right = [[rng.random() < p for _ in range(4)] for p in difficulty]
        low, high = summary(right, resamples=400)["ci"]
        held += low <= 0.5 <= high
    assert 0.90 <= held / 200 <= 0.99


def test_a_mean_over_answers_and_prompts():
    numbers = summary([[True, False], [True, True], [False, False], [False, False]])
    low, high = numbers["ci"]
    assert (numbers["n"], numbers["k"]) == (4, 2)
    assert numbers["accuracy"] == numbers["avg_at_k"] == 3 / 8
    assert numbers["pass_at_k"] == {"1": 3 / 8, "2": 1 / 2}
    assert low < 3 / 8 < high
