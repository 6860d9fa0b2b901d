"""A file of JSON lines that grows while a run goes on, and from which an interrupted run goes on.

It knows what a sample is called, and nothing of what is said of it.
"""

import fcntl
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from codellama.errors import EvaluationError, shown

Key = tuple[str | int, int]
"""task_id, and the number of the sample among those of its problem."""


class Journal:
    """Entries by key: those that the file held, and those appended since.

    When `append` returns they have left this process, so a run that is killed loses none of them. A last line
    without its end was being written then; it is cut off.

    Attributes:
        path: of the file; made where there is none.
        entries: by key.
    """

    def __init__(self, path: Path, required: Mapping[str, type]) -> None:
        """Open a file, for this process alone.

        Args:
            required: fields that each line must have, and their kinds, beside task_id and index.

        Raises:
            EvaluationError: another process has it open, or a line is not an entry.
        """
        self.path = path
        self.entries: dict[Key, dict[str, Any]] = {}
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise EvaluationError(f"{path} is in use by another run; give this one another --output_dir") from None
        try:
            self._read(required)
        except BaseException:
            self._file.close()
            raise

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Write entries that are new."""
        lines = []
        for entry in entries:
            key = _key(entry)
            assert key not in self.entries, f"{key} is there"
            self.entries[key] = entry
            lines.append(json.dumps(entry, ensure_ascii=True) + "\n")
        self._file.write("".join(lines).encode())
        self._file.flush()

    def close(self) -> None:
        """Let other processes have the file."""
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, required: Mapping[str, type]) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            entry = _parse(line)
            kinds: dict[str, Any] = {**required, "task_id": (str, int), "index": int}
            if entry is None or not all(isinstance(entry.get(name), kind) for name, kind in kinds.items()):
                raise EvaluationError(
                    f"{self.path}, line {number} is {shown(line.decode(errors='replace'))}; an object with "
                    f"{', '.join(kinds)} was expected: mend it, or give another --output_dir"
                )
            key = _key(entry)
            if key in self.entries:
                raise EvaluationError(f"{self.path}, line {number} has sample {key[1]} of {shown(key[0])} again")
            self.entries[key] = entry
        if len(whole) < len(data):
            self._file.truncate(len(whole))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _key(entry: dict[str, Any]) -> Key:
    return entry["task_id"], entry["index"]


def agree_on_parameters(
    path: Path, parameters: dict[str, Any], *, has_samples: bool, has_results: bool = False
) -> None:
    """Write down with what the samples of a folder are made; where it has some, compare with what is written there.

    Raises:
        EvaluationError: they were made with something else; naming it.
    """
    if not has_samples:
        _write(path, parameters)
        return
    found = _parse(path.read_bytes()) if path.exists() else None
    if found is None:
        raise EvaluationError(
            f"{path.parent} has samples, but {path.name} is missing or no JSON object: give another --output_dir"
        )
    names = [name for name in {**found, **parameters} if found.get(name) != parameters.get(name)]
    if names == ["timeout"] and not has_results:  # it decides about results alone
        _write(path, parameters)
    elif names:
        way = "or another --output_dir to begin anew"
        if names == ["timeout"]:
            way = "or remove results.jsonl, and the programs are run again; the samples stay"
        was = ", ".join(f"{name} {shown(found.get(name))} (now {shown(parameters.get(name))})" for name in names)
        raise EvaluationError(
            f"the samples in {path.parent} were made with {was}: give the same again to go on with them, {way}"
        )


def _write(path: Path, parameters: dict[str, Any]) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(parameters, indent=2) + "\n")
    draft.replace(path)
