"""GeneratedText against a model that looks at the whole text after each token; limits and deltas of a Request."""

import random
import time
from collections.abc import Sequence

import pytest

from codellama.config import SamplingParams
from codellama.errors import ContextLengthError, PromptError
from codellama.generation.request import Completion, Delta, GeneratedText, Request, TokenScore, check_ids
from codellama.generation.stop_string import StopString
from codellama.tokenizer import Tokenizer
from tests.support import bpe

DEMO = Tokenizer(bpe.DEMO)


def spell(text: str) -> list[int]:
    """One id for each byte."""
    return [7 + byte for byte in text.encode()]


def piece_bytes(id: int) -> bytes:
    piece = DEMO.token_piece(id)
    return bytes([id - 7]) if piece.startswith("<0x") else piece.replace(bpe.SPACE, " ").encode()


def words(*pieces: str) -> list[int]:
    """One id for each piece, which must exist."""
    ids = []
    for piece in pieces:
        found = DEMO.encode_infilling(piece)
        assert len(found) == 1, piece
        ids += found
    return ids


def run(text: GeneratedText, ids: Sequence[int]) -> list[str]:
    """Push until a stop string is found, then finish; returns what came out."""
    parts = []
    for id in ids:
        parts.append(text.push(id))
        if text.stopped:
            break
    parts.append(text.finish())
    return parts


def cut(whole: str, stop: Sequence[str]) -> int:
    found = [whole.find(string) for string in stop]
    return min((at for at in found if at >= 0), default=-1)


def make_request(prompt: Sequence[int] = (1, 300, 301), max_seq_len: int = 16, **params: object) -> Request:
    text = GeneratedText(DEMO, SamplingParams(**params).stop)  # type: ignore[arg-type]
    return Request(prompt, SamplingParams(**params), 0, 4096, max_seq_len, text)  # type: ignore[arg-type]


def test_without_stop_strings_nothing_is_held() -> None:
    assert run(GeneratedText(DEMO), spell("aaab")) == ["a", "a", "a", "b", ""]


def test_an_overlap_is_held_back_and_no_more() -> None:
    text = GeneratedText(DEMO, ["aab"])
    assert [text.push(id) for id in spell("aaab")] == ["", "", "a", ""]
    assert (text.stopped, text.text, text.n_tokens) == (True, "a", 1)
    assert text.finish() == ""


def test_a_stop_string_that_did_not_come_is_handed_out() -> None:
    text = GeneratedText(DEMO, ["END"])
    assert run(text, spell("xENx")) == ["x", "", "", "ENx", ""]
    assert run(GeneratedText(DEMO, ["END"]), spell("xEN")) == ["x", "", "", "EN"]


@pytest.mark.parametrize(
    ("pieces", "stop", "expected", "n_tokens"),
    [
        ((" return", " self", "."), ["n s"], " retur", 1),  # across a border
        ((" return", " self", "."), ["return self"], " ", 1),
        ((" return", " self", "."), [" self."], " return", 1),
        ((" return", " self", "."), [" return"], "", 0),
        ((" return", " self", "."), ["f", "e"], " r", 1),  # the earliest wins, whatever its place in the list
        ((" return", " self", "."), ["elf", "tu"], " re", 1),
        ((" return", " self", "."), ["self", "el"], " return s", 2),  # what ends first, wherever tokens end
        (("def", "(", ")"), [")"], "def(", 2),
    ],
)
def test_stop_strings(pieces: tuple[str, ...], stop: list[str], expected: str, n_tokens: int) -> None:
    text = GeneratedText(DEMO, stop)
    parts = run(text, words(*pieces))
    assert "".join(parts) == text.text == expected
    assert text.n_tokens == n_tokens


