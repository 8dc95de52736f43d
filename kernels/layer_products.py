"""The matrix products of a layer, as stages that threads share out by panels, with what belongs before and behind.

Few rows are normalised and rounded by every thread for itself, after its first claim: that costs less than a stage
of its own, and while a thread holds a claimed chunk nobody passes on to change the rows that it reads.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from kernels import layer_frame as f
from kernels.jit import native
from kernels.rms_norm import norm_row
from kernels.simd import exp, fma, load, load_float, never_inline, splat, store, store_float, store_narrow
from kernels.threads import claim, finish
from kernels.tiles import is_narrow, multiply_panels, narrow_stride, round_rows, rows_at_once
from kernels.values import GELU_TANH


@native
def copy_floats(source, to, floats):
    whole = floats // 16 * 16
    for column in range(0, whole, 16):
        store(to + 4 * column, load(source + 4 * column))
    for column in range(whole, floats):
        store_float(to + 4 * column, load_float(source + 4 * column))


@native
def keep_row(frame, row, hidden, capture):
    """Copy a row of x to where the drafter reads it, if it ever will."""
    wanted = f.word(frame, f.KEPT)
    if wanted and f.word(wanted, row) == 0:
        return
    kept = f.word(frame, f.FEATURES) + row * f.word(frame, f.FEATURE_STRIDE) + capture * hidden * 4
    copy_floats(f.word(frame, f.X) + row * hidden * 4, kept, hidden)


@native
def leaves_narrow(form, width):
    """Whether rows of this width are laid down as bfloat16 for panels of this form; very short ones have no room."""
    return is_narrow(form) and width >= 32


@native
def norm_to(x, weight, out, row, hidden, eps, narrow, scratch):
    """Row x normalised to row number `row` of `out`; of bfloat16 with `narrow`."""
    if narrow:
        norm_row(x, weight, scratch, hidden, eps)
        round_rows(1, scratch, hidden * 4, hidden, out + row * narrow_stride(hidden))
    else:
        norm_row(x, weight, out + row * hidden * 4, hidden, eps)


@native
def norm_stage(frame, stage, rows, source, index, weight, eps, out, hidden, narrow, scratch):
    """Rows of `source`, or those that `index` names if it is not 0, normalised; see `norm_to`."""
    never_inline()
    counters = f.word(frame, f.COUNTERS)
    chunks = rows if counters else 1
    size = 1 if counters else rows
    done, chunk = 0, claim(counters, stage, -1)
    while chunk < chunks:
        for row in range(chunk * size, (chunk + 1) * size):
            at = f.word(index, row) if index else row
            norm_to(source + at * hidden * 4, weight, out, row, hidden, eps, narrow, scratch)
        done, chunk = done + 1, claim(counters, stage, chunk)
    finish(counters, stage, done, chunks)


@native
def start_stage(frame, stage, layer, eps, capture, qkv_width, narrow, scratch):
    """Normalise the rows of x; keep x where the drafter wants it; lay what q, k and v start from, if anything."""
    never_inline()
    counters, rows, hidden = f.word(frame, f.COUNTERS), f.word(frame, f.ROWS), f.word(layer, f.HIDDEN)
    chunks = rows if counters else 1
    size = 1 if counters else rows
    done, chunk = 0, claim(counters, stage, -1)
    while chunk < chunks:
        for row in range(chunk * size, (chunk + 1) * size):
            x = f.word(frame, f.X) + row * hidden * 4
            norm_to(x, f.word(layer, f.INPUT_NORM), f.word(frame, f.NORMED), row, hidden, eps, narrow, scratch)
            if capture >= 0:
                keep_row(frame, row, hidden, capture)
            start = f.word(layer, f.BIAS)
            if f.word(frame, f.QKV_START):
                start = f.word(frame, f.QKV_START) + row * qkv_width * 4
            if start:
                copy_floats(start, f.word(frame, f.QKV) + row * qkv_width * 4, qkv_width)
        done, chunk = done + 1, claim(counters, stage, chunk)
    finish(counters, stage, done, chunks)


@native
def _norm_for_itself(rows, x, weight, hidden, eps, form, scratch):
    """Normalised rows of x, rounded for narrow panels, behind the spill; one more row of room lies behind them."""
    never_inline()
    out = scratch + f.SPILL
    if not is_narrow(form):
        for row in range(rows):
            norm_row(x + row * hidden * 4, weight, out + row * hidden * 4, hidden, eps)
        return
    normed = out + rows * narrow_stride(hidden)
    for row in range(rows):
        norm_row(x + row * hidden * 4, weight, normed, hidden, eps)
        round_rows(1, normed, hidden * 4, hidden, out + row * narrow_stride(hidden))


@native
def _chunk_size(counters, threads, panels):
    """Panels a thread claims at once: a quarter of its share, or fewer where that shares them out more evenly."""
    if counters == 0:
        return panels
    best = size = (panels + 4 * threads - 1) // (4 * threads)
    fewest = panels
    while size > 0:
        chunks = (panels + size - 1) // size
        longest = (chunks + threads - 1) // threads * size
        if longest < fewest:
            best, fewest = size, longest
        size -= 1
    return best


@native
def multiply_stage(
    counters, stage, threads, rows, x, x_stride, w, form, n, k, out, out_stride, accumulate, narrow, scratch
):
    """out [rows, n] (+)= x [rows, k] wᵀ, panels shared out among the threads.

    x holds float32, or with `narrow` what the panels multiply already. `scratch` holds SPILL bytes, and behind them
    room for the rows in bfloat16.
    """
    never_inline()
    panels = (n + 31) // 32
    size = _chunk_size(counters, threads, panels)
    chunks = (panels + size - 1) // size
    ready = not is_narrow(form) or narrow != 0
    done, chunk = 0, claim(counters, stage, -1)
    while chunk < chunks:
        if not ready:
            round_rows(rows, x, x_stride, k, scratch + f.SPILL)
            x, x_stride, ready = scratch + f.SPILL, narrow_stride(k), True
        first, last = chunk * size, min(panels, (chunk + 1) * size)
        multiply_panels(rows, x, x_stride, w, form, n, first, last, k, out, out_stride, accumulate, scratch)
        done, chunk = done + 1, claim(counters, stage, chunk)
    finish(counters, stage, done, chunks)


@native
def project_stages(frame, stage, layer, eps, capture, qkv_width, scratch):
    """q, k and v of the normed rows; x kept where the drafter wants it. Two stages, the first of them for many rows."""
    never_inline()
    counters, threads, rows = f.word(frame, f.COUNTERS), f.word(frame, f.THREADS), f.word(frame, f.ROWS)
    hidden, x, out = f.word(layer, f.HIDDEN), f.word(frame, f.X), f.word(frame, f.QKV)
    w, form = f.word(layer, f.W_QKV), f.word(layer, f.W_QKV + 1)
    start = f.word(layer, f.BIAS) | f.word(frame, f.QKV_START)
    if rows > f.FEW_ROWS or start:
        narrow = leaves_narrow(form, hidden)
        start_stage(frame, stage, layer, eps, capture, qkv_width, narrow, scratch + f.SPILL)
        stride = narrow_stride(hidden) if narrow else hidden * 4
        multiply_stage(
            counters, stage + 1, threads, rows, f.word(frame, f.NORMED), stride, w, form, qkv_width, hidden, out,
            qkv_width * 4, start, narrow, scratch,
        )  # fmt: skip
        return
    panels = (qkv_width + 31) // 32
    size = _chunk_size(counters, threads, panels)
    chunks = (panels + size - 1) // size
    ready, stride = False, narrow_stride(hidden) if is_narrow(form) else hidden * 4
    every = chunks + 1 if capture >= 0 else chunks
    done, chunk = 0, claim(counters, stage + 1, -1)
    while chunk < every:
        if chunk == chunks:
            for row in range(rows):
                keep_row(frame, row, hidden, capture)
        else:
            if not ready:
                _norm_for_itself(rows, x, f.word(layer, f.INPUT_NORM), hidden, eps, form, scratch)
                ready = True
            first, last = chunk * size, min(panels, (chunk + 1) * size)
            source = scratch + f.SPILL
            multiply_panels(
                rows, source, stride, w, form, qkv_width, first, last, hidden, out, qkv_width * 4, 0, scratch
            )
        done, chunk = done + 1, claim(counters, stage + 1, chunk)
    finish(counters, stage + 1, done, every)


@native
def gated(gate, up, activation):
    """silu(gate) · up; or gelu(gate) · up by the tanh formula, which is gate · σ(2 √(2/π) (gate + 0.044715 gate³))."""
    z = gate
    if activation == GELU_TANH:
        z = gate * fma(gate * gate, splat(0.071354814), splat(1.5957691))
    return gate / (splat(1.0) + exp(splat(0.0) - z)) * up


@native
def add_normed_stage(frame, stage, delta, weight, eps, x, hidden):
    """x += norm(delta), rows [rows, hidden] of both; delta is overwritten."""
    never_inline()
    counters, rows = f.word(frame, f.COUNTERS), f.word(frame, f.ROWS)
    whole = hidden // 16 * 16
    done, row = 0, claim(counters, stage, -1)
    while row < rows:
        source, to = delta + row * hidden * 4, x + row * hidden * 4
        norm_row(source, weight, source, hidden, eps)
        for column in range(0, whole, 16):
            store(to + 4 * column, load(to + 4 * column) + load(source + 4 * column))
        for column in range(whole, hidden):
            store_float(to + 4 * column, load_float(to + 4 * column) + load_float(source + 4 * column))
        done, row = done + 1, claim(counters, stage, row)
    finish(counters, stage, done, rows)


@native
def gated_stages(frame, stage, layer, eps, scratch):
    """Gate times up of the normed rows of x, a panel of each at a time, in the form that `down` multiplies.

    The width is a multiple of 32. Two stages, the first of them for many rows.
    """
    never_inline()
    counters, threads, rows = f.word(frame, f.COUNTERS), f.word(frame, f.THREADS), f.word(frame, f.ROWS)
    hidden, width = f.word(layer, f.HIDDEN), f.word(layer, f.INTERMEDIATE)
    w, form = f.word(layer, f.W_GATE_UP), f.word(layer, f.W_GATE_UP + 1)
    narrow, out = is_narrow(f.word(layer, f.W_DOWN + 1)), f.word(frame, f.ACTIVATED)
    out_stride = narrow_stride(width) if narrow else width * 4
    source, x_stride = scratch + f.SPILL, narrow_stride(hidden) if is_narrow(form) else hidden * 4
    activation, ready = f.word(layer, f.ACTIVATION), False
    if rows > f.FEW_ROWS:
        post_norm, normed = f.word(layer, f.POST_NORM), f.word(frame, f.NORMED)
        narrow = leaves_narrow(form, hidden)
        x = f.word(frame, f.X)
        norm_stage(frame, stage, rows, x, 0, post_norm, eps, normed, hidden, narrow, scratch + f.SPILL)
        if narrow or not is_narrow(form):
            source, ready = normed, True
    panels, step = width // 32, rows_at_once(form)
    size = _chunk_size(counters, threads, panels)
    chunks = (panels + size - 1) // size
    done, chunk = 0, claim(counters, stage + 1, -1)
    while chunk < chunks:
        if not ready:
            if rows <= f.FEW_ROWS:
                _norm_for_itself(rows, f.word(frame, f.X), f.word(layer, f.POST_NORM), hidden, eps, form, scratch)
            else:
                round_rows(rows, f.word(frame, f.NORMED), hidden * 4, hidden, source)
            ready = True
        for panel in range(chunk * size, min(panels, (chunk + 1) * size)):
            for row in range(0, rows, step):
                count, x = min(step, rows - row), source + row * x_stride
                gate, up = scratch, scratch + step * 128
                other = panels + panel
                multiply_panels(
                    count, x, x_stride, w, form, 2 * width, panel, panel + 1, hidden, gate - panel * 128, 128, 0, 0
                )
                multiply_panels(
                    count, x, x_stride, w, form, 2 * width, other, other + 1, hidden, up - other * 128, 128, 0, 0
                )
                for i in range(count):
                    low = gated(load(gate + i * 128), load(up + i * 128), activation)
                    high = gated(load(gate + i * 128 + 64), load(up + i * 128 + 64), activation)
                    to = out + (row + i) * out_stride + panel * (64 if narrow else 128)
                    if narrow:
                        store_narrow(to, low)
                        store_narrow(to + 32, high)
                    else:
                        store(to, low)
                        store(to + 64, high)
        done, chunk = done + 1, claim(counters, stage + 1, chunk)
    finish(counters, stage + 1, done, chunks)
