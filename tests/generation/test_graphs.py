"""Recorded decode steps: the same numbers as eager ones, in buffers and shapes that stay."""

import pytest
import torch
from torch import Tensor

from codellama.cache import KVCache
from codellama.generation.graphs import (
    DecodeGraphs,
    Recorder,
    run_plainly,
)
from codellama.generation.runner import Runner
from codellama.generation.scheduler import Batch
from codellama.model import Transformer
from tests.support import tiny

CPU = torch.device("cpu")
ROWS, LENGTH = 5, 1100
PLACES = [(1, 512), (3, 700), (4, 10), (5, 1099)]  # rows of a batch, and the position of its last one


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny.whole_model(tiny.ARGS, tiny.random_weights(tiny.ARGS))


def filled_cache(rows: int = ROWS, length: int = LENGTH) -> KVCache:
    cache = KVCache.allocate(tiny.ARGS, rows=rows, max_seq_len=length, dtype=torch.float32, device=CPU)
    generator = torch.Generator().manual_seed(1)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_(generator=generator)
    return cache


def make_runner(model: Transformer, cache: KVCache, record: Recorder | None = run_plainly) -> Runner:
    return Runner(model, cache, CPU, None if record is None else DecodeGraphs(model, cache, record))


def one(runner: Runner, batch: Batch) -> Tensor:
    (logits,) = runner.run(batch)
    return logits.clone()


@pytest.mark.parametrize(("rows", "position"), PLACES)
def test_a_recorded_step_is_an_eager_one(model: Transformer, rows: int, position: int) -> None:
    eager, recorded = filled_cache(), filled_cache()
    start = ROWS - rows if rows > 3 else 0
    positions = [position, *range(3, 2 + rows)]
    positions[rows // 2] = positions[rows // 2] if rows < 3 else -1  # a row that runs along
    batch = Batch(start, [[7 * row + 3] for row in range(rows)], positions, 0)
    expected, found = one(make_runner(model, eager, None), batch), one(make_runner(model, recorded), batch)
    real = torch.tensor(positions) >= 0
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)
    assert found.isfinite().all()
    for one_, other in zip((*eager.keys, *eager.values), (*recorded.keys, *recorded.values), strict=True):
        torch.testing.assert_close(other, one_, rtol=0, atol=1e-5)
    untouched = filled_cache()
    changed = [
        (row, position)
        for new, old in zip(recorded.keys, untouched.keys, strict=True)
        for row, position in (new != old).any(dim=3).any(dim=1).nonzero().tolist()
    ]
    assert set(changed) == {(start + row, where) for row, where in enumerate(positions) if where >= 0}
