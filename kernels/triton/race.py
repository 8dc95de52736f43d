"""Who wins a row: the argmax, or the argmax of log p − log E with the noise of a position. Device functions.

The exact score of `kernels.noise.pick` needs the row's maximum first. To read a row once, segments of it are scored
against the largest logit seen so far and moved when it changes. That rounds differently, by less than AMBIGUOUS: the
best such score beats the exact rest when it leads the second by more, and otherwise `pick` reads the row again.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.filters import kept, scaled
from kernels.triton.noise import exponential_from_bits, log_float32, words

# A winner's score lies in −3.2 … 22.9, so its rivals' terms are below 50, half an ulp is 2⁻¹⁹ and few are added up.
AMBIGUOUS = tl.constexpr(1e-4)
HIGHEST = tl.constexpr(23.0)  # above every −log E
COUPLED = tl.constexpr(3)  # kernels.noise.Purpose
_NOBODY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def score_bound(x, bits):
    """An upper bound of x − log E, cheap: log E ≥ log(1 − e^−E) ≥ ln 2 · (exponent + fraction) of that float."""
    small = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return x - (small.to(tl.int32, bitcast=True).to(tl.float32) * 8.262958405176314e-8 - 88.02869)


@triton.jit
def leader(score, token):
    """Best score, its lowest token, and the best score of the others, of vectors without NaN."""
    best = tl.max(score, 0)
    winner = tl.min(tl.where(score == best, token, _NOBODY), 0)
    return best, winner, tl.max(tl.where(token == winner, float("-inf"), score), 0)


@triton.jit
def advance(x, token, temperature, seed, position, top, best, second, winner, NOISE: tl.constexpr, TILE: tl.constexpr):
    """Take a tile of logits x [TILE] float32 into the running (top, best, second, winner).

    `top` is the largest logit. With NOISE, `best` and `second` are scores relative to it; without, `best` is top.
    """
    tile_top = tl.max(x, 0)
    if NOISE:
        if tile_top > top:
            moved = tl.math.div_rn(top - tile_top, temperature)
            best, second, top = best + moved, second + moved, tile_top
        if (tile_top > float("-inf")) & (tl.math.div_rn(tile_top - top, temperature) + HIGHEST + AMBIGUOUS >= best):
            scores = tl.where(x > float("-inf"), tl.math.div_rn(x - top, temperature), float("-inf"))
            bits = words(seed, position, COUPLED, tl.min(token, 0), TILE)
            if tl.max(score_bound(scores, bits), 0) + AMBIGUOUS >= best:
                scores = scores - log_float32(exponential_from_bits(bits))
                tile_best, tile_winner, tile_second = leader(scores, token)
                second = tl.maximum(tl.minimum(best, tile_best), tl.maximum(second, tile_second))
                winner = tl.where(tile_best > best, tile_winner, winner)
                best = tl.maximum(best, tile_best)
    else:
        if tile_top > top:
            winner = tl.min(tl.where(x == tile_top, token, _NOBODY), 0)
            top, best = tile_top, tile_top
    return top, best, second, winner


@triton.jit
def pick(row, vocabulary, top, temperature, limit, last, floor, seed, position, TILE: tl.constexpr):
    """argmax(x − log E) over the kept tokens of a row, exactly as `kernels.noise.pick`."""
    best, winner = tl.full([], float("-inf"), tl.float32), tl.full([], 0, tl.int32)
    for start in range(0, vocabulary, TILE):
        token = start + tl.arange(0, TILE)
        x = scaled(row, token, vocabulary, top, temperature)
        x = tl.where(kept(x, token, limit, last, floor) & (token < vocabulary), x, float("-inf"))
        if tl.max(x, 0) + HIGHEST >= best:
            bits = words(seed, position, COUPLED, start, TILE)
            if tl.max(score_bound(x, bits), 0) > best:
                tile_best, tile_winner, _ = leader(x - log_float32(exponential_from_bits(bits)), token)
                winner = tl.where(tile_best > best, tile_winner, winner)
                best = tl.maximum(best, tile_best)
    return winner
