"""Whose drafts pay, natively: each request by the survivals of its last blocks, the batch by all of them together."""

from __future__ import annotations

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_cost as c
from engine.schedule.jit import native
from engine.schedule.native_certainty import class_of

Array = np.ndarray

CLASS_WEIGHT = 3.0  # blocks of the class beside a request's own: who looks best of many is often just lucky
_FIRST_ROWS = 3.0  # rows a block, to begin with: by the first few alone, which are the dearest, nothing would ever pay
GAIN = 1.01  # drafting starts when it promises this much
STAY = 0.97  # and stops below this: to stop and to begin again costs rounds with cold caches, and what waits meanwhile


@native
def judge(
    places: Array,
    slots: Array,
    contexts: Array,
    limits: Array,
    whole: Array,
    real: Array,
    curves: Array,
    classes: Array,
    class_count: Array,
    memory: Array,
    base: Array,
    drift: Array,
    curve: Array,
    rates: Array,
    decoding: int,
    tokens: float,
    plain_s: float,
) -> None:
    """Dinkelbach's iteration on Σ w·tokens / T over who drafts and how many slots; lengths follow the price.

    A round without drafts costs these its own seconds and those of keeping their features: they are followed already.
    """
    count, block = places.shape[0], curves.shape[2]
    bare_s = plain_s
    if count:
        plain_s += memory[b.KEEPING_S] * min(count / max(decoding, 1), 1.0)
    ordinary = tokens / plain_s
    price = ordinary
    profit, rows = np.empty((count, block)), np.empty((count, block))
    drafted_factor, absorbed_s = np.empty(count + 1), np.empty(count + 1)
    for n in range(1, count + 1):
        drafted_factor[n] = c.factor(drift, c.DRAFT, n)
        absorbed_s[n] = c.absorb_s(base, drift, 2.0 * n)
    besides_s = c.drafted_s(drift, rates)
    expected = _FIRST_ROWS * count
    best_count, best_length = 0, block
    best_order = np.empty(count, np.int64)
    shortest = 1 if rates[c.DRAFT_SLOTS] > 0 else block
    for _ in range(3):
        span = max(expected, 2.0)
        row_s = (c.rows_s(curve, decoding + span) - c.rows_s(curve, decoding)) / span
        for k in range(count):
            i = places[k]
            own_s = rates[c.ROW_CONTEXT_S] * np.exp(drift[c.VERIFY, c.SPEED]) * contexts[i]
            dear = price * (row_s + own_s)
            _worth(slots[i], limits[i], dear, whole, real, curves, classes, class_count, profit[k], rows[k])
        best, best_count, best_overhead, expected_rows = -np.inf, 0, 0.0, 0.0
        for length in range(block, shortest - 1, -1):
            order = np.argsort(-profit[:, length - 1], kind="mergesort")  # stable: ties by place
            share = 1 - rates[c.DRAFT_SLOTS] * (1 - length / block)
            brought, context, expect = 0.0, 0.0, 0.0
            for n in range(1, count + 1):
                k = order[n - 1]
                brought += profit[k, length - 1]
                context += contexts[places[k]]
                expect += rows[k, length - 1]
                drafted_s = (c.table_s(base, c.DRAFT, n) + rates[c.DRAFT_CONTEXT_S] * context) * drafted_factor[n]
                overhead = drafted_s * share + absorbed_s[n] + besides_s
                if brought - price * overhead > best:
                    best = brought - price * overhead
                    best_count, best_length, best_overhead, expected_rows = n, length, overhead, expect
                    best_order = order
        if best_count == 0:
            break
        expected = expected_rows
        drafting_s = bare_s + best_overhead + expected * row_s
        price += (best + tokens - price * bare_s) / drafting_s
    pays = best_count > 0 and price > ordinary * (STAY if memory[b.OPEN] > 0 else GAIN)
    memory[b.OPEN] = 1.0 if pays else 0.0
    memory[b.PRICE] = price if pays else ordinary
    memory[b.LENGTH] = best_length if pays else block
    for k in range(count):
        whole[slots[places[k]], b.DRAFTING] = 0
    if pays:
        for k in range(best_count):
            whole[slots[places[best_order[k]]], b.DRAFTING] = 1


@native
def _worth(
    slot: int,
    limit: int,
    row_price: float,
    whole: Array,
    real: Array,
    curves: Array,
    classes: Array,
    class_count: Array,
    profit: Array,
    rows: Array,
) -> None:
    """Expected profit (weighted tokens) of a block of so many slots, and the rows it would verify; both [γ].

    By the request's own last blocks, and its class's as far as it has few. Where nothing is known, nothing is expected.
    """
    own = min(whole[slot, b.BLOCKS_SEEN], b.BLOCKS)
    kind = class_of(slot, whole, real)
    shared = min(class_count[kind], b.CLASS_BLOCKS)
    if own == b.BLOCKS:
        shared = 0
    weight = real[slot, b.WEIGHT]
    each = min(CLASS_WEIGHT / max(shared, 1), 1.0)
    total = max(own + each * shared, 1.0)
    gained = taken = 0.0
    for j in range(profit.shape[0]):
        if j < limit:
            for n in range(own):
                gain = curves[slot, n, j] * weight - row_price
                if gain > 0:
                    gained += gain / total
                    taken += 1 / total
            for n in range(shared):
                gain = classes[kind, n, j] * weight - row_price
                if gain > 0:
                    gained += each * gain / total
                    taken += each / total
        profit[j], rows[j] = gained, taken
