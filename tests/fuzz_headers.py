"""Mutate what stands before the weights: a file is refused with CheckpointError, or read; soon, and in little memory.

    python -m tests.fuzz_headers --format huggingface --count 20000

Each format has a Target: how a good folder is written, which files are mutated and how far, how it is opened, and what
may be done to it. A case that fails is repeated with its own number: `--first N --count 1`.
"""

import random
import re
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import fire

from codellama.checkpoint import Checkpoint
from codellama.checkpoint.convert import convert
from codellama.checkpoint.huggingface import INDEX, HuggingFaceCheckpoint
from codellama.checkpoint.quantized import WEIGHTS, QuantizedCheckpoint
from codellama.config import ModelArgs
from codellama.errors import CheckpointError
from tests.support import tiny

SECONDS = 3.0
"""A case may take so long; a good folder opens in milliseconds."""

KILOBYTES = 400_000
"""The peak of the process may grow by so much over all cases."""

Mutation = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """What is mutated: for each file the number of bytes from its begin that matter, found from its content."""

    write: Callable[[Path], None]
    heads: Mapping[str, Callable[[bytes], int]]
    open: Callable[[Path], Checkpoint]
    mutations: tuple[Mutation, ...]


def flip_bits(rng: random.Random, head: bytes) -> bytes:
    changed = bytearray(head)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut_out(rng: random.Random, head: bytes) -> bytes:
    begin = rng.randrange(len(head))
    return head[:begin] + head[begin + rng.choice((1, 2, 8, 50, 1000)) :]


def repeat_part(rng: random.Random, head: bytes) -> bytes:
    begin = rng.randrange(len(head))
    part = head[begin : begin + rng.choice((1, 4, 60, 400))]
    return head[:begin] + part * rng.choice((2, 3, 100)) + head[begin + len(part) :]


def insert_bytes(rng: random.Random, head: bytes) -> bytes:
    at = rng.randrange(len(head))
    return head[:at] + rng.randbytes(rng.choice((1, 3, 20))) + head[at:]


def set_length(rng: random.Random, head: bytes) -> bytes:
    """Replace eight bytes, mostly the first, by an integer at a border."""
    at = rng.choice((0, 0, 0, rng.randrange(max(1, len(head) - 8))))
    value = rng.choice((0, 1, 7, 8, 2**16, 10**8, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1))
    return head[:at] + value.to_bytes(8, "little") + head[at + 8 :]


def _replaced(rng: random.Random, head: bytes, pattern: bytes, values: tuple[bytes, ...]) -> bytes:
    """Replace one match of a pattern in the text after eight bytes, and mostly correct the length before it."""
    matches = list(re.finditer(pattern, head[8:]))
    if not matches:
        return head
    match, value = rng.choice(matches), rng.choice(values)
    text = head[8 : 8 + match.start()] + value + head[8 + match.end() :]
    is_text = head[:1] in b"{ "  # a JSON file, not a header behind its length
    length = head[:8] if is_text or rng.random() < 0.1 else len(text).to_bytes(8, "little")
    return length + text


def change_number(rng: random.Random, head: bytes) -> bytes:
    values = (
        b"0 -0 1 2 7 -1 48 2147483648 4294967296 9223372036854775807 18446744073709551616 1e400 -1e400 1.5 NaN true"
    )
    huge = (b"9" * 40, b"9" * 4000, b"9" * 5000, b"1000000000000", b'"1"', b"null", b"[]")
    return _replaced(rng, head, rb"-?\d+(\.\d+)?", (*values.split(), *huge))


def change_word(rng: random.Random, head: bytes) -> bytes:
    words = (
        b'"BF16"', b'"I64"', b'"F64"', b'"F8_E4M3"', b'""', b'"\\ud800"', b'"\\u0000"', b'"../x.safetensors"',
        b'"/etc/passwd"', b'"a\xff"', b'"' + b"x" * 100_000 + b'"', b'"__metadata__"', b'"shape"', b"null", b"[]",
        b"{}", b"[" * 100_000, b'{"a":' * 5000, b"[" * 400 + b"]" * 400, b'"default"', b'"model.norm.weight"',
    )  # fmt: skip
    return _replaced(rng, head, rb'"[^"]*"', words)


