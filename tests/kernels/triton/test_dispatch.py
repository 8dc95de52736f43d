"""On a GPU the public wrappers run these kernels: plain torch and native code are out of reach, the answers theirs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import decoder_stack, draft_stack, filters, markov_sample, noise, rms_norm, store_kv, verify
from kernels.context import ContextWeights, store_context
from kernels.forward import forward
from kernels.reference import decoder_stack as reference_stack
from kernels.reference import draft_stack as reference_draft
from kernels.reference import markov_sample as reference_head
from kernels.reference import rms_norm as reference_norm
from kernels.reference import store_kv as reference_store
from kernels.reference import verify as reference_verify
from kernels.rope import rope_table
from kernels.values import BlockRows, Ends, LayerStack, PackedMatrix
from tests.kernels import test_markov_sample as heads
from tests.kernels.layers import Shape, page_table, ragged_rows
from tests.kernels.triton.cases import DEVICE, poisoned_cache, seeded
from tests.kernels.triton.test_layers import copied, make_layer, normal
from tests.kernels.triton.test_markov_sample import make_case, on_device
from tests.kernels.triton.test_paged_attention import on_device as rows_on_device
from tests.kernels.triton.test_verify import mixed_case, moved

BFLOAT = torch.bfloat16
LAYERS = (decoder_stack, draft_stack, rms_norm, store_kv)


@pytest.fixture(autouse=True)
def no_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch and native code are out of the wrappers' reach; without a GPU a CPU's tensors pass for its."""
    for module in (*LAYERS, filters, markov_sample, noise, verify):
        for name in ("reference", "run_layers", "verify_arrays", "_markov_sample", "_filter_rows", "_exponential_rows"):
            monkeypatch.setattr(module, name, None, raising=False)
        for name in ("has_kernels", "on_gpu"):
            if DEVICE.type == "cpu" and hasattr(module, name):
                monkeypatch.setattr(module, name, lambda x: True)


def test_sampling_and_verification() -> None:
    logits, *rest = mixed_case(7)
    found = verify.verify(moved(logits.clone()), *(moved(value) for value in rest))
    for fast, slow in zip(found, reference_verify.verify(logits, *rest), strict=True):
        assert torch.equal(fast.cpu(), slow)
    # A reduced draft vocabulary: the target's ids come out.
    head, ids = heads.make_head("vanilla", 101), torch.randperm(101, generator=seeded(1))[:20]
    few = replace(head, w2=head.w2[ids], ids=ids, vocabulary=101)
    narrow = make_case(101, 1)
    narrow["base_logits"] = narrow["base_logits"][..., ids]
    found = markov_sample.markov_sample(head=on_device(few), **{name: moved(value) for name, value in narrow.items()})
    narrow["base_logits"] = few.widen(narrow["base_logits"])
    assert torch.equal(found.tokens.cpu(), reference_head.markov_sample(head=few.widened, **narrow)[0])
    seeds = torch.arange(3, device=DEVICE)
    assert noise.exponential_rows(seeds, seeds, 3, 9).shape == (3, 9)
    assert filters.filter_logits_(moved(logits[:8].clone()), moved(rest[6])).shape == (8,)


def test_forward_passes_and_the_drafters_context() -> None:
    """A target's rows, the context made of their features, a drafter's block, in bfloat16."""
    shape, near = Shape(), {"atol": 0.1, "rtol": 0.05}
    layers = tuple(make_layer(shape, BFLOAT, seed) for seed in (1, 2))
    rope = rope_table(64, shape.head_dim, 1e4, DEVICE)
    table = page_table([8, 4], 8, seeded(1))
    rows = rows_on_device(ragged_rows([(0, 5), (0, 2)], table))
    caches = tuple(poisoned_cache(shape, 8, BFLOAT) for _ in layers)
    mirrors = [copied(cache) for cache in caches]
    ends = Ends(normal(40, shape.hidden, dtype=BFLOAT), layers[0].input_norm, 1e-6, matrix(40, shape.hidden))
    tokens, chosen = torch.arange(3, 10, device=DEVICE), torch.tensor([4, 6], device=DEVICE)
    found = forward(tokens, ends, LayerStack(layers, caches), rope, rows, (-1, 0), chosen)
    x = ends.embedding[tokens]
    features = reference_stack.decoder_stack(x, layers, mirrors, rope, rows, (-1, 0))
    logits = reference_norm.rms_norm(x[chosen], ends.norm, 1e-6) @ ends.head.weight.T
    torch.testing.assert_close(found.features, features, **near)
    torch.testing.assert_close(found.logits, logits.float(), **near)

    fc, kv = matrix(shape.hidden, 2 * shape.hidden), matrix(4 * shape.kv_heads * shape.head_dim, shape.hidden)
    norms = torch.stack([layer.k_norm for layer in layers])
    weights = ContextWeights(fc, ends.norm, kv, norms, 1e-6, caches)
    store_context(features, weights, rope, rows.positions, rows.slots)
    projected = reference_norm.rms_norm(features @ fc.weight.T, ends.norm, 1e-6) @ kv.weight.T
    reference_store.store_context_kv(projected, norms, mirrors, rope, rows.positions, rows.slots, 1e-6)
    for cache, mirror in zip(caches, mirrors, strict=True):
        torch.testing.assert_close(cache.k, mirror.k, equal_nan=True, **near)
        torch.testing.assert_close(cache.v, mirror.v, equal_nan=True, **near)

    block = BlockRows(torch.tensor([5, 2], device=DEVICE), table.to(DEVICE), 2)
    found = forward(tokens[:4], ends, LayerStack(layers, caches), rope, block)
    x = ends.embedding[tokens[:4]]
    reference_draft.draft_stack(x, layers, mirrors, rope, block)
    torch.testing.assert_close(found.hidden, reference_norm.rms_norm(x, ends.norm, 1e-6), **near)


def matrix(n: int, k: int) -> PackedMatrix:
    return PackedMatrix(n, k, normal(n, k, dtype=BFLOAT, seed=n) * k**-0.5, None)
