"""Rung 5 of the parity ladder: recorded decode steps have the numbers of eager ones, in buffers and shapes that stay.

No GPU is needed: `tests/support/tape.py` replays operations on fixed memory, as a CUDA graph does. (A real one:
tests/gpu/test_graphs.py.)
"""

import gc
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters

from codellama.cache import KVCache
from codellama.config import RuntimeArgs, SamplingParams
from codellama.errors import ParallelSizeError
from codellama.generation.batch import LAST_DRAWN, Batch
from codellama.generation.engine import Engine
from codellama.generation.graphs import (
    MOST_SHAPES,
    DecodeGraphs,
    Recorder,
    choose_decode,
    decode_shapes,
    run_plainly,
    score_tokens,
)
from codellama.generation.request import Request
from codellama.generation.runner import Runner
from codellama.generation.scheduler import Scheduler
from codellama.linear import make_matrix
from codellama.llama import Llama
from codellama.memory import GRAPH_NODE_BYTES, plan_budget
from codellama.model import Transformer
from codellama.parallel import Parallel
from codellama.quantization import Quantization
from tests.support import tiny
from tests.support.tape import Log, TapeRecorder, tensors

CPU = torch.device("cpu")
ROWS, LENGTH = 5, 1100


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny.whole_model(tiny.ARGS, tiny.random_weights(tiny.ARGS))


def filled_cache(rows: int = ROWS, length: int = LENGTH, dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache.allocate(tiny.ARGS, rows=rows, max_seq_len=length, dtype=dtype, device=CPU)
    generator = torch.Generator().manual_seed(1)
    for tensor in (*cache.keys, *cache.values, *(scale for pair in cache.scales or () for scale in pair)):
        random_numbers = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(100 * random_numbers if tensor.dtype == torch.int8 else random_numbers)
    return cache


def make_runner(model: Transformer, cache: KVCache, record: Recorder | None) -> Runner:
    return Runner(model, cache, CPU, None if record is None else DecodeGraphs(model, cache, record))


def one_token(start: int, ids: list[int], positions: list[int]) -> Batch:
    """One new token in each row; a row at -1 runs along."""
    real = [position >= 0 for position in positions]
    return Batch(
        start, [[id] if here else [] for id, here in zip(ids, real, strict=True)], positions, [*map(int, real)]
    )


def run_one(runner: Runner, batch: Batch) -> Tensor:
    (logits,) = runner.run(batch)
    return logits.clone()


@pytest.mark.parametrize(
    ("start", "positions"),
    [(0, [512]), (0, [511]), (2, [3, 700, 4]), (0, [10, -1, 5, -1, 9]), (1, [1099, 0, -1, 1024]), (0, [7, 7])],
)
def test_a_replayed_step_is_an_eager_one(model: Transformer, start: int, positions: list[int]) -> None:
    eager, recorded = filled_cache(), filled_cache()
    batch = one_token(start, [7 * row + 3 for row in range(len(positions))], positions)
    recorder = TapeRecorder()
    expected = run_one(make_runner(model, eager, None), batch)
    found = run_one(make_runner(model, recorded, recorder), batch)
    assert recorder.replays == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for made, other in zip((*recorded.keys, *recorded.values), (*eager.keys, *eager.values), strict=True):
        torch.testing.assert_close(made, other, rtol=0, atol=1e-5)
    changed = (recorded.keys[2] != filled_cache().keys[2]).any(dim=3).any(dim=1).nonzero().tolist()
    assert changed == [[start + row, position] for row, position in enumerate(positions) if position >= 0]


@pytest.mark.parametrize(
    ("compute", "held", "tolerance"), [(torch.bfloat16, torch.bfloat16, 0.06), (torch.float32, torch.int8, 1e-4)]
)
def test_a_long_bucket_is_read_at_once_where_numbers_are_converted(
    compute: torch.dtype, held: torch.dtype, tolerance: float
) -> None:
    """More positions than are converted at once elsewhere; 16-bit results of a layer are rounded differently."""
    model = tiny.whole_model(tiny.ARGS, tiny.random_weights(tiny.ARGS, dtype=compute))
    eager, recorded = (filled_cache(4, 25_000, held) for _ in range(2))
    batch = one_token(0, [3, 4, 5, 6], [24_900, 17, -1, 22_000])
    expected = run_one(make_runner(model, eager, None), batch)
    found = run_one(make_runner(model, recorded, TapeRecorder()), batch)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("recorder", [run_plainly, TapeRecorder()])
def test_recording_writes_nothing_although_it_runs_the_step(model: Transformer, recorder: Recorder) -> None:
    cache = filled_cache()
    runner = make_runner(model, cache, recorder)
    run_one(runner, one_token(0, [9, 9], [5, 6]))
    runner.forget()
    run_one(runner, one_token(3, [9, 9], [600, -1]))  # another shape, in which rows 0 and 1 run along
    written = (cache.keys[0] != 0).any(dim=3).any(dim=1).nonzero().tolist()
    assert written == [[3, 600]]


def test_an_id_that_only_the_device_knows(model: Transformer) -> None:
    found = []
    for ids in ([5, 9], [LAST_DRAWN, 9]):
        runner = make_runner(model, filled_cache(), TapeRecorder())
        runner.drawn[2] = 5
        found.append(run_one(runner, one_token(2, ids, [30, 4])))
    assert torch.equal(*found)


def test_what_has_no_shape_is_computed_anew(model: Transformer) -> None:
    graphs, drawn = DecodeGraphs(model, filled_cache(9, 64), run_plainly), torch.zeros(9, dtype=torch.int64)
    assert graphs.run(Batch(0, [[1, 2]], [0], [1]), drawn) is None  # a prompt
    assert graphs.run(Batch(0, [[1]], [0], [0]), drawn) is None  # nothing is scored
    assert graphs.run(one_token(8, [1], [0]), drawn) is None  # nine rows for one
    assert graphs.captures == 0
    assert graphs.run(one_token(2, [1], [0]), drawn) is not None
    assert graphs.captures == 1


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 8, 11, 64, 256])
@pytest.mark.parametrize("length", [1, 100, 512, 700, 2048, 16_384, 100_000, 131_072])
def test_shapes_serve_every_step_and_waste_little(rows: int, length: int) -> None:
    shapes = decode_shapes(rows, length)
    assert len(shapes) == len(set(shapes)) <= MOST_SHAPES
    assert shapes == sorted(shapes, reverse=True)
    assert shapes[0] == (rows, length)
    for wanted in range(1, rows + 1):
        assert min(size for size, _ in shapes if size >= wanted) < 2 * wanted
    for size in {size for size, _ in shapes}:
        lengths = sorted(stop for number, stop in shapes if number == size)
        assert lengths[-1] == length
        most = 1.5 if size >= 8 and rows <= 64 and length <= 16_384 else 2
        assert all(high <= most * low for low, high in pairwise(lengths))


