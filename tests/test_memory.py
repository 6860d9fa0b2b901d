"""The budget: sizes against tensors that really exist, and advice that really fits."""

from pathlib import Path

import pytest
import torch

from benchmarks.memory import case
from codellama.cache import KVCache
from codellama.config import ModelArgs, RuntimeArgs
from codellama.errors import MemoryBudgetError
from codellama.memory import format_bytes, free_host_memory, plan_budget
from codellama.model import Transformer
from codellama.parallel import Parallel
from tests.support import tiny


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_weights_and_cache_are_those_that_a_rank_allocates(size: int, cache_dtype: str | None) -> None:
    runtime = RuntimeArgs(max_seq_len=100, max_batch_size=3, cache_dtype=cache_dtype)
    budget = plan_budget(tiny.ARGS, runtime, size, 2)
    model = Transformer(tiny.ARGS, Parallel(rank=size - 1, size=size))
    assert budget.weights == 2 * sum(parameter.numel() for parameter in model.parameters())
    cache = KVCache.allocate(
        tiny.ARGS,
        rows=3,
        max_seq_len=100,
        dtype=torch.int8 if cache_dtype else torch.bfloat16,
        device=torch.device("cpu"),
        model_parallel_size=size,
    )
    assert budget.cache == cache.nbytes


def test_seven_billion_parameters_in_bfloat16() -> None:
    args = ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32016, rope_theta=1e6)
    budget = plan_budget(args, RuntimeArgs(max_seq_len=16_384, max_batch_size=1), 1, 2)
    assert budget.weights == 6_738_546_688 * 2
    assert budget.cache == 16_384 * 524_288


@pytest.mark.parametrize("chunk_size", [16, 2048])
def test_the_longest_max_seq_len_that_is_named_fits_and_the_next_does_not(chunk_size: int) -> None:
    def check(max_seq_len: int) -> None:
        runtime = RuntimeArgs(max_seq_len=max_seq_len, max_batch_size=2, chunk_size=chunk_size)
        plan_budget(tiny.ARGS, runtime, 1, 4).check(3_000_000)

    with pytest.raises(MemoryBudgetError, match="with max_batch_size 2") as caught:
        check(10**6)
    longest = int(str(caught.value).split("max_seq_len up to ")[1].split()[0])
    check(longest)
    with pytest.raises(MemoryBudgetError):
        check(longest + 1)


def test_graphs_are_planned_and_the_way_without_them_is_named() -> None:
    args = ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32016, rope_theta=1e6)
    eager, recorded = (plan_budget(args, RuntimeArgs(), 1, 2, graphs=graphs) for graphs in (0, 9))
    nodes = 9 * (32 * 56 + 40)
    added = recorded.total - eager.total
    assert nodes * 24_576 < added < nodes * 24_576 + 20e6  # with the memory of one step of four rows, and their logits
    with pytest.raises(MemoryBudgetError, match="and so does decode='eager', without CUDA graphs"):
        recorded.check(eager.total)
    with pytest.raises(MemoryBudgetError) as caught:
        recorded.check(eager.total - 1)
    assert "eager" not in str(caught.value)


def test_weights_alone_too_large_and_unknown_memory() -> None:
    runtime = RuntimeArgs(max_seq_len=8)
    budget = plan_budget(tiny.ARGS, runtime, 1, 4)
    with pytest.raises(MemoryBudgetError, match="even without a cache"):
        budget.check(budget.weights)
    budget.check(None)
    assert "free memory unknown" in budget.describe(None)


def test_free_memory_is_shared_by_the_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    alone = free_host_memory()
    assert alone is not None
    assert 0 < alone <= 1.1 * 1024 * int(available.split()[1])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = free_host_memory()
    assert shared is not None
    assert shared == pytest.approx(alone / 4, rel=0.1)


@pytest.mark.parametrize(("count", "text"), [(7, "7 B"), (12_300, "12.3 kB"), (13_477_093_376, "13.48 GB")])
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "scored"), [(16, False), (1, True)])
def test_a_prefill_takes_what_is_planned(kv_heads: int, scored: bool) -> None:
    """In chunks; the growth of a fresh process above weights and cache, in MB."""
    args = ModelArgs(dim=512, n_layers=2, n_heads=16, n_kv_heads=kv_heads, vocab_size=32016, rope_theta=1e6)
    found = case(args, 5000, scored, torch.float32)
    assert abs(found["difference_MB"]) < max(20, found["planned_MB"] / 10), found