def test_random_texts_against_the_whole_text() -> None:
    """Whatever the tokens, stop strings and characters: what comes out, when, and how many tokens it took."""
    rng = random.Random(5)
    stopped = 0
    for _ in range(3000):
        source = "".join(
            rng.choice(("a", "a", "b", "b", "c", " ", "\n", "é", "日", "😀")) for _ in range(rng.randrange(12))
        )
        ids = spell(source) if rng.random() < 0.5 else DEMO.encode_infilling(source)
        stop = ["".join(rng.choices("aab \né", k=rng.randrange(1, 4))) for _ in range(rng.randrange(3))]
        text = GeneratedText(DEMO, stop)
        out, content, starts = "", b"", []
        for id in ids:
            starts.append(len(content.decode(errors="ignore")))
            content += piece_bytes(id)
            whole = content.decode(errors="ignore")
            out += text.push(id)
            at = cut(whole, stop)
            assert text.stopped is (at >= 0)
            if text.stopped:
                assert out == whole[:at]
                assert text.n_tokens == sum(start < at for start in starts)
                stopped += 1
                break
            held = max((n for s in stop for n in range(1, len(s)) if whole.endswith(s[:n])), default=0)
            certain = len(whole) - held
            assert out == whole[:certain]
            assert text.n_tokens == (sum(start < certain for start in starts) if stop else len(starts))
        else:
            out += text.finish()
            assert text.n_tokens == len(starts)
            assert out == content.decode()
        assert out == text.text
        assert [string for string in stop if string in out] == []
    assert 500 < stopped < 2500


def test_stop_strings_that_repeat_themselves() -> None:
    rng = random.Random(2)
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=30))
        stop = StopString("".join(rng.choices("ab", k=rng.randint(1, 9))))
        begun = 0
        while begun < len(text):
            piece = text[begun : begun + rng.randint(1, 4)]
            found = stop.push(piece)
            so_far = text[: begun + len(piece)]
            if stop.text in so_far:
                assert found == so_far.index(stop.text) + len(stop.text) - begun
                break
            assert found is None
            assert stop.length == max(n for n in range(len(stop.text)) if so_far.endswith(stop.text[:n]))
            begun += len(piece)


def test_long_stop_strings_and_much_that_is_held_cost_little() -> None:
    text = GeneratedText(DEMO, [f"{'b' * 60_000}{index}" for index in range(64)], strip=True)
    began = time.thread_time()
    for id in spell("a" + " " * 3_000):
        text.push(id)
    assert text.finish() == ""
    assert time.thread_time() - began < 5  # it takes hundredths of a second; 40, where all that is held is compared
    assert text.text == "a"


def test_white_space_is_stripped_around_and_kept_inside() -> None:
    rng = random.Random(6)
    for _ in range(2000):
        source = "".join(rng.choice("  \n\t\u3000abS") for _ in range(rng.randrange(10)))
        stop = ["S"] if rng.random() < 0.5 else []
        text = GeneratedText(DEMO, stop, strip=True)
        out = ""
        for part in run(text, spell(source)):
            out += part
            assert out == out.strip(), "white space at the end comes only before more text"
        at = cut(source, stop)
        assert out == text.text == (source if at < 0 else source[:at]).strip(), repr(source)


def test_stripping_streams_each_word_as_it_comes() -> None:
    text = GeneratedText(DEMO, strip=True)
    assert run(text, spell(" \na  b \n")) == ["", "", "a", "", "", "  b", "", "", ""]


@pytest.mark.parametrize(
    ("source", "expected"), [(" x", "x"), ("  x", " x"), ("x y", "x y"), ("", ""), (" ", ""), ("\n x", "\n x")]
)
def test_the_implicit_space_is_dropped_once(source: str, expected: str) -> None:
    text = GeneratedText(DEMO, drop_space=True)
    assert "".join(run(text, spell(source))) == text.text == expected
    kept = GeneratedText(DEMO)
    assert "".join(run(kept, spell(source))) == source


def test_the_implicit_space_and_a_stop_string() -> None:
    text = GeneratedText(DEMO, [" a"], drop_space=True)
    assert "".join(run(text, spell(" b a"))) == "b"
    text = GeneratedText(DEMO, [" a"], drop_space=True)
    assert "".join(run(text, spell(" ab"))) == ""


