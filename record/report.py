"""
Texts for people: tables at the start and the end, progress, samples of answers, the model's card.

Functions named show_ print, all others return text. Nothing here computes a result: every number
comes from the log or from a caller. Left out: the log itself (log.py).
Tests: tests/test_report.py, tests/test_readme.py
"""
from __future__ import annotations

import json
import shlex
from pathlib import Path

from data.printable import one_line, printable
from record.timeline import WORK

SAMPLES = 8                    # answers of an evaluation that are kept: those to the first prompts
PROMPT_LINES = 20              # lines of the first prompt that are shown


# -- tables at the start and the end -------------------------------------------------------------

def table(rows: list[list[str]]) -> str:
    """Aligned columns: the first one to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(rows: list[list[str]]) -> str:
    """The same cells as a Markdown table."""
    rule = ["---", *["--:"] * (len(rows[0]) - 1)]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [rows[0], rule, *rows[1:]]]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def show_start(why: str, plan: list[list[str]], memory: list[list[str]],
               changed: dict[str, object]) -> None:
    """`why` the roles are placed as in `plan`, the shared memory, the flags that differ from their
    defaults."""
    flags = [one_line(f"  --{name.replace('_', '-')} {value}") for name, value in changed.items()]
    show(f"\nwho runs where, and what it takes at most\n  {why}")
    show(table(plan))
    show("\nshared memory")
    show(table(memory))
    show("\nwhat differs from the defaults")
    show("\n".join(flags) + "\n")


def show_prompt(notes: tuple[str, ...], first_prompt: str) -> None:
    """Notes on the run, and the first prompt as the models read it."""
    for note in notes:
        show(f"  {note}")
    lines = [f"  | {line}" for line in printable(first_prompt).split("\n")]
    if len(lines) > PROMPT_LINES:
        lines = [*lines[:PROMPT_LINES], "  | ..."]
    show("\nthe first prompt, as the models read it")
    show("\n".join(lines) + "\n")


def show_end(done: dict, out: str) -> None:
    """The last line of the log as two tables, and where everything lies."""
    accuracy = [percent(done[f"accuracy_{when}"]) for when in ("before", "after", "teacher")]
    after = f"{done['kl_after']:.4f}"
    if done["steps"] < 2:
        after = ""                               # one step has no change to show
    busy = [percent(done["busy"].get(role, 0)) for role in WORK]
    show("\n" + table([
        ["", "student before", "student after", "teacher"],
        ["accuracy", *accuracy],
        ["KL per token, nats", f"{done['kl_before']:.4f}", after, "0"]]))
    show("\n" + table([
        ["", *WORK],
        ["busy, share of the time", *busy],
        ["tokens per second", thousands(done["gen_tok_s"]),
         thousands(done["score_tok_s"]) + " (busy)", thousands(done["train_tok_s"])]]))
    show(f"\n  overlap {done['overlap']:.2f} of 3   "
         f"lag mean {done['lag_mean']:.2f}, max {done['lag_max']} versions   "
         f"{done['tokens_trained']:,} tokens trained of {done['tokens_generated']:,} generated   "
         f"{done['wall_s']:.1f} s")
    show(f"  student: {out}/student   log: {out}/log.jsonl   trace: {out}/trace.json")


def show(text: str) -> None:
    """Print a text that may hold a model's or a file's words."""
    print(printable(text), flush=True)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def thousands(x: float) -> str:
    return f"{x / 1000:.1f}k" if x >= 1000 else f"{x:.0f}"


# -- while it runs -------------------------------------------------------------------------------

def progress_text(metrics: dict) -> str:
    """A step line, in the width of a progress bar."""
    lag = f"{metrics['lag_min']}/{metrics['lag_mean']:.1f}/{metrics['lag_max']}"
    return (f"kl {metrics['kl']:.3f}  lag {lag}  w_max {metrics['w_max']:.1f}  "
            f"gen {thousands(metrics['gen_tok_s'])} tok/s  "
            f"learn {thousands(metrics['train_tok_s'])} tok/s")


def evaluation_text(step: int, who: str, summary: dict, answered: list[tuple]) -> str:
    """An evaluation on three lines of a terminal.

    `answered`: of every prompt its row, the texts, and whether each is right.
    """
    low, high = summary["ci"]
    lines = [f"eval at step {step}, {who}: {percent(summary['accuracy'])} "
             f"[{100 * low:.1f}, {100 * high:.1f}] of {summary['n']} prompts"]
    if summary["k"] > 1:
        lines[0] += f" x {summary['k']}"
    for k, share in summary["pass_at_k"].items():
        if k != "1":
            lines[0] += f"  pass@{k} {percent(share)}"
    for row, texts, right in answered[:2]:
        question, answer = shortened(row.prompt, 40), shortened(texts[0], 60)
        lines.append(f"  {verdict(right[0])}  {question}  ->  {answer}")
    return "\n".join(lines)


def sample_texts(step: int, who: str, answered: list[tuple]) -> str:
    """Of the first prompts: the prompt, the first answer, its grade and the expected answer."""
    lines = []
    for i, (row, texts, right) in enumerate(answered[:SAMPLES], 1):
        lines.append(f"==== step {step}, {who}, sample {i}: {verdict(right[0])}, "
                     f"expected: {row.answer}")
        lines += [row.prompt, "----", texts[0], ""]
    return printable("\n".join(lines) + "\n")


def verdict(right: bool) -> str:
    return "right" if right else "wrong"


def shortened(text: str, width: int) -> str:
    """One line: the beginning of a text and, since answers stand there, its end."""
    text = printable(" ".join(text.split()))
    if len(text) <= width:
        return text
    return f"{text[:width // 3]} ... {text[-(2 * width // 3 - 5):]}"


# -- the card ------------------------------------------------------------------------------------

def model_card(log: Path) -> str:
    """README.md of a saved student: the facts of its run, all of them from its log."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    runs = [line for line in lines if line["type"] == "run"]
    evaluations = [line for line in lines if line["type"] == "eval"]
    done = [line for line in lines if line["type"] == "done"][-1]
    config = runs[0]["config"]
    return "\n".join([
        *card_header(config["student"]),
        f"# {one_line(log.parent.name)}", "",
        "A language model distilled on-policy from a teacher. Every number below was measured in "
        "its run.", "",
        "| | |", "|---|---|",
        *(f"| {name} | {one_line(fact)} |" for name, fact in card_facts(runs[0], done).items()), "",
        *card_evaluations(config, evaluations),
        card_divergence(config, done), "",
        f"With the code of commit {runs[0]['commit']} and its environment:", "",
        *(f"    .venv/bin/python {command_line(run['argv'])}" for run in runs), ""])


