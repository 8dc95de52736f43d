"""Ways to decode, each with a process of its own that stays, idle, beside the others."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from clients.client import Client
from clients.events import Delta, Options
from tests.bench.measure import ROOT, say
from tests.bench.peers.environments import BUILD, ENVIRONMENTS
from tests.bench.peers.workloads import Workload

RUNNERS = Path(__file__).parent / "runners"
LOGS = BUILD / "logs"
STOP_S = 30.0
Decoded = tuple[float, list[list[int]]]  # seconds, token ids of each text


class Unusable(Exception):
    """An arm that cannot take part; the text is the reason."""


class Process(Protocol):
    """What decodes."""

    def generate(self, mode: str, prompts: Sequence[Sequence[int]], tokens: int) -> Decoded: ...

    def stop(self) -> None: ...


@dataclass(slots=True)
class Arm:
    """A mode of a process.

    Args:
        single: it takes one request at a time, so that a total of several is that of one.
    """

    name: str
    process: Process
    mode: str = "plain"
    single: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Decoded:
        """Raises Unusable where the process fails, or returns anything but `tokens` tokens a prompt."""
        took, outputs = self.process.generate(self.mode, prompts, tokens)
        lengths = [len(output) for output in outputs]
        if lengths != [tokens] * len(prompts):
            raise Unusable(f"returned {lengths} tokens where {len(prompts)} × {tokens} were asked")
        return took, outputs


class Runner:
    """One of the programs in `runners`, in a peer's environment.

    Args:
        told: its first line, as in `runners/protocol.py`.
    """

    def __init__(self, name: str, program: Path, python: Path, told: dict[str, Any], logs: Path = LOGS) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._log = (logs / f"{name}.log").open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            # Its own folder and nothing else of ours is importable: a peer might take `kernels` for another's.
            [str(python), str(program)],
            cwd=logs,
            env={**os.environ, "OMP_NUM_THREADS": str(told["threads"])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._send(told)

    def ready(self) -> dict[str, Any]:
        """Waits for its start; what it says of itself."""
        return self._receive()

    def generate(self, mode: str, prompts: Sequence[Sequence[int]], tokens: int) -> Decoded:
        self._send({"mode": mode, "prompts": prompts, "tokens": tokens})
        answer = self._receive()
        return float(answer["seconds"]), answer["outputs"]

    def stop(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        _end(self._process)
        self._log.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Unusable(f"ended; {self._log.name} has the cause") from None

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Unusable(f"ended with code {self._process.wait()}; {self._log.name} has the cause")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unusable(answer["error"])
        return answer


class Ours:
    """Our real server, spoken to over gRPC by as many streams as requests."""

    def __init__(self, name: str, workload: Workload, threads: int, *flags: str) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        self._log = (LOGS / f"{name}.log").open("w", encoding="utf-8")
        self._loop = asyncio.new_event_loop()
        self._client: Client | None = None
        self._calls = 0
        fixed = ("--listen", "127.0.0.1:0", "--log-level", "warning", "--cost-cache", str(BUILD / "costs"))
        fixed = (*fixed, "--kv-memory", "1G")  # as much as vLLM is given
        model = ("--model", str(workload.directory), "--dtype", workload.dtype, "--threads", str(threads))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "server", *fixed, *model, *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ready(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("serving "):
            raise Unusable(f"did not start; {self._log.name} has the cause")
        self._client = self._loop.run_until_complete(_connect(line.rsplit(" ", 1)[1].strip()))
        return {}

    def generate(self, mode: str, prompts: Sequence[Sequence[int]], tokens: int) -> Decoded:
        return self._loop.run_until_complete(self._generate(prompts, tokens))

    async def _generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Decoded:
        assert self._client is not None
        client = self._client
        self._calls += 1
        # With a salt of its own, a request finds no prefix that an earlier one left: all arms do all the work.
        options = Options(max_tokens=tokens, temperature=0.0, ignore_eos=True, cache_salt=f"call {self._calls}")

        async def one(prompt: Sequence[int]) -> list[int]:
            events = client.generate(prompt, options)
            return [token async for event in events if isinstance(event, Delta) for token in event.token_ids]

        began = time.perf_counter()
        outputs = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return time.perf_counter() - began, outputs

    def stop(self) -> None:
        if self._client is not None:
            self._loop.run_until_complete(self._client.close())
        self._loop.close()
        self._process.terminate()
        _end(self._process)
        self._log.close()


async def _connect(address: str) -> Client:
    """A client that belongs to the loop that runs this."""
    return Client(address)


def _end(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


OURS = ("ours", "ours-dspark", "ours-engine")
NAMES = (*OURS, "transformers", "transformers-lookup", "transformers-assisted", "vllm", "llama.cpp")


class _Starter:
    """Starts the arms of one workload."""

    def __init__(self, workload: Workload, threads: int) -> None:
        self._workload, self._threads = workload, threads
        self._transformers: Arm | None = None  # its modes share a process

    def start(self, name: str) -> Arm:
        """Raises Unusable with the reason."""
        workload = self._workload
        if name == "ours":
            return self._ours(name, "--draft", "none", "--policy", "plain")
        if name == "ours-dspark":
            _need(workload.draft, "there is no drafter for this target")
            return self._ours(name, "--draft", str(workload.draft), "--policy", "auto")
        if name == "ours-engine":
            return self._runner(name, "run_engine", Path(sys.executable))
        if name == "vllm":
            return self._runner(name, "run_vllm", _python("vllm"), cache=str(BUILD / "cache"))
        if name == "llama.cpp":
            _need(workload.package, "there is no GGUF file of these weights")
            cache = str(BUILD / "weights")
            return self._runner(name, "run_llama", _python("llama"), package=workload.package, cache=cache)
        mode = name.partition("-")[2] or "plain"
        if mode == "assisted":
            _need(workload.assistant, "there is no smaller model of this vocabulary")
        if self._transformers is None:
            assistant = str(workload.assistant) if workload.assistant else None
            python = _python("transformers")
            self._transformers = self._runner("transformers", "run_transformers", python, assistant=assistant)
        return replace(self._transformers, name=name, mode=mode, single=mode != "plain")

    def _ours(self, name: str, *flags: str) -> Arm:
        return _ready(name, Ours(name, self._workload, self._threads, *flags))

    def _runner(self, name: str, program: str, python: Path, **more: Any) -> Arm:
        workload = self._workload
        told = {
            "model": str(workload.directory),
            "dtype": workload.dtype,
            "threads": self._threads,
            "requests": max(workload.counts),
            "length": workload.length + 16,
            **more,
        }
        return _ready(name, Runner(name, RUNNERS / f"{program}.py", python, told))


def start(workload: Workload, names: Sequence[str], threads: int) -> tuple[list[Arm], dict[str, str]]:
    """Starts what decodes this workload, one after the other; the arms, and why the others are left out."""
    starter = _Starter(workload, threads)
    arms: list[Arm] = []
    left_out: dict[str, str] = {}
    for name in names:
        try:
            arms.append(starter.start(name))
        except Unusable as error:
            left_out[name] = str(error)
            say(f"{workload.name}: {name} is left out: {error}")
        except BaseException:
            stop(arms)
            raise
    return arms, left_out


def _need(value: object, otherwise: str) -> None:
    if value is None:
        raise Unusable(otherwise)


def _python(environment: str) -> Path:
    if (missing := ENVIRONMENTS[environment].missing) is not None:
        raise Unusable(missing)
    return ENVIRONMENTS[environment].python


def _ready(name: str, process: Runner | Ours) -> Arm:
    began = time.perf_counter()
    try:
        about = process.ready()
    except BaseException:
        process.stop()
        raise
    say(f"{name} ready after {time.perf_counter() - began:.0f} s")
    return Arm(name, process, versions=about.get("versions", {}), note=about.get("note", ""))


def stop(arms: Sequence[Arm]) -> None:
    """Ends every process once."""
    for process in {id(arm.process): arm.process for arm in arms}.values():
        process.stop()
