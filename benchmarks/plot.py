"""
The figures of README and docs, from the raw results in this folder: they can be drawn again without a run.

    python benchmarks/plot.py timeline [SYNC_RUN ASYNC_RUN]   # figures/timeline.png; given two run folders, their
                                                              # traces are cut to a few steps: timeline.jsonl
    python benchmarks/plot.py lag                             # figures/lag.png, from pipeline.jsonl
"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
COLORS = {"generate": "#3b78b8", "push": "#9ec3e6", "score": "#57a55a", "step": "#d9822b", "publish": "#f3c27d"}
SECONDS = 3.0                     # of a run that the timeline shows
SIMULATED = {4: .90, 8: .98, 16: 1.00}      # cut / keep in tokens, a discrete-event simulation, responses of 2.4 steps


def excerpt(folder: str) -> list[dict]:
    """The spans of the SECONDS in the middle of a run, times from 0."""
    events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    schedule = json.loads((Path(folder) / "log.jsonl").open().readline())["config"]["schedule"]
    work = [e for e in events if e["ph"] == "X" and e["name"] in COLORS]
    steps = sorted(e["ts"] for e in work if e["name"] == "step")
    start = steps[len(steps) // 2] / 1e6
    return [dict(run=schedule, worker=names[e["tid"]], what=e["name"], start=round(max(0.0, a), 4),
                 end=round(min(SECONDS, b), 4)) for e in work
            if (b := (e["ts"] + e["dur"]) / 1e6 - start) > 0 and (a := e["ts"] / 1e6 - start) < SECONDS]


def timeline(folders: list[str]) -> None:
    raw = HERE / "timeline.jsonl"
    if folders:
        raw.write_text("".join(json.dumps(s) + "\n" for f in folders for s in excerpt(f)))
    spans = [json.loads(line) for line in raw.read_text().splitlines()]
    runs = list(dict.fromkeys(s["run"] for s in spans))
    fig, axes = plt.subplots(len(runs), 1, figsize=(10, 1.6 * len(runs) + 0.6), sharex=True)
    for ax, run in zip(axes, runs):
        workers = sorted({s["worker"] for s in spans if s["run"] == run}, key=lambda w: "rtl".index(w[0]))
        for s in spans:
            if s["run"] == run:
                ax.barh(workers.index(s["worker"]), s["end"] - s["start"], left=s["start"], color=COLORS[s["what"]],
                        height=0.72)
        steps = sum(s["run"] == run and s["what"] == "step" for s in spans)
        ax.set_yticks(range(len(workers)), [w.rstrip("0") for w in workers])
        ax.invert_yaxis()
        ax.set_xlim(0, SECONDS)
        ax.set_title(f"{'synchronous' if run == 'sync' else 'asynchronous'}: {steps} steps", loc="left", fontsize=10)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(left=False)
    axes[-1].set_xlabel("seconds")
    fig.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in COLORS.values()], COLORS, loc="upper right", ncols=5,
               frameon=False, fontsize=9)
    save(fig, "timeline")


def lag() -> None:
    rows = [json.loads(line) for line in (HERE / "pipeline.jsonl").read_text().splitlines()]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for kind, color in (("lognormal", "#3b78b8"), ("pareto", "#d9822b")):
        mine = [r for r in rows if r["lengths"] == kind and r["inflight"] == "recompute" and r["slots"] == 320]
        keep = next(r for r in mine if r["rule"] == "keep")
        cut = sorted((r for r in mine if r["rule"] == "cut"), key=lambda r: r["max_lag"])
        left.plot([r["max_lag"] for r in cut], [r["tok_s"] / keep["tok_s"] for r in cut], "o-", color=color,
                  label=f"cut, {kind}")
        right.plot([r["max_lag"] for r in cut], [r["lag_max"] for r in cut], "o-", color=color, label=f"cut, {kind}")
        right.axhline(keep["lag_max"], color=color, ls=":", label=f"keep, {kind}")
        for rule, marker in (("wait", "s"), ("drop", "x")):
            r = [r for r in mine if r["rule"] == rule]
            left.plot([x["max_lag"] for x in r], [x["tok_s"] / keep["tok_s"] for x in r], marker, color=color,
                      label=f"{rule}, {kind}", ms=6)
    left.plot(*zip(*SIMULATED.items()), "--", color="gray", label="cut, simulated")
    left.set(xlabel="--max-lag", ylabel="tokens per second / keep", title="price of the bound", ylim=(0, 1.1))
    right.set(xlabel="--max-lag", ylabel="oldest trained token, versions", title="what it buys")
    right.plot([4, 16], [4, 16], color="lightgray", lw=1, label="the bound")
    for ax in (left, right):
        ax.legend(fontsize=7.5, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    save(fig, "lag")


def save(fig, name: str) -> None:
    (HERE / "figures").mkdir(exist_ok=True)
    fig.tight_layout()
    fig.savefig(HERE / "figures" / f"{name}.png", dpi=110)
    print(json.dumps({"figure": f"benchmarks/figures/{name}.png"}))


if __name__ == "__main__":
    {"timeline": timeline, "lag": lambda _: lag()}[sys.argv[1]](sys.argv[2:])
