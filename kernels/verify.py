"""Decide how much of each draft the target keeps, and the token after it: the step that makes speculation lossless."""

from __future__ import annotations

import numpy as np
import torch

from kernels.device import has_kernels
from kernels.filters import SamplingRows
from kernels.jit import entry, routine
from kernels.reference import verify as reference
from kernels.threads import one_stage, run_team, team_and
from kernels.verify_native import WORDS, verify_rows


def verify(
    logits: torch.Tensor,
    logit_offsets: torch.Tensor,
    draft_tokens: torch.Tensor,
    draft_lengths: torch.Tensor,
    draft_logits: torch.Tensor | None,
    draft_log_z: torch.Tensor | None,
    draft_rows: torch.Tensor,
    sampling: SamplingRows,
    positions: torch.Tensor,
    proposals: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Verify R sequences: sequence i owns the target's rows logit_offsets[i] … + ℓ_i and the block's row draft_rows[i].

    logits [L, V] float32 after penalties (overwritten by filtered values), logit_offsets [R + 1] int64. The block has
    D rows: draft_tokens [D, γ] int64, draft_logits [D, γ, V] and draft_log_z [D, γ] as `markov_sample` returns them
    (None when no row samples by rejection). draft_rows [R] int64 is −1 where ℓ_i = 0, draft_lengths ℓ [R] int64.
    `positions` [R] is the position of the first decided token, `proposals` [R] the counter the draft was made with.

    Rows of draft_tokens beyond those of draft_logits, which may have none, are guesses drawn from no distribution.

    Rejection keeps x with probability min(1, p_t(x)/p_d(x)) and otherwise draws from max(p_t − p_d, 0); of a guess, it
    draws from p_t and keeps x where that is the token: with probability p_t(x), too. Coupled keeps x
    while it equals argmax(log p_t − log E) with the noise of that position; greedy is the argmax. ℓ = 0 is plain
    decoding. Returns accepted [R] int64, next_token [R] int64 (−1 where failed), failed [R] bool: a row that was needed
    held NaN, +inf, or nothing but −inf.

    Raises:
        ValueError: a sequence that samples by rejection has drafted tokens but the block has no logits.
    """
    on_device = has_kernels(logits)
    if on_device or logits.device.type != "cpu" or logits.dtype != torch.float32 or not logits.is_contiguous():
        # Without a drafted token there is nothing to ask: nobody waits for a device to say so.
        if (draft_logits is None or draft_log_z is None) and draft_tokens.numel() and sampling.any_rejection:
            rejection = (sampling.temperature > 0) & ~sampling.coupled
            if bool((rejection & (draft_lengths > 0)).any()):
                raise ValueError("verification by rejection needs the draft's logits and log_z")
        if on_device:
            from kernels.triton import verify as device

            return device.verify(
                logits, logit_offsets, draft_tokens, draft_lengths, draft_logits, draft_log_z, draft_rows, sampling,
                positions, proposals,
            )  # fmt: skip
        return reference.verify(
            logits, logit_offsets, draft_tokens, draft_lengths, draft_logits, draft_log_z, draft_rows, sampling,
            positions, proposals,
        )  # fmt: skip
    rows = (logit_offsets, draft_lengths, draft_rows, positions, proposals)
    accepted, next_token, failed, _ = verify_arrays(
        logits.numpy(),
        draft_tokens.numpy(),
        None if draft_logits is None else draft_logits.numpy(),
        None if draft_log_z is None else draft_log_z.numpy(),
        sampling,
        *(row.numpy() for row in rows),
    )
    return torch.from_numpy(accepted), torch.from_numpy(next_token), torch.from_numpy(failed)


def verify_arrays(
    logits: np.ndarray,
    draft_tokens: np.ndarray,
    draft_logits: np.ndarray | None,
    draft_log_z: np.ndarray | None,
    sampling: SamplingRows,
    logit_offsets: np.ndarray,
    draft_lengths: np.ndarray,
    draft_rows: np.ndarray,
    positions: np.ndarray,
    proposals: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`verify` on the host's arrays: making tensors of these few numbers takes longer than deciding.

    Fourth comes how certain the target was, [R] float64: its largest probability at the first decided position, where
    that costs nothing (rejection); NaN elsewhere.
    """
    if (draft_logits is None or draft_log_z is None) and sampling.any_rejection:
        rejection = (sampling.filters[0] > 0) & ~sampling.noise[1]
        if (rejection & (draft_lengths > 0)).any():
            raise ValueError("verification by rejection needs the draft's logits and log_z")
    # Native code is told addresses: what has gaps or another type is copied.
    draft_tokens, logit_offsets, draft_lengths, draft_rows, positions, proposals = (
        np.ascontiguousarray(part, np.int64)
        for part in (draft_tokens, logit_offsets, draft_lengths, draft_rows, positions, proposals)
    )
    draft_logits, draft_log_z = (
        none if part is None else np.ascontiguousarray(part, np.float32)
        for part, none in ((draft_logits, _NO_LOGITS), (draft_log_z, _NO_LOG_Z))
    )
    count = len(draft_lengths)
    accepted, next_token = np.zeros(count, np.int64), np.full(count, -1, np.int64)
    failed, certainty = np.zeros(count, np.bool_), np.full(count, np.nan)
    _verify(
        *team_and(verify_frame),
        logits,
        logit_offsets,
        draft_tokens,
        draft_lengths,
        draft_logits,
        draft_log_z,
        draft_rows,
        *sampling.filters,
        *sampling.noise,
        positions,
        proposals,
        accepted,
        next_token,
        failed,
        certainty,
    )
    return accepted, next_token, failed, certainty


_NO_LOGITS, _NO_LOG_Z = np.empty((0, 0, 0), np.float32), np.empty((0, 0), np.float32)


@routine
def verify_frame(frame, worker):  # type: ignore[no-untyped-def]
    verify_rows(frame)


@entry
def _verify(
    team: int,
    rows: int,
    logits: np.ndarray,
    offsets: np.ndarray,
    tokens: np.ndarray,
    lengths: np.ndarray,
    draft_logits: np.ndarray,
    draft_log_z: np.ndarray,
    draft_rows: np.ndarray,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    min_p: np.ndarray,
    seed: np.ndarray,
    coupled: np.ndarray,
    positions: np.ndarray,
    proposals: np.ndarray,
    accepted: np.ndarray,
    next_token: np.ndarray,
    failed: np.ndarray,
    certainty: np.ndarray,
) -> None:
    """Lays down where everything lies (`kernels.verify_native`), for all threads; one row needs no second one."""
    frame = np.array(
        (
            *(0, lengths.shape[0], logits.shape[0], logits.shape[1], logits.ctypes.data, offsets.ctypes.data),
            *(lengths.ctypes.data, tokens.ctypes.data, tokens.shape[0], tokens.shape[1]),
            *(draft_logits.ctypes.data, draft_logits.shape[0], draft_logits.shape[1], draft_log_z.ctypes.data),
            *(draft_rows.ctypes.data, temperature.ctypes.data, top_k.ctypes.data, top_p.ctypes.data),
            *(min_p.ctypes.data, seed.ctypes.data, coupled.ctypes.data, positions.ctypes.data),
            *(proposals.ctypes.data, accepted.ctypes.data, next_token.ctypes.data, failed.ctypes.data),
            certainty.ctypes.data,
        ),
        np.int64,
    )
    assert frame.shape[0] == WORDS
    run_team(team, rows, frame.ctypes.data, one_stage(lengths.shape[0], logits.size))
    frame[0] = 0  # named after the run: an array lives until its last use, and its address is none
