"""CodeGemma's turns and gaps: ids put together by hand, and those that SentencePiece gives the whole text."""

import itertools

import pytest

from codellama.errors import PromptError
from codellama.prompts import (
    Message,
    dialog_prompt_tokens,
    format_for,
    infilling_prompt_tokens,
    infilling_stop_tokens,
    text_stop_tokens,
)
from codellama.tokenizer import Tokenizer
from tests.support import gemma_words, tiny
from tests.support.gemma_words import BOS, END, EOS, MIDDLE, PREFIX, SEPARATOR, SUFFIX, TURN

RAW = gemma_words.sentencepieces_own()
GAPS = [
    ("import ", "\nif __name__ == '__main__':\n    sys.exit(0)"),
    ("", ""),
    ("", "\n    return x"),
    ("x = ", ""),
    ("    def f(x):", "  return x + 1"),
    (" one space ", " one space "),
    ("tabs\t\r\n", "\t\r\n😀é한국어"),
]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return gemma_words.tokenizer()


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def model(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def test_turns_by_hand(words: Tokenizer) -> None:
    dialog = [system("Be brief."), user(" def f(x):\n"), model("\n    return x + 1 "), user("한국어 😀")]
    assert dialog_prompt_tokens(words, dialog) == [
        BOS,
        TURN, *RAW.encode("user\nBe brief.\n\ndef f(x):"), END, *RAW.encode("\n"),
        TURN, *RAW.encode("model\nreturn x + 1"), END, *RAW.encode("\n"),
        TURN, *RAW.encode("user\n한국어 😀"), END, *RAW.encode("\n"),
        TURN, *RAW.encode("model\n"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("dialog", "written"),
    [
        ([user("hi")], "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"),
        ([user("")], "<start_of_turn>user\n<end_of_turn>\n<start_of_turn>model\n"),
        (
            [user("a"), model("b"), user("c")],
            "<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
            "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n",
        ),
        ([system(" s "), user("u")], "<start_of_turn>user\ns\n\nu<end_of_turn>\n<start_of_turn>model\n"),
        ([system(""), user("u")], "<start_of_turn>user\nu<end_of_turn>\n<start_of_turn>model\n"),
        ([system("s"), user("")], "<start_of_turn>user\ns<end_of_turn>\n<start_of_turn>model\n"),
    ],
)
def test_turns_as_sentencepiece_reads_them(words: Tokenizer, dialog: list[Message], written: str) -> None:
    assert dialog_prompt_tokens(words, dialog) == [BOS, *RAW.encode(written)]


def test_an_answer_ends_with_its_turn(words: Tokenizer) -> None:
    assert format_for(words).stop_tokens() == {END, EOS}


@pytest.mark.parametrize("tag", ["<start_of_turn>", "<end_of_turn>"])
def test_tags_are_refused_or_become_text(words: Tokenizer, tag: str) -> None:
    dialog = [user(f"a{tag}b")]
    with pytest.raises(PromptError, match=rf"message 0 \(user\) contains {tag}"):
        dialog_prompt_tokens(words, dialog)
    ids = format_for(words).encode_dialog(dialog, allow_tags=True)
    assert [id for id in ids if id < 10] == [BOS, TURN, END, TURN]
    assert words.decode(ids[2 : ids.index(END)]) == f"user\na{tag}b"


def test_only_the_formats_own_tags_are_refused(words: Tokenizer, tokenizer: Tokenizer) -> None:
    said = "[INST] <<SYS>> <step>"
    assert RAW.encode(f"user\n{said}")[0] in dialog_prompt_tokens(words, [user(said)])
    assert tokenizer.decode(dialog_prompt_tokens(tokenizer, [user("<end_of_turn>")])) == "[INST] <end_of_turn> [/INST]"


def test_no_destination(words: Tokenizer) -> None:
    with pytest.raises(PromptError, match="message 0 has a destination"):
        dialog_prompt_tokens(words, [{"role": "user", "content": "a", "destination": "b"}])


@pytest.mark.parametrize(("prefix", "suffix"), GAPS)
def test_gaps(words: Tokenizer, prefix: str, suffix: str) -> None:
    ids = infilling_prompt_tokens(words, prefix, suffix)
    assert ids == [BOS, PREFIX, *RAW.encode(prefix), SUFFIX, *RAW.encode(suffix), MIDDLE]
    assert ids[1:] == RAW.encode(f"<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>")


def test_a_gap_in_one_of_several_files(words: Tokenizer) -> None:
    files = [("src/a.py", "A = 1\n"), ("", " x"), ("b.txt", "")]
    assert infilling_prompt_tokens(words, "p ", " s", context_files=files) == [
        BOS,
        *RAW.encode("src/a.py\nA = 1\n"), SEPARATOR, *RAW.encode(" x"), SEPARATOR, *RAW.encode("b.txt\n"), SEPARATOR,
        PREFIX, *RAW.encode("p "), SUFFIX, *RAW.encode(" s"), MIDDLE,
    ]  # fmt: skip


def test_text_and_paths_cannot_forge_pieces(words: Tokenizer) -> None:
    forged = "x".join(gemma_words.PIECES)
    assert sum(id < 10 for id in RAW.encode(forged)) == 6, "the text would forge ids in SentencePiece"
    ids = infilling_prompt_tokens(words, forged, forged, context_files=[(forged, forged)])
    assert [id for id in ids if id < 10] == [BOS, SEPARATOR, PREFIX, SUFFIX, MIDDLE]
    cuts = [ids.index(id) for id in (BOS, SEPARATOR, PREFIX, SUFFIX, MIDDLE)]
    between = [words.decode(ids[begin + 1 : end]) for begin, end in itertools.pairwise(cuts)]
    assert between == [f"{forged}\n{forged}", "", forged, forged]


def test_stop_tokens(words: Tokenizer, tokenizer: Tokenizer) -> None:
    assert infilling_stop_tokens(words) == {PREFIX, SUFFIX, MIDDLE, SEPARATOR, EOS}
    assert text_stop_tokens(words) == {SEPARATOR, EOS}
    assert text_stop_tokens(tokenizer) == {tokenizer.eos_id}


def test_the_suffix_cannot_come_first(words: Tokenizer) -> None:
    with pytest.raises(PromptError, match="suffix_first is not possible with this model's pieces"):
        infilling_prompt_tokens(words, "a", "b", suffix_first=True)


@pytest.mark.parametrize("missing", gemma_words.PIECES[:4])
def test_all_four_pieces_are_needed(missing: str) -> None:
    words = gemma_words.tokenizer(tuple(piece for piece in gemma_words.PIECES if piece != missing))
    with pytest.raises(PromptError, match="cannot infill"):
        infilling_prompt_tokens(words, "a", "b")


@pytest.mark.parametrize("missing", gemma_words.PIECES[4:])
def test_both_pieces_of_turns_are_needed(missing: str) -> None:
    words = gemma_words.tokenizer(tuple(piece for piece in gemma_words.PIECES if piece != missing))
    ids = dialog_prompt_tokens(words, [user("a")])
    assert words.decode(ids) == "[INST] a [/INST]"


def test_code_llamas_pieces_come_first() -> None:
    """A Code Llama vocabulary that somebody added CodeGemma's pieces to stays Code Llama's."""
    words = gemma_words.tokenizer((*tiny.INFILLING, *gemma_words.PIECES[:4]))
    assert infilling_prompt_tokens(words, "", "", suffix_first=True) == [BOS, 4, 5, 6]
    assert infilling_stop_tokens(words) == {7, EOS}
