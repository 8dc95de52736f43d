"""Layers with windows, sandwich norms, GELU and ropes of their own: parity with plain torch, and no bit of a row
depends on what runs beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import threads
from kernels.decoder_layer import decoder_layer
from kernels.decoder_stack import decoder_stack
from kernels.draft_stack import draft_stack
from kernels.embedding import embedding
from kernels.forward import BlockRows, Ends, LayerStack, forward
from kernels.matmul import matmul, pack
from kernels.reference.decoder_layer import decoder_layer as reference_layer
from kernels.rms_norm import rms_norm
from kernels.rope import rope_table
from kernels.values import GELU_TANH, PAGE, LayerCache, LayerWeights
from tests.kernels.layers import Shape, copied, page_table, poisoned_cache, ragged_rows, random_layer, same_bits

# A key/value head for several query heads, widths that are no multiple of 32, the head sizes of the family.
SHAPES = [Shape(), Shape(hidden=80, intermediate=50, heads=4, kv_heads=1, head_dim=64), Shape(heads=2, head_dim=256)]
WINDOWS = (1, 5, 16, 23, 40)
DTYPES = [torch.float32, torch.bfloat16]
LENGTH = 70


def gemma_layer(shape: Shape, seed: int, window: int, dtype: torch.dtype = torch.float32) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)
    gains = [0.5 + torch.rand(shape.hidden, generator=generator) for _ in range(2)]
    return replace(
        random_layer(shape, generator, dtype=dtype),
        post_attention_norm=gains[0],
        post_feedforward_norm=gains[1],
        activation=GELU_TANH,
        window=window,
        scale=0.3,
        rope=rope_table(96, shape.head_dim, 100.0, factor=4.0),
    )


class Model:
    """One layer, and x of a sequence of LENGTH tokens to run through it in different ways."""

    def __init__(self, shape: Shape, window: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype = shape, dtype
        self.layer = gemma_layer(shape, 1, window, dtype)
        assert self.layer.address
        self.rope = rope_table(96, shape.head_dim, 1e4)  # never used: the layer has its own
        self.x = torch.randn(LENGTH, shape.hidden, generator=torch.Generator().manual_seed(2))

    def chunked(self, chunk: int, seed: int, forget: bool = False) -> Tensor:
        """The sequence in chunks, in pages laid out by the seed; `forget` spoils pages once no row can see them."""
        table = page_table([LENGTH], 9, torch.Generator().manual_seed(seed))
        cache, parts = poisoned_cache(self.shape, 9, self.dtype), []
        for start in range(0, LENGTH, chunk):
            stop = min(LENGTH, start + chunk)
            if forget and self.layer.window:
                for page in table[0, : max(0, start + 1 - self.layer.window) // PAGE].tolist():
                    cache.k[page] = torch.nan
                    cache.v[page] = torch.nan
            x = self.x[start:stop].clone()
            decoder_layer(x, self.layer, cache, self.rope, ragged_rows([(start, stop)], table))
            parts.append(x)
        return torch.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_batches_match_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    # Both sides round factors to bfloat16, but a last bit may tip that, and norms of sums then widen the difference.
    near = {"atol": 0.25, "rtol": 2**-6} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    mean = 2e-2 if dtype == torch.bfloat16 else 1e-5
    generator = torch.Generator().manual_seed(3)
    rope = rope_table(96, shape.head_dim, 1e4)
    table = page_table([LENGTH, 1, 16, 33], pages=13, generator=generator)
    for window in (0, *WINDOWS):
        layer, cache = gemma_layer(shape, 4, window, dtype), poisoned_cache(shape, 13, dtype)
        for cuts in (
            [(0, 37), (0, 1), (0, 15), (0, 2)],
            [(37, 40), (1, 1), (15, 16), (2, 32)],
            [(40, LENGTH), (1, 1), (16, 16), (32, 33)],
        ):
            rows = ragged_rows(cuts, table)
            x = torch.randn(len(rows.positions), shape.hidden, generator=generator)
            expected, mirror = x.clone(), copied(cache)
            reference_layer(expected, layer, mirror, rope, rows)
            decoder_layer(x, layer, cache, rope, rows)
            torch.testing.assert_close(x, expected, **near)
            assert (x - expected).abs().mean() < mean
            torch.testing.assert_close(cache.k, mirror.k, **near, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_chunks_and_pages_change_no_bit(shape: Shape, dtype: torch.dtype, window: int) -> None:
    model = Model(shape, window, dtype)
    whole = model.chunked(LENGTH, seed=0)
    assert whole.isfinite().all()
    for chunk in (1, 3, 8, 16, 23):
        assert same_bits(model.chunked(chunk, seed=chunk, forget=True), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_with_a_window_may_have_pages_of_their_own(dtype: torch.dtype) -> None:
    """Other tables, fewer pages, nothing where a page has left: not a bit changes. float16 is plain torch's."""
    shape, generator = SHAPES[0], torch.Generator().manual_seed(5)
    layers = tuple(gemma_layer(shape, seed, window, dtype) for seed, window in enumerate((20, 0, 20)))
    rope, lengths = rope_table(96, shape.head_dim, 1e4), [LENGTH, 40]
    shared, full, own = (page_table(lengths, pages, generator) for pages in (13, 15, 9))
    whole = [poisoned_cache(shape, 13, dtype) for _ in layers]
    apart = [poisoned_cache(shape, 9 if layer.window else 15, dtype) for layer in layers]
    for cuts in ([(0, 37), (0, 3)], [(37, 38), (3, 20)], [(38, LENGTH), (20, 40)]):
        there = own.clamp(min=0)
        for sequence, (start, _) in enumerate(cuts):
            there[sequence, : max(0, start + 1 - 20) // PAGE] = 0  # gone: any page
        rows = ragged_rows(cuts, full)
        windows = ragged_rows(cuts, own).slots
        rows = rows._replace(window_slots=windows, window_table=there)
        x = torch.randn(len(rows.positions), shape.hidden, generator=generator)
        x = x.half() if dtype == torch.float16 else x
        y = x.clone()
        decoder_stack(x, layers, whole, rope, ragged_rows(cuts, shared))
        decoder_stack(y, layers, apart, rope, rows)
        assert x.isfinite().all() and torch.equal(x, y)


def test_window_pages_that_point_outside_are_refused() -> None:
    shape, table = SHAPES[0], torch.arange(5)[None]
    layers = gemma_layer(shape, 1, 20), gemma_layer(shape, 2, 0)
    caches = poisoned_cache(shape, 5), poisoned_cache(shape, 9)
    rows, rope = ragged_rows([(0, 40)], table + 4), rope_table(96, shape.head_dim, 1e4)
    slots = rows.slots - 4 * PAGE
    for changes, message in (
        ({"window_slots": slots + 5 * PAGE, "window_table": table}, "slot"),
        ({"window_slots": slots, "window_table": table + 4}, "page"),
        ({"window_slots": slots, "window_table": table - 1}, "page"),
        ({"window_slots": slots[1:], "window_table": table}, "fit"),
        ({"window_slots": slots, "window_table": table[:, :3].contiguous()}, "fit"),
        ({"window_slots": slots.int(), "window_table": table}, "int64"),
        ({}, "slot"),  # one table for all is held to the smaller caches
    ):
        with pytest.raises(ValueError, match=message):
            decoder_stack(torch.zeros(40, shape.hidden), layers, caches, rope, rows._replace(**changes))
    decoder_stack(
        torch.zeros(40, shape.hidden), layers, caches, rope, rows._replace(window_slots=slots, window_table=table)
    )


def test_a_window_forgets() -> None:
    """What lies before the window has no part in a row; what lies inside has."""
    model = Model(SHAPES[0], 20)
    whole = model.chunked(LENGTH, seed=0)
    model.x[10] += 1.0
    changed = model.chunked(LENGTH, seed=0)
    differs = (changed != whole).any(dim=1).nonzero().flatten().tolist()
    assert differs == list(range(10, 30))


def test_threads_and_neighbours_change_no_bit(three_threads: None) -> None:
    model = Model(SHAPES[0], 23)
    many = model.chunked(9, seed=1)
    table = page_table([LENGTH, LENGTH], 13, torch.Generator().manual_seed(5))
    x = torch.cat([model.x, model.x.flip(1)])
    decoder_layer(x, model.layer, poisoned_cache(model.shape, 13), model.rope, ragged_rows([(0, LENGTH)] * 2, table))
    threads.set_threads(1)
    one = model.chunked(LENGTH, seed=0)
    assert same_bits(many, one)
    assert same_bits(x[:LENGTH], one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_forward_pass_is_the_composition_of_its_parts(dtype: torch.dtype) -> None:
    shape, generator = SHAPES[0], torch.Generator().manual_seed(6)
    layers = tuple(gemma_layer(shape, seed, window, dtype) for seed, window in ((7, 16), (8, 0), (9, 5)))
    table = torch.randn(50, shape.hidden, generator=generator).to(dtype)
    gains = 0.5 + torch.rand(shape.hidden, generator=generator)
    ends = Ends(table, gains, 1e-6, pack(table), scale=8.0)
    rope, rows = rope_table(96, shape.head_dim, 1e4), ragged_rows([(0, 40)], page_table([40], 4, generator))
    tokens = torch.randint(50, (40,), generator=generator)

    def caches() -> tuple[LayerCache, ...]:
        return tuple(poisoned_cache(shape, 4, dtype) for _ in layers)

    logits, hidden, features = forward(tokens, ends, LayerStack(layers, caches()), rope, rows, (-1, 1))
    x = embedding(table, tokens, torch.float32, 8.0)
    assert same_bits(x, table[tokens].float() * 8.0)
    kept = [x.clone()]
    for index, (layer, cache) in enumerate(zip(layers, caches(), strict=True)):
        decoder_layer(x, layer, cache, rope, rows)
        kept += [x.clone()] if index == 1 else []
    assert features is not None
    assert same_bits(features, torch.cat(kept, dim=1))
    assert same_bits(hidden, rms_norm(x, gains, 1e-6))
    assert same_bits(logits, matmul(hidden, ends.head))


def test_what_does_not_fit_is_refused() -> None:
    layer = gemma_layer(SHAPES[0], 1, 5)
    assert not layer.plain
    assert random_layer(SHAPES[0], torch.Generator().manual_seed(1)).plain
    with pytest.raises(ValueError, match="both of its halves"):
        replace(layer, post_attention_norm=None)
    with pytest.raises(ValueError, match="rope table"):
        replace(layer, rope=rope_table(8, 64, 1e4))
    with pytest.raises(ValueError, match="window"):
        replace(layer, window=-1)
    rope = rope_table(96, SHAPES[0].head_dim, 1e4)
    block = BlockRows(torch.tensor([0]), torch.full((1, 1), -1), 4)
    with pytest.raises(ValueError, match="window"):
        draft_stack(torch.zeros(4, 64), (layer,), (poisoned_cache(SHAPES[0], 1),), rope, block)
    short = replace(layer, rope=rope_table(8, 32, 1e4))
    rows = ragged_rows([(0, 9)], page_table([9], 1, torch.Generator()))
    with pytest.raises(ValueError, match="rope table"):
        decoder_layer(torch.zeros(9, 64), short, poisoned_cache(SHAPES[0], 1), rope, rows)
