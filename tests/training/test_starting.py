"""Starting weights: bigrams against the plain formula, and layers that read what they read in the target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.training.channels import fold, inverse, sizes
from engine.training.export import read_target
from engine.training.folding import folded
from engine.training.frozen import Frozen
from engine.training.loop import train
from engine.training.model import rope_table
from engine.training.plan import Plan
from engine.training.settings import SettingsError
from engine.training.sources import Stream
from engine.training.starting import bigram_factors
from engine.training.trainable import find
from tests.engine.gemma import make_gemma

V = 24


def streams() -> list[Stream]:
    draw = np.random.default_rng(2)
    plain = Stream("plain", draw.zipf(1.5, 9000).clip(1, V).astype(np.int64) - 1, None)
    partly = Stream("partly", draw.integers(0, V, 6000), draw.random(6000) < 0.4)
    return [plain, partly]


@pytest.mark.parametrize("ids", [None, torch.tensor([0, 1, 2, 5, 7, 11])])
def test_bigrams_at_full_rank_are_the_formula(ids: torch.Tensor | None) -> None:
    both, shares = streams(), (3.0, 1.0)
    joint, total = np.zeros((V, V)), 0
    for stream, share in zip(both, (0.75, 0.25), strict=True):
        counts = np.zeros((V, V))
        for place in range(1, len(stream.tokens)):
            if stream.asked is None or stream.asked[place]:
                counts[stream.tokens[place - 1], stream.tokens[place]] += 1
        joint += share * counts / counts.sum()
        total += int(counts.sum())
    floor = 1 / total
    expected = np.log1p(joint / (10 / total * (joint.sum(0) + floor)))
    torch.manual_seed(0)
    w1, w2 = bigram_factors(both, shares, V, V, ids)
    columns = slice(None) if ids is None else ids.numpy()
    np.testing.assert_allclose((w1 @ w2.T).numpy(), expected[:, columns], rtol=0.02, atol=0.02)


def test_a_small_rank_keeps_the_frequent_pairs() -> None:
    torch.manual_seed(0)
    whole = [w.double() for w in bigram_factors(streams(), (1.0, 1.0), V, V)]
    part = [w.double() for w in bigram_factors(streams(), (1.0, 1.0), V, 6)]
    error = (whole[0] @ whole[1].T - part[0] @ part[1].T).abs()
    assert part[0].shape == part[1].shape == (V, 6)
    assert error[:4, :4].mean() < error.mean() / 2  # zipf: the first ids are the frequent ones


@pytest.mark.parametrize("drafter", ["dspark", "dflash", "eagle3"])
def test_context_is_read_as_the_last_layer_reads_it(make_plan: Callable[..., Plan], drafter: str) -> None:
    """With fc's noise gone, keys and values of the context are the target's own."""
    one = [] if drafter == "eagle3" else ["model.layers=1"]
    plan = make_plan("model.init=target", *one, drafter=drafter)
    target = read_target(plan.target)
    model = find(drafter)(plan.model, Frozen(target, ()).shared)
    tokens = torch.randint(0, target.config.vocab_size, (2, 20))
    features, _ = Frozen(target, model.feature_layers).run(tokens)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.begin(target, streams(), (1.0, 1.0))
        state = model.fc(features)
        if drafter == "eagle3":
            for projection in (model.layer.self_attn.k_proj, model.layer.self_attn.v_proj):
                projection.weight[:, : target.config.hidden_size] = 0
            _, context = model.read(state, torch.zeros_like(state))
        else:
            context = model.hidden_norm(state)
        rope = rope_table(torch.arange(20), target.config.head_dim, target.config.rope_theta)
        last = target.model.layers[-1]
        before = Frozen(target, (target.config.num_hidden_layers - 2,)).run(tokens)[0]
        theirs = last.self_attn.keys_values(last.input_layernorm(before), rope)
        mine = model.layers[0].self_attn.keys_values(context, rope)
    for one_of_mine, one_of_theirs in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one_of_mine, one_of_theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_a_head_begins_near_the_bigrams(make_plan: Callable[..., Plan], head: str) -> None:
    """What a head adds to the logits before any training correlates with the factors' product."""
    plan = make_plan("model.init=target", f"model.head={head}")
    target = read_target(plan.target)
    torch.manual_seed(1)
    model = find("dspark")(plan.model, Frozen(target, ()).shared)
    tokens = torch.arange(target.config.vocab_size)
    model.begin(target, streams(), (1.0, 1.0))
    markov = model.markov_head
    with torch.no_grad():
        low = markov.markov_w1(tokens)
        latent = markov.latents(low[:, None], torch.randn(len(tokens), 1, target.config.hidden_size))[:, 0]
        added, bias = markov.markov_w2(latent)[:V], markov.markov_w2(low)[:V]
    assert torch.corrcoef(torch.stack((added.flatten(), bias.flatten())))[0, 1] > 0.7


