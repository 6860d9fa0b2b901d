"""Products for a GPU in Triton's interpreter, where Triton is installed: it comes with PyTorch's CUDA build alone."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

PROGRAM = """
import torch
from codellama.linear.int4 import quantize_int4, unpack_int4
from codellama.linear.int8 import quantize_int8, unpack_int8
from codellama.native.gpu import int4_product, int8_product

torch.manual_seed(0)
worst = 0.0
for dtype in (torch.float32, torch.float16):  # the interpreter cannot multiply bfloat16
    for n, k in ((75, 384), (64, 512), (33, 96)):
        for rows in (1, 3, 16):
            weight, x = torch.randn(n, k) * torch.logspace(-1, 1, n)[:, None], torch.randn(rows, k).to(dtype)
            eight, four = quantize_int8(weight), quantize_int4(weight, 32)
            for y, dense in (
                (int8_product(x, *eight), unpack_int8(*eight, torch.float32)),
                (int4_product(x, *four), unpack_int4(*four, dtype)),
            ):
                exact = x.double() @ dense.double().T
                sizes = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
                worst = max(worst, float(((y - exact).abs() / sizes).max()) / (1 if dtype == torch.float16 else 1e-3))
assert worst < 5e-4, worst
"""


def test_products_are_those_of_the_unpacked_matrix() -> None:
    """In float16 within half of its last bit, in float32 within 5e-7 of the lengths of both vectors."""
    subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True, timeout=200
    )