def test_characters_split_over_tokens() -> None:
    text = GeneratedText(DEMO, ["日"])
    assert [text.push(id) for id in spell("é日")] == ["", "é", "", "", ""]
    assert (text.stopped, text.text, text.n_tokens) == (True, "é", 2)


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    text = GeneratedText(DEMO)
    assert run(text, spell("a😀")[:-1]) == ["a", "", "", "", "\ufffd"]


def test_a_stop_string_behind_a_broken_character_keeps_its_tokens_out() -> None:
    """The token that shows that a character is broken does not have a share in its U+FFFD."""
    text = GeneratedText(DEMO, ["def"])
    assert "".join(run(text, [*spell("a"), 7 + 0xC3, *words("def")])) == "a\ufffd"
    assert text.n_tokens == 2


@pytest.mark.parametrize(("length", "max_gen_len", "n_max"), [(1, None, 15), (15, None, 1), (3, 5, 5), (12, 9, 4)])
def test_n_max(length: int, max_gen_len: int | None, n_max: int) -> None:
    assert make_request([1] * length, max_gen_len=max_gen_len).n_max == n_max


@pytest.mark.parametrize(("length", "max_gen_len"), [(16, None), (16, 1), (17, None), (17, 0), (100, 5)])
def test_a_prompt_without_room_is_refused(length: int, max_gen_len: int | None) -> None:
    with pytest.raises(ContextLengthError, match=f"the prompt has {length} tokens, but max_seq_len is 16") as caught:
        make_request([1] * length, max_gen_len=max_gen_len)
    assert (caught.value.prompt_length, caught.value.max_seq_len) == (length, 16)


