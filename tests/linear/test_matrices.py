"""Every way to hold a matrix, against the dense product of what it holds."""

import pytest
import torch
from torch import Tensor

from codellama.device import packs_half
from codellama.linear import Dense, Int4, Int8, Matrix, PackedHalf, make_matrix
from codellama.linear.int4 import quantize_int4, unpack_int4
from codellama.quantization import Quantization

CPU = torch.device("cpu")
N, K = 75, 128 * 3
KINDS = ["int8", "int4", "int4-g64", "int4-g128"]


def weight(seed: int = 0) -> Tensor:
    """Rows of very different sizes, so that a scale of another row would show."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=random) * torch.logspace(-2, 1, N)[:, None]


def filled(matrix: Matrix, rows: Tensor) -> Matrix:
    """Put the rows in two pieces, as layers that share a matrix do."""
    matrix.put_(0, rows[:50])
    matrix.put_(50, rows[50:])
    matrix.finish_()
    return matrix


def error(y: Tensor, x: Tensor, w: Tensor) -> float:
    """Largest error of a product, in parts of the lengths of both vectors."""
    x, w = x.double(), w.double()
    return float(((y - x @ w.T).abs() / (x.norm(dim=1)[:, None] * w.norm(dim=1))).max())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 7, 16, 33, 200])
def test_quantized_products(name: str, compute: torch.dtype, count: int) -> None:
    """The product is that of the numbers held, whichever kernel is taken for so many rows of activations."""
    matrix = filled(make_matrix(N, K, compute, compute, CPU, Quantization.parse(name)), weight())
    x = torch.randn(1, count, K, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, count)[:, None]
    y = matrix(x.to(compute))
    assert (y.shape, y.dtype) == ((1, count, N), compute)
    # Our kernels round activations to eight bits, half a step of which is 1/254 of the largest of a
    # group; a result in bfloat16 is off by 1/512. Both are spread over K inputs.
    assert error(y[0], x.to(compute)[0], matrix.dense()) < (
        2e-3 if compute == torch.bfloat16 or count <= matrix._few else 1e-6
    )


@pytest.mark.parametrize(
    ("name", "bound"), [("int8", 0.011), ("int4", 0.076), ("int4-g64", 0.088), ("int4-g128", 0.097)]
)
def test_the_error_of_rounding(name: str, bound: float) -> None:
    """On Gaussian weights; 0.078, 0.09 and 0.1 for int4 would be that of steps over the whole range of a group."""
    rows = weight()
    matrix = filled(make_matrix(N, K, torch.float32, torch.float32, CPU, Quantization.parse(name)), rows)
    relative = (matrix.dense() - rows).norm(dim=1) / rows.norm(dim=1)
    assert bound / 2 < relative.mean() < bound


@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_what_was_planned(name: str) -> None:
    quantization = Quantization.parse(name)
    matrix = filled(make_matrix(N, K, torch.bfloat16, torch.bfloat16, CPU, quantization), weight())
    assert quantization.nbytes(N, K) <= matrix.nbytes <= quantization.nbytes(80, K)  # kernels may fill up registers


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("value", [0.0, 3.0, -0.5])
def test_a_row_of_equal_numbers(name: str, value: float) -> None:
    matrix = make_matrix(2, K, torch.float32, torch.float32, CPU, Quantization.parse(name))
    matrix.put_(0, torch.stack([torch.full((K,), value), torch.randn(K)]))
    matrix.finish_()
    assert torch.allclose(matrix.dense()[0], torch.tensor(value), rtol=1e-2)
    assert matrix(torch.ones(1, K)).isfinite().all()


def test_codes_are_the_nearest_ones() -> None:
    """No other code of its group, or of its row, is nearer to a number."""
    rows = weight()[:9]
    for name in ("int8", "int4"):
        matrix = make_matrix(9, K, torch.float32, torch.float32, CPU, Quantization.parse(name))
        matrix.put_(0, rows)
        if isinstance(matrix, Int8):
            levels = torch.arange(-127.0, 128)[:, None, None] * matrix.scales[:, None]
        else:
            assert isinstance(matrix, Int4)
            scales, zeros = (part.float().repeat_interleave(32, dim=1) for part in (matrix.scales, matrix.zeros))
            levels = torch.arange(-8.0, 8)[:, None, None] * scales + zeros
        nearest = (levels - rows).abs().amin(dim=0)
        size = rows.abs().amax(dim=1, keepdim=True)
        assert ((matrix.dense() - rows).abs() - nearest <= 1e-6 * size).all()  # of two that are as near, either


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_group_is_rounded_by_its_own_numbers(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bits in pieces of any size, and in parts of a row, which is what other ranks hold."""
    rows = weight()
    whole = quantize_int4(rows, group)
    parts = [quantize_int4(rows[:, start : start + 128], group) for start in range(0, K, 128)]
    for together, *apart in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(apart, dim=1), together)
    for together, alone in zip(whole, quantize_int4(rows[7:8], group), strict=True):
        assert torch.equal(together[7:8], alone)
    monkeypatch.setattr("codellama.linear.int4.PIECE", group)
    assert all(map(torch.equal, quantize_int4(rows, group), whole))


