"""The benchmark of quality, on one file: what quantization costs and saves is within what the documentation says."""

import json

import pytest

from benchmarks.quality import quality


def test_the_cost_of_quantization(capsys: pytest.CaptureFixture[str]) -> None:
    quality(files=1, quantize="int8,int4,int4-g128")
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    plain, int8, int4 = line["rows"]
    assert [plain["weights"], int8["weights"], int4["weights"]] == ["float32", "int8", "int4"]
    assert plain["change"] == 0
    assert abs(int8["change"]) < 0.005 < int4["change"] < 0.06
    assert int8["matrices_by_16_bit"] < 0.55
    assert int4["matrices_by_16_bit"] < 0.38
    assert "groups of 128 do not divide" in line["arguments"]["refused"]["int4-g128"]