@pytest.mark.parametrize(
    ("rows", "length", "shortest", "count"),
    [(1, 512, 512, 1), (4, 2048, 512, 9), (64, 2048, 512, 29), (64, 16_384, 512, 62), (4, 131_072, 512, 27),
     (64, 131_072, 512, 63), (256, 131_072, 2048, 63), (1, 100, 100, 1)],
)  # fmt: skip
def test_how_many_shapes_there_are(rows: int, length: int, shortest: int, count: int) -> None:
    shapes = decode_shapes(rows, length)
    assert (shapes[-1][1], len(shapes)) == (shortest, count)


def run_mixed(engine: Engine) -> list[list[int]]:
    """Fifty requests of many lengths, that come in small crowds."""
    rng, done = random.Random(3), []
    for _ in range(10):
        crowd = [
            Request(
                [rng.randrange(3, tiny.VOCAB) for _ in range(rng.choice((1, 5, 40, 505, 560)))],
                SamplingParams(max_gen_len=rng.randrange(1, 14)), 0, tiny.VOCAB, 600,
            )
            for _ in range(5)
        ]  # fmt: skip
        done += [list(completion.tokens) for completion in engine.run(crowd)]
    return done


class CountingRunner(Runner):
    """Counts the steps of one token for each row."""

    steps = 0

    def run(self, batch: Batch) -> Iterator[Tensor]:
        self.steps += batch.width == 1 and all(len(row) == n for row, n in zip(batch.tokens, batch.wanted, strict=True))
        return super().run(batch)


def test_nothing_is_recorded_after_the_warm_up_in_fifty_mixed_requests(model: Transformer) -> None:
    found, runtime = [], RuntimeArgs(max_seq_len=600, max_batch_size=3)
    for record in (None, TapeRecorder()):
        cache = filled_cache(3, 600)
        graphs = None if record is None else DecodeGraphs(model, cache, record)
        if graphs is not None:
            graphs.prepare()
        runner = CountingRunner(model, cache, CPU, graphs)
        found.append(run_mixed(Engine(runner, Scheduler(runtime), Parallel())))
        if record is not None:
            assert graphs.captures == len(decode_shapes(3, 600)) == 6
            assert record.replays == runner.steps > 50
    assert found[1] == found[0]


def meta_model(quantize: str | None, held: torch.dtype = torch.bfloat16) -> tuple[Transformer, KVCache]:
    """A model and a cache without numbers. A plan on the meta device is a GPU's; what the host asks for is an error."""
    meta, args = (
        torch.device("meta"),
        replace(tiny.ARGS, dim=64, multiple_of=32, head_dim=None),
    )  # groups of 32 divide it
    model = Transformer(args).to(torch.bfloat16).requires_grad_(False)
    quantization = Quantization.parse(quantize)
    for layers in model.matrices():
        rows = [layer.local_shape[0] for layer in layers]
        matrix = make_matrix(sum(rows), layers[0].local_shape[1], *[torch.bfloat16] * 2, meta, quantization)
        matrix.finish_()
        for index, layer in enumerate(layers):
            layer.hold(matrix, sum(rows[:index]))
    return model, KVCache.allocate(args, rows=4, max_seq_len=600, dtype=held, device=meta)


