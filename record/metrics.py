"""
Every key of the log: its meaning or formula, its unit, and who fills it.

A step line holds METRICS, an evaluation line EVAL, and the last line of a run DONE. A token means
a response token, unless stated otherwise. Left out: the keys of `run` lines (provenance.py) and
of `event` lines, which differ from event to event.
Tests: tests/test_pipeline.py, tests/test_readme.py
"""
from __future__ import annotations

# -- step lines ----------------------------------------------------------------------------------

BY_LEARNER = {                 # filled by learner.py, while it trains and publishes
    "step": "train batches so far, this one included",
    "version": "version of the weights after this step = publishes since the start",
    "loss": "the estimator's surrogate: sum over positions / number of positions, nats (its value "
            "is not the KL)",
    "kl": "unbiased estimate of the per-token KL that --kl selects, current student, prefixes as "
          "visited, nats (exact where the estimator sees the whole vocabulary; otherwise, with "
          "--top-p below 1, the KL's terms in the nucleus alone, which is not the KL)",
    "entropy": "entropy of the student, mean over positions: -sum of p / pi log p over the drawn "
               "tokens, nats (with --top-p below 1 of the nucleus alone)",
    "token_weight": "weight of a token of this batch in the loss, relative to one of the run's "
                    "first batch: tokens of the first batch / what the losses are divided by; 1 "
                    "with --schedule async",
    "length_trained": "response tokens so far of the responses in this batch, mean; below "
                      "`length_begun` where a batch holds the responses that ended first",
    "lag_min": "lag of the freshest token of the batch: learner version before the step - version "
               "that drew the token",
    "lag_mean": "the same, mean over tokens",
    "lag_max": "the same, oldest token",
    "tokens": "tokens of this step's batch, those of skipped updates included",
    "sequences": "responses, or segments of responses, in this step",
    "context": "tokens generated and trained earlier, read again as context of a segment after a "
               "cut",
    "stored": "share of the batch's positions whose scores were cached; where it is below 1, what "
              "is measured from scores, as `kl` is, covers these positions only",
    "w_mean": "importance weight w = p / mu of the emitted tokens, mean; 1 in expectation",
    "w_max": "the largest of these weights",
    "w_p99": "their 99th percentile",
    "ess": "their effective sample size: (sum w)^2 / sum w^2 / n, 1 = on-policy",
    "duplicates": "share of drawn candidates that repeat an earlier one at their position",
    "publish_s": "seconds the learner spent on publishing",
    "push_bytes": "bytes that it published, and that every engine reads: the student in the dtype "
                  "of compute",
    "grad_norm": "norm of the gradient before clipping, of the step's last optimizer update",
    "lr": "learning rate of the step's last optimizer update",
    "train_tok_s": "tokens / seconds of this step, publishing included",
    "wait_s": "seconds the learner waited for this batch",
}

BY_ROLLOUT = {                 # filled by rollout.py at a push of weights; the worst worker's
    "engine_gap_max": "largest |log-prob in the engine - log-prob in the learner| on the probe at "
                      "the last push, nats",
    "engine_gap_p95": "95th percentile of the same",
    "engine_gap_mean": "mean of the same",
    "push_s": "seconds of that push: copying, loading and the probe",
}

BY_PARENT = {                  # filled by steps.py in the parent, which keeps the account
    "skipped": "optimizer updates not made because the loss or the gradient was not finite",
    "trained": "what was trained: [uid of the prompt, first response token, number of tokens] of "
               "every segment",
    "preempted": "responses that an engine has put aside for want of memory and taken up again, "
                 "since the last step line, as far as they have been handed over",
    "length_begun": "tokens generated so far / responses begun so far: the mean length of all "
                    "responses once most have ended",
    "gen_tok_s": "tokens generated since the last step line / seconds since then",
    "wall_s": "seconds since the first ticket, over all resumptions",
}

METRICS = BY_LEARNER | BY_ROLLOUT | BY_PARENT

# -- evaluation lines: filled by the parent, when it has graded the answers ----------------------

EVAL = {
    "step": "version of the weights that answered",
    "who": "student or teacher",
    "accuracy": "avg_at_k",
    "n": "prompts",
    "k": "answers to each of them",
    "avg_at_k": "right answers / (n k)",
    "pass_at_k": "for j = 1, 2, 4, .. k the chance that one of j answers is right, drawn without "
                 "replacement from a prompt's k answers, c of them right: mean over prompts of "
                 "1 - C(k - c, j) / C(k, j), unbiased",
    "ci": "2.5th and 97.5th percentile of avg_at_k when prompts, each with all its answers, are "
          "resampled with replacement 2,000 times; no information where all answers are right or "
          "all are wrong, and none about other seeds",
}

# -- the last line: filled by the parent, when the run ends --------------------------------------

DONE = {
    "steps": "train batches",
    "tokens": "tokens trained (= tokens_trained)",
    "tokens_generated": "tokens drawn by the rollout workers, by their own count",
    "tokens_trained": "tokens trained, by the learner's count",
    "tokens_in_flight": "drawn but not trained when the last step ended: generated = trained + in "
                        "flight + dropped + lost",
    "tokens_dropped": "thrown away by --overdue drop, or in the flush after an extension moved "
                      "the weights",
    "tokens_lost": "drawn by a worker or a run that died before they were handed over or trained, "
                   "and drawn again",
    "wall_s": "seconds from the first ticket to the end of the last step, over all resumptions",
    "overlap": "(rollout + teacher + learner busy seconds, each averaged over its workers) / "
               "wall, since the last start: at most 3",
    "busy": "these three shares by role",
    "train_tok_s": "tokens_trained / wall_s",
    "gen_tok_s": "tokens_generated / wall_s",
    "score_tok_s": "tokens trained since the last start / seconds the teacher was busy",
    "lag_mean": "mean over all trained tokens, versions",
    "lag_max": "largest of any trained token, versions",
    "token_weight_short": "mean weight of a trained token in the loss, in the third of the "
                          "responses that are shortest, relative to the mean of all",
    "token_weight_long": "the same in the third that are longest",
    "kl_before": "mean `kl` of the first 10 steps, or of the first half of fewer than 20: one "
                 "batch alone is noisy, and the student has hardly moved",
    "kl_after": "mean `kl` of as many steps at the end; of the only step in a run of one",
    "accuracy_before": "mean over the held-out rows and --eval.k answers to each, step 0",
    "accuracy_after": "the same, last step",
    "accuracy_teacher": "accuracy of the teacher, one greedy answer each (--eval.teacher)",
}


def keys_table(keys: dict[str, str]) -> str:
    """Markdown of METRICS, EVAL or DONE: the README's tables are printed from the code."""
    rows = []
    for key, meaning in keys.items():
        escaped = meaning.replace("|", "\\|")
        rows.append(f"| `{key}` | {escaped} |")
    return "\n".join(["| key | what it is |", "|---|---|", *rows])
