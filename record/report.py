"""
A run for people: what its student says, the card that lies beside the saved student, and --log.

log.jsonl is the record; what is here repeats parts of it elsewhere. A tracker's library is imported only by who asks
for it. What is left out: going on with a tracker's run after --resume, which begins a new one of the same name.
Tests: tests/test_report.py
"""
from __future__ import annotations

import json
import shlex
from pathlib import Path

from record.timeline import BUSY

SAMPLES = 8          # of every evaluation: the first prompts' first answers

# -- tables ----------------------------------------------------------------------------------------

def table(rows: list[list[str]]) -> str:
    """Aligned columns, the first one left, the others right."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ("  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:]))]) for r in rows)
    return "\n".join("  " + line.rstrip() for line in lines)


def show_start(why: str, plan: list[list[str]], memory: list[list[str]], changed: dict[str, object]) -> None:
    print(f"\nwho runs where, and what it takes at most\n  {why}")
    print(table(plan))
    print("\nshared memory")
    print(table(memory))
    print("\nwhat differs from the defaults")
    print("\n".join(f"  --{name.replace('_', '-')} {value}" for name, value in changed.items()) + "\n", flush=True)


def show_end(d: dict, out: str) -> None:
    def percent(x):
        return "" if x is None else f"{100 * x:.1f}%"
    print("\n" + table([
        ["", "student before", "student after", "teacher"],
        ["accuracy", percent(d["accuracy_before"]), percent(d["accuracy_after"]), percent(d["accuracy_teacher"])],
        ["KL per token, nats", f"{d['kl_before']:.4f}", f"{d['kl_after']:.4f}", "0"]]))
    print("\n" + table([
        ["", "rollout", "teacher", "learner"],
        ["busy, share of the time", *(percent(d["busy"].get(role, 0)) for role in BUSY)],
        ["tokens per second", thousands(d["gen_tok_s"]), thousands(d["score_tok_s"]) + " (busy)",
         thousands(d["train_tok_s"])]]))
    print(f"\n  overlap {d['overlap']:.2f} of 3   lag mean {d['lag_mean']:.2f}, max {d['lag_max']} versions   "
          f"{d['tokens_trained']:,} tokens trained of {d['tokens_generated']:,} generated   {d['wall_s']:.1f} s")
    print(f"  student: {out}/student   log: {out}/log.jsonl   trace: {out}/trace.json", flush=True)


def thousands(x: float) -> str:
    return f"{x / 1000:.1f}k" if x >= 1000 else f"{x:.0f}"

# -- what the student says -------------------------------------------------------------------------

def show_texts(notes: tuple[str, ...], first_prompt: str) -> None:
    for note in notes:
        print(f"  {note}")
    lines = first_prompt.splitlines()
    print("\nthe first prompt, as the models read it")
    print("\n".join(f"  | {line}" for line in lines[:20]) + ("\n  | ..." if len(lines) > 20 else "") + "\n", flush=True)


def samples(step: int, who: str, answered: list[tuple]) -> str:
    """Plain text: of the first rows the prompt, the first answer, its grade and the expected answer."""
    out = []
    for i, (row, texts, right) in enumerate(answered[:SAMPLES], 1):
        out += [f"==== step {step}, {who}, sample {i}: {'right' if right[0] else 'wrong'}, expected: {row.answer}",
                row.prompt, "----", texts[0], ""]
    return "\n".join(out) + "\n"


def evaluation_line(step: int, who: str, said: dict, answered: list[tuple]) -> str:
    """An evaluation on three lines of a terminal."""
    low, high = (100 * x for x in said["ci"])
    more = "".join(f"  pass@{j} {100 * x:.1f}%" for j, x in said["pass_at_k"].items() if j != "1")
    lines = [f"eval at step {step}, {who}: {100 * said['accuracy']:.1f}% [{low:.1f}, {high:.1f}] of {said['n']} prompts"
             + (f" x {said['k']}" if said["k"] > 1 else "") + more]
    lines += [f"  {'right' if right[0] else 'wrong'}  {shortened(row.prompt, 40)}  ->  {shortened(texts[0], 60)}"
              for row, texts, right in answered[:2]]
    return "\n".join(lines)


def shortened(text: str, width: int) -> str:
    """One line: the beginning and, since that is where answers are, the end."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[:width // 3]} ... {text[-(2 * width // 3 - 5):]}"


