"""From logits to tokens: pure functions of each request's logits, parameters and random numbers.

Requests are drawn together, but no operation goes across them, so a request's neighbours cannot change its tokens.

Shapes: B requests, V vocabulary, N positions of one request.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

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
    """Choose the next token of one request; see `adjust` and `draw_batch`, of which it is made.

    Returns:
        The id, int64 `[]`.
    """
    adjusted = adjust(logits, params, ids, ids, counts, allowed)
    return draw_batch((logits if adjusted is None else adjusted)[None], [params], [uniform])[0]


def adjust(
    logits: Tensor,
    params: SamplingParams,
    ids: Sequence[int],
    seen: Iterable[int],
    counts: Mapping[int, int] | None = None,
    allowed: bytearray | None = None,
) -> Tensor | None:
    """Change one request's logits as it asks for.

    The order is: logits_processor, repetition penalty, presence and frequency penalty, logit_bias, grammar.

    Args:
        logits: float32 `[V]`; not changed.
        params: what the request asks for.
        ids: prompt and output so far, for the logits_processor.
        seen: the same for the repetition penalty, which needs each id only once.
        counts: how often each id was generated.
        allowed: one byte for each id, 0 where the grammar forbids it; None allows all.

    Returns:
        float32 `[V]`, or None where there is nothing to change.

    Raises:
        ValueError: the logits_processor returned something else than logits, or allows nothing that the grammar allows.
    """
    changed = None
    if params.logits_processor is not None:
        changed = params.logits_processor(ids, logits.clone())
        if not isinstance(changed, Tensor) or changed.shape != logits.shape:
            found = list(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise ValueError(f"logits_processor returned {found}; a tensor of {list(logits.shape)} was expected")
        changed = changed.to(logits)
        if not changed.max() > -math.inf:
            raise ValueError("logits_processor returned no logit that is a number above -inf: it allows no token")
    if params.repetition_penalty != 1:
        changed = penalize(logits if changed is None else changed, params.repetition_penalty, seen)
    if counts and (params.presence_penalty or params.frequency_penalty):
        given = logits if changed is None else changed
        changed = penalize_generated(given, params.presence_penalty, params.frequency_penalty, counts)
    if params.logit_bias:
        chosen, biases = zip(*params.logit_bias, strict=True)
        changed = _add(
            logits if changed is None else changed,
            chosen,
            torch.tensor(biases, dtype=torch.float64, device=logits.device),
        )
    if allowed is not None:
        forbidden = torch.frombuffer(allowed, dtype=torch.uint8).to(logits.device) == 0
        changed = (logits if changed is None else changed).masked_fill(forbidden, -math.inf)
        if params.logits_processor is not None and not changed.max() > -math.inf:
            raise ValueError("logits_processor allows no token that the grammar allows")
    return changed


def draw_batch(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """Choose a token for each row.

    The order is: temperature, top_k, top_p, min_p; what remains is drawn by the inverse of the cumulative distribution
    in the order of ids. Every operation is along a row, so that a row's neighbours change nothing.

    Args:
        logits: float32 `[B, V]`, adjusted.
        params: one for each row.
        uniforms: random numbers in [0, 1), one for each row.

    Returns:
        Ids, int64 `[B]`.
    """
    chosen = logits.argmax(dim=-1)
    rows = [row for row, wish in enumerate(params) if not wish.greedy]
    if not rows:
        return chosen
    wishes = [params[row] for row in rows]
    # One transfer for all that rows differ in. Float64 holds any top_k.
    columns = [
        (wish.temperature, uniforms[row], wish.top_p, wish.min_p) for row, wish in zip(rows, wishes, strict=True)
    ]
    temperature, uniform, top_p, min_p = torch.tensor(columns, dtype=torch.float64, device=logits.device).T[..., None]
    mixed = len(rows) < len(params)
    if mixed:
        logits = logits[rows]
    # In float64, so that the smallest temperature does not divide 0 by 0; what equals the maximum may be +inf.
    top = logits.amax(dim=-1, keepdim=True)
    below = torch.where(logits == top, 0, logits - top).double()
    probs = torch.softmax(below / temperature, dim=-1)
    limited = [row for row, wish in enumerate(wishes) if wish.top_k is not None and wish.top_k < logits.shape[1]]
    if limited:
        probs[limited] = keep_top_k(probs[limited], [wishes[row].top_k or 0 for row in limited])
    cut = [row for row, wish in enumerate(wishes) if wish.top_p < 1]
    if cut:
        probs[cut] = keep_top_p(probs[cut], top_p[cut])
    if any(wish.min_p > 0 for wish in wishes):
        probs = torch.where(probs < min_p * probs.amax(dim=-1, keepdim=True), 0, probs)
    cumulative = probs.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, cumulative[:, -1:] * uniform, right=True)[:, 0]
    kept = torch.where(probs > 0, torch.arange(probs.shape[1], device=probs.device), 0).amax(dim=-1)
    drawn = torch.minimum(drawn, kept)  # rounding must not carry the draw past the last token kept
    if not mixed:
        return drawn
    chosen[rows] = drawn
    return chosen


def penalize(logits: Tensor, penalty: float, ids: Iterable[int]) -> Tensor:
    """Make the tokens of ids less probable, each once."""
    seen = torch.tensor(list(ids if isinstance(ids, AbstractSet) else set(ids)), device=logits.device)
    chosen = logits[seen].double()  # the product may leave float32's range
    return logits.index_copy(0, seen, torch.where(chosen > 0, chosen / penalty, chosen * penalty).float())


def penalize_generated(logits: Tensor, presence: float, frequency: float, counts: Mapping[int, int]) -> Tensor:
    """Subtract what was generated before: presence once, frequency as often as it was."""
    times = torch.tensor(list(counts.values()), dtype=torch.float64, device=logits.device)
    return _add(logits, list(counts), -(presence + frequency * times))


def _add(logits: Tensor, ids: Sequence[int], values: Tensor) -> Tensor:
    """Add float64 values to the logits of some ids, each once."""
    places = torch.tensor(ids, device=logits.device)
    return logits.index_copy(0, places, (logits[places].double() + values).float())


def keep_top_k(probs: Tensor, top_k: Sequence[int]) -> Tensor:
    """Zero all but the most probable tokens of each row, `[B, V]`, as many as it says.

    Each row by itself: which of equal ones are kept must not depend on how many a neighbour keeps.
    """
    kept = torch.zeros_like(probs)
    for row, count in enumerate(top_k):
        best = probs[row].topk(count)
        kept[row].scatter_(0, best.indices, best.values)
    return kept


def keep_top_p(probs: Tensor, top_p: Tensor) -> Tensor:
    """Zero all but the smallest set of most probable tokens of each row that holds top_p of its mass.

    Source: nucleus sampling, arXiv 1904.09751, section 3.1.

    Args:
        probs: `[B, V]`.
        top_p: `[B, 1]`.
    """
    target = top_p * probs.sum(dim=-1, keepdim=True)
    if probs.device.type != "cpu":  # where a sort is cheap, and to ask whether it is needed is not
        return _nucleus(probs, *probs.sort(dim=-1, descending=True), target)
    values, indices = probs.topk(min(_CANDIDATES, probs.shape[1]))
    kept = _nucleus(probs, values, indices, target)
    lacking = (values.sum(dim=-1, keepdim=True) < target)[:, 0].nonzero()[:, 0]
    if len(lacking):
        part = probs[lacking]
        kept[lacking] = _nucleus(part, *part.sort(dim=-1, descending=True), target[lacking])
    return kept


def _nucleus(probs: Tensor, values: Tensor, indices: Tensor, target: Tensor) -> Tensor:
    """Keep of each row's most probable tokens, in falling order, those before which the target is not reached."""
    before = values.cumsum(dim=-1) - values
    return torch.zeros_like(probs).scatter(1, indices, torch.where(before < target, values, 0))


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
