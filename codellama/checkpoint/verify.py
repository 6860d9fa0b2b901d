"""Is a checkpoint whole? Every file, every tensor, as many faults as there are in one run; bad input never ends it.

It knows nothing of any format: each lists its files and says what is wrong with one.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from codellama.checkpoint import check_vocabulary, choose_format
from codellama.checkpoint.layout import Checkpoint, row_pieces
from codellama.checkpoint.report import Report
from codellama.errors import CheckpointError
from codellama.memory import format_bytes

CHECKLIST = "checklist.chk"

PIECE_BYTES = 32 * 2**20
"""All values of a tensor are read in pieces of about this size."""

SAMPLE_VALUES = 2**16
"""So many values of a tensor, or a row of it, are read at each place of a sample."""

SAMPLE_PLACES = 4
"""Places of a sample beside the first and the last rows."""


def verify(
    path: str | Path,
    *,
    full: bool = False,
    checkpoint_format: str | None = None,
    tokenizer_path: str | Path | None = None,
    rope_theta: float | None = None,
    seed: int = 0,
) -> Report:
    """Look for faults in a checkpoint of any format.

    Files: readable by themselves, md5 as in checklist.chk where there is one, none a copy of another. Tensors: all
    there, of the expected shapes, their values finite and not all zero. The tokenizer: as many pieces as the embedding
    has rows. Without `full`, values are a sample: the first rows of each tensor, the last ones, and some between.

    Args:
        path: the folder, or the file where the format is one file.
        full: look at all values.
        checkpoint_format: as for `open_checkpoint`.
        tokenizer_path: None means the one beside the weights, or inside them.
        rope_theta: base of the rotary frequencies, where the weights' own description has none.
        seed: of the places of the sample.

    Returns:
        A report; a path that is no checkpoint at all is a fault in it, and raises nothing.
    """
    path = Path(path)
    tokenizer = None if tokenizer_path is None else Path(tokenizer_path)
    report = Report()
    kind = report.attempt(path.name, "format", choose_format, path, checkpoint_format)
    if kind is None:
        return report
    report.add(path.name, "format", kind.format_name)
    files = _check_files(report, kind, path, tokenizer, rope_theta)
    sums = _check_sums(report, path) if path.is_dir() else {}
    _check_copies(report, files, sums)
    checkpoint = report.attempt(path.name, "names and shapes", kind, path, tokenizer, rope_theta)
    if checkpoint is None:
        report.add(path.name, "values", "not looked at, since the checkpoint does not open")
        return report
    if checkpoint.quantization is not None:
        report.add(path.name, "matrices", f"codes of {checkpoint.quantization}; their numbers are looked at")
    count = sum(1 for _ in checkpoint.names())
    report.add(path.name, "names and shapes", f"{count} tensors")
    pieces = report.attempt("tokenizer", "vocabulary", _check_pieces, checkpoint, path)
    if pieces is not None:
        report.add("tokenizer", "vocabulary", f"{pieces} pieces, as the embedding has rows")
    for group, names in _groups(checkpoint).items():
        _check_values(report, checkpoint, group, names, None if full else random.Random(f"{seed} {group}"))
    return report


def _check_files(
    report: Report, kind: type[Checkpoint], path: Path, tokenizer: Path | None, rope_theta: float | None
) -> list[Path]:
    """Look at each file by itself; returns those that are there."""
    there = []
    for file, check in report.attempt(path.name, "files", _listed, kind, path, tokenizer, rope_theta) or ():
        faults = len(report.faults)
        report.attempt(file.name, "content", check)
        if file.is_file():
            there.append(file)
            if len(report.faults) == faults:
                report.add(file.name, "content", format_bytes(file.stat().st_size))
    return there


def _listed(
    kind: type[Checkpoint], path: Path, tokenizer: Path | None, rope_theta: float | None
) -> list[tuple[Path, Callable[[], object]]]:
    return list(kind.files(path, tokenizer, rope_theta))


def _check_pieces(checkpoint: Checkpoint, path: Path) -> int:
    check_vocabulary(checkpoint, path)
    return checkpoint.args.vocab_size


def _check_sums(report: Report, folder: Path) -> dict[Path, str]:
    """Compare the files of a folder with its list of md5 sums; returns the sums of the files."""
    checklist = folder / CHECKLIST
    sums: dict[Path, str] = {}
    if not checklist.exists():
        report.add(CHECKLIST, "md5", "none there, so contents are not compared with what was published")
        return sums
    for line in (report.attempt(CHECKLIST, "content", checklist.read_text, "utf-8") or "").splitlines():
        match = re.fullmatch(r"([0-9a-fA-F]{32}) [ *](.+)", line.strip())
        if match is None or Path(match[2]).name != match[2]:
            if line.strip():
                report.add(CHECKLIST, "content", f"has a line that is no md5 sum of a file here: {line[:80]!a}", False)
            continue
        file = folder / match[2]
        if not file.is_file():
            report.add(match[2], "md5", f"{CHECKLIST} lists it, but {file} is missing: download it", ok=False)
            continue
        found = report.attempt(match[2], "md5", _md5, file)
        if found is None:
            continue
        sums[file] = found
        if found == match[1].lower():
            report.add(match[2], "md5", found)
        else:
            report.add(
                match[2], "md5", f"{file} has the md5 {found}, {CHECKLIST} has {match[1]}: download it again", ok=False
            )
    return sums


def _check_copies(report: Report, files: list[Path], sums: dict[Path, str]) -> None:
    """Find a file that is a copy of another, as after a download of the same address twice."""
    for one, other in combinations(files, 2):
        same = report.attempt(other.name, "copies", _same, one, other, sums)
        if same:
            report.add(other.name, "copies", f"{other} holds the same bytes as {one.name}: download it again", ok=False)


def _same(one: Path, other: Path, sums: dict[Path, str]) -> bool:
    size = one.stat().st_size
    if size == 0 or size != other.stat().st_size:
        return False
    if one in sums and other in sums:
        return sums[one] == sums[other]
    with one.open("rb") as first, other.open("rb") as second:
        for place in random.Random(size).sample(range(0, size, 4096), k=min(64, -(-size // 4096))):  # most differ here
            first.seek(place)
            second.seek(place)
            if first.read(4096) != second.read(4096):
                return False
    return _md5(one) == _md5(other)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _groups(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Tensors that differ in their layer alone."""
    groups: dict[str, list[str]] = {}
    for name in checkpoint.names():
        groups.setdefault(re.sub(r"\.\d+\.", ".N.", name), []).append(name)
    return groups