# -- the card --------------------------------------------------------------------------------------

def model_card(log: Path) -> str:
    """README.md of a saved student: the facts of its run, all of them from its log."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    runs, evals, done = ([x for x in lines if x["type"] == kind] for kind in ("run", "eval", "done"))
    run, c, d = runs[0], runs[0]["config"], done[-1]
    hub = "" if Path(c["student"]).exists() else f"base_model: {c['student']}\n"
    facts = {
        "student before": f"`{c['student']}`", "teacher": f"`{c['teacher']}`",
        "prompts": f"`{c['task']}`" + "".join(f", {k} `{c['data'][k]}`" for k in ("filter", "suffix") if c["data"][k]),
        "objective": f"{c['kl']} KL, estimator `{c['estimator']}`",
        "training": f"{d['steps']} batches of {c['batch']} responses, {d['tokens_trained']:,} tokens, AdamW, learning "
                    f"rate {c['lr']:g} ({c['lr_schedule']}), seed {c['seed']}",
        "staleness": f"schedule {c['schedule']}: lag mean {d['lag_mean']:.2f}, max {d['lag_max']} versions",
        "time": f"{d['wall_s']:,.0f} s on {', '.join(run['hardware']['gpus']) or run['hardware']['cpu']}",
        "code": f"asyncopd {run['commit']}; " + ", ".join(f"{k} {v}" for k, v in run["versions"].items())}
    measured = ["| step | who | accuracy | 95% interval over prompts | prompts | answers to each |",
                "|--:|---|--:|--:|--:|--:|"]
    measured += [f"| {e['step']} | {e['who']} | {e['accuracy']:.1%} | {e['ci'][0]:.1%} to {e['ci'][1]:.1%} | {e['n']} "
                 f"| {e['k']} |" for e in evals]
    how = f"temperature {c['eval']['temperature']:g}" if c["eval"]["temperature"] else "greedy"
    where = f"`{c['data']['eval_task']}`" if c["data"]["eval_task"] else "rows of the task that were held out"
    kl = (f"KL per token, {c['kl']}, on the student's own prefixes: {d['kl_before']:.4f} in the first ten batches, "
          f"{d['kl_after']:.4f} in the last ten." if d["steps"] >= 20 else "")
    return "\n".join([
        f"---\n{hub}library_name: transformers\ntags: [on-policy-distillation, asyncopd]\n---",
        f"# {log.parent.name}", "",
        "A language model distilled on-policy from a teacher. Measured was what stands here, and nothing else.", "",
        "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items()), "",
        *([f"On {where}, {how}:", "", *measured, ""] if evals else ["It was not evaluated on a task.", ""]), kl, "",
        *(f"    python {shlex.join(r['argv'])}" for r in runs), ""])


# -- --log -----------------------------------------------------------------------------------------

def numbers(type: str, line: dict) -> dict[str, float]:
    """Of a line of the log what can be drawn, by name: step/kl, eval/student/pass_at_k/4."""
    who, found = f"{type}/{line['who']}" if "who" in line else type, {}
    for key, value in line.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        found |= {f"{who}/{key}/{k}".rstrip("/"): v for k, v in parts
                  if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return found


class Board:
    """TensorBoard: files in the run folder."""

    def __init__(self, folder: Path, config: dict):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", "    " + json.dumps(config, indent=2).replace("\n", "\n    "))

    def write(self, step: int, found: dict[str, float]) -> None:
        for name, value in found.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Site:
    """Weights & Biases, and trackio, which has the same three functions."""

    def __init__(self, module, folder: Path, config: dict):
        self.module, self.step = module, 0
        module.init(project="asyncopd", name=folder.resolve().name, config=config)

    def write(self, step: int, found: dict[str, float]) -> None:
        self.step = max(self.step, step)     # an evaluation comes after later steps, and steps may not go back
        self.module.log(found, step=self.step)

    def close(self) -> None:
        self.module.finish()


def tracker(name: str, folder: Path, config: dict):
    """--log NAME, ready to write to."""
    if name == "tensorboard":
        return Board(folder, config)
    import importlib
    return Site(importlib.import_module(name), folder, config)
