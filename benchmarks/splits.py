"""
The split of eight GPUs that the estimate chooses, against the paper's 4 / 1 / 3, on stand-ins that take time instead of
computing (benchmarks/pipeline.py), at the stage times of three students.

    python benchmarks/splits.py              # Qwen3-1.7B, 4B and 8B, 30 batches each; 5 minutes
    python benchmarks/splits.py --steps 12   # shorter

The stage times are those of control/estimate.py for the paper's setting, and the engines' turns follow from the same
bytes per second; all are made shorter by one factor. The responses of the stand-ins have 4,500 tokens on average,
lognormal, and at most 16,384.
Records: benchmarks/splits.jsonl, from which docs/gpu.md has its table. Last line: one JSON object, {student: trained
tokens per second with the split of the estimate / with 4, 1 and 3}.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from pipeline import BATCH, Pace, mean_length, play  # noqa: E402

from config import Config  # noqa: E402
from control import dryrun, plan  # noqa: E402
from control.command_line import Given  # noqa: E402
from control.estimate import GPU, estimate, fit_split, gpu  # noqa: E402
from control.resolve import configure  # noqa: E402
from extension import ModelPair  # noqa: E402
from record.provenance import provenance  # noqa: E402
from record.report import markdown  # noqa: E402

RECORDS = HERE / "splits.jsonl"
STUDENTS = ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B")
KIND, UNIT = "lognormal", 64                     # a token of the stand-ins is 64 tokens
SHORTER = 1 / 60


def setting(student: str) -> tuple[Config, ModelPair]:
    """The paper's, on eight GPUs."""
    cfg = configure([f"--config={HERE.parent}/configs/deepmath_1.7b.yaml", f"--student={student}", "--gpus=8",
                     "--dry-run"])
    known = [dryrun.known_model(role, getattr(cfg, role)) for role in ("student", "teacher")]
    return cfg, ModelPair(student=known[0].shape, teacher=known[1].shape, student_config=known[0].config,
                          teacher_config=known[1].config)


def pace(cfg: Config, models: ModelPair) -> Pace:
    """Of the stand-ins, for batches of BATCH responses, by the estimate for this split."""
    needs = plan.memory(cfg, models.student, models.teacher, GPU["gb"])
    machine = gpu(cfg)
    seconds, _ = estimate(cfg, models, needs, machine)
    tokens = cfg.batch * (cfg.max_prompt / 4 + cfg.max_response / 2)              # that the estimate counts
    ours = cfg.batch * mean_length(KIND) * UNIT
    size = plan.itemsize(cfg)
    held = mean_length(KIND) * UNIT / 2 * models.student.cached(size)             # of a running response
    weights = size * models.student.P
    return Pace(step_s=SHORTER * seconds["learn"] * ours / tokens,
                teacher_s=SHORTER * seconds["score"] * cfg.teachers * ours / tokens,
                turn_s=SHORTER * UNIT * weights / machine.bytes_s,
                knee=weights / held * BATCH / cfg.batch)


def run(student: str, cfg: Config, models: ModelPair, steps: int) -> dict:
    found = play(KIND, steps=steps, workers=cfg.rollouts, teachers=cfg.teachers, pace=pace(cfg, models))
    return {"student": student, "split": [cfg.rollouts, cfg.teachers, cfg.learners], "tok_s": found["tok_s"],
            "overlap": found["overlap"], "lag_mean": found["lag_mean"], "lag_max": found["lag_max"]}


def newest(student: str) -> tuple[dict, dict] | None:
    """The newest records of a student: with the paper's split, and with the one that ran after it."""
    found = [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []
    mine = [r for r in found if r["student"] == student]
    at = max((i for i, r in enumerate(mine) if r["split"] == [4, 1, 3]), default=None)
    return None if at is None else (mine[at], mine[-1])


def gain(papers: dict, best: dict) -> float:
    return best["tok_s"] / papers["tok_s"]


def table() -> str:
    """Markdown, from the records."""
    lines = [["student", "4 / 1 / 3: lag mean / max", "by the estimate", "lag mean / max", "trained tokens per second"]]
    for student in STUDENTS:
        pair = newest(student)
        if pair is None:
            continue
        papers, best = pair
        lags = [f"{r['lag_mean']:.1f} / {r['lag_max']}" for r in pair]
        name = student.partition("/")[2]
        if best is papers:
            lines.append([name, lags[0], "the same", "", ""])
        else:
            lines.append([name, lags[0], " / ".join(map(str, best["split"])), lags[1], f"x {gain(papers, best):.2f}"])
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--students", nargs="*", default=STUDENTS)
    args = parser.parse_args()
    made = provenance({}, {})
    records = []
    for student in args.students:
        cfg, models = setting(student)
        cfg = replace(cfg, rollouts=4, teachers=1, learners=3)
        best, _ = fit_split(cfg, Given(), models, {}, GPU["gb"])
        for split in [cfg] if best == cfg else [cfg, best]:
            r = run(student, split, models, args.steps)
            print(json.dumps(r), flush=True)
            records.append(r | {name: made[name] for name in ("commit", "hardware")})
    with RECORDS.open("a") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    print(json.dumps({s: gain(*newest(s)) for s in args.students}))


if __name__ == "__main__":
    main()
