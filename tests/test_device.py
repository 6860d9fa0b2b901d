"""Devices and dtypes are chosen when asked, not at import, and a wish that cannot be met is an error."""

from collections.abc import Callable

import pytest
import torch

from codellama.device import choose_device, choose_dtype, compute_dtype, free_memory, use_device
from codellama.errors import RankError
from codellama.parallel import refuse_shared_gpus


def test_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None) == torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend that so many GPUs are visible; the current one is the last."""

    def show(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: count - 1)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return show


def test_a_rank_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch, gpus: Callable[[int], None]) -> None:
    gpus(4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for wish in (None, "cuda", "cuda:1", 1, torch.device("cuda", 1)):
        assert choose_device(wish) == torch.device("cuda", 1), wish
    assert choose_device("cuda:3") == torch.device("cuda", 3), "ranks may use other GPUs than the first ones"
    assert choose_device(0) == torch.device("cuda", 0)
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="rank 4 of this host needs GPU 4, but 4 are visible"):
        choose_device("cuda")


def test_a_launcher_may_show_each_rank_its_own_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, gpus: Callable[[int], None]
) -> None:
    gpus(1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(None) == choose_device("cuda:0") == torch.device("cuda", 0)


def test_without_a_launcher_the_current_gpu_is_taken(gpus: Callable[[int], None]) -> None:
    gpus(3)
    assert choose_device(None) == choose_device("cuda") == torch.device("cuda", 2)
    assert choose_device(0) == torch.device("cuda", 0)


def test_a_gpu_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    use_device(torch.device("cpu"))
    use_device(torch.device("cuda", 2))
    assert made == [torch.device("cuda", 2)]


def test_ranks_that_share_a_gpu_are_refused() -> None:
    refuse_shared_gpus([("a", "x"), ("a", "y"), ("b", "x")])
    with pytest.raises(RankError, match="ranks 1 and 2 both use GPU y of a"):
        refuse_shared_gpus([("a", "x"), ("a", "y"), ("a", "y")])


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float16)],
)
def test_bfloat16_on_a_cpu_that_computes_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype(None, torch.device("cpu")) == expected
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")  # such as ARM has: nothing packs float16 there
    without = torch.float32 if expected == torch.float16 else expected
    assert choose_dtype(None, torch.device("cpu")) == without
    assert compute_dtype(torch.float16, torch.device("cpu")) == torch.float16


@pytest.mark.parametrize(
    ("held", "device", "expected"),
    [
        ("float16", "cpu", "float32"),
        ("bfloat16", "cpu", "bfloat16"),
        ("float32", "cpu", "float32"),
        ("float16", "cuda", "float16"),
    ],
)
def test_float16_is_multiplied_in_float32_on_a_cpu(held: str, device: str, expected: str) -> None:
    assert compute_dtype(getattr(torch, held), torch.device(device)) == getattr(torch, expected)


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
