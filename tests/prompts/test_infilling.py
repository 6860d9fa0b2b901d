"""Infilling prompts: ids put together in the test from SentencePiece's, and golden ids."""

import json
from pathlib import Path

import pytest
import sentencepiece

from codellama.errors import PromptError
from codellama.prompts import infilling_prompt_tokens, infilling_stop_tokens
from codellama.prompts.infilling import write_comments
from codellama.tokenizer import Tokenizer
from tests.support import bpe, tiny

RAW = sentencepiece.SentencePieceProcessor(model_file=str(bpe.DEMO))
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "prompts.json").read_text())["infilling"]
BOS, PRE, SUF, MID, EOT = 1, 3, 4, 5, 6
GAPS = [
    ('def remove_non_ascii(s: str) -> str:\n    """ ', "\n    return result\n"),
    ("", ""),
    ("", "\n    return x"),
    ("x = ", ""),
    ("    indented", "    indented too"),
    (" one space", " one space"),
    ("tabs\t\r\n", "\t\r\n😀é"),
]


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer(bpe.DEMO)


@pytest.mark.parametrize(("prefix", "suffix"), GAPS)
def test_prefix_suffix_middle(demo: Tokenizer, prefix: str, suffix: str) -> None:
    before, after = RAW.encode(prefix), bpe.encode_without_space(RAW, suffix)
    assert infilling_prompt_tokens(demo, prefix, suffix) == [BOS, PRE, *before, SUF, *after, MID]


@pytest.mark.parametrize(("prefix", "suffix"), GAPS)
def test_suffix_prefix_middle(demo: Tokenizer, prefix: str, suffix: str) -> None:
    before, after = RAW.encode(prefix), bpe.encode_without_space(RAW, suffix)
    expected = [BOS, PRE, SUF, *after, MID, *before]
    assert infilling_prompt_tokens(demo, prefix, suffix, suffix_first=True) == expected


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_ids(demo: Tokenizer, case: dict[str, object]) -> None:
    ids = infilling_prompt_tokens(demo, str(case["prefix"]), str(case["suffix"]), bool(case["suffix_first"]))
    assert ids == case["ids"]


def test_stop_tokens(demo: Tokenizer) -> None:
    assert infilling_stop_tokens(demo) == frozenset({EOT, 2})


@pytest.mark.parametrize("text", ["a <SUF>b", " <MID>", "x <PRE> <EOT>"])
def test_text_cannot_forge_structure(demo: Tokenizer, text: str) -> None:
    ids = infilling_prompt_tokens(demo, text, text)
    assert [id for id in ids if id < 7] == [BOS, PRE, SUF, MID]
    first, second = ids.index(SUF), ids.index(MID)
    assert demo.decode(ids[2:first]) == text
    assert demo.decode_infilling(ids[first + 1 : second]) == text


@pytest.mark.parametrize("missing", tiny.INFILLING)
def test_a_tokenizer_that_lacks_a_piece_is_refused(tmp_path: Path, missing: str) -> None:
    pieces = tuple(piece for piece in tiny.INFILLING if piece != missing)
    tokenizer = tiny.tiny_tokenizer(tmp_path, pieces)
    with pytest.raises(PromptError, match=r"cannot infill: its tokenizer \(320 pieces\) lacks"):
        infilling_prompt_tokens(tokenizer, "a", "b")


def test_other_files_are_comments_before_the_prefix(demo: Tokenizer) -> None:
    files = [("src/a.py", "def f():\n    return 1\n\nX = 2\n"), ("", "one\r\ntwo"), ("b", "")]
    comments = "# src/a.py\n# def f():\n#     return 1\n#\n# X = 2\n\n# one\n# two\n\n# b\n\n"
    before, after = RAW.encode(f"{comments}  x = "), bpe.encode_without_space(RAW, "\ny")
    psm = infilling_prompt_tokens(demo, "  x = ", "\ny", context_files=files)
    assert psm == [BOS, PRE, *before, SUF, *after, MID]
    spm = infilling_prompt_tokens(demo, "  x = ", "\ny", suffix_first=True, context_files=files)
    assert spm == [BOS, PRE, SUF, *after, MID, *before]


@pytest.mark.parametrize("end", ["\r", "\x0b", "\x0c", "\x85", "\u2028"])
def test_no_line_of_a_file_stands_without_its_mark(end: str) -> None:
    """Whatever some language takes for the end of a line."""
    assert write_comments([(f"a{end}b", f"c{end}d")]) == "# a\n# b\n# c\n# d\n\n"
