"""As much of protobuf as a SentencePiece model needs: write fields, and part a message into its fields.

It knows nothing of what the fields mean. Source: protobuf's encoding rules.
"""

from collections.abc import Iterator

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


def message(number: int, *fields: bytes) -> bytes:
    """Write a message inside of another one."""
    return bytes_field(number, b"".join(fields))


def bytes_field(number: int, content: bytes) -> bytes:
    """Write a field of bytes, a text or a message."""
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def varint_field(number: int, value: int) -> bytes:
    """Write a field that is an integer, a boolean or an enumeration."""
    return _varint(number << 3 | _VARINT) + _varint(value & (2**64 - 1))  # a negative int32 is written as 64 bits


def split_fields(content: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Part a message: number of each field, its content if that has a length (else nothing), and all of its bytes.

    Raises:
        ValueError: it is no message, or has a field of a kind that is not written any more.
    """
    at = 0
    while at < len(content):
        begin = at
        key, at = _read_varint(content, at)
        inside = b""
        match key & 7:
            case 0:
                _, at = _read_varint(content, at)
            case 1 | 5 as kind:
                at += 8 if kind == _EIGHT_BYTES else 4
            case 2:
                length, at = _read_varint(content, at)
                inside = content[at : at + length]
                at += length
            case kind:
                raise ValueError(f"a field of wire type {kind} at byte {begin}")
        if at > len(content):
            raise ValueError(f"a field at byte {begin} goes on behind the end")
        yield key >> 3, inside, content[begin:at]


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    written.append(value)
    return bytes(written)


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            break
        byte = content[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError(f"an unfinished number at byte {at}")