def command_line(words: list[str]) -> str:
    """One line for bash, in the folder of the code. A word with a line break or another control
    character is written as $'..', in which bash reads escapes."""
    script, *flags = words
    if Path(script).name == "asyncopd.py":       # from wherever it was called
        script = "asyncopd.py"
    quoted = []
    for word in (script, *flags):
        if one_line(word) == word:
            quoted.append(shlex.quote(word))
        else:
            inside = word.replace("\\", "\\\\").replace("'", "\\'")
            quoted.append(f"$'{one_line(inside)}'")
    return " ".join(quoted)


def card_header(student: str) -> list[str]:
    """The hub's metadata; a folder of this machine is no base model there."""
    lines = ["---"]
    if not Path(student).exists():
        lines.append(f"base_model: {one_line(student)}")
    lines += ["library_name: transformers", "tags: [on-policy-distillation, asyncopd]", "---"]
    return lines


def card_facts(run: dict, done: dict) -> dict[str, str]:
    config, hardware = run["config"], run["hardware"]
    prompts = f"`{config['task']}`"
    for key in ("filter", "suffix"):
        if config["data"][key]:
            prompts += f", {key} `{config['data'][key]}`"
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return {
        "student before": f"`{config['student']}`",
        "teacher": f"`{config['teacher']}`",
        "prompts": prompts,
        "precision": config["dtype"] + ", learnt in float32" * (config["dtype"] != "float32"),
        "objective": f"{config['kl']} KL, estimator `{config['estimator']}`",
        "training": f"{done['steps']} batches of {config['batch']} responses, "
                    f"{done['tokens_trained']:,} tokens, AdamW, learning rate {config['lr']:g} "
                    f"({config['lr_schedule']}), seed {config['seed']}",
        "staleness": f"schedule {config['schedule']}: lag mean {done['lag_mean']:.2f}, "
                     f"max {done['lag_max']} versions",
        "time": f"{done['wall_s']:,.0f} s on {', '.join(hardware['gpus']) or hardware['cpu']}",
        "code": f"asyncopd {run['commit']}; {versions}"}


def card_evaluations(config: dict, evaluations: list[dict]) -> list[str]:
    """A table of all evaluations, and how they were made."""
    if not evaluations:
        return ["It was not evaluated on a task.", ""]
    where, how = "rows of the task that were held out", "greedy"
    if config["data"]["eval_task"]:
        where = f"`{one_line(config['data']['eval_task'])}`"
    if config["eval"]["temperature"]:
        how = f"temperature {config['eval']['temperature']:g}"
    rows = []
    for e in evaluations:
        low, high = e["ci"]
        rows.append(f"| {e['step']} | {e['who']} | {e['accuracy']:.1%} | {low:.1%} to {high:.1%} "
                    f"| {e['n']} | {e['k']} |")
    return [f"On {where}, {how}:", "",
            "| step | who | accuracy | 95% interval over prompts | prompts | answers to each |",
            "|--:|---|--:|--:|--:|--:|", *rows, ""]


def card_divergence(config: dict, done: dict) -> str:
    """Empty where the first and the last ten batches overlap."""
    if done["steps"] < 20:
        return ""
    return (f"KL per token, {config['kl']}, on the student's own prefixes: "
            f"{done['kl_before']:.4f} in the first ten batches, "
            f"{done['kl_after']:.4f} in the last ten.")
