"""The decoder layer and stack: parity with plain torch and transformers, and row invariance to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import threads
from kernels.decoder_layer import decoder_layer
from kernels.decoder_stack import decoder_stack
from kernels.matmul import pack
from kernels.reference.decoder_layer import decoder_layer as reference_layer
from kernels.reference.decoder_stack import decoder_stack as reference_stack
from kernels.reference.rms_norm import rms_norm
from kernels.rope import rope_table
from kernels.values import LayerCache, LayerWeights, Rows
from tests.kernels.layers import Shape, copied, page_table, poisoned_cache, ragged_rows, random_layer, same_bits

SHAPES = [
    Shape(),
    Shape(hidden=80, intermediate=50, heads=3, kv_heads=1, head_dim=64),
    Shape(hidden=48, intermediate=33, heads=2, kv_heads=2, head_dim=128),
    Shape(hidden=96, intermediate=128, heads=8, kv_heads=2, head_dim=32),
    Shape(hidden=32, intermediate=64, heads=20, kv_heads=1, head_dim=32),
    Shape(hidden=64, intermediate=96, heads=20, kv_heads=1, head_dim=64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", ["float32", "sixteen bit", "bfloat16"])
def test_ragged_batches_match_the_reference(shape: Shape, weights: str) -> None:
    generator = torch.Generator().manual_seed(1)
    sixteen_bit = weights != "float32"
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
    layer = random_layer(shape, generator, bias=sixteen_bit, sixteen_bit=sixteen_bit, dtype=dtype)
    assert layer.address
    # Rounding is the same on both sides, but a last bit may tip it: by 2^-8 of one number among many.
    near = {"atol": 2e-2, "rtol": 2**-7} if dtype == torch.bfloat16 else {"atol": 5e-5, "rtol": 1e-4}
    rope = rope_table(128, shape.head_dim, 1e4)
    lengths = [70, 1, 16, 33]
    table = page_table(lengths, pages=13, generator=generator)
    cache = poisoned_cache(shape, 13, dtype)
    for cuts in (
        [(0, 37), (0, 1), (0, 15), (0, 2)],
        [(37, 40), (1, 1), (15, 16), (2, 32)],
        [(40, 70), (1, 1), (16, 16), (32, 33)],
    ):
        rows = ragged_rows(cuts, table)
        x = torch.randn(len(rows.positions), shape.hidden, generator=generator)
        expected, mirror = x.clone(), copied(cache)
        reference_layer(expected, layer, mirror, rope, rows)
        decoder_layer(x, layer, cache, rope, rows)
        torch.testing.assert_close(x, expected, **near)
        torch.testing.assert_close(cache.k, mirror.k, **near, equal_nan=True)
        torch.testing.assert_close(cache.v, mirror.v, **near, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_rows_may_start_from_their_own_q_k_and_v(shape: Shape) -> None:
    """Where every row starts from the same values, that is a bias, to the bit; else the reference says."""
    generator = torch.Generator().manual_seed(2)
    layer, biased = (random_layer(shape, torch.Generator().manual_seed(3), bias=bias) for bias in (False, True))
    rope = rope_table(64, shape.head_dim, 1e4)
    table = page_table([40, 20], 6, generator)
    rows = ragged_rows([(0, 40), (0, 20)], table)
    x = torch.randn(60, shape.hidden, generator=generator)
    start = torch.randn(60, layer.qkv.n, generator=generator)
    ours, expected = x.clone(), x.clone()
    cache, mirror = poisoned_cache(shape, 6), poisoned_cache(shape, 6)
    decoder_layer(ours, layer, cache, rope, rows, start)
    reference_layer(expected, layer, mirror, rope, rows, start)
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(cache.v, mirror.v, atol=2e-5, rtol=1e-4, equal_nan=True)
    assert biased.qkv_bias is not None
    one, two = x.clone(), x.clone()
    decoder_layer(one, layer, poisoned_cache(shape, 6), rope, rows, biased.qkv_bias.repeat(60, 1))
    decoder_layer(two, biased, poisoned_cache(shape, 6), rope, rows)
    assert same_bits(one, two)
    with pytest.raises(ValueError, match="qkv_start"):
        decoder_layer(x, biased, cache, rope, rows, start)
    with pytest.raises(ValueError, match="qkv_start"):
        decoder_layer(x, layer, cache, rope, rows, start[:-1])


class Model:
    """Three layers, and x of one sequence of 60 tokens to run through them in different ways."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        self.shape = shape
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(2)
        self.layers = [random_layer(shape, self.generator, sixteen_bit=i == 1, dtype=dtype) for i in range(3)]
        self.rope = rope_table(64, shape.head_dim, 1e4)
        self.x = torch.randn(60, shape.hidden, generator=self.generator)

    def caches(self, pages: int = 20) -> list[LayerCache]:
        return [poisoned_cache(self.shape, pages, self.dtype) for _ in self.layers]

    def run(self, x: Tensor, caches: list[LayerCache], rows: Rows) -> Tensor:
        x = x.clone()
        features = decoder_stack(x, self.layers, caches, self.rope, rows, (-1, 0, 2))
        assert features is not None
        return torch.cat([x, features], dim=1)

    def chunked(self, chunk: int, seed: int) -> Tensor:
        """The whole sequence in chunks, in pages laid out by the seed."""
        table = page_table([60], 20, torch.Generator().manual_seed(seed))
        caches = self.caches()
        starts = range(0, 60, chunk)
        spans = [(start, min(60, start + chunk)) for start in starts]
        return torch.cat([self.run(self.x[a:b], caches, ragged_rows([(a, b)], table)) for a, b in spans])


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_chunks_and_pages_change_no_bit(shape: Shape, dtype: torch.dtype) -> None:
    model = Model(shape, dtype)
    whole = model.chunked(60, seed=0)
    assert whole.isfinite().all()
    for chunk in (1, 2, 3, 7, 8, 16, 23):
        assert same_bits(model.chunked(chunk, seed=chunk), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_neighbours_change_no_bit(shape: Shape, dtype: torch.dtype) -> None:
    model = Model(shape, dtype)
    alone = model.chunked(60, seed=0)
    lengths = [60, 60, 60, 20]
    table = page_table(lengths, 20, model.generator)
    caches = model.caches()
    noise = torch.randn(60, shape.hidden, generator=model.generator)
    # A prefill, a decoding row and a verified block run side by side with the rows under test.
    steps = [
        [(0, 20), (0, 5), (0, 40), (0, 1)],
        [(20, 21), (5, 50), (40, 47), (1, 1)],
        [(21, 60), (50, 51), (47, 60), (1, 9)],
    ]
    ours = []
    for spans in steps:
        rows = ragged_rows(spans, table)
        (a, b), rest = spans[0], spans[1:]
        x = torch.cat([model.x[a:b], *(noise[c:d] for c, d in rest)])
        ours.append(model.run(x, caches, rows)[: b - a])
    assert same_bits(torch.cat(ours), alone)


def test_order_of_rows_changes_no_bit() -> None:
    model = Model(SHAPES[0])
    table = page_table([60, 60], 20, model.generator)
    x = torch.cat([model.x, model.x.flip(1)])
    rows = ragged_rows([(0, 60), (0, 60)], table)
    expected = model.run(x, model.caches(), rows)
    order = torch.randperm(120, generator=model.generator)
    mixed = Rows(rows.positions[order], rows.row_sequence[order], rows.slots[order], table)
    assert same_bits(model.run(x[order], model.caches(), mixed), expected[order])


def test_threads_change_no_bit(three_threads: None) -> None:
    model = Model(SHAPES[0])
    many = [model.chunked(chunk, seed=chunk) for chunk in (60, 60, 9, 1)]
    threads.set_threads(1)
    one = model.chunked(60, seed=0)
    assert all(same_bits(result, one) for result in many)


def test_a_poisoned_row_spares_the_others() -> None:
    model = Model(SHAPES[0])
    table = page_table([60, 60], 20, model.generator)
    rows = ragged_rows([(0, 30), (0, 30)], table)
    x = torch.cat([model.x[:30], model.x[:30]])
    clean = model.run(x, model.caches(), rows)
    x[20] = torch.nan  # position 20 of the first sequence
    dirty = model.run(x, model.caches(), rows)
    assert dirty[20:30].isnan().any(dim=1).all()
    keep = [*range(20), *range(30, 60)]
    assert same_bits(dirty[keep], clean[keep])


def test_other_dtypes_run_the_reference() -> None:
    model = Model(SHAPES[0])
    table = page_table([60], 20, model.generator)
    rows = ragged_rows([(0, 60)], table)
    layer = model.layers[0]
    half = LayerWeights(
        *(getattr(layer, name).double() for name in ("input_norm",)),
        pack(layer.qkv.dense().double()),
        layer.q_norm.double(),
        layer.k_norm.double(),
        pack(layer.o.dense().double()),
        layer.post_norm.double(),
        pack(layer.gate_up.dense().double()),
        pack(layer.down.dense().double()),
        layer.heads,
        layer.kv_heads,
        layer.head_dim,
        layer.eps,
    )
    assert not half.address
    x, wide = model.x.clone(), model.x.double()
    decoder_layer(x, layer, poisoned_cache(model.shape, 20), model.rope, rows)
    cache = poisoned_cache(model.shape, 20)
    decoder_layer(wide, half, LayerCache(cache.k.double(), cache.v.double()), model.rope, rows)
    torch.testing.assert_close(x, wide.float(), atol=5e-5, rtol=1e-4)


def test_what_points_outside_is_refused() -> None:
    model = Model(SHAPES[0])
    table = page_table([60], 20, model.generator)
    good = ragged_rows([(0, 40)], table)
    bad = [
        (Rows(good.positions + 64, good.row_sequence, good.slots, table), "rope table"),
        (Rows(good.positions, good.row_sequence, good.slots + 400, table), "slot"),
        (Rows(good.positions, good.row_sequence, good.slots, table[:, :1].contiguous()), "page"),
        (Rows(good.positions, good.row_sequence, good.slots, table * 0 - 1), "page"),
        (Rows(good.positions[:-1], good.row_sequence, good.slots, table), "fit"),
        (Rows(good.positions.int(), good.row_sequence, good.slots, table), "int64"),
    ]
    for rows, message in bad:
        with pytest.raises(ValueError, match=message):
            decoder_layer(model.x[:40].clone(), model.layers[0], poisoned_cache(model.shape, 20), model.rope, rows)


def test_the_stack_is_transformers_qwen3() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.Qwen3Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    layers = []
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        layers.append(
            LayerWeights(
                input_norm=block.input_layernorm.weight.detach(),
                qkv=pack(torch.cat([p.weight for p in projections])),
                q_norm=attention.q_norm.weight.detach(),
                k_norm=attention.k_norm.weight.detach(),
                o=pack(attention.o_proj.weight),
                post_norm=block.post_attention_layernorm.weight.detach(),
                gate_up=pack(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])),
                down=pack(mlp.down_proj.weight),
                heads=4,
                kv_heads=2,
                head_dim=32,
                eps=config.rms_norm_eps,
            )
        )
    rope = rope_table(128, 32, 1e4)
    ids = torch.randint(0, 97, (1, 50))
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
    table = page_table([50], 4, torch.Generator().manual_seed(0))
    shape = Shape(hidden=64, intermediate=112, heads=4, kv_heads=2, head_dim=32)
    for stack in (reference_stack, decoder_stack):
        x = model.model.embed_tokens(ids[0]).detach().clone()
        caches = [poisoned_cache(shape, 4) for _ in layers]
        features = stack(x, layers, caches, rope, ragged_rows([(0, 50)], table), (-1, 0, 1))
        assert features is not None
        hidden = torch.cat([h[0] for h in expected.hidden_states[:3]], dim=-1)
        torch.testing.assert_close(features, hidden, atol=1e-4, rtol=1e-4)
        logits = rms_norm(x, model.model.norm.weight, config.rms_norm_eps) @ model.lm_head.weight.T
        torch.testing.assert_close(logits, expected.logits[0], atol=1e-4, rtol=1e-4)