def test_a_narrower_range_is_taken_where_it_is_nearer() -> None:
    """Against sixteen steps over the whole range of a group; an outlier cannot be cut where it costs more."""
    rows = torch.randn(200, 32, generator=torch.Generator().manual_seed(3))
    rows[0, 5] = 40.0
    codes, scales, zeros = quantize_int4(rows, 32)
    found = (unpack_int4(codes, scales, zeros, torch.float32) - rows).square().sum(dim=1)
    low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    step = (high - low) / 15
    plain = (low + ((rows - low) / step).round() * step - rows).square().sum(dim=1)
    assert (found <= plain * 1.03).all()  # scales and zeros are bfloat16
    assert found[1:].sum() < 0.92 * plain[1:].sum()


@pytest.mark.skipif(not packs_half(), reason="PyTorch has no fbgemm here")
@pytest.mark.parametrize("count", [1, 2, 8, 100])
def test_packed_half(count: int) -> None:
    matrix = filled(PackedHalf(N, K, torch.float32), weight())
    assert torch.equal(matrix.dense(), weight().half().float())
    assert torch.equal(matrix.dense(20, 60), weight()[20:60].half().float())
    assert matrix.nbytes == 2 * N * K
    x = torch.randn(3, count, K, generator=torch.Generator().manual_seed(1))
    assert error(matrix(x)[1], x[1], matrix.dense()) < 1e-6


def test_dense_rows_are_views() -> None:
    matrix = filled(Dense(N, K, torch.bfloat16, CPU), weight())
    matrix.dense(10, 20).zero_()
    assert torch.equal(matrix.weight[20:], weight()[20:].bfloat16())
    assert not matrix.weight[10:20].any()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9])
def test_a_kernel_of_our_own_for_bfloat16(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A row has the same bits whatever rows stand beside it, up to as many as go through our kernel."""
    monkeypatch.setattr("codellama.linear.dense.LARGE", 0)
    matrix = filled(Dense(N, K, torch.bfloat16, CPU), weight())
    x = torch.randn(count, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = matrix(x)
    assert error(y, x, matrix.dense()) < 2e-3
    if 1 < count <= matrix._few:
        assert torch.equal(torch.cat([matrix(row[None]) for row in x]), y)


@pytest.mark.parametrize("name", [None, *KINDS])
def test_a_row_of_activations_depends_on_itself_alone(name: str | None) -> None:
    """Neighbours may change the kernel, and with it the last bits, but never by what they hold."""
    matrix = filled(make_matrix(N, K, torch.float32, torch.float32, CPU, Quantization.parse(name)), weight())
    random = torch.Generator().manual_seed(2)
    one = torch.randn(1, K, generator=random)
    for count in (2, 5, 8, 40):
        small, large = (torch.randn(count, K, generator=random) * size for size in (0.01, 1000.0))
        small[1], large[1] = one[0], one[0]
        assert torch.equal(matrix(small)[1], matrix(large)[1])