def change_sign(rng: random.Random, head: bytes) -> bytes:
    return _replaced(rng, head, rb"[\[\]{},:]", (b"[", b"]", b"{", b"}", b",", b":", b"", b"[0,", b"[[", b",,"))


BYTES: tuple[Mutation, ...] = (flip_bits, cut_out, repeat_part, insert_bytes, set_length)
JSON: tuple[Mutation, ...] = (change_number, change_number, change_word, change_word, change_sign)


def _write_huggingface(folder: Path) -> None:
    tiny.tiny_huggingface(folder, max_file_bytes=300_000)


def _write_quantized(folder: Path) -> None:
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tiny.VOCAB, multiple_of=32, rope_theta=1e4)
    with tempfile.TemporaryDirectory() as source:
        tiny.tiny_checkpoint(Path(source), args=args)
        convert(source, folder / "new", quantize="int4")
    for path in (folder / "new").iterdir():
        path.rename(folder / path.name)


def _safetensors_head(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


TARGETS = {
    "huggingface": Target(
        write=_write_huggingface,
        heads={"model-00001-of-00002.safetensors": _safetensors_head, "config.json": len, INDEX: len},
        open=HuggingFaceCheckpoint,
        mutations=(*BYTES, *JSON),
    ),
    "quantized": Target(
        write=_write_quantized,
        heads={WEIGHTS: _safetensors_head},
        open=QuantizedCheckpoint,
        mutations=(*BYTES, *JSON),
    ),
}


def fuzz(format: str, folder: Path, count: int, first: int = 0) -> Counter[str]:
    """Open and read `count` mutated folders, and count the results: "read", or the message without its particulars.

    Raises:
        AssertionError: another exception than CheckpointError, too much time, too much memory; with the case's number.
    """
    target = TARGETS[format]
    target.write(folder)
    for tensor in map(target.open(folder).read, target.open(folder).names()):
        assert tensor.numel() > 0  # also brings what is loaded at the first use into the peak
    good = {name: (folder / name).read_bytes() for name in target.heads}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results: Counter[str] = Counter()
    for case in range(first, first + count):
        rng = random.Random(case)
        name = rng.choice([*good, next(iter(good))])  # the first file twice as often
        size = target.heads[name](good[name])
        head = good[name][:size]
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            head = rng.choice(target.mutations)(rng, head) or b"\0"
        content = head + good[name][size:]
        (folder / name).write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.05 else content)
        begin = time.monotonic()
        result = _open_and_read(target, folder, f"case {case} ({name})")
        seconds = time.monotonic() - begin
        assert seconds < SECONDS, f"case {case} ({name}) took {seconds:.1f} s"
        results[result] += 1
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        assert grown < KILOBYTES, f"case {case} ({name}): the peak has grown by {grown} KB"
        (folder / name).write_bytes(good[name])
    return results


def _open_and_read(target: Target, folder: Path, case: str) -> str:
    try:
        checkpoint = target.open(folder)
        for tensor in checkpoint.names():
            assert checkpoint.read(tensor).shape == checkpoint.shape(tensor), tensor
    except CheckpointError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    else:
        return "read"
    assert len(message) < 2000, f"{case}: a message of {len(message)} characters"
    message.encode()  # a lone surrogate could not be printed
    return re.sub(r"\S*[^a-z\s]\S*", "…", message)[:50]  # what is left are the words of the message


def main(format: str, count: int = 20_000, first: int = 0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for result, times in fuzz(format, Path(folder), count, first).most_common():
            print(f"{times:6} {result}")


if __name__ == "__main__":
    fire.Fire(main)
