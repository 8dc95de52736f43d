"""The exact law of a tiny target's first tokens, from transformers alone: no line of the engine takes part.

With V tokens every prefix of up to three output tokens is enumerated, heap-numbered: the root (no output yet) is
node 0 and the child of node n by token t is n·V + 1 + t.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from transformers import Qwen3ForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.types import Sampling

DEPTH = 3  # output tokens that a conditional may depend on: x_1 … x_3


@dataclass(frozen=True)
class Tree:
    """Raw next-token logits of every node of every prompt, float32 [P, nodes, V]."""

    prompts: tuple[tuple[int, ...], ...]
    vocab: int
    logits: np.ndarray

    @property
    def nodes(self) -> int:
        return self.logits.shape[1]


def levels(vocab: int) -> list[slice]:
    """Where the nodes of depth 0 … DEPTH lie."""
    found, start = [], 0
    for depth in range(DEPTH + 1):
        found.append(slice(start, start + vocab**depth))
        start += vocab**depth
    return found


def paths(vocab: int, depth: int) -> torch.Tensor:
    """All token paths [V^depth, depth] in heap order."""
    return torch.tensor(list(product(range(vocab), repeat=depth)), dtype=torch.int64).reshape(vocab**depth, depth)


def enumerate_tree(model: Qwen3ForCausalLM, prompts: tuple[tuple[int, ...], ...]) -> Tree:
    """One transformers forward a prompt, over all its continuations."""
    vocab = model.config.vocab_size
    leaves = paths(vocab, DEPTH)
    tables = []
    for prompt in prompts:
        ids = torch.cat([torch.tensor(prompt).expand(len(leaves), -1), leaves], -1)
        with torch.inference_mode():
            logits = model(ids).logits[:, len(prompt) - 1 :]  # [V^DEPTH, DEPTH + 1, V]
        by_depth = [logits[:: vocab ** (DEPTH - depth), depth] for depth in range(DEPTH + 1)]
        tables.append(torch.cat(by_depth).float().numpy())
    return Tree(prompts, vocab, np.stack(tables))


def conditionals(tree: Tree, sampling: Sampling) -> np.ndarray:
    """What `sampling` makes of the raw logits: probabilities float64 [P, nodes, V].

    transformers' own processors, in its order; presence and frequency penalties, which it lacks, as OpenAI's.
    """
    result = np.empty(tree.logits.shape)
    for index, prompt in enumerate(tree.prompts):
        for depth, level in enumerate(levels(tree.vocab)):
            output = paths(tree.vocab, depth)
            ids = torch.cat([torch.tensor(prompt).expand(len(output), -1), output], -1)
            scores = torch.tensor(tree.logits[index, level])
            result[index, level] = _process(ids, output, scores, sampling).double().softmax(-1).numpy()
    return result


def _process(ids: torch.Tensor, output: torch.Tensor, scores: torch.Tensor, s: Sampling) -> torch.Tensor:
    if s.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(ids, scores)
    counts = torch.zeros_like(scores)
    for column in range(output.shape[1]):
        counts[torch.arange(len(output)), output[:, column]] += 1
    scores = scores - s.presence_penalty * (counts > 0) - s.frequency_penalty * counts
    if s.logit_bias:
        scores = SequenceBiasLogitsProcessor([[[token], value] for token, value in s.logit_bias])(ids, scores)
    scores = TemperatureLogitsWarper(s.temperature)(ids, scores)
    if s.top_k:
        scores = TopKLogitsWarper(s.top_k)(ids, scores)
    if s.top_p < 1:
        scores = TopPLogitsWarper(s.top_p)(ids, scores)
    if s.min_p:
        scores = MinPLogitsWarper(s.min_p)(ids, scores)
    return scores


def joint_of_tokens_2_to_4(conditional: np.ndarray, vocab: int) -> np.ndarray:
    """P(x_2, x_3, x_4) float64 [P, V³] from the conditionals [P, nodes, V], x_1 summed out."""
    prompts = conditional.shape[0]
    joint = np.ones((prompts, 1))
    for level in levels(vocab):
        joint = (joint[:, :, None] * conditional[:, level]).reshape(prompts, -1)
    return joint.reshape(prompts, vocab, -1).sum(1)
