"""
Renews what stands between markers in docs/: the tables that code and raw results print.

    python benchmarks/tables.py

A table stands between `<!-- name -->` and `<!-- /name -->`; PAGES lists, for every page, the names that it holds.
Last line: one JSON object, {"pages", "changed"}: how many pages there are, and which of them had to be rewritten.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import apply  # noqa: E402
import designs  # noqa: E402
import gsm8k_lm  # noqa: E402
import kills  # noqa: E402
import peers  # noqa: E402
import pipeline  # noqa: E402
import prune  # noqa: E402
import push  # noqa: E402
import rehearsal  # noqa: E402
import splits  # noqa: E402
import step  # noqa: E402
import toy  # noqa: E402

import benchmarks.effopd  # noqa: E402
import benchmarks.head  # noqa: E402
import benchmarks.oprd  # noqa: E402
import benchmarks.rock  # noqa: E402
from estimators import estimator_table  # noqa: E402
from extension import extension_class  # noqa: E402
from record.metrics import DONE, EVAL, METRICS, keys_table  # noqa: E402

PAGES = {
    "results.md": {
        "results": lambda: toy.table("demo"),
        "toy": lambda: toy.table("estimators"),
        "pairs": lambda: toy.table("pairs"),
        "gsm8k": gsm8k_lm.table,
        "head": benchmarks.head.table,
        "step": step.table,
        "faults": kills.table,
    },
    "using.md": {"dtype": toy.dtype_table, "bf16": lambda: toy.table("bf16")},
    "estimators.md": {"estimators": estimator_table},
    "optimal-cache.md": {"noise": designs.noise, "baseline": designs.baseline, "training": designs.training,
                         "draws": toy.draws_table},
    "gpu.md": {"where": rehearsal.where, "runs": rehearsal.runs_table, "costs": rehearsal.costs_table,
               "splits": splits.table, "push": push.table, "apply": apply.table},
    "prune-and-distil.md": {"distilled": prune.before_and_after, "promises": prune.promises, "answers": prune.answers,
                            "comparison": prune.comparison, "pairs": prune.pairs_table},
    "staleness.md": {"lag": lambda: pipeline.table() + "\n\n" + toy.table("lag")},
    "peers.md": {"race": peers.race_table, "accuracy": peers.accuracy_table},
    "log.md": {"metrics": lambda: "\n\n".join(keys_table(keys) for keys in (METRICS, EVAL, DONE))},
    "extensions/oprd.md": {
        "metrics": lambda: keys_table(extension_class("oprd").METRICS),
        "oprd": benchmarks.oprd.table,
    },
    "extensions/effopd.md": {"effopd": lambda: benchmarks.effopd.table(benchmarks.effopd.ROWS)},
    "extensions/rock.md": {
        "metrics": lambda: keys_table(extension_class("rock").METRICS),
        "rock": benchmarks.rock.table,
    },
}


def renewed(page: str, text: str) -> str:
    """The text of docs/`page` with its tables as they are printed now. Raises ValueError where a marker is missing."""
    for name, table in PAGES[page].items():
        start = f"<!-- {name} -->\n"
        end = f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"docs/{page}: needs one {start.strip()} and one {end}")
        before, rest = text.split(start)
        after = rest.split(end)[1]
        text = f"{before}{start}{table()}\n{end}{after}"
    return text


def main() -> None:
    changed = []
    for page in PAGES:
        path = HERE.parent / "docs" / page
        old = path.read_text(encoding="utf-8")
        new = renewed(page, old)
        if new != old:
            path.write_text(new, encoding="utf-8")
            changed.append(page)
    print(json.dumps({"pages": len(PAGES), "changed": changed}))


if __name__ == "__main__":
    main()
