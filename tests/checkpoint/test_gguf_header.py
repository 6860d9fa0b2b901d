"""The header of GGUF: every type of value, and each way in which a header can lie; and random damage."""

import struct
from pathlib import Path
from typing import Any

import pytest

from codellama.checkpoint import gguf_header
from codellama.checkpoint.gguf_header import read_header
from codellama.errors import CheckpointError
from tests.fuzz_gguf import fuzz
from tests.support import gguf
from tests.support.gguf import file_by_hand, info, pair, string

HUGE = struct.pack("<Q", 2**63)


def header(folder: Path, content: bytes) -> Any:
    path = folder / "by_hand.gguf"
    path.write_bytes(content)
    return read_header(path)


@pytest.mark.parametrize(
    ("kind", "content", "value"),
    [
        (0, b"\xff", 255), (1, b"\xff", -1), (2, b"\xfe\xff", 65534), (3, b"\xfe\xff", -2),
        (4, b"\0\0\0\x80", 2**31), (5, b"\0\0\0\x80", -(2**31)), (6, struct.pack("<f", 0.1), 0.1), (7, b"\1", True),
        (7, b"\0", False), (8, string("naïve"), "naïve".encode()), (10, HUGE, 2**63), (11, HUGE, -(2**63)),
        (12, struct.pack("<d", 1 / 3), 1 / 3), (6, struct.pack("<f", 1e-5), 1e-5), (6, struct.pack("<f", 1e6), 1e6),
        (6, struct.pack("<f", 3.4028234663852886e38), 3.4028235e38), (6, struct.pack("<f", float("inf")), float("inf")),
        (6, struct.pack("<f", 1e-45), 1e-45), (6, struct.pack("<f", -0.0), 0.0),
    ],
)  # fmt: skip
def test_every_type_of_value(tmp_path: Path, kind: int, content: bytes, value: object) -> None:
    read = header(tmp_path, file_by_hand([pair("key", kind, content), pair("next", 0, b"\7")])).values
    assert read == {"key": value, "next": 7}
    assert type(read["key"]) is type(value)


