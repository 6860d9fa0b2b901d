"""Damaged GGUF files: each must open, or be refused with CheckpointError, in bounded time and memory.

    python -m tests.fuzz_gguf --count 20000

A few hundred run in tests/checkpoint/test_gguf_header.py; pytest does not collect this file.
"""

import random
import resource
import struct
import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import fire

from codellama.checkpoint import open_checkpoint
from codellama.errors import CheckpointError
from tests.support import gguf

EXTREMES = (0, 1, 2, 7, 8, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


@dataclass
class Outcome:
    """How many files opened and were refused; the slowest one's CPU seconds, the most that one allocated."""

    opened: int = 0
    refused: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


def fuzz(sound: bytes, count: int, folder: Path, seed: int) -> Outcome:
    """Damage a sound file in `count` ways and open each; whatever is not a CheckpointError comes through."""
    rng = random.Random(seed)
    outcome = Outcome()
    path = folder / "damaged.gguf"
    head = sound.index(b"output_norm.weight") + 64
    tracemalloc.start()
    try:
        for _ in range(count):
            path.write_bytes(damage(rng, sound, head))
            tracemalloc.reset_peak()
            before, began = tracemalloc.get_traced_memory()[0], time.process_time()
            try:
                checkpoint = open_checkpoint(path)
                for name in list(checkpoint.names())[:3]:
                    checkpoint.read(name)
                outcome.opened += 1
            except CheckpointError:
                outcome.refused += 1
            outcome.seconds = max(outcome.seconds, time.process_time() - began)
            outcome.peak_bytes = max(outcome.peak_bytes, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return outcome


def damage(rng: random.Random, sound: bytes, head: int) -> bytes:
    """Change a few places of the header, each in one of six ways."""
    content = bytearray(sound)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.choice((rng.randrange(head), rng.randrange(min(head, 800))))
        kind = rng.randrange(6)
        if kind == 0:
            content[at] = rng.randrange(256)
        elif kind == 1:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            code = rng.choice("IQ")
            value = rng.choice((*EXTREMES, len(sound), len(sound) - at)) % 2 ** (8 * struct.calcsize(f"<{code}"))
            content[at : at + struct.calcsize(f"<{code}")] = struct.pack(f"<{code}", value)
        elif kind == 3:
            del content[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            source = rng.randrange(head)
            content[at:at] = content[source : source + rng.randrange(1, 80)]
        else:
            del content[rng.randrange(len(content)) :]
        if len(content) < head:
            break
    return bytes(content)


def main(count: int = 20_000, seed: int = 0) -> str:
    """Damage files of plain numbers and of blocks, with no more than 4 GiB of address space beyond what is in use."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, resource.RLIM_INFINITY))
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = gguf.write_gguf(folder / "plain.gguf").read_bytes()
        blocks = gguf.write_gguf(folder / "blocks.gguf", gguf.ARGS, kind="Q4_0").read_bytes()
        for index, sound in enumerate((plain, blocks)):
            lines.append(str(fuzz(sound, count // 2, folder, seed + index)))
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)
