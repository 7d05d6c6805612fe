"""
A rehearsal on the hardware that is there: does everything run, and what does it cost next to a baseline without it?

    python benchmarks/rehearsal.py                   # every GPU; ten minutes, 10 GB of disk in runs/rehearsal
    python benchmarks/rehearsal.py --cpu             # its CPU form: tiny models in bf16; two minutes
    python benchmarks/rehearsal.py --parts costs     # some of its parts

    preflight  every GPU computes, a compiler is there; driver and CUDA versions
    runs       steps of the command in bf16, at the shapes of Qwen3-0.6B (student) and Qwen3-1.7B (teacher), on 1 GPU
               and on 2 and 8 where they are; on a CPU with one learner and with two. The command itself compares the
               bits of every push, as far as the engine shows them. Memory on each device beside the plan's
    preempted  vLLM with room for a few responses only: it preempts some, and all end with as many tokens as they may
               have (that they are the same tokens: tests/test_rollout.py)
    costs      seconds of each kind of work, in turn with its baseline, median of --rounds:
               draw      N = 4 optimal draws for 256 rows         softmax and one multinomial draw
               generate  an engine of ours                        the same engine, one plain draw per token
               score     teacher.score                            a forward pass with its head
               step      Learner.backward                         forward and backward with cross-entropy
               publish   Learner.publish                          a copy of the weights to the host
               push      Engine.load and its checksums            a copy of the weights to the device

Models are made in code and random: speed and memory do not depend on what weights know. Appends a record to
benchmarks/rehearsal.jsonl, from which docs/gpu.md has its tables. Last line: the record's results as one JSON object.
"""
import argparse
import copy
import functools
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import torch  # noqa: E402

from config import Config, compute_dtype  # noqa: E402
from control import plan  # noqa: E402
from control.preflight_gpu import check_gpus, installed  # noqa: E402
from control.resolve import configure  # noqa: E402
from models.footprint import Shape, nvidia_smi  # noqa: E402
from record.provenance import provenance  # noqa: E402
from record.report import markdown  # noqa: E402

RECORDS = HERE / "rehearsal.jsonl"
QWEN3 = dict(vocab_size=151_936, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
             max_position_embeddings=40_960, rope_theta=1e6, tie_word_embeddings=True)
SHAPES = {"student": QWEN3 | dict(hidden_size=1024, intermediate_size=3072),
          "teacher": QWEN3 | dict(hidden_size=2048, intermediate_size=6144)}
TINY = dict(vocab_size=512, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
            max_position_embeddings=512, hidden_size=64, intermediate_size=192, tie_word_embeddings=True)
FLAGS = ["--batch=64", "--max-ahead=1", "--max-prompt=256", "--max-response=1024", "--max-running=128",
         "--micro-tokens=8192"]
TINY_FLAGS = ["--batch=8", "--max-ahead=1", "--max-prompt=64", "--max-response=32", "--max-running=16"]
PARTS = ("preflight", "runs", "preempted", "costs")
GPU_COUNTS = (1, 2, 8)
BLOCKS = 12                      # of vLLM's keys and values, 16 tokens each on a GPU: room for one long response


# -- models and commands --------------------------------------------------------------------------

def make_models(root: Path, tiny: bool) -> list[str]:
    """Folders of the two models and a file of prompts as long as --max-prompt allows; the flags that name them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from data.toy import SYMBOLS, toy_tokenizer
    tokenizer = toy_tokenizer()
    for seed, (name, shape) in enumerate(SHAPES.items()):
        if not (root / name / "config.json").exists():
            torch.manual_seed(seed)
            config = Qwen3Config(**TINY if tiny else shape, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
                                 pad_token_id=tokenizer.pad_token_id, dtype="bfloat16")
            Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
    rng = random.Random(0)
    length = 64 if tiny else 256
    prompts = ["".join(rng.choices(SYMBOLS, k=length)) for _ in range(2000)]
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return [f"--student={root / 'student'}", f"--teacher={root / 'teacher'}", f"--task={root / 'prompts.jsonl'}"]


def flags_of(models: list[str], cpu: bool, gpus: int) -> list[str]:
    if cpu:
        return [*models, "--gpus=0", "--engine=hf", "--dtype=bfloat16", "--eval.n=0", *TINY_FLAGS]
    return [*models, f"--gpus={gpus}", "--dtype=bfloat16", "--eval.n=0", *FLAGS]


# -- runs -----------------------------------------------------------------------------------------

class Memory(threading.Thread):
    """The largest memory in use on each GPU, GB, by all processes, while it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.peak: dict[str, float] = {}

    def run(self) -> None:
        while not self.ended.wait(0.5):
            for i, (used,) in enumerate(nvidia_smi("memory.used")):
                device = f"cuda:{i}"
                self.peak[device] = max(self.peak.get(device, 0.0), float(used) * 2 ** 20 / 1e9)


