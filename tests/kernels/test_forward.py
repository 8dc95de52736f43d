"""A whole forward pass: the composition of its parts, to the bit, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from kernels.decoder_stack import decoder_stack
from kernels.draft_stack import draft_stack
from kernels.embedding import embedding
from kernels.forward import BlockRows, Ends, LayerStack, Rows, forward
from kernels.matmul import matmul, pack
from kernels.reference.decoder_stack import decoder_stack as reference_stack
from kernels.reference.matmul import matmul as reference_matmul
from kernels.reference.rms_norm import rms_norm as reference_norm
from kernels.rms_norm import rms_norm
from kernels.rope import rope_table
from tests.kernels.layers import Shape, page_table, poisoned_cache, ragged_rows, random_layer, same_bits

SHAPES = [Shape(), Shape(hidden=80, intermediate=50, heads=3, kv_heads=1, head_dim=64)]
DTYPES = [torch.float32, torch.bfloat16]
VOCABULARY = 70


class Model:
    def __init__(self, shape: Shape, dtype: torch.dtype, layers: int = 2) -> None:
        self.generator = torch.Generator().manual_seed(4)
        self.shape, self.dtype = shape, dtype
        self.layers = tuple(random_layer(shape, self.generator, dtype=dtype) for _ in range(layers))
        table = torch.randn(VOCABULARY, shape.hidden, generator=self.generator).to(dtype)
        head = torch.randn(VOCABULARY, shape.hidden, generator=self.generator).to(dtype)
        gains = 0.5 + torch.rand(shape.hidden, generator=self.generator)
        self.ends = Ends(table, gains, 1e-6, pack(head))
        self.rope = rope_table(96, shape.head_dim, 1e4)

    def stack(self) -> LayerStack:
        return LayerStack(self.layers, tuple(poisoned_cache(self.shape, 12, self.dtype) for _ in self.layers))

    def tokens(self, count: int) -> torch.Tensor:
        return torch.randint(VOCABULARY, (count,), generator=self.generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spans", [[(0, 3)], [(0, 40), (0, 9)]], ids=["few rows", "many rows"])
def test_rows_are_the_composition_of_the_parts(
    shape: Shape, dtype: torch.dtype, spans: list[tuple[int, int]], three_threads: None
) -> None:
    model = Model(shape, dtype)
    rows = ragged_rows(spans, page_table([stop for _, stop in spans], 12, model.generator))
    count = sum(stop - start for start, stop in spans)
    tokens, chosen = model.tokens(count), torch.tensor([count - 1, 0])
    logits, hidden, features = forward(tokens, model.ends, model.stack(), model.rope, rows, (-1, 1), chosen)
    x = embedding(model.ends.embedding, tokens, torch.float32)
    stack = model.stack()
    kept = decoder_stack(x, stack.layers, stack.caches, model.rope, rows, (-1, 1))
    normed = rms_norm(x[chosen], model.ends.norm, 1e-6)
    assert features is not None
    assert kept is not None
    assert same_bits(features, kept)
    assert same_bits(hidden, normed)
    assert same_bits(logits, matmul(normed, model.ends.head))
    everything, *_ = forward(tokens, model.ends, model.stack(), model.rope, rows)
    assert same_bits(everything[chosen], logits)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_match_plain_torch(shape: Shape) -> None:
    model = Model(shape, torch.float32)
    rows = ragged_rows([(0, 20), (0, 7)], page_table([20, 7], 12, model.generator))
    tokens, stack = model.tokens(27), model.stack()
    logits, *_ = forward(tokens, model.ends, model.stack(), model.rope, rows)
    x = model.ends.embedding[tokens]
    reference_stack(x, stack.layers, stack.caches, model.rope, rows)
    expected = reference_matmul(reference_norm(x, model.ends.norm, 1e-6), model.ends.head)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_are_the_composition_of_the_parts(dtype: torch.dtype) -> None:
    model = Model(Shape(), dtype)
    block = BlockRows(torch.tensor([0, 0, 0]), torch.full((3, 1), -1), 5)
    tokens, chosen = model.tokens(15), torch.tensor([1, 2, 3, 4, 6, 14])
    logits, hidden, features = forward(tokens, model.ends, model.stack(), model.rope, block, logit_rows=chosen)
    x, stack = embedding(model.ends.embedding, tokens, torch.float32), model.stack()
    draft_stack(x, stack.layers, stack.caches, model.rope, block)
    assert features is None
    assert same_bits(hidden, rms_norm(x[chosen], model.ends.norm, 1e-6))
    assert same_bits(logits, matmul(hidden, model.ends.head))


def test_what_does_not_exist_is_refused() -> None:
    model = Model(Shape(), torch.float32)
    rows = ragged_rows([(0, 6)], page_table([6], 12, model.generator))
    tokens = model.tokens(6)

    def run(tokens: torch.Tensor, rows: Rows = rows, chosen: torch.Tensor | None = None) -> None:
        forward(tokens, model.ends, model.stack(), model.rope, rows, logit_rows=chosen)

    for bad in (-1, VOCABULARY):
        with pytest.raises(ValueError, match="token"):
            run(tokens.index_fill(0, torch.tensor([3]), bad))
    for bad in (-1, 6):
        with pytest.raises(ValueError, match="logits"):
            run(tokens, chosen=torch.tensor([0, bad]))
    with pytest.raises(ValueError, match="fit"):
        run(tokens[:5].clone())
    with pytest.raises(ValueError, match="int64"):
        run(tokens.int())
    with pytest.raises(ValueError, match="fit together"):
        Ends(model.ends.embedding[:, 1:], model.ends.norm, 1e-6, model.ends.head)
    empty = Rows(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)), torch.zeros(0, 1, dtype=torch.int64))
    logits, *_ = forward(tokens[:0], model.ends, model.stack(), model.rope, empty)
    assert logits.shape == (0, VOCABULARY)
