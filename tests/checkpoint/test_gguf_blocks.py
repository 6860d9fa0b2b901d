"""Parts of matrices in every type of block, with the `gguf` package's de-quantization of the whole matrix."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from codellama.checkpoint import gguf_blocks
from codellama.checkpoint.gguf_blocks import BLOCKS, PLAIN, UNREAD, Block, read_part

ROWS, WIDTH, OFFSET = 11, 1024, 70
EACH_BLOCK = [pytest.param(number, block, id=block.name) for number, block in BLOCKS.items()]


def random_blocks(block: Block) -> np.ndarray:
    """Random bytes [ROWS, bytes of a row]: any bytes are blocks, though some scales are infinite or NaN."""
    return np.random.default_rng(5).integers(0, 256, (ROWS, WIDTH // block.values * block.nbytes), dtype=np.uint8)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers, so that NaN equals itself."""
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize(("number", "block"), EACH_BLOCK)
def test_any_part_is_the_part_of_the_whole(
    number: int, block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = random_blocks(block)
    path = tmp_path / "blocks"
    path.write_bytes(bytes(OFFSET) + blocks.tobytes() + b"what follows")
    with np.errstate(invalid="ignore", over="ignore"):
        whole = torch.from_numpy(dequantize(blocks, GGMLQuantizationType(number)))
    if block.name in PLAIN:
        whole = torch.frombuffer(bytearray(blocks.tobytes()), dtype=PLAIN[block.name]).view(ROWS, WIDTH)
    monkeypatch.setattr(gguf_blocks, "PIECE_VALUES", 2500)  # two rows of the whole width, or more of a part
    with path.open("rb", buffering=0) as file:
        for rows in ((0, ROWS), (0, 1), (3, 8), (ROWS - 1, ROWS)):
            for columns in ((0, WIDTH), (0, 1), (255, 257), (300, 811), (512, 768), (WIDTH - 1, WIDTH)):
                part = read_part(file, OFFSET, block, WIDTH, rows, columns)
                assert part.dtype == PLAIN.get(block.name, torch.float32)
                assert torch.equal(bits(part), bits(whole[slice(*rows), slice(*columns)])), (rows, columns)


def test_only_the_blocks_of_a_part_are_read() -> None:
    asked = []

    class Recorder(io.BytesIO):
        def readinto(self, buffer: memoryview) -> int:
            asked.append((self.tell(), len(buffer)))
            return super().readinto(buffer)

    block = Block("Q8_0", 32, 34)
    read_part(Recorder(bytes(ROWS * 32 * 34)), 0, block, WIDTH, (2, 4), (40, 70))  # type: ignore[arg-type]
    assert asked == [(row * 32 * 34 + 34, 2 * 34) for row in (2, 3)]


def test_short_reads_go_on() -> None:
    class Slow(io.BytesIO):
        def readinto(self, buffer: memoryview) -> int:
            return super().readinto(buffer[:100])

    values = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    file = Slow(values.numpy().tobytes())
    assert torch.equal(read_part(file, 0, Block("F32", 1, 4), WIDTH, (1, 9), (0, WIDTH)), values[1:9])  # type: ignore[arg-type]


def test_sizes_and_numbers_are_the_packages() -> None:
    assert {number: (block.name, block.values, block.nbytes) for number, block in BLOCKS.items()} == {
        number: (GGMLQuantizationType(number).name, *GGML_QUANT_SIZES[GGMLQuantizationType(number)])
        for number in BLOCKS
    }
    assert {kind.value: kind.name for kind in GGMLQuantizationType if kind.value not in BLOCKS} == UNREAD