@pytest.mark.parametrize("held", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_step_does_nothing_that_a_cuda_graph_cannot_hold(quantize: str | None, held: torch.dtype) -> None:
    model, cache = meta_model(quantize, held)
    with Log() as log:
        DecodeGraphs(model, cache, run_plainly).prepare()
    assert len(log.calls) > 500
    waiting = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "unique", "is_nonzero", "item", "equal")
    for operation, args, kwargs, result in log.calls:
        assert not any(name in str(operation) for name in waiting), operation
        assert {tensor.device.type for tensor in tensors((args, kwargs, result))} == {"meta"}, operation
        if "index" in str(operation):
            assert not any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors(args[1])), operation


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_plan_counts_at_least_the_kernels_of_a_step(quantize: str | None) -> None:
    model, cache = meta_model(quantize)
    ids = torch.zeros(4, 1, dtype=torch.int64, device="meta")
    with torch.no_grad(), Log() as log:  # where operations show their parts
        score_tokens(model, ids, ids, cache)
    aliases = [[value.alias_info for value in operation._schema.returns] for operation, *_ in log.calls]
    kernels = sum(all(alias is None or alias.is_write for alias in found) for found in aliases)  # the others are views
    runtime = RuntimeArgs(max_seq_len=600)
    alone, recorded = (
        plan_budget(model.args, runtime, 1, 2, None, Quantization.parse(quantize), graphs).workspace
        for graphs in (1, 2)
    )
    planned = (recorded - alone) // GRAPH_NODE_BYTES
    assert 100 < kernels <= planned < 3 * kernels


def test_freeing_lets_go_of_the_recorded_steps_before_the_weights() -> None:
    own = tiny.whole_model(tiny.ARGS, tiny.random_weights(tiny.ARGS))
    devices: list[str] = []

    class Recorded:
        def __init__(self, step: Callable[[], object]) -> None:
            self.step = step

        def __call__(self) -> None:
            self.step()

        def __del__(self) -> None:
            devices.append(own.norm.weight.device.type)

    runner = make_runner(own, filled_cache(1, 16), Recorded)
    run_one(runner, one_token(0, [1], [0]))
    runner.free()
    gc.collect()
    assert devices == ["cpu"]
    assert own.norm.weight.device.type == "meta"


def test_how_to_decode_is_chosen_by_what_can_be_recorded() -> None:
    gpu, alone, two = torch.device("cuda", 0), Parallel(), Parallel(size=2)
    assert choose_decode(None, CPU, alone, dense=True) == "eager"
    assert choose_decode(None, gpu, alone, dense=False) == "eager"  # until a GPU has run them
    assert choose_decode("graph", gpu, alone, dense=False) == "graph"
    assert choose_decode("eager", gpu, alone, dense=True) == "eager"
    assert choose_decode("compile", gpu, alone, dense=False) == "compile"
    with pytest.raises(ValueError, match="decode is 'graph', but cpu has no CUDA graphs"):
        choose_decode("graph", CPU, alone, dense=True)
    with pytest.raises(ValueError, match="packed weights cannot be compiled"):
        choose_decode("compile", CPU, alone, dense=False)
    with pytest.raises(ParallelSizeError, match="decode is 'compile' on 2 ranks"):
        choose_decode("compile", gpu, two, dense=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        through_gloo = replace(two, group=dist.group.WORLD)
        assert choose_decode(None, gpu, through_gloo, dense=True) == "eager"
        with pytest.raises(ParallelSizeError, match="talk through gloo"):
            choose_decode("graph", gpu, through_gloo, dense=True)
    finally:
        dist.destroy_process_group()


def test_a_wrong_choice_is_told_before_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no CUDA graphs"):
        Llama.build(tmp_path / "nothing", device="cpu", decode="graph")
    with pytest.raises(ValueError, match="packed weights"):
        Llama.build(tmp_path / "nothing", device="cpu", decode="compile", quantize="int8")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile imports it by itself
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler, which torch.compile needs")
def test_a_compiled_step_is_an_eager_one(tmp_path: Path) -> None:
    args = replace(tiny.ARGS, n_layers=1)
    folder = tiny.tiny_checkpoint(tmp_path, args=args)
    found, compiled = [], counters["stats"]["unique_graphs"]
    for decode in ("eager", "compile"):
        with Llama.build(folder, None, 64, 1, dtype="float32", device="cpu", decode=decode) as llama:
            graphs = llama.engine._runner.graphs
            found.append(llama.generate([[1, 5, 7], [1, 9]], 12, temperature=0, logprobs=True, stop_token=-1))
    assert graphs.captures == 1  # one shape, whatever the number of steps
    assert counters["stats"]["unique_graphs"] == compiled + 1
    (tokens, scores), (compiled_tokens, compiled_scores) = found
    assert compiled_tokens == tokens
    for one, other in zip(scores, compiled_scores, strict=True):
        assert other == pytest.approx(one, abs=1e-4)
