"""Characters that a terminal obeys never reach it, nor a file that people read, from a model's or a file's text."""
import json
import multiprocessing
import subprocess
import sys
import unicodedata

import pytest

import asyncopd
from data.printable import ESCAPED, one_line, printable
from data.prompts import Row
from record import report
from record.log import Log
from tests.test_report import LINES, SAID
from transport import process

# Clears the screen, sets the title, moves the cursor, asks the terminal to type, in eight bits too; ends a C string;
# reverses what follows and hides it; half a pair
VOCABULARY = ["\x1b[2J", "\x1b]0;title\x07", "\x1b[1A", "\x1b[6n", "\x9b31m", "\x85", "\0", "\x08", "\x7f", "\r",
              "\u202e", "\u2066", "\u200f", "\u061c", "\u2028", "\ud800", "\udfff", "\U000e0041", "\ufeff"]
NASTY = "a" + "b".join(VOCABULARY) + "c"
FORK = multiprocessing.get_context("fork")


def harmless(data: bytes) -> str:
    """The text in these bytes, of which a terminal shows every character."""
    text = data.decode("utf-8")
    bad = {x for x in text if unicodedata.category(x) in ESCAPED and x not in "\n\t"}
    assert not bad, [hex(ord(x)) for x in bad]
    return text


def test_what_is_shown_stays_and_the_rest_becomes_its_escape():
    for text in ("plain, äöü, 汉字, \\boxed{7}", "two\nlines\tand a column", "👩‍👩‍👧 e\u0301"):
        assert printable(text) == text
    assert printable("\x1b[2J\0\x85\u202e\ud800\U000e0041\r\n") == "\\x1b[2J\\x00\\u0085\\u202e\\ud800\\U000e0041\\r\n"
    assert one_line("a\tb\nc") == "a\\tb\\nc"
    assert harmless(printable(NASTY).encode()).startswith("a\\x1b[2Jb\\x1b]0;title\\x07b")


def test_answers_and_warnings(tmp_path, capfd):
    log = Log(tmp_path, steps=5)
    log.evaluation(5, "student", SAID, [(Row(NASTY, NASTY), [NASTY, "other"], [True, False])])
    shown = harmless(capfd.readouterr().out.encode("utf-8", "surrogatepass"))
    assert "right  a\\x1b[2Jb" in shown and "\\udfff" in shown
    log.warn(f"teacher0: {NASTY}", what="warning", why=NASTY)
    assert "teacher0: a\\x1b[2Jb" in harmless(capfd.readouterr().err.encode("utf-8", "surrogatepass"))
    assert harmless((tmp_path / "samples.txt").read_bytes()).count("\\x1b[2J") == 3        # prompt, answer, expected
    why = json.loads((tmp_path / "log.jsonl").read_bytes().splitlines()[-1])["why"]
    assert why == NASTY and (tmp_path / "log.jsonl").read_bytes().isascii(), "nothing is lost for programs"


def test_the_tables_before_a_run_and_the_messages(capfd):
    report.show_start("why", [["a", NASTY]], [["b", NASTY]], {"data.suffix": "\nso " + NASTY})
    report.show_prompt((NASTY,), f"1{NASTY}\n2\v3")
    asyncopd.refuse(ValueError(f"--student {NASTY}"))
    asyncopd.complain(f"rollout0 crashed\n{NASTY}")
    out, err = capfd.readouterr()
    shown = harmless(out.encode("utf-8", "surrogatepass"))
    assert "--data.suffix \\nso a\\x1b[2J" in shown and "  | 1a\\x1b[2Jb" in shown and "  | 2\\x0b3\n" in shown
    assert harmless(err.encode("utf-8", "surrogatepass")).count("\\x1b[2J") == 2


def test_the_card_and_its_command(tmp_path):
    argv = ["asyncopd.py", "--task=it's", "--data.suffix=\nso it's \\boxed{}:\t\x1b[2J\u202e"]
    config = LINES[0]["config"] | {"student": NASTY, "teacher": NASTY, "task": NASTY}
    config["data"] = {"filter": NASTY, "suffix": "\nso", "eval_task": NASTY}
    run = LINES[0] | {"config": config, "argv": argv}
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(line) for line in [run, *LINES[1:]]))
    card = harmless(report.model_card(tmp_path / "log.jsonl").encode("utf-8"))
    assert "suffix `\\nso` |\n" in card and card.count("\\x1b[2J") == 7
    command = report.command_line(argv)
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    line = command.replace("asyncopd.py", f"{sys.executable} -c '{code}'", 1)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env={"LC_ALL": "C.UTF-8"})
    assert json.loads(done.stdout) == argv[1:], "bash reads the words that were given"


def in_a_worker(log):
    process.begin(log, "cpu")
    print(f"reads {NASTY}\n50%\r100%\n", flush=True)
    raise RuntimeError(NASTY)


def test_the_log_of_a_worker_that_dies_of_it(tmp_path):
    worker = FORK.Process(target=in_a_worker, args=(str(tmp_path / "rollout0.log"),))
    worker.start()
    worker.join(30)
    assert worker.exitcode == 1
    text = harmless((tmp_path / "rollout0.log").read_bytes())
    assert "reads a\\x1b[2Jb" in text and "RuntimeError: a\\x1b[2Jb" in text and "50%\n100%\n" in text


@pytest.mark.parametrize("text", ["", "a", "\n"])
def test_short_texts(text):
    assert printable(text) == text