@pytest.mark.parametrize("drafter", ["dspark", "dflash", "eagle3", "mtp"])
def test_every_drafter_trains_from_its_target(make_plan: Callable[..., Plan], drafter: str) -> None:
    folder: Path = train(make_plan("model.init=target", "run.steps=2", drafter=drafter))
    assert (folder / "model.safetensors").exists()


def test_more_layers_than_the_target_has_are_refused(make_plan: Callable[..., Plan]) -> None:
    with pytest.raises(SettingsError, match=r"model\.init=target: 5 layers"):
        train(make_plan("model.init=target", "model.layers=5"))


@pytest.fixture
def loud(tmp_path: Path) -> Path:
    """A Gemma 3 with one channel that is far larger than the others, and norms far from 1."""
    model, generator = make_gemma(hidden=64, layers=4), torch.Generator().manual_seed(7)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] += 30.0
        model.model.norm.weight.copy_(20.0 * torch.rand(64, generator=generator))
    model.save_pretrained(tmp_path / "loud")
    return tmp_path / "loud"


def test_channels_come_at_one_size(loud: Path, make_plan: Callable[..., Plan]) -> None:
    target, both = read_target(loud), streams()
    plan = make_plan("model.channel_scale=true", "model.feature_layers=[0, 2]", f"target={loud}")
    model = find("dspark")(plan.model, Frozen(target, ()).shared)
    model.begin(target, both, (1.0, 1.0))
    tokens = torch.randint(0, V, (8, 200), generator=torch.Generator().manual_seed(2))
    features = Frozen(target, (0, 2)).run(tokens)[0]
    before = features.square().mean((0, 1)).sqrt()
    scaled = (features * model.feature_scale).square().mean((0, 1)).sqrt()
    assert before.max() > 20 * before.median()
    assert scaled.min() > 0.5 and scaled.max() < 2.0
    with torch.no_grad():
        expected = model.fc(features * model.feature_scale)
        served = features @ fold(model.state_dict())["fc.weight"].T
    torch.testing.assert_close(served, expected, rtol=1e-4, atol=1e-4)


def test_sizes_are_inverted_without_losing_a_bit() -> None:
    size = torch.tensor([0.011, 1.0, 3.0, 29417.0])
    scale = inverse(size)
    assert torch.equal(torch.frexp(scale)[0], torch.full((4,), 0.5))
    assert ((size * scale - 1).abs() < 0.5).all()


