"""Memory of a long prefill: it grows with the chunk and the cache, not with the square of the prompt."""

import json
import subprocess
import sys

import pytest

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