def test_nothing_to_generate_needs_no_room() -> None:
    request = make_request([1] * 16, max_gen_len=0, echo=True, logprobs=True)
    assert (request.n_max, request.scores_prompt, request.prefilling) == (0, True, True)
    assert request.scores == [TokenScore(0.0)]


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([], PromptError, "gap 2 holds no token ids"),
        ([1, 4096], PromptError, "gap 2 holds id 4096 at 1; the vocabulary has ids 0 to 4095"),
        ([-1], PromptError, "gap 2 holds id -1 at 0"),
        ([1, 2.0], TypeError, r"gap 2 holds 2\.0 at 1"),
        ([True], TypeError, "gap 2 holds True at 0"),
        ("12", TypeError, "gap 2 is '12'; a list of integer"),
    ],
)
def test_bad_ids(ids: Sequence[int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_ids(ids, 4096, "gap 2")
    with pytest.raises(error, match=message):
        Request(ids, SamplingParams(), 0, 4096, 16, None, "gap 2")


def finish(request: Request, ids: Sequence[int], scored: bool = False) -> tuple[Completion, list[Delta]]:
    """Append ids until the request ends."""
    deltas: list[Delta] = []
    request.on_delta = deltas.append
    for id in ids:
        assert request.finish_reason is None
        request.append(id, TokenScore(-float(id)) if scored else None)
        if request.finish_reason is not None:
            break
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == request.finish_reason
    completion = request.completion()
    assert "".join(delta.text for delta in deltas) == completion.text
    return completion, deltas


def test_the_end_of_the_row() -> None:
    ids = words("def", "(", ")")
    completion, deltas = finish(make_request(max_gen_len=3, logprobs=True), ids, scored=True)
    assert completion == Completion(tuple(ids), "def()", tuple(TokenScore(-float(id)) for id in ids), "length")
    assert [delta.tokens for delta in deltas] == [(id,) for id in ids]


def test_a_stop_token_is_not_returned() -> None:
    ids = words("def", "(")
    request = make_request(stop_tokens=[2], logprobs=True)
    completion, deltas = finish(request, [*ids, 2, 300], scored=True)
    assert completion == Completion(tuple(ids), "def(", tuple(TokenScore(-float(id)) for id in ids), "stop")
    assert deltas[-1] == Delta("", (), (), "stop")


def test_a_stop_string_cuts_tokens_and_scores() -> None:
    ids = words("def", "(", ")", ".")
    completion, _ = finish(make_request(stop=["()"], logprobs=True), ids, scored=True)
    assert completion == Completion((ids[0],), "def", (TokenScore(-float(ids[0])),), "stop")


def test_a_stop_string_leaves_the_prompt_alone() -> None:
    request = make_request(stop=["def"], echo=True, logprobs=True)
    request.scores += [TokenScore(-1.0), TokenScore(-2.0)]  # the engine's, of the prompt
    completion, _ = finish(request, words("def"), scored=True)
    assert completion.tokens == (1, 300, 301)
    assert completion.scores == (TokenScore(0.0), TokenScore(-1.0), TokenScore(-2.0))


def test_deltas_are_the_result() -> None:
    """Whatever the tokens, and whatever ends it: joined deltas are the completion, in text, tokens and scores."""
    rng = random.Random(8)
    ends = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
    for _ in range(3000):
        source = "".join(rng.choice(("a", "a", "b", " ", "\n", "é", "😀")) for _ in range(rng.randrange(1, 12)))
        ids = spell(source) if rng.random() < 0.5 else DEMO.encode_infilling(source)
        ids = [rng.choice([id, id, id, id, DEMO.suffix_id or 0]) for id in ids]
        request = make_request(
            stop=["".join(rng.choices("aab \né", k=rng.randrange(1, 4))) for _ in range(rng.randrange(3))],
            stop_tokens=[ids[-1]] if rng.random() < 0.3 else [],
            max_gen_len=rng.randrange(1, 14),
            logprobs=rng.random() < 0.5,
            echo=rng.random() < 0.5,
        )
        if request.scores_prompt:  # the engine's, of the prompt
            request.scores += [TokenScore(-1.0), TokenScore(-2.0)]
        deltas: list[Delta] = []
        request.on_delta = deltas.append
        for place, id in enumerate(ids):
            request.append(id, TokenScore(-float(place)) if request.params.logprobs else None)
            if request.finish_reason is not None:
                break
        else:
            if rng.random() < 0.5:
                request.finish("cancelled")
            else:
                request.fail(LookupError())
        done = request.completion()
        ends[done.finish_reason] += 1
        assert "".join(delta.text for delta in deltas) == done.text
        assert sum((delta.tokens for delta in deltas), ()) == done.tokens
        assert sum((delta.scores for delta in deltas), ()) == done.scores
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [done.finish_reason]
        assert len(done.scores) == len(done.tokens) * request.params.logprobs
    assert min(ends.values()) > 100


def test_special_pieces_are_tokens_and_no_text() -> None:
    assert DEMO.suffix_id is not None
    ids = [*words("def"), DEMO.suffix_id, *words("(")]
    completion, _ = finish(make_request(max_gen_len=3), ids)
    assert (completion.tokens, completion.text) == (tuple(ids), "def(")


def test_a_receiver_that_raises_at_the_end_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def explode(delta: Delta) -> None:
        raise LookupError("from the receiver")

    request = make_request()
    request.on_delta = explode
    error = ValueError("what ended it")
    request.fail(error)
    request.fail(LookupError("a second end"))
    assert (request.finish_reason, request.error) == ("error", error)
    assert "the receiver of the prompt raised LookupError: from the receiver" in caplog.text


def test_cancelling_hands_out_what_was_held() -> None:
    deltas: list[Delta] = []
    request = make_request(stop=["def("])
    request.on_delta = deltas.append
    request.append(words("def")[0], None)
    request.finish("cancelled")
    assert [(delta.text, delta.finish_reason) for delta in deltas] == [("", None), ("def", "cancelled")]
    assert request.completion().text == "def"


def test_random_numbers_are_the_seeds() -> None:
    first, second, other = (Request([1], SamplingParams(), seed, 4096, 16) for seed in (7, 7, 8))
    drawn = [request.rng.random() for request in (first, second, other)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
