"""How far our next-token distributions are from another program's on the same ids."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from codellama.checkpoint import load_model, open_checkpoint
from codellama.parallel import Parallel


@dataclass(frozen=True)
class Agreement:
    """Over all positions: mean and largest KL divergence from theirs to ours, in nats; the worst rank of our argmax."""

    mean_kl: float
    max_kl: float
    worst_rank: int


def our_log_probs(path: Path, ids: list[int]) -> np.ndarray:
    """Log-probabilities of the next token at every position, float32 [len(ids), vocab_size]."""
    model = load_model(open_checkpoint(path), Parallel(), torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None])
        log_probs: np.ndarray = torch.log_softmax(model.logits(hidden)[0], dim=-1).numpy()
    return log_probs


def compare(theirs: np.ndarray, top: np.ndarray, ours: np.ndarray) -> Agreement:
    """Compare with the most probable tokens of another program; all the others count as one outcome.

    Merging outcomes never makes the divergence larger; with all tokens in `top` it is the divergence itself.

    Args:
        theirs: log-probabilities [positions, k], the largest first.
        top: their tokens [positions, k].
        ours: log-probabilities of all tokens [positions, vocab_size].
    """
    same = np.take_along_axis(ours.astype(np.float64), top.astype(np.int64), axis=1)
    p, q = np.exp(theirs.astype(np.float64)), np.exp(same)
    kl = (p * (theirs - same)).sum(axis=1)
    if top.shape[1] < ours.shape[1]:
        p_rest, q_rest = np.clip(1 - p.sum(axis=1), 1e-9, None), np.clip(1 - q.sum(axis=1), 1e-9, None)
        kl += p_rest * np.log(p_rest / q_rest)
    found = top == ours.argmax(axis=1)[:, None]
    ranks = np.where(found.any(axis=1), found.argmax(axis=1), top.shape[1])
    return Agreement(float(kl.mean()), float(kl.max()), int(ranks.max()))
