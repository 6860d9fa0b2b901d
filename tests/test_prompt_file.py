"""Prompts from files: their bytes, their one gap, and what is said of others."""

import io
import sys
from pathlib import Path

import pytest

from codellama import PromptError, read_prompt, split_prompt


def test_a_text_is_read_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "é = 1\r\n\ty\n".encode()
    (tmp_path / "code.py").write_bytes(content)
    assert read_prompt(str(tmp_path / "code.py")) == "é = 1\r\n\ty\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert read_prompt("-") == "é = 1\r\n\ty\n"


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "binary").write_bytes(b"ok \xff\xfe")
    with pytest.raises(PromptError, match=r"absent\.py cannot be read: No such file or directory"):
        read_prompt(str(tmp_path / "absent.py"))
    with pytest.raises(PromptError, match="cannot be read: Is a directory"):
        read_prompt(str(tmp_path))
    with pytest.raises(PromptError, match=r"binary is not UTF-8 text \(invalid start byte at 3\)"):
        read_prompt(str(tmp_path / "binary"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(PromptError, match=r"^standard input is not UTF-8 text"):
        read_prompt("-")


def test_a_text_is_split_at_its_gap() -> None:
    assert split_prompt("a <FILL>\n b") == ("a ", "\n b")
    assert split_prompt("<FILL>") == ("", "")


@pytest.mark.parametrize(("text", "count"), [("", 0), ("<fill>", 0), ("<FILL> <FILL>", 2)])
def test_there_must_be_one_gap(text: str, count: int) -> None:
    with pytest.raises(PromptError, match=f"holds {count} <FILL> markers; exactly one was expected"):
        split_prompt(text)


def test_only_world_rank_0_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert read_prompt("nowhere") == ""
    assert split_prompt("no gap") == ("", "")
