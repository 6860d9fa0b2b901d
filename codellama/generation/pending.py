"""A step that was launched: what its requests are given lies on the device, or is on its way to the host.

It knows nothing of the model, of rows, or of who sends the step: numbers out of logits, one transfer for all of them.

Shapes: V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codellama.config import SamplingParams
from codellama.generation.batch import Batch
from codellama.generation.request import Request, TokenScore


@dataclass(frozen=True)
class Result:
    """What a step found, on the host.

    Attributes:
        extremes: least and greatest logit of each rank's share of the vocabulary; NaN where there is any.
        drawn: each request that drew, and its ids with their scores if it asks for them; several where it guessed.
    """

    extremes: Sequence[tuple[float, float]]
    drawn: Sequence[tuple[Request, Sequence[tuple[int, TokenScore | None]]]]


class Pending:
    """The numbers of one step, in one tensor that travels while the host does something else.

    On a CPU there is nothing to wait for, and nothing is copied.
    """

    def __init__(
        self, batch: Batch, drawn: Sequence[tuple[Request, Tensor, Tensor]], extremes: Tensor, device: torch.device
    ) -> None:
        """Score what was drawn, and let all of it go to the host.

        Args:
            batch: the step.
            drawn: each request that draws, its logits `[V]` as the model computed them, and its token, int64 `[]`;
                several times where it guessed.
            extremes: float32 `[ranks, 2]`, see `extremes_of`; or `[0, 2]` where there are no logits.
            device: where all of this is.
        """
        self.batch = batch
        self._owners = [request for request, *_ in drawn]
        self.requests = list(dict.fromkeys(self._owners))
        self._n_ranks = len(extremes)
        self._tops = [_n_top(request.params, logits) for request, logits, _ in drawn]
        numbers = [extremes.flatten()]
        if drawn:
            numbers.append(torch.stack([token for *_, token in drawn]))
        numbers += _scores([entry for entry in drawn if entry[0].params.logprobs])
        found = torch.cat([part.to(device, torch.float64) for part in numbers])  # it holds any id and any float32
        self._arrived = None
        self._found = found
        if found.is_cuda:
            self._found = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._found.copy_(found, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> Result:
        """Wait for the numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values = self._found.tolist()
        extremes = [(values[2 * rank], values[2 * rank + 1]) for rank in range(self._n_ranks)]
        at = 2 * self._n_ranks
        tokens = [int(value) for value in values[at : at + len(self._owners)]]
        at += len(tokens)
        drawn: dict[Request, list[tuple[int, TokenScore | None]]] = {request: [] for request in self.requests}
        for request, token, top in zip(self._owners, tokens, self._tops, strict=True):
            score = None
            if top is not None:
                ids, logprobs = values[at + 1 : at + 1 + top], values[at + 1 + top : at + 1 + 2 * top]
                score = TokenScore(values[at], tuple(zip(map(int, ids), logprobs, strict=True)))
                at += 1 + 2 * top
            drawn[request].append((token, score))
        return Result(extremes, list(drawn.items()))


def extremes_of(logits: Tensor, n_ranks: int) -> Tensor:
    """Least and greatest logit of each rank's share of the vocabulary, float32 `[n_ranks, 2]`: `[..., V]` is split.

    Where one is NaN, both are. It costs a tenth of asking each number whether it is finite, and says who to blame.
    """
    shares = logits.reshape(-1, n_ranks, logits.shape[-1] // n_ranks)
    return torch.stack([shares.amin(dim=(0, 2)), shares.amax(dim=(0, 2))], dim=1)  # aminmax is 15 times slower


def widest(extremes: Sequence[Tensor]) -> Tensor:
    """The extremes of several pieces of logits as those of one, float32 `[n_ranks, 2]`; `[0, 2]` of none."""
    if len(extremes) < 2:
        return extremes[0] if extremes else torch.zeros(0, 2)
    every = torch.stack(list(extremes))
    return torch.stack([every[..., 0].amin(dim=0), every[..., 1].amax(dim=0)], dim=1)


def _n_top(params: SamplingParams, logits: Tensor) -> int | None:
    """How many rivals a request wants to see beside its token; None where it wants no score."""
    return min(params.top_logprobs, len(logits)) if params.logprobs else None


def _scores(asking: Sequence[tuple[Request, Tensor, Tensor]]) -> list[Tensor]:
    """For each request: log-probability of its token, ids and log-probabilities of the rivals."""
    if not asking:
        return []
    logprobs = torch.log_softmax(torch.stack([logits for _, logits, _ in asking]), dim=-1)
    chosen = logprobs.gather(1, torch.stack([token for *_, token in asking])[:, None])
    parts: list[Tensor] = []
    for row, (request, logits, _) in enumerate(asking):
        parts.append(chosen[row])
        if top := _n_top(request.params, logits):
            # Each by itself: which of equal ones are listed must not depend on who else asks.
            best = logprobs[row].topk(top)
            parts += [best.indices, best.values]
    return parts
