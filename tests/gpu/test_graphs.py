"""Decode steps in real CUDA graphs. (On a tape that stands for them: tests/generation/test_graphs.py.)"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from codellama.cache import KVCache
from codellama.errors import MemoryBudgetError
from codellama.generation.batch import Batch
from codellama.generation.graphs import CudaRecorder, DecodeGraphs, decode_shapes
from codellama.generation.runner import Runner
from codellama.llama import Llama
from codellama.memory import plan_budget
from tests.support import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use"),
]

DEVICE = torch.device("cuda", 0)
PROMPTS = [[1, 50], [1, 60, 70, 80], [1, *range(90, 130)], [1, 44, 45], [1, *range(5, 300), *range(5, 300)], [1, 99]]


@pytest.fixture(scope="module")
def generators(tiny_folder: Path) -> Iterator[tuple[Llama, Llama]]:
    """The same weights, eager and in graphs."""
    options = {"max_seq_len": 700, "max_batch_size": 3, "dtype": "float32", "device": "cuda"}
    with Llama.build(tiny_folder, decode="eager", **options) as eager, Llama.build(tiny_folder, **options) as recorded:
        yield eager, recorded


def test_generated_tokens_and_scores_are_the_eager_ones(generators: tuple[Llama, Llama]) -> None:
    """Both buckets of length, and one to three rows, greedy and sampled; nothing is captured on the way."""
    eager, recorded = generators
    graphs = recorded.engine._runner.graphs
    assert graphs is not None
    assert graphs.captures == len(decode_shapes(3, 700)) == 6
    for options in ({"temperature": 0}, {"temperature": 0.8, "seed": 5}):
        tokens, scores = eager.generate(PROMPTS, 24, logprobs=True, stop_token=-1, **options)
        found, found_scores = recorded.generate(PROMPTS, 24, logprobs=True, stop_token=-1, **options)
        assert found == tokens
        for one, other in zip(scores, found_scores, strict=True):
            assert other == pytest.approx(one, abs=1e-4)
    assert graphs.captures == 6


def step(runner: Runner, batch: Batch) -> Tensor:
    (logits,) = runner.run(batch)
    return logits.float().cpu()


@pytest.mark.parametrize(
    ("compute", "held", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.bfloat16, torch.bfloat16, 0.06),
        (torch.float16, torch.float16, 0.01),
        (torch.float32, torch.int8, 1e-4),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_logits_and_cache_are_those_of_the_cpu(
    compute: torch.dtype, held: torch.dtype, tolerance: float, compiled: bool
) -> None:
    """Rows of two buckets, with one that runs along; 16-bit results of a layer are rounded differently."""
    weights = tiny.random_weights(tiny.ARGS, dtype=compute)
    runners = []
    for device in (torch.device("cpu"), DEVICE):
        model = tiny.whole_model(tiny.ARGS, {name: tensor.to(device) for name, tensor in weights.items()})
        cache = KVCache.allocate(tiny.ARGS, rows=4, max_seq_len=700, dtype=held, device=device)
        generator = torch.Generator().manual_seed(1)
        for tensor in (*cache.keys, *cache.values, *(scale for pair in cache.scales or () for scale in pair)):
            numbers = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(100 * numbers if tensor.dtype == torch.int8 else numbers)
        graphs = DecodeGraphs(model, cache, CudaRecorder(device), compiled) if device.type == "cuda" else None
        runners.append(Runner(model, cache, device, graphs))
    for positions in ([3, -1, 600], [4, -1, 601], [5, -1, 7]):
        batch = Batch(0, [[9], [], [7]], positions, [1, 0, 1])
        expected, found = (step(runner, batch) for runner in runners)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    on_cpu, on_gpu = (runner.cache.keys[2].cpu() for runner in runners)
    assert (on_gpu[1] == on_cpu[1]).all()
    if held != torch.int8:  # a code may be the next one, where a number lies between two
        torch.testing.assert_close(on_gpu, on_cpu, rtol=tolerance, atol=tolerance)
    runners[1].free()


def test_the_plan_holds_what_graphs_take(tiny_folder: Path) -> None:
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info(DEVICE)
    with Llama.build(tiny_folder, max_seq_len=2048, max_batch_size=8, dtype="bfloat16", device="cuda") as llama:
        after, _ = torch.cuda.mem_get_info(DEVICE)
        budget = plan_budget(llama.model.args, llama.runtime, 1, 2, graphs=len(decode_shapes(8, 2048)))
        assert before - after < budget.total + 200e6  # cuBLAS's workspaces, and the blocks of PyTorch's allocator
    with pytest.raises(MemoryBudgetError, match="decode='eager'"):
        budget.check(budget.total - budget.workspace + budget.workspace // 2)
