import pytest

from codellama.errors import QuantizationError
from codellama.quantization import Quantization


def test_names() -> None:
    names = ["int8", "int4", "int4-g64", "int4-g128"]
    parsed = [Quantization.parse(name) for name in names]
    assert parsed == [Quantization("int8"), *(Quantization("int4", group) for group in (32, 64, 128))]
    assert [str(one) for one in parsed] == names
    assert Quantization.parse("int4-g32") == Quantization.parse("int4")
    assert Quantization.parse(None) is None


@pytest.mark.parametrize("text", ["int3", "int4-g16", "int4-g", "INT8", "", "int8-g32", 8, True])
def test_other_names_are_refused(text: object) -> None:
    with pytest.raises(QuantizationError, match="one of int8, int4, int4-g64, int4-g128 was expected"):
        Quantization.parse(text)  # type: ignore[arg-type]


def test_groups_divide_the_input() -> None:
    Quantization("int4", 64).check({"wq": 128, "w2": 192})
    Quantization("int8").check({"wq": 13})
    with pytest.raises(QuantizationError, match=r"groups of 128 do not divide w2 \(192 inputs\), wo \(64 inputs\)"):
        Quantization("int4", 128).check({"wq": 256, "w2": 192, "wo": 64})


def test_bytes() -> None:
    assert Quantization("int8").nbytes(10, 64) == 10 * 64 + 10 * 4
    assert Quantization("int4", 32).nbytes(10, 64) == 10 * 32 + 10 * 2 * 4
