"""Rigged drafters over an exact table, behind the engine's own protocol, and the broken ones it must not survive.

They draw with the real DRAFT and COUPLED noise and the real filters; only where the logits come from is rigged.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from engine.sampling import sampling_rows
from engine.types import DraftBlock, Sequence, StepPlan, Verdict, Verification
from kernels.filters import filter_logits_
from kernels.noise import Purpose, exponential_rows, uniforms
from tests.lossless.exact import Tree


class TableDrafter:
    """Drafts from a table of logits by prefix; confidences too are a function of the prefix alone.

    Args:
        tree: names the prompts; a prefix's node number is `exact`'s.
        logits: [P, nodes, V] float32. Deeper prefixes draft uniformly: nothing counted depends on them.
        confidence: [P, nodes] in (0, 1).
    """

    kind = "table"
    head = "none"
    has_confidence = True
    lookahead = 0
    page_bytes = 0

    def __init__(self, tree: Tree, logits: np.ndarray, confidence: np.ndarray, block: int) -> None:
        prompts, self.nodes, self.vocab = logits.shape
        self.block_size = block
        self.feature_layers: tuple[int, ...] = (0,)
        self.prompt_index = {prompt: index for index, prompt in enumerate(tree.prompts)}
        beyond = np.zeros((prompts, 1, self.vocab), np.float32)
        self.logits = torch.from_numpy(np.concatenate([logits.astype(np.float32), beyond], 1))
        self.confidence = np.concatenate([confidence, np.full((prompts, 1), 0.5)], 1).astype(np.float32)

    def allocate(self, pages: int) -> None:
        pass

    def child(self, nodes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.minimum(nodes * self.vocab + 1 + tokens, self.nodes)

    def node(self, sequence: Sequence) -> int:
        """The node of everything committed, the anchor included."""
        node = 0
        for token in sequence.tokens[sequence.prompt_length :]:
            node = min(node * self.vocab + 1 + token, self.nodes)
        return node

    def propose(self, sequences: tuple[Sequence, ...], length: int | None = None) -> DraftBlock:
        prompt = np.array([self.prompt_index[s.request.prompt] for s in sequences])
        nodes = np.array([self.node(s) for s in sequences])
        rows = sampling_rows(sequences, torch.device("cpu"))
        coupled = np.array([s.verification is Verification.COUPLED for s in sequences])
        positions = torch.tensor([s.kv_length for s in sequences])
        proposals = torch.tensor([s.proposals for s in sequences])
        tokens, logits, log_z, confidence = [], [], [], []
        for k in range(length or self.block_size):
            assert all(s.absorbed == s.kv_length for s in sequences)
            filtered = self.logits[prompt, nodes]
            normaliser = filter_logits_(filtered, rows)
            probability = (filtered - normaliser[:, None]).double().exp().numpy()
            u = uniforms(rows.seed, positions + 1 + k, proposals, Purpose.DRAFT).numpy()
            noise = exponential_rows(rows.seed, positions + 1 + k, Purpose.COUPLED, self.vocab)
            shared = (filtered - noise.log()).argmax(-1).numpy()
            chosen = np.where(coupled, shared, self.draw(probability, u))
            confidence.append(self.confidence_of(prompt, nodes, chosen))
            nodes = self.child(nodes, chosen)
            tokens.append(chosen)
            logits.append(filtered)
            log_z.append(normaliser)
        return DraftBlock(
            sequences,
            torch.from_numpy(np.stack(tokens, 1)),
            torch.from_numpy(np.stack(confidence, 1)),
            torch.stack(logits, 1),
            torch.stack(log_z, 1),
        )

    def absorb(self, plan: StepPlan, verdict: Verdict, chosen: Iterable[int] | None = None) -> None:
        """Keeps no features, but the same books as the real one."""
        assert verdict.features is not None
        for index in range(len(plan.rows)) if chosen is None else chosen:
            row = plan.rows[index]
            assert row.sequence.absorbed == row.start, "the drafter's context has holes"
            row.sequence.absorbed = row.start + row.count - row.draft_length + verdict.accepted[index]

    def draw(self, probability: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Inverse CDF of p_d [R, V] at u [R]."""
        return _inverse(probability, u)

    def confidence_of(self, prompt: np.ndarray, nodes: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Of the slot after prefix `nodes`; an honest one never looks at `chosen`."""
        return self.confidence[prompt, nodes]


class Retrospective(TableDrafter):
    """Mutant: whether position k is verified depends on the token x_k drafted there."""

    def confidence_of(self, prompt: np.ndarray, nodes: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return np.where(chosen < self.vocab // 2, 0.9, 0.1).astype(np.float32)


class ArgmaxAsSampled(TableDrafter):
    """Mutant: drafts the most likely token, but claims that it was drawn from the softmax."""

    def draw(self, probability: np.ndarray, u: np.ndarray) -> np.ndarray:
        return probability.argmax(-1)


class UnnormalisedTopK(TableDrafter):
    """Mutant: draws among its best three tokens, but claims the full softmax."""

    def draw(self, probability: np.ndarray, u: np.ndarray) -> np.ndarray:
        third = np.sort(probability, -1)[:, -3, None]
        return _inverse(np.where(probability >= third, probability, 0.0), u)


def _inverse(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    cumulative = weights.cumsum(-1)
    token = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(-1)
    return np.minimum(token, weights.shape[-1] - 1)


def near(tree: Tree, seed: int = 11) -> np.ndarray:
    """Trained-like: the target's logits, perturbed."""
    return tree.logits + np.random.default_rng(seed).normal(0, 0.8, tree.logits.shape).astype(np.float32)


def never(probability: np.ndarray) -> np.ndarray:
    """Always rejected: nearly all mass on the target's least likely token."""
    logits = np.zeros_like(probability, dtype=np.float32)
    np.put_along_axis(logits, probability.argmin(-1)[..., None], 12.0, -1)
    return logits


def split(probability: np.ndarray) -> np.ndarray:
    """Half on the most likely token, half on the least: which half of [0, 1) drew a rejected token is no secret."""
    logits = np.full_like(probability, -12.0, dtype=np.float32)
    for extreme in (probability.argmax(-1), probability.argmin(-1)):
        np.put_along_axis(logits, extreme[..., None], 0.0, -1)
    return logits


def rigged_confidence(tree: Tree, seed: int = 5) -> np.ndarray:
    """High or low by prefix, so that lengths vary with the earlier tokens."""
    generator = np.random.default_rng(seed)
    return np.where(generator.random(tree.logits.shape[:2]) < 0.7, 0.9, 0.1)
