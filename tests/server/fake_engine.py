"""A scripted engine and a small real tokenizer: the service without a model."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.config import EngineConfig
from engine.errors import InvalidRequest, QueueFull
from engine.messages import EngineInfo, EngineStats, FinishReason, PolicySettings, Request, TokenDelta, TokenLogprob
from engine.schedule.record import History, RequestRecord, RoundRecord, Sitting, Stop
from engine.schedule.steering import problems, settings
from server.boundary import NotLoaded, Ready
from server.engine_loop import EngineLoop, Pipe

CONFIG = EngineConfig(model="scripted")
CORPUS = ["def add(a, b):\n    return a + b\n", "hello world, hello there", "naïve café 漢字 🙂 done", "STOP END"] * 4
EOS = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'villain' %}{{ raise_exception('no villains') }}{% endif %}"
    "<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% if thinking %}[{{ thinking }}]{% endif %}{% endif %}"
)


def write_checkpoint(directory: Path) -> Path:
    """The text files of a checkpoint: tokenizer, template, generation defaults."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[EOS, "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": EOS}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def info(vocab_size: int, max_model_len: int = 512) -> EngineInfo:
    return EngineInfo(
        model="scripted",
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        dtype="float32",
        device="cpu",
        drafter="dspark",
        draft_model="scripted-draft",
        block_size=4,
        head="vanilla",
        has_confidence=True,
        seed_reproducible=True,
        page_size=16,
        pages_total=64,
        parameters=1234,
        policy="auto",
        eos_ids=(0,),
        threads=1,
    )


@dataclass
class _Running:
    request: Request
    position: int = 0
    announced: bool = False


@dataclass
class ScriptedEngine:
    """Answers every request with `reply` (token ids), `block` tokens a round, the last of each its own.

    `gate`, when given, is waited for before every round. `before_step` may raise.
    """

    reply: Sequence[int]
    block: int = 3
    max_queue: int = 8
    gate: threading.Semaphore | None = None
    before_step: Callable[[], None] = lambda: None
    running: dict[str, _Running] = field(default_factory=dict)
    seen: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    rounds: int = 0
    resets: int = 0
    history: History = field(default_factory=lambda: History(64))
    policy: PolicySettings = field(default_factory=lambda: settings(CONFIG, drafts=True))

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def submit(self, request: Request) -> None:
        if 13 in request.prompt:
            raise InvalidRequest("token_ids", "13 brings bad luck; choose another")
        if len(self.running) >= self.max_queue:
            raise QueueFull(len(self.running), 2.5)
        self.seen.append(request)
        self.running[request.request_id] = _Running(request)

    def cancel(self, request_id: str) -> None:
        if self.running.pop(request_id, None) is not None:
            self.cancelled.append(request_id)

    def reset(self) -> None:
        self.running.clear()
        self.resets += 1

    def stats(self) -> EngineStats:
        return EngineStats(len(self.running), 0, 64, 64 - len(self.running), 0, self.rounds, self.policy.policy)

    def policy_settings(self) -> PolicySettings:
        return self.policy

    def update_policy(self, changes: Mapping[str, Any]) -> PolicySettings:
        for name, mend in problems(changes, CONFIG, 4):
            raise InvalidRequest(name, mend)
        self.policy = replace(self.policy, **changes)
        return self.policy

    def step(self) -> list[TokenDelta]:
        if self.gate is not None:
            self.gate.acquire()
        self.before_step()
        self.rounds += 1
        deltas = [delta for state in list(self.running.values()) for delta in self._advance(state)]
        self.history.add(record_of(self.rounds, deltas, self.policy.policy, len(self.running)))
        for delta in deltas:
            if delta.finish is not None:
                del self.running[delta.request_id]
        return deltas

    def _advance(self, state: _Running) -> list[TokenDelta]:
        request = state.request
        deltas = []
        prefill = not state.announced
        if prefill:
            state.announced = True
            deltas.append(TokenDelta(request.request_id, cached_tokens=2))
        count = 1 if prefill else self.block
        tokens, finish = self._next(state, count)
        state.position += len(tokens)
        accepted = 0 if prefill else min(len(tokens), self.block - 1)
        logprobs = ()
        if request.logprobs is not None:
            logprobs = tuple(TokenLogprob(t, -0.5, ((t, -0.5),) * request.logprobs) for t in tokens)
        deltas.append(
            TokenDelta(
                request.request_id,
                tokens=tokens,
                logprobs=logprobs,
                finish=finish,
                decode_round=not prefill,
                drafted=0 if prefill else self.block,
                verified=0 if prefill else self.block - 1,
                accepted=accepted,
            )
        )
        return deltas

    def _next(self, state: _Running, count: int) -> tuple[tuple[int, ...], FinishReason | None]:
        end = state.request.end
        tokens: list[int] = []
        for _ in range(count):
            index = state.position + len(tokens)
            token = self.reply[index % len(self.reply)]
            tokens.append(token)
            if token in end.stop_ids and index + 1 > end.min_tokens:
                return tuple(tokens), FinishReason.STOP_ID
            if index + 1 == end.max_tokens:
                return tuple(tokens), FinishReason.LENGTH
        return tuple(tokens), None


def record_of(number: int, deltas: Sequence[TokenDelta], policy: str = "auto", running: int = 0) -> RoundRecord:
    """A record that is true of what is scripted, and has made-up times."""
    requests = tuple(
        RequestRecord(d.request_id, Sitting.ASKED, 1.0, 2, d.drafted, d.verified, d.accepted, (0.5,) * d.drafted)
        for d in deltas
        if d.decode_round
    )
    verified, accepted = sum(r.verified for r in requests), sum(r.accepted for r in requests)
    counts = number, policy, running, 0, 0, sum(r.drafted for r in requests)
    seconds = (0.012, 0.016, 0.002, 0.012, 0.001, 0.004)
    tokens = sum(len(d.tokens) for d in deltas if d.decode_round)
    return RoundRecord(*counts, verified, 0.5, accepted, tokens, *seconds, 900.0, Stop.RULE, requests)


class EngineThread:
    """An engine behind the real boundary, in a thread where the server has a process: tests see both sides."""

    def __init__(self, engine: ScriptedEngine, facts: EngineInfo, *, refusal: str = "", gather_s: float = 0.0) -> None:
        self.connection, self._theirs = socket.socketpair()
        self._engine = engine
        self._gather_s = gather_s
        self._first = NotLoaded(refusal) if refusal else Ready(facts, CONFIG)
        self._killed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pipe = Pipe(self._theirs)
        pipe.send(self._first)
        if isinstance(self._first, Ready):
            EngineLoop(self._engine, pipe, self._gather_s).run()
        self._theirs.close()

    def kill(self) -> None:
        """What SIGKILL looks like from the server; a thread stuck in a round stays behind."""
        self._killed = True
        with contextlib.suppress(OSError):  # it may have hung up by itself
            self._theirs.shutdown(socket.SHUT_RDWR)

    def ended(self) -> str | None:
        if self._killed:
            return "killed"
        return None if self._thread.is_alive() else "returned"