def one_run(flags: list[str], out: Path) -> dict:
    """The command, from outside."""
    memory = Memory()
    memory.start()
    start = time.monotonic()
    command = [sys.executable, "asyncopd.py", *flags, f"--out={out}", "--overwrite"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    memory.ended.set()
    memory.join()
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [x for x in log if x["type"] == "step"]
    last = log[-1]
    return {"seconds": round(time.monotonic() - start, 1), "steps": len(steps),
            "tok_s": {"rollout": last["gen_tok_s"], "teacher": last["score_tok_s"], "learner": last["train_tok_s"]},
            "busy": last["busy"], "overlap": last["overlap"], "lag_max": last["lag_max"],
            "push_s": statistics.median(s["push_s"] for s in steps),
            "publish_s": statistics.median(s["publish_s"] for s in steps),
            "gap_p95": statistics.median(s["engine_gap_p95"] for s in steps),
            "gap_max": max(s["engine_gap_max"] for s in steps),
            "peak_gb": memory.peak, "plan_gb": planned(flags, log[0]["config"])}


def planned(flags: list[str], recorded: dict) -> dict[str, float]:
    """GB by device, of the split that the run has recorded."""
    from transformers import AutoConfig
    cfg = replace(configure(flags), **{name: recorded[name] for name in ("rollouts", "teachers", "learners")})
    sizes = [float(total) * 2 ** 20 / 1e9 for total, in nvidia_smi("memory.total")]
    shapes = [Shape.of(AutoConfig.from_pretrained(folder)) for folder in (cfg.student, cfg.teacher)]
    found: dict[str, float] = {}
    for need in plan.memory(cfg, *shapes, gpu_gb=min(sizes, default=0.0)):
        found[need.device] = round(found.get(need.device, 0.0) + need.gb, 2)
    return found


def runs(models: list[str], cpu: bool, steps: int, root: Path) -> dict[str, dict]:
    if cpu:
        wanted = {"1 learner": [], "2 learners": ["--learners=2"]}
        return {label: one_run([*flags_of(models, True, 0), f"--steps={steps}", *more], root / label.replace(" ", "-"))
                for label, more in wanted.items()}
    there = torch.cuda.device_count()
    return {f"{n} GPU{'s' * (n > 1)}": one_run([*flags_of(models, False, n), f"--steps={steps}"], root / f"gpus-{n}")
            for n in GPU_COUNTS if n <= there}


# -- responses that are put aside -----------------------------------------------------------------

def preempted(flags: list[str]) -> dict[str, int]:
    """vLLM with `BLOCKS` blocks. Every response must end with as many tokens as it may have."""
    import engines.vllm as module
    module.LLM = functools.partial(module.LLM, num_gpu_blocks_override=BLOCKS)
    cfg = configure([*flags, "--engine=vllm", "--max-prompt=16", "--max-response=140", "--max-running=8"])
    engine = module.VLLMEngine(cfg, device_of(cfg), compute_dtype(cfg))
    engine.ends = []
    for key in range(8):
        engine.add(key, [3, 4, 5], 140, uid=key, position=0)
    found = {}
    while len(found) < 8:
        found |= engine.take(engine.step())
    assert all(len(drawn.tokens) == 140 for drawn in found.values()), "a response ended early"
    assert engine.preempted, f"vLLM had room for all in {BLOCKS} blocks"
    return {"responses": len(found), "preempted": engine.preempted}


def device_of(cfg: Config) -> str:
    return "cuda:0" if cfg.gpus > 0 else "cpu"


# -- costs ----------------------------------------------------------------------------------------

def in_turn(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds + 1):
        for name, work in works.items():
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cost_of_draws(cpu: bool, rounds: int) -> dict[str, float]:
    from engines.drawn import DrawnTable
    from engines.sampling import Drawing, draw_rows
    rows, words = (16, TINY["vocab_size"]) if cpu else (256, QWEN3["vocab_size"])
    device = "cpu" if cpu else "cuda:0"
    logits = 4 * torch.randn(rows, words, generator=torch.Generator().manual_seed(0)).to(device)
    drawing = Drawing(n=4, design="optimal", k=0, temperature=1.0, top_p=1.0, seed=0)
    table = DrawnTable(device)
    keys, positions = range(rows), [0] * rows
    return in_turn({"ours": lambda: table.write(keys, positions, draw_rows(logits, keys, positions, drawing)),
                    "baseline": lambda: torch.multinomial(logits.softmax(-1), 1)}, rounds)


def cost_of_training(cpu: bool, rounds: int) -> dict[str, dict[str, float]]:
    """score, step, publish and push, of one model: the toy's, or one of Qwen3-1.7B's shape."""
    import step

    import teacher
    from engines.drawn import DrawnTable
    from engines.hf import HFEngine
    from models.alignment import pad, response_rows
    from transport.weights import Weights
    learner, segments, slots = step.ready("toy" if cpu else "1.7B")
    student = learner.student
    model = student.model
    tokens = pad(segments, student.device)[0]
    count = sum(map(len, segments))
    found = {"step": in_turn({"ours": lambda: learner.backward(segments, count),
                              "baseline": lambda: step.cross_entropy(student, segments)}, rounds)}
    model.zero_grad()
    weights = Weights({n: p.shape for n, p in model.named_parameters()}, [i % 30 for i in range(64)], torch.bfloat16)
    found["publish"] = in_turn({
        "ours": lambda: learner.publish(weights, 0),
        "baseline": lambda: [p.detach().to(torch.bfloat16).to("cpu", copy=True) for p in model.parameters()]}, rounds)
    learner.publish(weights, 0)
    engine = HFEngine.__new__(HFEngine)
    engine.model = copy.deepcopy(model).to(torch.bfloat16)
    engine.rows = []
    engine.drawn = DrawnTable(student.device)
    published = weights.read(0)

    def push() -> None:
        engine.load(published.tensors, 0)
        engine.checksums(weights.layout, 0)

    found["push"] = in_turn({
        "ours": push,
        "baseline": lambda: [x.to(student.device, copy=True) for x in published.tensors.values()]}, rounds)
    scorer = engine.model

    @torch.no_grad()
    def forward() -> None:
        rows = response_rows(scorer.base_model(input_ids=tokens, use_cache=False).last_hidden_state, segments)
        for part in rows.split(1024):
            scorer.get_output_embeddings()(part)

    found["score"] = in_turn({
        "ours": lambda: teacher.score(scorer, segments, slots, "candidates", student.words),
        "baseline": forward}, rounds)
    return found


def cost_of_generation(flags: list[str], ours: bool) -> float:
    """Tokens per second of one engine, with our draws or without."""
    cfg = configure(flags)
    rows = cfg.max_running
    prompt = [3 + i % 9 for i in range(cfg.max_prompt)]
    if ours or cfg.engine == "hf":
        from engines.table import engine_class
        if not ours:
            import engines.hf
            engines.hf.draw_rows = one_draw
        engine = engine_class(cfg.engine)(cfg, device_of(cfg), compute_dtype(cfg))
        engine.ends = type(engine.ends)()

        def generate() -> None:
            for key in range(rows):
                engine.add(key, prompt, cfg.max_response, uid=key, position=0)
            left = rows
            while left:
                left -= len(engine.take(engine.step()))
    else:
        from engines.vllm import LLM, SamplingParams, plain_arguments
        llm = LLM(**plain_arguments(cfg, device_of(cfg), compute_dtype(cfg)))
        params = SamplingParams(max_tokens=cfg.max_response, ignore_eos=True, detokenize=False)

        def generate() -> None:
            llm.generate([{"prompt_token_ids": prompt}] * rows, params, use_tqdm=False)
    generate()
    start = time.perf_counter()
    generate()
    return rows * cfg.max_response / (time.perf_counter() - start)


def one_draw(logits: torch.Tensor, uids, positions, drawing):
    """Instead of engines.sampling.draw_rows: a token, and nothing recorded of it."""
    from draws import Chosen
    ids = torch.multinomial(logits.softmax(-1), 1)
    zeros = torch.zeros(ids.shape, device=ids.device)
    return Chosen(ids, zeros, zeros[:, 0])


def costs(flags: list[str], cpu: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds; of generation for a thousand tokens. Each in a process of its own, which gives its memory back."""
    found = {"draw": apart(cost_of_draws, cpu, rounds)}
    found["generate"] = {name: 1000 / apart(cost_of_generation, flags, name == "ours") for name in ("ours", "baseline")}
    return found | apart(cost_of_training, cpu, rounds)


def apart(fn: Callable, *args):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(fn, *args).result()


# -- the record -----------------------------------------------------------------------------------

def newest() -> dict | None:
    """The newest record of a GPU; without one, the newest of all."""
    if not RECORDS.exists():
        return None
    found = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    return max(found, key=lambda r: (r["form"] == "gpu", found.index(r)), default=None)


def where() -> str:
    """One line about the machine of the newest record."""
    r = newest()
    if r is None:
        return "Not run yet."
    hardware = r["hardware"]
    if r["form"] == "gpu":
        return f"Measured with {len(hardware['gpus'])} x {hardware['gpus'][0]}; {r['preflight']}."
    return (f"Not run on a GPU yet. The CPU form, on {hardware['cores']} cores of an {hardware['cpu']} "
            f"({r['preflight']}):")


def runs_table() -> str:
    lines = [["run", "steps", "tokens/s generated, scored, trained", "push, s", "publish, s", "gap on the probe, p95",
              "GB used / planned"]]
    for label, x in (newest() or {"runs": {}})["runs"].items():
        tok_s = ", ".join(f"{x['tok_s'][role]:,.0f}" for role in ("rollout", "teacher", "learner"))
        used = ", ".join(f"{device} {x['peak_gb'][device]:.1f} / {gb:.1f}" for device, gb in x["plan_gb"].items()
                         if device in x["peak_gb"])
        lines.append([label, str(x["steps"]), tok_s, f"{x['push_s']:.2f}", f"{x['publish_s']:.2f}",
                      f"{x['gap_p95']:.2g}", used])
    return markdown(lines)


def costs_table() -> str:
    lines = [["work", "ours, s", "baseline, s", "ours / baseline"]]
    for name, s in (newest() or {"costs": {}})["costs"].items():
        what = "generate, 1,000 tokens" if name == "generate" else name
        lines.append([what, f"{s['ours']:.3g}", f"{s['baseline']:.3g}", f"{s['ours'] / s['baseline']:.2f}"])
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cpu", action="store_true", help="the CPU form, also where there is a GPU")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--steps", type=int, default=5, help="of each run")
    parser.add_argument("--rounds", type=int, default=5, help="of each cost")
    parser.add_argument("--root", type=Path, default=ROOT / "runs", help="where models and runs go")
    args = parser.parse_args()
    cpu = args.cpu or not torch.cuda.device_count()
    if cpu and not args.cpu:
        print("no GPU here: the CPU form")
    root = args.root / ("rehearsal-cpu" if cpu else "rehearsal")
    models = make_models(root, tiny=cpu)
    flags = flags_of(models, cpu, 1)
    found: dict = {"form": "cpu" if cpu else "gpu", "preflight": installed()}
    if "preflight" in args.parts:
        check_gpus(configure(flags_of(models, cpu, torch.cuda.device_count())))
        print(f"preflight: {found['preflight']}", flush=True)
    if "runs" in args.parts:
        found["runs"] = runs(models, cpu, args.steps, root)
        print(f"runs: {json.dumps(found['runs'])}", flush=True)
    if "preempted" in args.parts and not cpu:        # on a CPU: tests/test_rollout.py
        found["preempted"] = apart(preempted, flags)
        print(f"preempted: {json.dumps(found['preempted'])}", flush=True)
    if "costs" in args.parts:
        found["costs"] = costs(flags, cpu, args.rounds)
        print(f"costs: {json.dumps(found['costs'])}", flush=True)
    if set(args.parts) == set(PARTS):
        made = provenance({}, {})
        record = found | {name: made[name] for name in ("commit", "versions", "hardware")}
        with RECORDS.open("a") as file:
            file.write(json.dumps(record) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
