"""
What a person should know of a run before it ends: skipped updates, and a student that collapses.

What is left out: deaths of workers (recovery.py), a teacher that knows nothing (teacher.py).
Tests: tests/test_faults.py
"""
from __future__ import annotations

from collections.abc import Callable

from config import Config
from record.account import WINDOW, Account

COLLAPSED = 0.01             # share of the entropy at the start below which a person is warned


class Watchdog:
    """Looks at every step. `warn(text, **event)` writes an event and shows the text."""

    def __init__(self, cfg: Config, account: Account, warn: Callable[..., None]):
        self.cfg = cfg
        self.account = account
        self.warn = warn
        self.skips = 0               # updates in a row
        self.collapsed = False

    def see(self, step: int, skipped: list[dict], uids: dict[int, int], saved: str) -> None:
        """Warn of updates that could not be made and of a low entropy. RuntimeError after too
        many.

        skipped   of each skipped update, `slots` and `why`
        uids      of the batch, by slot: which prompt
        saved     the newest checkpoint
        """
        for update in skipped:
            prompts = [uids[slot] for slot in update["slots"]]
            self.warn(f"step {step}: an update was skipped, prompts {prompts}: {update['why']}",
                      what="skipped", step=step, uids=prompts, why=update["why"])
        if len(skipped) == min(self.cfg.minibatches, len(uids)):
            self.skips += len(skipped)
        else:
            self.skips = 0
        most = self.cfg.faults.skips
        if self.skips >= most:
            raise RuntimeError(f"step {step}: {self.skips} updates in a row were not finite "
                               f"(--faults.skips {most}); the last good checkpoint is "
                               f"{saved or 'none'}")
        self.check_entropy(step)

    def check_entropy(self, step: int) -> None:
        """Warn once when the last ten steps have a small share of the first ten steps' entropy."""
        before = self.account.entropy_before
        now = self.account.entropy_after
        if self.collapsed or len(self.account.last) < WINDOW or now >= COLLAPSED * before:
            return
        self.collapsed = True
        self.warn(f"step {step}: the student's entropy has collapsed from {before:.3g} to "
                  f"{now:.3g} nats", what="entropy", step=step, entropy=now)