def _check_values(
    report: Report, checkpoint: Checkpoint, group: str, names: list[str], rng: random.Random | None
) -> None:
    looked = 0
    for name in names:
        count = report.attempt(name, "values", _check_tensor, checkpoint, name, rng)
        looked += count or 0
    total = sum(torch.Size(checkpoint.shape(name)).numel() for name in names)
    of = "all" if looked == total else f"a sample of {looked:,} of"
    report.add(
        group, "values", f"{of} {total:,} numbers in {len(names)} tensor{'s' if len(names) > 1 else ''} looked at"
    )


def _check_tensor(checkpoint: Checkpoint, name: str, rng: random.Random | None) -> int:
    """Return how many values were looked at.

    Raises:
        CheckpointError: one of them is not finite, or all are zero.
    """
    looked, bad, zero = 0, 0, True
    for piece in row_pieces(checkpoint, name, PIECE_BYTES) if rng is None else _sample(checkpoint, name, rng):
        looked += piece.numel()
        bad += piece.numel() - int(piece.isfinite().sum())
        zero = zero and not piece.any()
    if bad:
        raise CheckpointError(f"{name} holds {bad} values of NaN or infinity among {looked}: download the file again")
    if zero:
        raise CheckpointError(
            f"{name} is zero in all {looked} values that were looked at: was the file reserved and never filled?"
        )
    return looked


def _sample(checkpoint: Checkpoint, name: str, rng: random.Random) -> Iterator[Tensor]:
    """Read the first rows, the last rows, and some between."""
    rows, *rest = checkpoint.shape(name)
    count = max(1, SAMPLE_VALUES // torch.Size(rest).numel())
    blocks = range(-(-rows // count))
    for block in sorted({0, blocks[-1], *rng.sample(blocks, min(len(blocks), SAMPLE_PLACES))}):
        yield checkpoint.read(name, 0, block * count, min(rows, (block + 1) * count))
