"""The directory of a .pth file: what torch.save writes is found, and what is mutated or hostile is refused."""

import io
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from codellama.checkpoint.pth import read_directory, read_part
from codellama.errors import CheckpointError


def read(path: Path, name: str, spans: list[tuple[int, int]]) -> torch.Tensor:
    place = read_directory(path)[name]
    target = torch.empty([high - low for low, high in spans], dtype=place.dtype)
    read_part(path, place, spans, target)
    return target


def saved(path: Path, protocol: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(7, 12, generator=generator)
    state = OrderedDict(
        a=wide, b=wide[2:5], c=wide.t(), d=wide[:, 3:8], e=wide.bfloat16(), f=torch.nn.Parameter(wide.half()),
        g=torch.randn(5, generator=generator), h=torch.empty(0, 4), i=torch.tensor(2.5), j=wide[::2, ::3].double(),
    )  # fmt: skip
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as Module.state_dict does
    torch.save(state, path, pickle_protocol=protocol)
    return state


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves_is_read(tmp_path: Path, protocol: int) -> None:
    state = saved(tmp_path / "x.pth", protocol)
    assert read_directory(tmp_path / "x.pth").keys() == state.keys()
    for name, tensor in state.items():
        whole = read(tmp_path / "x.pth", name, [(0, size) for size in tensor.shape])
        assert whole.dtype == tensor.dtype, name
        assert torch.equal(whole, tensor), name
    for name in "acdefj":
        tensor = state[name]
        for low, high in ((1, 3), (0, 1), (2, 2)):
            assert torch.equal(read(tmp_path / "x.pth", name, [(1, 4), (low, high)]), tensor[1:4, low:high]), name


def repacked(path: Path, target: Path, pickled: bytes, compress: bool = False) -> None:
    """The same archive with another pickle."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            content = pickled if info.filename.endswith("/data.pkl") else old.read(info)
            new.writestr(info.filename, content, zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED)


def test_hostile_pickles_do_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "x.pth")
    cases = {
        "more than tensors": [
            b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR.",
            b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
            b"\x80\x02ctorch\nload\n(X\x01\x00\x00\x001tR.",
            b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.",
            b"\x80\x02(ios\nsystem\n.",
        ],
        "cannot be read": [
            b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # a bytearray of a terabyte
            b"\x80\x02X\xff\xff\xff\xff.",
            b"\x80\x02}",
            b"",
            b"\x80\x02h\x07.",
        ],
        "numbers more objects than it has": [b"\x80\x02}r\xff\xff\xff\x7f."],  # a table of gigabytes would be made
        "its pickle uses DICT": [b"\x80\x02(X\x01\x00\x00\x00aK\x01d."],
        "not a dict of tensors": [b"\x80\x02].", b"\x80\x02}K\x01K\x02s."],
        "dense tensor": [b"\x80\x02}X\x01\x00\x00\x00aK\x01s."],
    }  # fmt: skip
    for message, pickles in cases.items():
        for pickled in pickles:
            repacked(tmp_path / "x.pth", tmp_path / "bad.pth", pickled)
            with pytest.raises(CheckpointError, match=message):
                read_directory(tmp_path / "bad.pth")


class _Described:
    """Describes a tensor with any numbers."""

    def __init__(self, key: str, numel: object, offset: object, shape: object, stride: object) -> None:
        self.storage = ("storage", torch.FloatStorage, key, "cpu", numel)
        self.rest = (offset, shape, stride, False, OrderedDict())

    def __reduce__(self) -> tuple[object, ...]:
        return torch._utils._rebuild_tensor_v2, (_Key(self.storage), *self.rest)


class _Key:
    def __init__(self, reference: tuple[object, ...]) -> None:
        self.reference = reference


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.reference if isinstance(obj, _Key) else None


@pytest.mark.parametrize(
    "described",
    [
        _Described("0", 85, 0, (7, 12), (12, 1)),  # the record has 84
        _Described("0", 84, 1, (7, 12), (12, 1)),
        _Described("0", 84, 0, (7, 13), (12, 1)),
        _Described("0", 84, 0, (7, 12), (13, 1)),
        _Described("0", 84, -1, (7, 12), (12, 1)),
        _Described("0", 84, 0, (7, -12), (12, 1)),
        _Described("0", 84, 0, (7, 12), (12,)),
        _Described("0", 84, 0, (7.0, 12), (12, 1)),
        _Described("0", 84, 0, (2**60, 12), (12, 1)),
        _Described("99", 84, 0, (7, 12), (12, 1)),
        _Described("0", 84, 0, 5, (12, 1)),
    ],
)
def test_a_tensor_that_its_record_does_not_hold(tmp_path: Path, described: _Described) -> None:
    saved(tmp_path / "x.pth")
    content = io.BytesIO()
    _Pickler(content, protocol=2).dump({"a": described})
    repacked(tmp_path / "x.pth", tmp_path / "bad.pth", content.getvalue())
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_directory(tmp_path / "bad.pth")


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        pickled = archive.read(name)
    repacked(tmp_path / "x.pth", tmp_path / "bad.pth", pickled, compress=True)
    with pytest.raises(CheckpointError, match="compressed"):
        read_directory(tmp_path / "bad.pth")


def test_a_record_that_would_reach_beyond_the_file(tmp_path: Path) -> None:
    saved(tmp_path / "x.pth")
    content = bytearray((tmp_path / "x.pth").read_bytes())
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    content[info.header_offset + 28 : info.header_offset + 30] = b"\xff\xff"  # the length of the padding
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="the record of 'a' is not where the archive says"):
        read_directory(tmp_path / "x.pth")


def test_mutated_files_are_refused_or_read(tmp_path: Path) -> None:
    """Whatever a few bytes become, it ends with our error or with tensors inside of the file."""
    saved(tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    rng = random.Random(3)
    refused = 0
    for _ in range(600):
        mutated = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            mutated[rng.randrange(len(mutated))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        if rng.random() < 0.1:
            del mutated[rng.randrange(len(mutated)) :]
        (tmp_path / "m.pth").write_bytes(mutated)
        try:
            for place in read_directory(tmp_path / "m.pth").values():
                if torch.Size(place.shape).numel() < 10_000:
                    spans = [(0, size) for size in place.shape]
                    read_part(tmp_path / "m.pth", place, spans, torch.empty(place.shape, dtype=place.dtype))
        except CheckpointError:
            refused += 1
    assert 100 < refused < 600
