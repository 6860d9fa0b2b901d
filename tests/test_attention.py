"""Rung 5 of the parity ladder: attention, as it is planned, is attention as it is defined."""

import math

import pytest
import torch
from torch import Tensor

from codellama.attention import AttentionPlan, _partial_on_gpu, rotary_angles, rotate, turn
from codellama.cache import KVCache
from codellama.config import ModelArgs
from tests.support import tiny

HEADS, HEAD_DIM, ROWS, LENGTH = 6, 4, 3, 150


def test_rotation_is_exact_far_out() -> None:
    position, head_dim, theta = 100_000, 8, 1e6
    cos, sin = rotary_angles(torch.tensor([[position]]), head_dim, theta)
    x = torch.arange(1.0, head_dim + 1).view(1, 1, 1, head_dim)
    turned = rotate(x, cos, sin).flatten().tolist()
    for pair in range(head_dim // 2):
        angle = torch.tensor(position * theta ** (-2 * pair / head_dim), dtype=torch.float64)
        a, b = 2 * pair + 1, 2 * pair + 2
        assert turned[2 * pair] == pytest.approx(float(a * angle.cos() - b * angle.sin()), abs=1e-6)
        assert turned[2 * pair + 1] == pytest.approx(float(a * angle.sin() + b * angle.cos()), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_complex_rotation_has_the_same_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    joint = torch.randn(2, 150, 5, 16, generator=generator).to(dtype)  # such as a joint product of queries and keys
    cos, sin = rotary_angles(torch.arange(300).view(2, 150), 16, 1e4)
    for x in (joint[:, :, 1:4], joint[:, :1, 1:4]):
        width = x.shape[1]
        expected = rotate(x.contiguous(), cos[:, :width], sin[:, :width])
        assert torch.equal(turn(x, torch.complex(cos, sin)[:, :width]), expected)


def definition(query: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
    """One token's attention, `[H, D]` over `[K, S, D]`, in float64."""
    shared = query.shape[0] // keys.shape[0]
    mixed = []
    for head, q in enumerate(query.double()):
        k, v = (held[head // shared, : position + 1].double() for held in (keys, values))
        mixed.append(torch.softmax(k @ q / math.sqrt(q.shape[0]), dim=0) @ v)
    return torch.stack(mixed)


class Case:
    """A cache with content, new tokens at some positions, and what each real one should see and give."""

    def __init__(self, positions: list[list[int]], kv_heads: int, dtype: torch.dtype, held: torch.dtype) -> None:
        self.args = ModelArgs(
            dim=HEADS * HEAD_DIM, n_layers=2, n_heads=HEADS, n_kv_heads=kv_heads, vocab_size=8, rope_theta=1e4
        )
        rows, width = len(positions), len(positions[0])
        generator = torch.Generator().manual_seed(3)
        self.positions = torch.tensor(positions)
        cache = KVCache.allocate(self.args, rows=rows + 2, max_seq_len=LENGTH, dtype=held, device=torch.device("cpu"))
        shape = (rows + 2, kv_heads, LENGTH, HEAD_DIM)
        if held == torch.int8:
            cache.keys[1].random_(-127, 128, generator=generator)
            cache.values[1].random_(-127, 128, generator=generator)
            assert cache.scales is not None
            for scales in cache.scales[1]:
                scales.uniform_(0.001, 0.02, generator=generator)
        else:
            cache.keys[1].copy_(torch.randn(shape, generator=generator))
            cache.values[1].copy_(torch.randn(shape, generator=generator))
        self.view = cache.rows(1, rows + 1)
        self.query = torch.randn(rows, width, HEADS, HEAD_DIM, generator=generator).to(dtype)
        self.key = torch.randn(rows, width, kv_heads, HEAD_DIM, generator=generator).to(dtype)
        self.value = torch.randn(rows, width, kv_heads, HEAD_DIM, generator=generator).to(dtype)

    @torch.inference_mode()
    def error(self, on_device: bool = False) -> float:
        """Largest difference from the definition over the real tokens."""
        plan = AttentionPlan(self.positions, self.args, self.view, on_device)
        mixed = plan.attend(1, self.query, self.key, self.value)
        assert mixed.shape == self.query.shape
        assert mixed.isfinite().all(), "padding too"
        everything = slice(None)
        where = (1, everything, everything, everything, torch.float32)
        keys, values = self.view.read_keys(*where), self.view.read_values(*where)
        worst = 0.0
        for row, line in enumerate(self.positions.tolist()):
            for step, position in enumerate(line):
                if position >= 0:
                    expected = definition(self.query[row, step], keys[row], values[row], position)
                    worst = max(worst, float((mixed[row, step] - expected).abs().max()))
        return worst


def rising(*starts: int, width: int, real: tuple[int, ...] | None = None) -> list[list[int]]:
    """Positions of rows that start here, with -1 behind so many real ones."""
    counts = real or (width,) * len(starts)
    return [
        [start + step if step < count else -1 for step in range(width)]
        for start, count in zip(starts, counts, strict=True)
    ]


STEPS = {
    "from the beginning": rising(0, 0, 0, width=40),
    "from the beginning, ragged": rising(0, 0, 0, width=40, real=(7, 40, 0)),
    "one token each, together": rising(80, 80, 80, width=1),
    "one token each": rising(3, 149, 80, width=1),
    "one token each, some run along": [[80], [-1], [0]],
    "one row": rising(31, width=1),
    "chunks": rising(31, 7, 1, width=70),
    "chunks, ragged": rising(31, 0, 80, width=70, real=(69, 70, 1)),
    "a few tokens": rising(31, 7, 145, width=5, real=(5, 1, 4)),
}


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("small", [0, 2**18])  # one token in each row goes one of two ways
@pytest.mark.parametrize("step", STEPS)
def test_attention_equals_the_definition(step: str, small: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codellama.attention._SMALL_BYTES", small)
    monkeypatch.setattr("codellama.attention.QUERY_TILE", 30)  # several tiles, and a last one that is shorter
    assert Case(STEPS[step], kv_heads, torch.float32, torch.float32).error() < 1e-6


@pytest.mark.parametrize("held", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("small", [0, 2**18])
@pytest.mark.parametrize("step", STEPS)
def test_numbers_are_converted_tile_by_tile(
    step: str, small: int, kv_heads: int, held: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 rounds the result to 2^-9 of it; of an int8 cache the definition reads the same numbers."""
    monkeypatch.setattr("codellama.attention._SMALL_BYTES", small)
    monkeypatch.setattr("codellama.attention.QUERY_TILE", 30)
    monkeypatch.setattr("codellama.attention.READ_BYTES", 2 * HEAD_DIM * 4 * 47)  # 47 positions of a head
    query = torch.float32 if held == torch.int8 else held
    assert Case(STEPS[step], kv_heads, query, held).error() < (1e-6 if held == torch.int8 else 2e-2)


@pytest.mark.parametrize("step", [step for step in STEPS if len(STEPS[step][0]) == 1])
def test_a_plan_on_the_device_equals_the_definition(step: str) -> None:
    for held in (torch.float32, torch.int8):
        assert Case(STEPS[step], 2, torch.float32, held).error(on_device=True) < 1e-6


@torch.inference_mode()
def test_a_ragged_forward_equals_its_rows_alone() -> None:
    """Prompts of different lengths from different places, one of which begins; and a row that runs along."""
    model = tiny.whole_model(tiny.ARGS, tiny.random_weights(tiny.ARGS))
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(tiny.VOCAB, (4, 60), generator=generator)
    starts, counts, width = (20, 0, 33, 7), (17, 25, 1, 0), 25

    def new_cache() -> KVCache:
        cpu = torch.device("cpu")
        cache = KVCache.allocate(tiny.ARGS, rows=4, max_seq_len=64, dtype=torch.float32, device=cpu)
        for row, start in enumerate(starts):
            if start:
                model(ids[row : row + 1, :start], torch.arange(start)[None], cache.rows(row, row + 1))
        return cache

    together, alone = new_cache(), new_cache()
    tokens = torch.zeros(4, width, dtype=torch.int64)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        tokens[row, :count] = ids[row, start : start + count]
    hidden = model(tokens, torch.tensor(rising(*starts, width=width, real=counts)), together.first(45))
    assert hidden.isfinite().all()
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count:
            positions = torch.arange(start, start + count)[None]
            expected = model(ids[row : row + 1, start : start + count], positions, alone.rows(row, row + 1))
            assert (hidden[row, :count] - expected[0]).abs().max() < 1e-5
    for mine, theirs in zip(together.keys, alone.keys, strict=True):
        assert (mine - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 6])
def test_the_kernels_of_a_gpu_are_called_with_what_they_take(dtype: torch.dtype, head_dim: int) -> None:
    """Without a GPU only shapes can be seen."""
    query = torch.empty(1, 3, 10, head_dim, dtype=dtype, device="meta")
    keys = torch.empty(1, 3, 50, head_dim, dtype=dtype, device="meta")
    mixed, weight = _partial_on_gpu(query, keys, keys, causal=False)
    assert mixed.shape == query.shape
    assert weight.shape == (1, 3, 10)
    assert weight.dtype == torch.float32
