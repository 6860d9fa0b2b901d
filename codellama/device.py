"""Which device, which dtype, and how much memory it has free. Nothing is decided at import.

It knows nothing of models.
"""

import os

import torch

from codellama.memory import free_host_memory

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(device: str | int | torch.device | None) -> torch.device:
    """Take the device asked for, or this rank's GPU where there is one, else the CPU.

    This rank's GPU is the one of LOCAL_RANK; the only one, where a launcher shows each rank its own; and without a
    launcher the current one, as torch.cuda.set_device left it.

    Raises:
        ValueError: no such device here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; cpu, cuda or cuda:N was expected") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {chosen}; cpu and cuda are supported")
    if chosen.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"device is {chosen}, but PyTorch finds no GPU here")
    count = torch.cuda.device_count()
    index = _own_gpu(count) if chosen.index is None else chosen.index
    if index >= count:
        rank = os.environ.get("LOCAL_RANK", "0")
        raise ValueError(f"rank {rank} of this host needs GPU {index}, but {count} are visible: start fewer ranks")
    return torch.device("cuda", index)


def _own_gpu(count: int) -> int:
    if "LOCAL_RANK" not in os.environ:
        return torch.cuda.current_device()
    return 0 if count == 1 else int(os.environ["LOCAL_RANK"])


def use_device(device: torch.device) -> None:
    """Make a GPU the current one, before groups and graphs are made: both take the current one for their own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Take the dtype asked for, or the fastest that is safe there: how weights are held.

    bfloat16 has float32's range and half its bytes, so it is taken wherever the hardware computes it. A CPU without it
    emulates it slowly: there weights are float16, packed, and all else is float32 (`compute_dtype`), which is faster
    than float32 weights at any number of rows; where they cannot be packed, float32.

    Raises:
        ValueError: another dtype.
    """
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; one of {', '.join(_DTYPES)} was expected")
        dtype = _DTYPES[dtype]
    if dtype is not None:
        if dtype not in _DTYPES.values():
            raise ValueError(f"dtype is {dtype}; one of {', '.join(_DTYPES)} was expected")
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        return torch.bfloat16
    return torch.float16 if packs_half() else torch.float32


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Say in which dtype weights of this one are multiplied, and so what activations, norms and the cache are held in.

    CPUs are slow at float16, so there it is float32.
    """
    if device.type == "cpu" and dtype == torch.float16 and packs_half():
        return torch.float32
    return dtype


FEW_ROWS: dict[tuple[str, str], int] = {
    ("bfloat16", "avx512_bf16"): 8,
    ("int8", "avx512_vnni"): 2**31,
    ("int8", "avx2"): 64,
    ("int4", "avx512_vnni"): 2**31,
    ("int4", "avx2"): 64,
}
"""For a way to hold weights, and an instruction set of the CPU, the best first: rows of activations up to which our own
kernel is faster than PyTorch's, and than the dense product of the unpacked weight. benchmarks/kernels.py measures."""


def few_rows(held: str, device: torch.device) -> int:
    """Say for how many rows of activations our own kernel is to be taken here; 0 for none."""
    if device.type != "cpu":
        return 0
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return next((count for (kind, name), count in FEW_ROWS.items() if kind == held and capabilities.get(name)), 0)


def packs_half() -> bool:
    """Say whether PyTorch here has fbgemm's packed float16 product, which x86 has from AVX2 on."""
    return torch.backends.quantized.engine in ("fbgemm", "x86")


def free_memory(device: torch.device) -> int | None:
    """Bytes that this rank may still take on the device; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_host_memory()
