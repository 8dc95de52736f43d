"""On a GPU the public wrappers run these kernels: the plain torch twins are out of reach, the answers are theirs."""

from __future__ import annotations

import pytest
import torch

from kernels import decoder_stack, filters, markov_sample, noise, rms_norm, verify
from kernels.reference import decoder_stack as reference_stack
from kernels.reference import verify as reference_verify
from kernels.rope import rope_table
from tests.kernels import test_markov_sample as heads
from tests.kernels.layers import Shape, page_table, ragged_rows
from tests.kernels.triton.cases import DEVICE, poisoned_cache, seeded
from tests.kernels.triton.test_layers import copied, make_layer, normal
from tests.kernels.triton.test_markov_sample import make_case, on_device
from tests.kernels.triton.test_paged_attention import on_device as rows_on_device
from tests.kernels.triton.test_verify import mixed_case, moved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu", reason="wrappers run Triton's kernels on CUDA tensors only"),
]


@pytest.fixture
def no_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrappers' way to the plain torch twins is closed."""
    for module in (decoder_stack, filters, markov_sample, noise, rms_norm, verify):
        monkeypatch.setattr(module, "reference", None)


def test_sampling_and_verification(no_twins: None) -> None:
    logits, *rest = mixed_case(7)
    found = verify.verify(moved(logits.clone()), *(moved(value) for value in rest))
    for fast, slow in zip(found, reference_verify.verify(logits, *rest), strict=True):
        assert torch.equal(fast.cpu(), slow)
    case = {name: moved(value) for name, value in make_case(101, 1).items()}
    assert markov_sample.markov_sample(head=on_device(heads.make_head("vanilla", 101)), **case).tokens.is_cuda
    seeds = torch.arange(3, device=DEVICE)
    assert noise.exponential_rows(seeds, seeds, 3, 9).shape == (3, 9)
    assert filters.filter_logits_(moved(logits[:8].clone()), moved(rest[6])).is_cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers(dtype: torch.dtype, no_twins: None) -> None:
    shape = Shape(hidden=256, intermediate=384, heads=8, kv_heads=2, head_dim=128)
    layers = [make_layer(shape, dtype, seed) for seed in (1, 2)]
    rope = rope_table(64, shape.head_dim, 1e4, DEVICE)
    rows = rows_on_device(ragged_rows([(0, 33), (0, 7)], page_table([33, 7], 8, seeded(1))))
    caches = [poisoned_cache(shape, 8, dtype) for _ in layers]
    mirrors = [copied(cache) for cache in caches]
    x = normal(40, shape.hidden, dtype=dtype)
    expected = x.clone()
    decoder_stack.decoder_stack(x, layers, caches, rope, rows)
    reference_stack.decoder_stack(expected, layers, mirrors, rope, rows)
    near = {"atol": 1e-3, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(x, expected, **near)