def test_arrays(tmp_path: Path) -> None:
    pairs = [
        pair("words", 9, struct.pack("<IQ", 8, 3) + string("a") + string("") + string("bc")),
        pair("numbers", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
        pair("floats", 9, struct.pack("<IQ2f", 6, 2, 0.5, -4)),
        pair("flags", 9, struct.pack("<IQ2B", 7, 2, 1, 0)),
        pair("wide", 9, struct.pack("<IQ1q", 11, 1, -(2**40))),
        pair("empty", 9, struct.pack("<IQ", 4, 0)),
    ]
    read = header(tmp_path, file_by_hand(pairs)).values
    assert {key: list(value) for key, value in read.items()} == {
        "words": [b"a", b"", b"bc"], "numbers": [1, -2, 3], "floats": [0.5, -4], "flags": [1, 0],
        "wide": [-(2**40)], "empty": [],
    }  # fmt: skip


def test_where_tensors_lie(tmp_path: Path) -> None:
    infos = [info("b", [64, 3], 8, 32), info("a", [5]), info("c", [2, 3, 4], 1, 256)]
    read = header(tmp_path, file_by_hand([], infos, bytes(304)))
    begin = len(file_by_hand([], infos))
    assert [(name, tensor.shape, tensor.offset - begin, tensor.nbytes) for name, tensor in read.tensors.items()] == [
        ("a", (5,), 0, 20), ("b", (3, 64), 32, 204), ("c", (4, 3, 2), 256, 48),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + bytes(60), r"byte 4: it begins b'GGML'; b'GGUF' was expected"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), r"8 more bytes were announced"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), r"8 more bytes were announced"),
        (file_by_hand([HUGE]), r"a key has 9223372036854775808 bytes; 1 to 65535 were expected"),
        (file_by_hand([string("")]), r"a key has 0 bytes"),
        (file_by_hand([pair("k", 8, HUGE)]), r"9223372036854775808 more bytes were announced"),
        (file_by_hand([pair("k", 9, struct.pack("<I", 8) + HUGE)]), r"73786976294838206464 more bytes"),
        (file_by_hand([pair("k", 9, struct.pack("<I", 12) + HUGE)]), r"73786976294838206464 more bytes"),
        (file_by_hand([pair("k", 9, struct.pack("<IQIQ", 9, 1, 9, 1))]), r"'k' is an array of value type 9; .* nested"),
        (file_by_hand([pair("k", 9, struct.pack("<IQ", 13, 1))]), r"'k' is an array of value type 13"),
        (file_by_hand([pair("k", 13, b"")]), r"'k' has value type 13, which is not known"),
        (file_by_hand([pair("k", 0, b"\1"), pair("k", 0, b"\1")]), r"the key 'k' stands there twice"),
        (file_by_hand([pair(b"\xff\n", 0, b"\1")]), r"a key b'\\xff\\n' is not UTF-8"),
        (file_by_hand([pair("general.alignment", 4, bytes(4))]), r"general\.alignment is 0; a power of two"),
        (file_by_hand([pair("general.alignment", 0, b"\30")]), r"general\.alignment is 24; a power of two"),
        (file_by_hand([pair("general.alignment", 8, string("32"))]), r"alignment is '32'; an integer was expected"),
        (file_by_hand([], [info("t", [])]), r"'t' has 0 dimensions; 1 to 4 were expected"),
        (file_by_hand([], [info("t", [1] * 5)]), r"'t' has 5 dimensions"),
        (file_by_hand([], [info("t", [4, 0])]), r"'t' has the shape \[0, 4\]; positive sizes"),
        (file_by_hand([], [info("t", [2**63] * 4)]), r"'t' ends at byte \d{70,}; it is probably truncated"),
        (file_by_hand([], [info("t", [4], offset=2**63)]), r"'t' ends at byte 92233720368547\d+; it is probably trunc"),
        (file_by_hand([], [info("t", [4], offset=16)], bytes(64)), r"offset 16, no multiple of the alignment 32"),
        (file_by_hand([], [info("t", [4], 17)], bytes(64)), r"'t' is IQ2_XS, which this package does not read; it"),
        (file_by_hand([], [info("t", [4], 99)], bytes(64)), r"'t' is of the unknown type 99, which"),
        (file_by_hand([], [info("t", [48], 8)], bytes(64)), r"'t' has rows of 48, no multiple of Q8_0's 32"),
        (file_by_hand([], [info("t", [4]), info("t", [4], 0, 32)], bytes(64)), r"the tensor 't' stands there twice"),
        (file_by_hand([], [info("t", [9]), info("u", [4], 0, 32)], bytes(64)), r"'u' begins at byte \d+, inside 't'"),
        (file_by_hand([], [info("t", [9])], bytes(35)), r"'t' ends at byte \d+; it is probably truncated"),
        (file_by_hand([], [info("t\n" * 99, [0])]), r"'t\\nt\\n.*\.\.\. has the shape"),
    ],
)
def test_wrong_headers(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"by_hand\.gguf.*{message}") as caught:
        header(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_values_of_another_kind(tmp_path: Path) -> None:
    read = header(tmp_path, file_by_hand([pair("long", 8, string("x" * 200)), pair("bad", 8, string(b"\xff"))]))
    with pytest.raises(CheckpointError, match=r"long is 'x{70,80}\.*; an integer was expected") as caught:
        read.find("long", int)
    assert len(str(caught.value)) < 250 + len(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"bad is .*, which is not UTF-8"):
        read.text("bad")
    assert (read.text("absent"), read.find("absent", int)) == (None, None)


def test_a_header_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "HEADER_BYTES", 1000)
    content = file_by_hand([pair("k", 8, string(bytes(900)))])
    assert len(header(tmp_path, content).values["k"]) == 900
    with pytest.raises(CheckpointError, match="the header is longer than 1000 bytes"):
        header(tmp_path, file_by_hand([pair("k", 8, string(bytes(990)))]))


def test_random_damage_is_a_checkpoint_error(tmp_path: Path) -> None:
    seed = gguf.write_gguf(tmp_path / "seed.gguf").read_bytes()
    outcome = fuzz(seed, 300, tmp_path, seed=7)
    assert outcome.seconds < 1
    assert outcome.peak_bytes < 50 * 2**20
    assert outcome.refused > 150
    assert outcome.opened > 5  # damage to weights, or to what nobody reads
