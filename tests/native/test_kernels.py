"""Products with packed weights against the dense products of what they stand for."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from codellama.native.build import AVX2, AVX512, UnavailableError, cpu_features, instruction_sets, load_library
from codellama.native.kernels import Kernels

# Outputs that fill no register, inputs in odd multiples of a group, and one of a model's size.
SHAPES = [(1, 32, 32), (33, 96, 32), (50, 320, 64), (17, 384, 128), (520, 2048, 32)]


@pytest.fixture(scope="module", params=["avx512 bf16", "avx512", "avx2"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The kernels of each variant that this CPU can run."""
    flags = {"avx512 bf16": (*AVX512, "-mavx512bf16"), "avx512": AVX512, "avx2": AVX2}[request.param]
    try:
        if not set(flags) <= set(instruction_sets(cpu_features())):
            pytest.skip(f"this CPU has no {request.param}")
        return Kernels(load_library(flags))
    except UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rounded(x: Tensor) -> Tensor:
    """The activations that the kernels multiply: signed bytes with a scale for each 32, in float64."""
    groups = x.float().unflatten(1, (-1, 32))
    top = groups.abs().amax(2, keepdim=True)
    codes = (groups * torch.where(top > 0, 127 / top, 0)).round()
    return (codes.double() * (top / 127).double()).flatten(1)


class Int4:
    """A random 4-bit matrix, packed, and what it stands for."""

    def __init__(self, kernels: Kernels, n: int, k: int, group: int) -> None:
        generator = torch.Generator().manual_seed(n)
        codes = torch.randint(16, (n, k), generator=generator, dtype=torch.uint8)
        scales = torch.rand(n, k // group, generator=generator).bfloat16() / 8 + 0.01
        zeros = torch.randn(n, k // group, generator=generator).bfloat16() / 8
        self.scaled = (codes.float() - 8) * scales.float().repeat_interleave(group, 1)
        self.zeros = zeros.float().repeat_interleave(group, 1)
        self.dense = self.scaled + self.zeros
        self.packed = kernels.pack_int4(codes[:, 0::2] | codes[:, 1::2] << 4, scales, zeros)
        self.kernels, self.n, self.group = kernels, n, group

    def linear(self, x: Tensor) -> Tensor:
        return self.kernels.int4_linear(x, self.packed, self.n, self.group)

    def unpack(self, out: Tensor, start: int = 0) -> Tensor:
        return self.kernels.unpack_int4(self.packed, self.n, self.group, out, start)

    def terms(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What `linear` multiplies and adds up: a zero multiplies activations as they are."""
        return [(rounded(x), self.scaled.double()), (x.double(), self.zeros.double())]


class Int8:
    """A random 8-bit matrix, packed, and what it stands for."""

    def __init__(self, kernels: Kernels, n: int, k: int, group: int) -> None:
        generator = torch.Generator().manual_seed(n)
        codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
        self.scales = torch.rand(n, generator=generator) / 127 + 1e-4
        self.dense = codes.float() * self.scales[:, None]
        self.packed = kernels.pack_int8(codes)
        self.kernels = kernels

    def linear(self, x: Tensor) -> Tensor:
        return self.kernels.int8_linear(x, self.packed, self.scales)

    def unpack(self, out: Tensor, start: int = 0) -> Tensor:
        return self.kernels.unpack_int8(self.packed, self.scales, out, start)

    def terms(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What `linear` multiplies and adds up."""
        return [(rounded(x), self.dense.double())]


def activations(rows: int, k: int) -> Tensor:
    """Rows of sizes 0.1 to 10, one of them 0, and a few very large values."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(rows, k, generator=generator) * torch.logspace(-1, 1, rows)[:, None]
    x[:, 5] *= 100
    x[rows // 2] = 0
    return x


matrices = pytest.mark.parametrize("kind", [Int4, Int8])
shapes = pytest.mark.parametrize("shape", SHAPES)


@matrices
@shapes
def test_unpacking_gives_the_weights(kernels: Kernels, kind: type[Int4 | Int8], shape: tuple[int, int, int]) -> None:
    matrix = kind(kernels, *shape)
    assert torch.equal(matrix.unpack(torch.empty_like(matrix.dense)), matrix.dense)
    half = matrix.dense.bfloat16()
    assert torch.equal(matrix.unpack(torch.empty_like(half)), half)
    start, stop = shape[0] // 3, shape[0] - shape[0] // 4
    assert torch.equal(matrix.unpack(torch.empty_like(half[start:stop]), start), half[start:stop])


@matrices
@shapes
def test_a_product_is_the_dense_one(kernels: Kernels, kind: type[Int4 | Int8], shape: tuple[int, int, int]) -> None:
    matrix = kind(kernels, *shape)
    x = activations(19, shape[1])
    found = matrix.linear(x)
    exact = sum(a @ b.T for a, b in matrix.terms(x))
    sizes = sum(a.abs() @ b.abs().T for a, b in matrix.terms(x))
    assert float(((found - exact).abs() / sizes.clamp(min=1e-9)).max()) < 1e-6
    assert torch.equal(found[9], torch.zeros(shape[0]))
    half = x.bfloat16()
    assert torch.equal(matrix.linear(half), matrix.linear(half.float()).bfloat16())


@matrices
def test_rounding_of_activations_costs_little(kernels: Kernels, kind: type[Int4 | Int8]) -> None:
    matrix = kind(kernels, 520, 2048, 32)
    x = torch.randn(8, 2048, generator=torch.Generator().manual_seed(0))
    dense = x.double() @ matrix.dense.double().T
    assert float((matrix.linear(x) - dense).norm() / dense.norm()) < 0.008


@matrices
@shapes
@pytest.mark.usefixtures("threads")
def test_a_row_does_not_see_its_neighbours(
    kernels: Kernels, kind: type[Int4 | Int8], shape: tuple[int, int, int]
) -> None:
    matrix = kind(kernels, *shape)
    x = activations(17, shape[1])
    torch.set_num_threads(1)
    alone = torch.cat([matrix.linear(row[None]) for row in x])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in range(1, 18):
            assert torch.equal(matrix.linear(x[:rows]), alone[:rows])
            assert torch.equal(matrix.linear(x[17 - rows :]), alone[17 - rows :])


@matrices
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_seen(kernels: Kernels, kind: type[Int4 | Int8], bad: float) -> None:
    matrix = kind(kernels, 33, 96, 32)
    x = activations(3, 96)
    good = matrix.linear(x)
    x[1, 40] = bad
    found = matrix.linear(x)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], good[[0, 2]])


def test_a_group_costs_what_was_promised(kernels: Kernels) -> None:
    matrix = Int4(kernels, 520, 2048, 32)
    assert matrix.packed.nbytes <= 528 * 2048 * 5 / 8


def test_codes_have_a_sign(kernels: Kernels) -> None:
    with pytest.raises(AssertionError):
        kernels.pack_int8(torch.full((1, 32), -128, dtype=torch.int8))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("shape", [(37, 96), (64, 2080)])
def test_a_16_bit_product_is_the_dense_one(kernels: Kernels, rows: int, shape: tuple[int, int]) -> None:
    """Products are exact in float32; sums are of 64 partial ones. A row's bits are its own."""
    n, k = shape
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1)).bfloat16()
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = kernels.bf16_linear(x, weight)
    exact, sizes = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert float(((found.double() - exact).abs() - exact.abs() / 256).div(sizes).max()) < 1e-6
    alone = torch.cat([kernels.bf16_linear(row[None], weight) for row in x])
    assert torch.equal(found, alone)
