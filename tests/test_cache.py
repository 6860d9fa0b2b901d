"""Rung 2 of the parity ladder: the cache is right."""

import pytest
import torch
from torch import Tensor

from codellama.cache import KVCache, Slots
from codellama.model import Transformer
from tests.support import tiny
from tests.support.oracle import oracle_logits

LENGTH = 40


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny.whole_model(tiny.ARGS, tiny.random_weights(tiny.ARGS))


def new_cache(rows: int = 5, max_seq_len: int = 64, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache.allocate(tiny.ARGS, rows=rows, max_seq_len=max_seq_len, dtype=dtype, device=torch.device("cpu"))


def ids_of(seed: int) -> list[int]:
    return torch.randint(tiny.VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def run(model: Transformer, cache: KVCache, row: int, ids: list[int], chunks: list[int]) -> Tensor:
    """Logits of all positions, computed chunk by chunk in one row of a cache."""
    logits, done = [], 0
    for size in chunks:
        tokens = torch.tensor([ids[done : done + size]])
        positions = torch.arange(done, done + size)[None]
        view = cache.rows(row, row + 1).first(done + size)
        logits.append(model.logits(model(tokens, positions, view))[0])
        done += size
    assert done == len(ids)
    return torch.cat(logits)


@pytest.mark.parametrize(
    "chunks", [[LENGTH], [1] * LENGTH, [17, 1, 1, 21], [1, 39], [39, 1], [8] * 5], ids=lambda chunks: f"{len(chunks)}"
)
def test_chunks_through_the_cache_equal_one_dense_pass(model: Transformer, chunks: list[int]) -> None:
    ids = ids_of(1)
    expected = oracle_logits(tiny.ARGS, tiny.random_weights(tiny.ARGS), ids)
    difference = (run(model, new_cache(), 3, ids, chunks) - expected).abs().max()
    assert difference < 3e-5


@torch.inference_mode()
def test_ragged_rows_decode_together_as_they_do_alone(model: Transformer) -> None:
    cache, lengths = new_cache(), [7, 30, 19]
    texts = [ids_of(seed) for seed in (2, 3, 4)]
    for row, (ids, length) in enumerate(zip(texts, lengths, strict=True), start=1):
        run(model, cache, row, ids[:length], [length])
    tokens = torch.tensor([[ids[length]] for ids, length in zip(texts, lengths, strict=True)])
    view = cache.rows(1, 4).first(max(lengths) + 1)
    logits = model.logits(model(tokens, torch.tensor(lengths)[:, None], view))[:, 0]
    weights = tiny.random_weights(tiny.ARGS)
    for row, (ids, length) in enumerate(zip(texts, lengths, strict=True)):
        expected = oracle_logits(tiny.ARGS, weights, ids[: length + 1])[-1]
        assert (logits[row] - expected).abs().max() < 3e-5


@torch.inference_mode()
def test_a_row_reads_nothing_of_what_it_held_before(model: Transformer) -> None:
    cache = new_cache()
    run(model, cache, 0, ids_of(5), [LENGTH])
    again = run(model, cache, 0, ids_of(6)[:9], [4, 5])
    fresh = run(model, new_cache(), 0, ids_of(6)[:9], [4, 5])
    assert torch.equal(again, fresh)


def test_views_share_memory_and_writes_stay_in_their_place() -> None:
    cache = new_cache(rows=4, max_seq_len=16)
    key = torch.randn(2, 3, tiny.ARGS.kv_heads, tiny.ARGS.head_dim)
    positions = torch.tensor([[2, 3, 4], [9, 10, 11]])
    cache.rows(1, 3).first(12).write_(1, Slots.find(positions), key, -key)
    for row in range(2):
        for step in range(3):
            place = cache.keys[1][row + 1, :, int(positions[row, step])]
            assert torch.equal(place, key[row, step])
            assert torch.equal(cache.values[1][row + 1, :, int(positions[row, step])], -key[row, step])
    written = sum(int(tensor.count_nonzero()) for tensor in (*cache.keys, *cache.values))
    assert written == 2 * key.numel()
    cache.zero_()
    assert not any(tensor.any() for tensor in (*cache.keys, *cache.values))


@torch.inference_mode()
def test_a_copied_row_goes_on_as_its_source(model: Transformer) -> None:
    cache, ids = new_cache(), ids_of(7)
    run(model, cache, 1, ids, [LENGTH])
    run(model, cache, 3, ids[:9], [9])
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    cache.copy_row_(1, 3, 25, start=9)
    for tensor, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(tensor[3, :, 9:25], tensor[1, :, 9:25])
        tensor[3, :, 9:25] = old[3, :, 9:25]
        assert torch.equal(tensor, old), "nothing else has changed"
    cache.copy_row_(1, 4, 25)
    tokens, positions = torch.tensor([ids[25:]]), torch.arange(25, LENGTH)[None]
    view = cache.first(LENGTH)
    assert torch.equal(model(tokens, positions, view.rows(4, 5)), model(tokens, positions, view.rows(1, 2)))


@pytest.mark.parametrize(
    "positions",
    [
        [[4, 5, 6], [4, 5, 6], [4, 5, 6]],
        [[4, 5, 6], [9, -1, -1], [-1, -1, -1]],
        [[4, 5, -1], [4, 5, -1], [4, 5, -1]],
        [[4], [4], [4]],
        [[4], [-1], [11]],
        [[-1], [-1], [3]],
    ],
)
def test_tokens_are_written_at_their_positions_and_nowhere_else(positions: list[list[int]]) -> None:
    check_written(positions, Slots.find(torch.tensor(positions)))


@pytest.mark.parametrize("positions", [[[4], [4], [4]], [[4], [-1], [11]], [[-1], [-1], [3]]])
def test_the_device_writes_the_same(positions: list[list[int]]) -> None:
    check_written(positions, Slots.on_device(torch.tensor(positions)))


def check_written(positions: list[list[int]], slots: Slots) -> None:
    width = len(positions[0])
    cache = new_cache(rows=5, max_seq_len=16)
    expected = torch.randn(cache.keys[1].shape, generator=torch.Generator().manual_seed(1))
    cache.keys[1].copy_(expected)
    key = torch.randn(3, width, tiny.ARGS.kv_heads, tiny.ARGS.head_dim)
    cache.rows(1, 4).first(12).write_(1, slots, key, -key)
    for row, line in enumerate(positions):
        for step, position in enumerate(line):
            if position >= 0:
                expected[row + 1, :, position] = key[row, step]
    assert torch.equal(cache.keys[1], expected)
    written = sum(position >= 0 for line in positions for position in line)
    assert int(cache.values[1].count_nonzero()) == written * key[0, 0].numel()


@torch.inference_mode()
def test_an_int8_cache_rounds_each_vector_by_itself() -> None:
    cache = new_cache(dtype=torch.int8)
    sizes = torch.logspace(-30, 3, 64)[None, :, None, None]  # of which the smallest square to 0
    key = torch.randn(1, 64, tiny.ARGS.kv_heads, tiny.ARGS.head_dim, generator=torch.Generator().manual_seed(4)) * sizes
    key[0, 7] = 0
    cache.rows(2, 3).write_(1, Slots.find(torch.arange(64)[None]), key, -key)
    everything = slice(None)
    where = (1, slice(2, 3), everything, everything, torch.float32)
    keys, values = cache.read_keys(*where), cache.read_values(*where)
    wanted = key.transpose(1, 2)
    largest = wanted.abs().amax(dim=-1, keepdim=True)
    assert ((keys - wanted).abs() <= 0.51 * largest / 127).all(), "half a step"
    assert torch.equal(values, -keys)
    assert cache.nbytes == 2 * 3 * 5 * 64 * tiny.ARGS.kv_heads * (tiny.ARGS.head_dim + 4)


@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [17, 1, 1, 21]], ids=lambda chunks: f"{len(chunks)}")
def test_an_int8_cache_costs_little_accuracy(model: Transformer, chunks: list[int]) -> None:
    ids = ids_of(1)
    expected = oracle_logits(tiny.ARGS, tiny.random_weights(tiny.ARGS), ids)
    difference = (run(model, new_cache(dtype=torch.int8), 3, ids, chunks) - expected).abs()
    assert difference.max() < 0.3
    assert difference.mean() < 0.03


@torch.inference_mode()
def test_rows_of_an_int8_cache_are_copied_and_forgotten(model: Transformer) -> None:
    cache, ids = new_cache(dtype=torch.int8), ids_of(7)
    run(model, cache, 1, ids, [LENGTH])
    cache.copy_row_(1, 4, 25)
    tokens, positions = torch.tensor([ids[25:]]), torch.arange(25, LENGTH)[None]
    view = cache.first(LENGTH)
    assert torch.equal(model(tokens, positions, view.rows(4, 5)), model(tokens, positions, view.rows(1, 2)))
    cache.zero_()
    everything = slice(None)
    for layer in range(tiny.ARGS.n_layers):
        where = (layer, everything, everything, everything, torch.float32)
        assert not cache.read_keys(*where).any()
        assert not cache.read_values(*where).any()
