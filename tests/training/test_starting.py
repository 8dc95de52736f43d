"""Starting weights: bigrams against the plain formula, and layers that read what they read in the target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.training.export import read_target
from engine.training.frozen import Frozen
from engine.training.loop import train
from engine.training.model import rope_table
from engine.training.plan import Plan
from engine.training.settings import SettingsError
from engine.training.sources import Stream
from engine.training.starting import bigram_factors
from engine.training.trainable import find

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
