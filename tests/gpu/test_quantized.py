"""Quantized matrices on a GPU: our products for few rows, and the dense one of the unpacked matrix for many."""

import pytest
import torch

from codellama.linear import make_matrix
from codellama.quantization import Quantization

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use"),
]

BOUND = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}
"""Half of the last bit of a result, and sums in another order."""


@pytest.mark.parametrize("name", ["int8", "int4", "int4-g64", "int4-g128"])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 100])
def test_products_are_those_of_the_numbers_held(name: str, dtype: torch.dtype, rows: int) -> None:
    n, k = 75, 384
    torch.manual_seed(0)
    weight = torch.randn(n, k) * torch.logspace(-2, 1, n)[:, None]
    matrix = make_matrix(n, k, dtype, dtype, torch.device("cuda"), Quantization.parse(name))
    matrix.put_(0, weight)
    matrix.finish_()
    x = torch.randn(rows, k, device="cuda").to(dtype)
    exact = x.double() @ matrix.dense().double().T
    sizes = x.double().norm(dim=1)[:, None] * matrix.dense().double().norm(dim=1)
    assert float(((matrix(x).double() - exact).abs() / sizes).max()) < BOUND[dtype]


def test_quantizing_on_the_gpu_gives_the_codes_of_the_cpu() -> None:
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    for name in ("int8", "int4"):
        found = []
        for device in ("cpu", "cuda"):
            matrix = make_matrix(40, 128, torch.float32, torch.float32, torch.device(device), Quantization.parse(name))
            matrix.put_(0, weight)
            found.append(matrix.dense().cpu())
        assert torch.equal(*found)
