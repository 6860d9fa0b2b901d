"""Rows of different lengths in one step; memory of a long prefill, which grows with the chunk and the cache alone."""

import json
import subprocess
import sys

import pytest
import torch

from codellama.cache import KVCache
from codellama.generation.batch import Batch
from codellama.generation.runner import Runner
from tests.support import tiny

PROGRAM = """
import json, resource, sys, torch
from codellama.cache import KVCache
from codellama.config import RuntimeArgs, SamplingParams
from codellama.generation.engine import Engine
from codellama.generation.request import Request
from codellama.generation.runner import Runner
from codellama.generation.scheduler import Scheduler
from codellama.parallel import Parallel
from tests.support import tiny
cpu, length, peaks = torch.device("cpu"), 16_384 + 8, []
model = tiny.whole_model(tiny.ARGS, tiny.random_weights(tiny.ARGS))
cache = KVCache.allocate(tiny.ARGS, rows=1, max_seq_len=length, dtype=torch.float32, device=cpu)
for tensor in (*cache.keys, *cache.values):
    tensor.fill_(1)  # so that its pages count from the beginning
for prompt in (2048, 16_384):
    engine = Engine(Runner(model, cache, cpu), Scheduler(RuntimeArgs(max_seq_len=length, max_batch_size=1)), Parallel())
    engine.run([Request([5] * prompt, SamplingParams(max_gen_len=2), 0, tiny.VOCAB, length)])
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_a_long_prompt_needs_little_more_than_its_cache() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    short, long = json.loads(done.stdout)
    assert long - short < 300e6, f"grew by {(long - short) / 1e6:.0f} MB"


def new_runner(rows: int) -> Runner:
    cpu = torch.device("cpu")
    cache = KVCache.allocate(tiny.ARGS, rows=rows, max_seq_len=32, dtype=torch.float32, device=cpu)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(7.5)
    return Runner(tiny.whole_model(tiny.ARGS, tiny.random_weights(tiny.ARGS)), cache, cpu)


@pytest.mark.parametrize("first", [0, 4])
def test_a_ragged_step_is_its_rows_alone(first: int) -> None:
    """Rows 1 and 4 have gone further than row 2 where first is 4; row 3 runs along. Padding writes nothing."""
    begin = [[], [3, 1, 4, 1], [], [], [9, 2, 6, 5]] if first else [[]] * 5
    tokens = [[], [5, 3, 5, 8, 9, 7], [2], [], [11, 12, 13]]
    wanted = [0, 2, 1, 0, 3]
    together, alone = new_runner(5), new_runner(5)
    expected = []
    for row in (1, 2, 4):
        for runner in (together, alone):
            if begin[row]:
                assert list(runner.run(Batch(row, [begin[row]], [0], [0]))) == []
        expected += alone.run(Batch(row, [tokens[row]], [len(begin[row])], [wanted[row]]))
    positions = [len(begin[row]) if tokens[row] else -1 for row in range(1, 5)]
    found = list(together.run(Batch(1, tokens[1:], positions, wanted[1:])))
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=1e-5, rtol=0)
    assert len(torch.cat(found)) == 6
    for one, other in zip(together.cache.keys, alone.cache.keys, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    ends = [0, *(position + len(row) for position, row in zip(positions, tokens[1:], strict=True))]
    for tensor in (*together.cache.keys, *together.cache.values):
        for row, end in enumerate(ends):
            assert (tensor[row, :, max(end, 0) :] == 7.5).all()
            assert not (tensor[row, :, : max(end, 0)] == 7.5).any()
