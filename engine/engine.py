"""submit, cancel, step: the whole engine, one straight line a round.

Knows no transport, no text, no threads: whoever calls it does so from one thread.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from engine.backlog import Backlog
from engine.commit import Committer
from engine.config import PAGE_SIZE, EngineConfig
from engine.device_rounds.rounds import DeviceRounds
from engine.drafters.drafter import Drafter
from engine.drafters.dspark import DSparkDrafter
from engine.errors import InvalidRequest, QueueFull
from engine.lookup import with_copies
from engine.messages import EngineInfo, EngineStats, PolicySettings
from engine.models.decoder import DecoderModel
from engine.page_groups import PageGroups
from engine.pages import PagePool
from engine.prefix_cache import PrefixCache
from engine.schedule.calibrate import Calibration
from engine.schedule.finished import NOTHING_COPIED
from engine.schedule.policies import LengthPolicy, make_policy
from engine.schedule.record import History
from engine.schedule.scheduler import Scheduler
from engine.schedule.steering import problems, settings
from engine.stopwatch import Stopwatch
from engine.types import Request, Sequence, TokenDelta, Verification
from engine.verify import Verifier
from engine.windows import WindowPages

REUSE_SHARE = 0.01  # of a token's time: what may go into making finished pages reusable


class Engine:
    """A target, perhaps a drafter, and the sequences they work on.

    Args:
        target, drafter: with their caches allocated for `pool`'s pages.
        policy: how much of each block to verify; None picks by `config.policy`.
        calibration: what makes the drafter's confidences probabilities, where it was measured.
        clock: seconds; what the scheduler measures rounds with.
        window_pages: pages of the target's layers with a window, where these have a group of their own.
        device_rounds: whether rounds may stay on the device; the caches then hold one page more than `pages`.
    """

    def __init__(
        self,
        config: EngineConfig,
        target: DecoderModel,
        drafter: Drafter | None,
        pages: int,
        info: EngineInfo,
        policy: LengthPolicy | None = None,
        calibration: Calibration | None = None,
        clock: Callable[[], float] = time.perf_counter,
        window_pages: int | None = None,
        device_rounds: bool = False,
    ) -> None:
        self.config = config
        self._started_with = config
        self.info = info
        self.target = target
        self.drafter = drafter
        windows = None if window_pages is None else WindowPages(PagePool(window_pages), target.window)
        self.pages = PageGroups(PagePool(pages), windows)
        lookahead = drafter.lookahead if drafter is not None else 0
        self.cache = PrefixCache(self.pool, config.prefix_cache, lookahead, drafter is not None, windows)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.rounds = 0
        self._ended: float | None = None  # when the last round did, if there was more to do
        self._took = 0.0  # seconds
        self._arrivals = 0
        if policy is None and drafter is not None:
            policy = make_policy(config)
        block_size = drafter.block_size if drafter is not None else 0
        has_confidence = drafter is not None and drafter.has_confidence
        self.clock = clock
        self.scheduler = Scheduler(
            config, self.pages, self.cache, policy, block_size, info.max_model_len, has_confidence, clock
        )
        self.scheduler.calibrate(calibration)
        self.history = History(config.history)
        self.backlog = Backlog(drafter, target.device) if drafter is not None else None
        self.verifier = Verifier(target, drafter.feature_layers if drafter is not None else ())
        self.committer = Committer(self.pages, self.cache, self.running, info.max_model_len)
        self.committer.before_end = self._settle
        self.device_rounds: DeviceRounds | None = None
        if device_rounds:
            assert drafter is None or isinstance(drafter, DSparkDrafter)
            parts = (self.scheduler, self.committer, self.waiting, self.backlog, pages)
            self.device_rounds = DeviceRounds(
                self.verifier, drafter, *parts, lambda done: self.history.add(done), clock
            )

    @property
    def pool(self) -> PagePool:
        """Pages of the layers that see everything."""
        return self.pages.whole

    @property
    def windows(self) -> WindowPages | None:
        """Those of layers with a window, where these have a group of their own."""
        return self.pages.windows

    @property
    def calibration(self) -> Calibration | None:
        """What makes the drafter's confidences probabilities; set it while nothing runs."""
        return self.scheduler.calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        self.scheduler.calibrate(calibration)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting or (self.device_rounds is not None and self.device_rounds.flying))

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: it can never be served; names the field.
            QueueFull: too many wait already.
        """
        self._validate(request)
        free = max(self.config.max_running - len(self.running), 0)  # these do not wait: they enter with the next round
        if len(self.waiting) >= self.config.max_queue + free:
            raise QueueFull(len(self.waiting), retry_after_s=1.0)
        seed = request.sampling.seed
        verification = request.speculation.verification
        if verification is None:
            verification = Verification.REJECTION if seed is None else Verification.COUPLED
        sequence = Sequence(
            request=request,
            seed=secrets.randbits(64) if seed is None else seed,
            verification=verification,
            tokens=list(request.prompt),
            arrival=self._arrivals,
            prompt_length=len(request.prompt),
        )
        self._arrivals += 1
        self.waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its pages now; unknown ids are ignored."""
        for sequence in self.running:
            if sequence.request.request_id == request_id:
                self.committer.finish(sequence)
                return
        self.waiting[:] = [s for s in self.waiting if s.request.request_id != request_id]

    def step(self) -> list[TokenDelta]:
        """One round: draft, schedule, verify, absorb, commit. On a device, if it can, the one before is committed."""
        late: list[TokenDelta] = []
        if self.device_rounds is not None:
            late, launched = self.device_rounds.step()
            self.rounds += launched
            if launched or not self.has_work:
                return late
        self.rounds += 1
        watch = Stopwatch(self.clock)
        began = watch.last
        if self._ended is not None:  # longer than a round took nobody was sending what it brought: all stood still
            watch.add("between", min(began - self._ended, self._took))
        drafting = self.scheduler.choose_drafting(self.running, self.waiting)
        watch.lap("decide")
        caught_up = self.backlog.catch_up(drafting) if self.backlog is not None else 0
        watch.lap("absorb")
        block = None
        if self.drafter is not None and drafting:
            block = self.drafter.propose(drafting, self.scheduler.draft_length)
        watch.lap("draft")
        if block is not None:
            self.scheduler.choose_lengths(block)
        watch.lap("decide")
        plan = self.scheduler.plan(block, self.running, self.waiting)
        watch.lap("plan")
        proposed = with_copies(block, self.scheduler.copies, self.target.device)
        if self.backlog is not None and not drafting:
            self.verifier.place = self.backlog.place_for(plan, self.verifier.width)
            watch.lap("keep")
        verdict = self.verifier.run(plan, proposed)
        watch.lap("verify")
        absorbed = 0
        if self.backlog is not None:
            absorbed = self.backlog.take(plan, verdict, drafting)
        watch.lap("absorb")
        deltas = self.committer.apply(plan, proposed, verdict)
        watch.lap("commit")
        copied = self.scheduler.learn_copies(plan, verdict.accepted) if self.scheduler.copies else NOTHING_COPIED
        planner = self.scheduler.planner
        finished = planner.learn(plan, block, verdict, len(self.waiting), absorbed, watch, copied, caught_up)
        if block is None and self.scheduler.lookup.asked:
            self.scheduler.lookup.times.learn(finished, planner.row_s)
        self.history.add(finished)
        ended = self.clock()
        self._ended, self._took = ended if self.has_work else None, ended - began
        return late + deltas

    def _settle(self, sequence: Sequence) -> None:
        """Absorb what waits for a sequence that ends, where that completes a page to be reused, and is worth it."""
        if self.backlog is None or not self.config.prefix_cache or not (sequence.followed and sequence.deferred):
            return
        ahead = self.cache.lookahead
        if (sequence.kv_length - ahead) // PAGE_SIZE == (sequence.absorbed - ahead) // PAGE_SIZE:
            return
        cost, running = self.scheduler.cost, len(self.running)
        token_s = cost.rows_s(running) / running
        if sequence.deferred < PAGE_SIZE or cost.absorb_s(64) / 64 <= REUSE_SHARE * token_s:
            self.backlog.settle(sequence)

    def reset(self) -> None:
        """Drop every request and everything cached, after a failed round."""
        for sequence in list(self.running):
            self.committer.finish(sequence)
        if self.device_rounds is not None:
            self.device_rounds.reset()
        self.waiting.clear()
        self.pages.forget()

    def forget_rounds(self) -> None:
        """Empty the decision records and what the scheduler learned from rounds, but not its cost table."""
        self.scheduler.forget()
        self.history = History(self.config.history, self.history.observer)

    def stats(self) -> EngineStats:
        pool = self.pool
        counts = len(self.running), len(self.waiting), pool.total, pool.free, pool.idle, self.rounds
        return EngineStats(*counts, self.policy_settings().policy)

    def policy_settings(self) -> PolicySettings:
        """What decides now."""
        return settings(self.config, drafts=self.drafter is not None)

    def update_policy(self, changes: Mapping[str, Any]) -> PolicySettings:
        """Change policy and limits from the next round on; running requests go on.

        Args:
            changes: values by name of PolicySettings.

        Raises:
            InvalidRequest: a value that does not fit; nothing has changed.
        """
        for name, mend in problems(changes, self._started_with, self.scheduler.block_size):
            raise InvalidRequest(name, mend)
        self.config = self.scheduler.config = replace(self.config, **changes)
        if self.drafter is not None and changes.keys() & {"policy", "draft_tokens", "confidence_threshold"}:
            self.scheduler.policy = make_policy(self.config)
        return self.policy_settings()

    def check(self) -> None:
        """Prove that every page is accounted for; raises AssertionError."""
        self.pages.check(self.running, self.device_rounds.held if self.device_rounds is not None else ())
        assert not any(sequence.pages for sequence in self.waiting), "a waiting sequence holds pages"

    def _validate(self, request: Request) -> None:
        info, end, sampling = self.info, request.end, request.sampling
        if not request.prompt:
            raise InvalidRequest("prompt", "is empty; give at least one token")
        for token in request.prompt:
            if not 0 <= token < info.vocab_size:
                raise InvalidRequest("token_ids", f"{token} is not in the vocabulary (0 … {info.vocab_size - 1})")
        if len(request.prompt) >= info.max_model_len:
            raise InvalidRequest(
                "prompt", f"has {len(request.prompt)} tokens; at most {info.max_model_len - 1} leave room for one more"
            )
        if end.max_tokens < 1:
            raise InvalidRequest("max_tokens", f"must be at least 1, got {end.max_tokens}")
        if end.min_tokens > end.max_tokens:
            raise InvalidRequest("min_tokens", f"{end.min_tokens} is above max_tokens {end.max_tokens}")
        for token in end.stop_ids:
            if not 0 <= token < info.vocab_size:
                raise InvalidRequest("stop_token_ids", f"{token} is not in the vocabulary")
        for token, _ in sampling.logit_bias:
            if not 0 <= token < info.vocab_size:
                raise InvalidRequest("logit_bias", f"{token} is not in the vocabulary")
        if any(s.request.request_id == request.request_id for s in (*self.running, *self.waiting)):
            raise InvalidRequest("request_id", f"{request.request_id!r} is running already; choose another")
