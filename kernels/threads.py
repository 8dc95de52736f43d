"""Helper threads for native routines: work is claimed piece by piece, so a late helper delays nobody.

A routine runs stage after stage on every thread. A stage is a number of chunks; threads claim them from a
shared counter and pass on when all are finished. Which thread computes a chunk changes no bit of it. A helper
that the operating system wakes late finds the first stages done and joins at the current one; where it never
comes, the caller does all the work. Helpers spin for a moment after a job, then sleep in the kernel.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from kernels.jit import entry, native
from kernels.simd import I64, load_int, pointer, store_int

STAGES = 2048  # counters a team has; longer routines run on one thread
ALONE = STAGES + 1  # what is said of a routine that is not worth waking anybody
_WORTH = 1 << 14  # numbers to go through, some microseconds
_LINE = 64  # bytes: every shared word has a cache line of its own
# Words of a helper's block.
_STATE, _ASLEEP, _SEMAPHORE = 0, _LINE, 2 * _LINE
_BLOCK = 4 * _LINE
_IDLE, _POSTED, _RUNNING, _QUIT = 0, 1, 2, 3
# Words of the team: a lock, the job, the number of helpers and where their blocks and the counters lie.
_LOCK, _ROUTINE, _FRAME, _HELPERS, _BLOCKS = 0, _LINE, _LINE + 8, _LINE + 16, 2 * _LINE
_SPINS = 2000  # polls before a helper sleeps or a waiting thread yields: some 50 µs

_sem_wait = types.ExternalFunction("sem_wait", types.int32(types.int64))
_sem_post = types.ExternalFunction("sem_post", types.int32(types.int64))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())


def _atomic(arguments: int, emit: Any) -> Any:
    def lower(context, builder, sig, args):
        value = emit(builder, pointer(builder, args[0], I64), *args[1:])
        return context.get_dummy_value() if value is None else value

    def typed(result: Any) -> Any:
        sig = signature(result, *[types.int64] * arguments)
        if arguments == 1:
            return intrinsic(lambda typingctx, a: (sig, lower))
        if arguments == 2:
            return intrinsic(lambda typingctx, a, b: (sig, lower))
        return intrinsic(lambda typingctx, a, b, c: (sig, lower))

    return typed


def _exchange_if(builder: ir.IRBuilder, p: ir.Value, old: ir.Value, new: ir.Value) -> ir.Value:
    result = builder.cmpxchg(p, old, new, "seq_cst", "seq_cst")
    return builder.zext(builder.extract_value(result, 1), I64)


def _pause(builder: ir.IRBuilder, _: ir.Value) -> None:
    """Tell the core that this is a spin loop (x86 only; elsewhere nothing)."""
    if builder.module.triple.startswith(("x86", "i686")):
        function = ir.FunctionType(ir.VoidType(), [])
        known = builder.module.globals.get("llvm.x86.sse2.pause")
        builder.call(known or ir.Function(builder.module, function, "llvm.x86.sse2.pause"), [])


atomic_add = _atomic(2, lambda b, p, n: b.atomic_rmw("add", p, n, "seq_cst"))(types.int64)
atomic_swap = _atomic(2, lambda b, p, n: b.atomic_rmw("xchg", p, n, "seq_cst"))(types.int64)
atomic_load = _atomic(1, lambda b, p: b.load_atomic(p, "seq_cst", 8))(types.int64)
atomic_store = _atomic(2, lambda b, p, n: b.store_atomic(n, p, "seq_cst", 8) and None)(types.void)
exchange_if = _atomic(3, _exchange_if)(types.int64)
pause = _atomic(1, _pause)(types.void)


@intrinsic
def _call(typingctx, routine, frame, worker):
    """Call the routine at an address (kernels.jit.routine)."""

    def lower(context, builder, sig, args):
        function_type = ir.FunctionType(ir.VoidType(), [I64, I64])
        builder.call(builder.inttoptr(args[0], function_type.as_pointer()), [args[1], args[2]])
        return context.get_dummy_value()

    return signature(types.void, types.int64, types.int64, types.int64), lower


@native
def claim(counters, stage, previous):
    """The next chunk of the stage for this thread to do; `previous` is its last one, −1 at first."""
    if counters == 0:
        return previous + 1
    return atomic_add(counters + stage * 2 * _LINE, 1)


@native
def finish(counters, stage, done, total):
    """Add this thread's `done` chunks and wait until all `total` are finished."""
    if counters == 0:
        return
    address = counters + stage * 2 * _LINE + _LINE
    if done:
        atomic_add(address, done)
    spins = 0
    while atomic_load(address) < total:
        pause(address)
        spins += 1
        if spins >= _SPINS:
            _sched_yield()
            spins = 0


@native
def one_stage(chunks, numbers):
    """The stages of a routine with one that goes through so many numbers: ALONE where that is not worth sharing."""
    return 1 if chunks > 1 and numbers >= _WORTH else ALONE


