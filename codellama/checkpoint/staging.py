"""A folder that appears whole or not at all: written under another name beside its place, then renamed.

It knows nothing of what is written.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from codellama.errors import CheckpointError
from codellama.memory import format_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def staged_folder(target: Path, need: int) -> Iterator[Path]:
    """Give an empty folder to write to, which becomes `target` when the block ends without an exception.

    Otherwise it is removed, also after Ctrl-C. A process that is killed leaves it behind, under a name that ends in
    .partial- and eight digits.

    Args:
        target: must not exist; the folder around it must.
        need: bytes that will be written.

    Raises:
        CheckpointError: target exists, there is no place for it, or the disk is too full, now or later.
    """
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists already, and nothing is overwritten: name another folder or remove it")
    around = target.absolute().parent
    if not around.is_dir():
        raise CheckpointError(f"{target} cannot be made, since there is no folder {around}: make it first")
    free = shutil.disk_usage(around).free
    if free < need:
        raise CheckpointError(
            f"{target} needs {format_bytes(need)}, but {format_bytes(free)} are free in {around}: make room, or name "
            f"a folder on another disk"
        )
    partial = around / f"{target.name}.partial-{secrets.token_hex(4)}"
    try:
        partial.mkdir()
        yield partial
        for path in partial.iterdir():
            _flush(path)
        _flush(partial)
        partial.rename(target)
        _flush(around)
    except OSError as error:
        if error.errno in _FULL:
            raise CheckpointError(
                f"{target} could not be written ({error.strerror}): it needs {format_bytes(need)} in {around}"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk: a name must not outlive its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
