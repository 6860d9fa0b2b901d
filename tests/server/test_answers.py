"""Answers against tokenizer and deltas: places of tokens in the returned text, as a whole and as a stream."""

from typing import Any

import pytest

from codellama.generation.prompt import Prompt, PromptMaker
from codellama.generation.request import Delta, TokenScore
from codellama.server.answers import Answer
from codellama.server.schemas import CompletionRequest
from codellama.tokenizer import Tokenizer
from tests.support import gemma_words


def answer(tokenizer: Tokenizer, body: dict[str, Any], generated: list[int]) -> tuple[dict[str, Any], list[Any]]:
    """Answer a completion with given ids, one delta each, as the engine hands them out."""
    request = CompletionRequest.model_validate({"logprobs": 0, "max_tokens": 400, **body})
    maker = PromptMaker(tokenizer, tokenizer.n_words, 512, seed=0)
    (prompt,) = request.prompts(maker, tokenizer)
    made = Answer([prompt], tokenizer, "m", chat=False, echo=request.echo)
    chunks = [chunk["choices"][0] for delta in deltas(maker, prompt, generated) for chunk in made.push(0, delta)]
    (choice,) = made.whole()["choices"]
    return choice, chunks


def deltas(maker: PromptMaker, prompt: Prompt, generated: list[int]) -> list[Delta]:
    found: list[Delta] = []
    request = maker.request(prompt)
    request.on_delta = found.append
    if request.scores_prompt:
        request.scores += [TokenScore(-1.0)] * (len(prompt.tokens) - 1)
    for token in generated:
        request.append(token, TokenScore(-2.0))
    request.finish("length")
    return found


@pytest.mark.parametrize("prompt", ["import os", " import os", "\tx\n", "naïve 🦙", "", "def f(x):"])
@pytest.mark.parametrize("echo", [True, False])
def test_tokens_lie_where_their_offsets_say(tokenizer: Tokenizer, prompt: str, echo: bool) -> None:
    generated = tokenizer.encode("for i in x:\n é🦙 return", bos=False, eos=False)
    choice, chunks = answer(tokenizer, {"prompt": prompt, "echo": echo}, generated)
    text, found = choice["text"], choice["logprobs"]
    shown = [token for token in zip(found["tokens"], found["text_offset"], strict=True) if token[0]]
    # The first token of a text is spelled with SentencePiece's implicit space, which the text does not have.
    implicit = echo or prompt == ""
    first, at = shown[0]
    assert (at, text.startswith(first.removeprefix(" ") if implicit else first)) == (0, True)
    assert [spelled for spelled, at in shown[1:] if "\ufffd" not in spelled and not text.startswith(spelled, at)] == []
    assert sum("\ufffd" in spelled and text[at] not in "ï🦙é" for spelled, at in shown) == 0
    assert found["text_offset"] == sorted(found["text_offset"])
    streamed = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    for key in found:
        assert [value for piece in streamed for value in piece[key]] == found[key]


@pytest.mark.parametrize("prompt", ["import os", " import os", "", "  한 x"])
@pytest.mark.parametrize("echo", [True, False])
def test_offsets_without_an_implicit_space(prompt: str, echo: bool) -> None:
    """Every token lies where it is spelled, the first one, too: its space is the text's own."""
    words = gemma_words.tokenizer()
    choice, _ = answer(words, {"prompt": prompt, "echo": echo}, words.encode_infilling(" import os x"))
    text, found = choice["text"], choice["logprobs"]
    assert text == (prompt if echo else "") + " import os x"
    whole = [
        (token, at) for token, at in zip(found["tokens"], found["text_offset"], strict=True) if "\ufffd" not in token
    ]
    assert [text[at : at + len(token)] for token, at in whole] == [token for token, _ in whole]


def test_what_is_not_returned_has_its_place_at_the_gap(tokenizer: Tokenizer) -> None:
    generated = tokenizer.encode_infilling("x + 1")
    choice, _ = answer(tokenizer, {"prompt": "def f(x):", "suffix": "print(i)", "echo": True}, generated)
    assert choice["text"] == "def f(x):x + 1"
    offsets, n = choice["logprobs"]["text_offset"], len(generated)
    at = len("def f(x):")
    assert (max(offsets[:-n]), offsets[-n - 1], offsets[-n]) == (at, at, at)  # the suffix's, MID, and the first after
    lengths = [len(tokenizer.token_bytes(token)) for token in generated]
    assert offsets[-n:] == [at + sum(lengths[:index]) for index in range(n)]


def test_a_token_that_is_given_is_certain(tokenizer: Tokenizer) -> None:
    choice, _ = answer(tokenizer, {"prompt": "x", "echo": True}, tokenizer.encode_infilling(" = 1"))
    assert choice["logprobs"]["token_logprobs"][:2] == [0, -1]  # a number, where OpenAI's own clients want one
    assert choice["logprobs"]["top_logprobs"][0] == {}


def test_of_rivals_that_are_spelled_alike_the_more_probable_is_told(tokenizer: Tokenizer) -> None:
    maker = PromptMaker(tokenizer, tokenizer.n_words, 512, seed=0)
    (prompt,) = CompletionRequest(prompt="x", logprobs=2).prompts(maker, tokenizer)
    made = Answer([prompt], tokenizer, "m", chat=False)
    bytes_of_none = [id for id in range(tokenizer.n_words) if tokenizer.token_piece(id) in ("<0xE2>", "<0xF0>")]
    score = TokenScore(-3.0, tuple(zip(bytes_of_none, (-0.5, -2.0), strict=True)))
    (chunk,) = made.push(0, Delta("a", (5,), (score,)))
    assert chunk["choices"][0]["logprobs"]["top_logprobs"] == [{"\ufffd": -0.5}]
