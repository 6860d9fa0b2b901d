"""Large pages: asked for where the system has them, and harmless elsewhere."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from codellama.native.pages import use_huge_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags(address: int) -> list[str]:
    """The flags of the memory area that holds an address."""
    area = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if borders := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            area = int(borders[1], 16) <= address < int(borders[2], 16)
        if area and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(not SWITCH.exists(), reason="this system has no transparent huge pages")
def test_the_area_is_marked() -> None:
    # A mapping of its own: what the allocator hands out may have been marked for a tensor before.
    memory = mmap.mmap(-1, 2**24, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    middle = tensor.data_ptr() + 2**23
    assert "hg" not in flags(middle)
    assert use_huge_pages(tensor)
    assert "hg" in flags(middle)
    assert int(tensor.fill_(3).long().sum()) == 3 * 2**24


@pytest.mark.parametrize("size", [0, 1, 4095, 5000])
def test_small_tensors_are_left_alone(size: int) -> None:
    tensor = torch.full((size,), 7, dtype=torch.uint8)
    use_huge_pages(tensor)
    assert tensor.eq(7).all()