@native
def _helper_block(team, index):
    return team + _BLOCKS + index * _BLOCK


@entry
def _help(team, index):
    """A helper's life. Holds neither the GIL nor, while asleep, the processor."""
    block = _helper_block(team, index)
    spins = 0
    while True:
        state = atomic_load(block + _STATE)
        if state == _QUIT:
            return
        if state == _POSTED and exchange_if(block + _STATE, _POSTED, _RUNNING):
            _call(load_int(team + _ROUTINE), load_int(team + _FRAME), index + 1)
            atomic_store(block + _STATE, _IDLE)
            spins = 0
        spins += 1
        if spins < _SPINS:
            pause(block)
            continue
        # Announce the sleep, then look once more: the caller posts first and reads the flag afterwards.
        atomic_store(block + _ASLEEP, 1)
        if atomic_load(block + _STATE) == _IDLE or not atomic_swap(block + _ASLEEP, 0):
            _sem_wait(block + _SEMAPHORE)
        spins = 0


@native
def _wake(block):
    if atomic_swap(block + _ASLEEP, 0):
        _sem_post(block + _SEMAPHORE)


@native
def run_team(team, routine, frame, stages):
    """Run a routine on the caller and all helpers; `frame` gets the address of the counters in its first word."""
    helpers = load_int(team + _HELPERS)
    if helpers == 0 or stages > STAGES or not exchange_if(team + _LOCK, 0, 1):
        store_int(frame, 0)
        _call(routine, frame, 0)
        return
    counters = _helper_block(team, helpers)
    for stage in range(stages):
        store_int(counters + stage * 2 * _LINE, 0)
        store_int(counters + stage * 2 * _LINE + _LINE, 0)
    store_int(frame, counters)
    store_int(team + _ROUTINE, routine)
    store_int(team + _FRAME, frame)
    for index in range(helpers):
        block = _helper_block(team, index)
        atomic_store(block + _STATE, _POSTED)
        _wake(block)
    _call(routine, frame, 0)
    for index in range(helpers):
        block = _helper_block(team, index)
        spins = 0
        # A helper that has not begun must not begin any more; one that has is about to leave.
        while atomic_load(block + _STATE) != _IDLE and not exchange_if(block + _STATE, _POSTED, _IDLE):
            pause(block)
            spins += 1
            if spins >= _SPINS:
                _sched_yield()
                spins = 0
    atomic_store(team + _LOCK, 0)


@entry
def _run(team, routine, frame, stages):
    run_team(team, routine, frame, stages)


@entry
def _quit(team):
    for index in range(load_int(team + _HELPERS)):
        block = _helper_block(team, index)
        while not exchange_if(block + _STATE, _IDLE, _QUIT):
            pause(block)
        _wake(block)


class _Team:
    """The calling thread and `threads` − 1 helpers, with the memory that they share."""

    def __init__(self, threads: int) -> None:
        helpers = threads - 1
        words = (_BLOCKS + helpers * _BLOCK + STAGES * 2 * _LINE + _LINE) // 8
        self._memory = np.zeros(words, np.int64)
        # A zeroed sem_t is an unlocked semaphore of value 0, private to the process (glibc and musl).
        self.address = -(-self._memory.ctypes.data // _LINE) * _LINE
        self.threads = threads
        self._memory[(self.address - self._memory.ctypes.data + _HELPERS) // 8] = helpers
        self._helpers = [
            threading.Thread(target=_help, args=(self.address, index), name=f"kernel-{index}", daemon=True)
            for index in range(helpers)
        ]
        for helper in self._helpers:
            helper.start()

    def close(self) -> None:
        _quit(self.address)
        for helper in self._helpers:
            helper.join()


_team = _Team(1)


def set_threads(count: int) -> None:
    """Let native routines use `count` threads, the caller included. Call it while none is running.

    Raises:
        ValueError: `count` is less than 1.
    """
    global _team
    if count < 1:
        raise ValueError(f"threads must be at least 1, got {count}")
    if count != _team.threads:
        before, _team = _team, _Team(count)
        before.close()


def get_threads() -> int:
    return _team.threads


def run(routine: int, frame: int, stages: int) -> None:
    """Run the native routine at an address on all threads.

    `frame` is the address of its arguments; the first word is overwritten. `stages` is how many it has.
    """
    _run(_team.address, routine, frame, stages)


def stages_for(chunks: int, numbers: int) -> int:
    """`one_stage` for Python."""
    return 1 if chunks > 1 and numbers >= _WORTH else ALONE


def team_and(routine: Callable[[], int]) -> tuple[int, int]:
    """What `run_team` wants of native code that is called from Python: the team, and the address of its routine."""
    return _team.address, routine()


atexit.register(lambda: set_threads(1))
