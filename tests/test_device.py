"""Devices and dtypes are chosen when asked, not at import, and a wish that cannot be met is an error."""

import pytest
import torch

from codellama.device import choose_device, choose_dtype, free_memory


def test_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None) == torch.device("cpu")


def test_a_rank_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(None) == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="every rank on one GPU"):
        choose_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="rank 2 of this host needs GPU 2, but 2 are visible"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
)
def test_bfloat16_on_a_cpu_that_computes_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype(None, torch.device("cpu")) == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_half_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch, supported: bool, expected: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert choose_dtype(None, torch.device("cuda", 0)) == expected


def test_what_is_asked_for_is_taken_or_refused() -> None:
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16
    assert choose_dtype(torch.float32, torch.device("cuda", 0)) == torch.float32
    with pytest.raises(ValueError, match="dtype is 'fp16'; one of bfloat16, float16, float32"):
        choose_dtype("fp16", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        choose_dtype(torch.int8, torch.device("cpu"))
    with pytest.raises(ValueError, match="cpu and cuda are supported"):
        choose_device("mps")


def test_free_memory_of_the_host_is_positive() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is not None
    assert free > 0