def test_a_folded_layer_does_what_its_own_did(loud: Path) -> None:
    """A Gemma layer in Qwen3's form, over the stream in units: keys are its own, what it adds points the same way."""
    target, both = read_target(loud), streams()
    (layer,), norm = folded(target, 1, both, (1.0, 1.0))
    tokens = torch.randint(0, V, (4, 40), generator=torch.Generator().manual_seed(3))
    before, after = (Frozen(target, (depth,)).run(tokens)[0] for depth in (2, 3))
    unit = inverse(sizes(target, (2,), both, (1.0, 1.0)).features)
    rope = rope_table(torch.arange(40), target.config.head_dim, target.config.rope_theta)
    with torch.no_grad():
        his = target.model.layers[3]
        read = his.input_layernorm(before)
        keys = his.self_attn.k_norm(his.self_attn.k_proj(read).unflatten(-1, (-1, target.config.head_dim)))
        inner = layer.input_layernorm(before * unit)
        mine = layer.self_attn.k_norm(layer.self_attn.k_proj(inner).unflatten(-1, (-1, target.config.head_dim)))
        torch.testing.assert_close(mine, keys, rtol=0.02, atol=0.02)
        q, k = layer.self_attn.queries(inner, rope), layer.self_attn.keys_values(inner, rope)
        middle = before + his.post_attention_layernorm(his.self_attn(read, rope))
        pairs = [
            (layer.self_attn.attend(q, *k), (middle - before) * unit),
            (layer.mlp(layer.post_attention_layernorm(middle * unit)), (after - middle) * unit),
        ]
    for added, wanted in pairs:
        assert torch.cosine_similarity(added[:, 1:].flatten(0, 1), wanted[:, 1:].flatten(0, 1), dim=-1).min() > 0.9
    hidden = target.model.norm(after)
    assert torch.corrcoef(torch.stack((norm, hidden[:, 1:].square().mean((0, 1)).sqrt())))[0, 1] > 0.5


def test_half_of_the_heads_begin_with_the_state_before_the_anchor(
    make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    """Whatever the slot: nearly all their attention is on the last position of the context, and they give it back."""
    make_gemma(hidden=96, layers=4, head_dim=64).save_pretrained(tmp_path / "gemma")
    options = ["model.nearest=true", "model.channel_scale=true", "model.init=target"]
    plan = make_plan(*options, f"target={tmp_path / 'gemma'}")
    target = read_target(plan.target)
    model = find("dspark")(plan.model, Frozen(target, ()).shared)
    model.begin(target, streams(), (1.0, 1.0))
    config, length, slots = target.config, 60, 5
    tokens = torch.randint(0, V, (3, length), generator=torch.Generator().manual_seed(4))
    layer, shared = model.layers[0], Frozen(target, ()).shared
    attention, width = layer.self_attn, config.head_dim
    with torch.no_grad():
        context = model._context(Frozen(target, model.feature_layers).run(tokens)[0])
        block = torch.full((3, slots), plan.model.mask_token_id)
        block[:, 0] = torch.randint(0, V, (3,))
        inner = layer.input_layernorm(shared.embed(block))
        ropes = [
            rope_table(torch.arange(a, b), width, config.rope_theta) for a, b in ((0, length), (length, length + slots))
        ]
        keys = torch.cat((attention.keys_values(context, ropes[0])[0], attention.keys_values(inner, ropes[1])[0]), 2)
        groups = config.num_key_value_heads
        queries = attention.queries(inner, ropes[1]).unflatten(1, (groups, -1))[:, :, 0]
        seen = (queries @ keys.transpose(-1, -2) * width**-0.5).softmax(-1)
        assert seen[..., length - 1].mean() > 0.5 and seen[..., length - 3 : length].sum(-1).mean() > 0.75
        values = attention.v_proj(context).unflatten(-1, (groups, width))[:, :, 0]
        head = attention.o_proj.weight.unflatten(1, (-1, width))[:, 0]
        given = values @ head.T
    likeness = torch.cosine_similarity(given[:, 1:].flatten(0, 1), context[:, 1:].flatten(0, 1), dim=-1)
    assert likeness.mean() > 0.5


@pytest.mark.parametrize("drafter", ["dspark", "eagle3", "mtp"])
def test_layers_begin_as_the_targets_only_in_their_own_units(
    make_plan: Callable[..., Plan], loud: Path, drafter: str
) -> None:
    """Folded ones read channels at one size, others read them as they come."""
    for change, need in ((f"target={loud}", "true"), ("model.channel_scale=true", "false")):
        with pytest.raises(SettingsError, match=rf"model\.init=target: .* need model\.channel_scale={need}"):
            train(make_plan("model.init=target", change, "run.steps=1", drafter=drafter))
