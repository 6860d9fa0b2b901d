"""From logits to a token: pure functions of one request's logits, parameters and random numbers.

They know nothing of batches or rows, so a request's neighbours cannot change its tokens.

Shapes: V vocabulary, N positions of one request.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from codellama.config import SamplingParams
from codellama.generation.request import TokenScore

_CANDIDATES = 256
"""top_p looks at so many most probable tokens first: sorting all 32,016 costs far more than choosing the top."""


def sample(
    logits: Tensor,
    params: SamplingParams,
    uniform: float,
    ids: Sequence[int],
    counts: Mapping[int, int] | None = None,
    allowed: bytearray | None = None,
) -> Tensor:
    """Choose the next token.

    The order is: logits_processor, repetition penalty, presence and frequency penalty, logit_bias, grammar,
    temperature, top_k, top_p, min_p; what remains is drawn by the inverse of the cumulative distribution in the order
    of ids, which no neighbour and no batch can change.

    Args:
        logits: float32 `[V]`; not changed.
        params: what the request asks for.
        uniform: a random number in [0, 1).
        ids: prompt and output so far.
        counts: how often each id was generated.
        allowed: one byte for each id, 0 where the grammar forbids it; None allows all.

    Returns:
        The id, int64 `[]`.

    Raises:
        ValueError: the logits_processor returned something else than logits, or allows nothing that the grammar allows.
    """
    if params.logits_processor is not None:
        processed = params.logits_processor(ids, logits.clone())
        if not isinstance(processed, Tensor) or processed.shape != logits.shape:
            found = list(processed.shape) if isinstance(processed, Tensor) else type(processed).__name__
            raise ValueError(f"logits_processor returned {found}; a tensor of {list(logits.shape)} was expected")
        logits = processed.to(logits)
        if not logits.max() > -math.inf:
            raise ValueError("logits_processor returned no logit that is a number above -inf: it allows no token")
    if params.repetition_penalty != 1:
        logits = penalize(logits, params.repetition_penalty, ids)
    if counts and (params.presence_penalty or params.frequency_penalty):
        logits = penalize_generated(logits, params.presence_penalty, params.frequency_penalty, counts)
    if params.logit_bias:
        chosen, biases = zip(*params.logit_bias, strict=True)
        logits = _add(logits, chosen, torch.tensor(biases, dtype=torch.float64))
    if allowed is not None:
        logits = logits.masked_fill(torch.frombuffer(allowed, dtype=torch.uint8).to(logits.device) == 0, -math.inf)
        if params.logits_processor is not None and not logits.max() > -math.inf:
            raise ValueError("logits_processor allows no token that the grammar allows")
    if params.greedy:
        return logits.argmax()
    # In float64, so that the smallest temperature does not divide 0 by 0; what equals the maximum may be +inf.
    below = torch.where(logits == logits.max(), 0, logits - logits.max()).double()
    probs = torch.softmax(below / params.temperature, dim=-1)
    probs = keep_top_k(probs, params.top_k)
    probs = keep_top_p(probs, params.top_p)
    if params.min_p > 0:
        probs = torch.where(probs < params.min_p * probs.max(), 0, probs)
    cumulative = probs.cumsum(0)
    drawn = torch.searchsorted(cumulative, cumulative[-1] * uniform, right=True)
    kept = torch.where(probs > 0, torch.arange(len(probs), device=probs.device), 0)
    return torch.minimum(drawn, kept.max())  # rounding must not carry the draw past the last token kept


def penalize(logits: Tensor, penalty: float, ids: Sequence[int]) -> Tensor:
    """Make the tokens of ids less probable, each once."""
    seen = torch.tensor(sorted(set(ids)), device=logits.device)
    chosen = logits[seen].double()  # the product may leave float32's range
    return logits.index_copy(0, seen, torch.where(chosen > 0, chosen / penalty, chosen * penalty).float())


def penalize_generated(logits: Tensor, presence: float, frequency: float, counts: Mapping[int, int]) -> Tensor:
    """Subtract what was generated before: presence once, frequency as often as it was."""
    times = torch.tensor(list(counts.values()), dtype=torch.float64)
    return _add(logits, list(counts), -(presence + frequency * times))


def _add(logits: Tensor, ids: Sequence[int], values: Tensor) -> Tensor:
    """Add float64 values to the logits of some ids, each once."""
    places = torch.tensor(ids, device=logits.device)
    return logits.index_copy(0, places, (logits[places].double() + values.to(logits.device)).float())


def keep_top_k(probs: Tensor, top_k: int | None) -> Tensor:
    """Zero all but the top_k most probable tokens."""
    if top_k is None or top_k >= probs.numel():
        return probs
    kept = probs.topk(top_k)
    return torch.zeros_like(probs).scatter(0, kept.indices, kept.values)


def keep_top_p(probs: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of most probable tokens that holds top_p of the mass.

    Source: nucleus sampling, arXiv 1904.09751, section 3.1.
    """
    if top_p >= 1:
        return probs
    target = top_p * probs.sum()
    values, indices = probs.topk(min(_CANDIDATES, probs.numel()))
    if values.sum() < target:
        values, indices = probs.sort(descending=True)
    before = values.cumsum(0) - values
    return torch.zeros_like(probs).scatter(0, indices, torch.where(before < target, values, 0))


def score(logits: Tensor, ids: Sequence[int], top: int) -> list[TokenScore]:
    """Log-probabilities of given tokens under the model, temperature 1, nothing cut.

    Args:
        logits: float32 `[N, V]`.
        ids: N token ids.
        top: number of most probable alternatives to report at each position.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    if not top:
        return [TokenScore(value) for value in chosen]
    best = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
    rivals = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenScore(value, tuple(zip(row, values, strict=True)))
        for value, (row, values) in zip(chosen, rivals, strict=True)
    ]
