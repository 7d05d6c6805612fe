"""
Renews what stands between markers in README.md: the tables that code and raw results print.

    python benchmarks/readme.py

Last line: one JSON object, {"blocks", "changed"}.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import gsm8k_lm  # noqa: E402
import kills  # noqa: E402
import pipeline  # noqa: E402
import step  # noqa: E402
import toy  # noqa: E402

import benchmarks.effopd  # noqa: E402
import benchmarks.head  # noqa: E402
import benchmarks.oprd  # noqa: E402
import benchmarks.rock  # noqa: E402
from estimators import estimator_table  # noqa: E402
from record.metrics import DONE, EVAL, METRICS, keys_table  # noqa: E402

BLOCKS = {
    "results": lambda: toy.table("demo"),
    "estimators": estimator_table,
    "lag": lambda: pipeline.table() + "\n\n" + toy.table("lag"),
    "head": benchmarks.head.table,
    "step": step.table,
    "toy": lambda: toy.table("estimators"),
    "gsm8k": gsm8k_lm.table,
    "oprd": benchmarks.oprd.table,
    "effopd": lambda: benchmarks.effopd.table(benchmarks.effopd.ROWS),
    "rock": benchmarks.rock.table,
    "faults": kills.table,
    "pairs": lambda: toy.table("pairs"),
    "metrics": lambda: "\n\n".join(keys_table(keys) for keys in (METRICS, EVAL, DONE)),
}


def renewed(text: str) -> str:
    for name, block in BLOCKS.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{block()}\n<!-- /{name} -->" + rest.split(f"<!-- /{name} -->")[1]
    return text


if __name__ == "__main__":
    readme = HERE.parent / "README.md"
    old = readme.read_text(encoding="utf-8")
    readme.write_text(renewed(old), encoding="utf-8")
    print(json.dumps({"blocks": len(BLOCKS), "changed": old != renewed(old)}))
