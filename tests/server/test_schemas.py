"""From OpenAI's words to prompts: the same ids as the library makes, and the parameters that were asked for."""

import pytest
from pydantic import BaseModel, ValidationError

from codellama.errors import GrammarError, PromptError
from codellama.generation.prompt import PromptMaker
from codellama.grammar import Grammar
from codellama.prompts import dialog_prompt_tokens, infilling_prompt_tokens
from codellama.server.llama_cpp import InfillRequest, LlamaCppRequest
from codellama.server.markers import split_markers
from codellama.server.schemas import ChatRequest, CompletionRequest
from codellama.tokenizer import Tokenizer


@pytest.fixture
def maker(tokenizer: Tokenizer) -> PromptMaker:
    return PromptMaker(tokenizer, tokenizer.n_words, 512, seed=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<PRE> a <SUF>b <MID>", ("a", "b")),
        ("<PRE>  a  <SUF> b  <MID>", (" a ", " b ")),
        ("<PRE>  <SUF> <MID>", ("", "")),
        ("<PRE> a\r\n <SUF>\r\nb <MID>", ("a\r\n", "\r\nb")),
        ("<PRE>a<SUF>b<MID>", ("a", "b")),
        ("<PRE> a <MID>", ("<PRE> a <MID>", None)),
        (" <PRE> a <SUF>b <MID>", (" <PRE> a <SUF>b <MID>", None)),
        ("<PRE> a <SUF>b <MID>\n", ("<PRE> a <SUF>b <MID>\n", None)),
    ],
)
def test_markers(tokenizer: Tokenizer, text: str, expected: tuple[str, str | None]) -> None:
    assert split_markers(text, tokenizer) == expected


def test_a_gap_is_the_same_by_markers_and_by_suffix(maker: PromptMaker, tokenizer: Tokenizer) -> None:
    written = CompletionRequest(prompt="<PRE> def f(): <SUF>\r\n x <MID>")
    named = CompletionRequest(prompt="def f():", suffix="\r\n x")
    expected = infilling_prompt_tokens(tokenizer, "def f():", "\r\n x")
    assert [prompt.tokens for prompt in written.prompts(maker, tokenizer)] == [expected]
    assert [prompt.tokens for prompt in named.prompts(maker, tokenizer)] == [expected]


def test_prompts_of_every_kind(maker: PromptMaker, tokenizer: Tokenizer) -> None:
    one, two = (tokenizer.encode(text, bos=True, eos=False) for text in ("one", "two"))
    for sent, expected in (("one", [one]), (["one", "two"], [one, two]), (one, [one]), ([one, two], [one, two])):
        made = CompletionRequest(prompt=sent).prompts(maker, tokenizer)
        assert [prompt.tokens for prompt in made] == expected
        assert {prompt.params.stop_tokens for prompt in made} == {frozenset({tokenizer.eos_id})}
        assert made[0].before == "one"


def test_answers_of_one_prompt_have_seeds_of_their_own(maker: PromptMaker, tokenizer: Tokenizer) -> None:
    made = CompletionRequest(prompt=["a", "b"], n=3, seed=-9007199254740991).prompts(maker, tokenizer)
    assert [prompt.seed for prompt in made] == [-9007199254740991 + index for index in (0, 1, 2)] * 2
    assert [prompt.before for prompt in made] == ["a"] * 3 + ["b"] * 3


def test_a_chat_asks_as_the_library_does(maker: PromptMaker, tokenizer: Tokenizer) -> None:
    body = {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "model": "any", "functions": [], "audio": {}, "logit_bias": {"foo": 0}, "best_of": 0, "stream": None,
        "stop": ["", "\n"], "max_tokens": 9, "max_completion_tokens": 7, "top_k": -1, "min_p": 0.25,
        "repetition_penalty": 1.5, "temperature": 0.5, "top_p": None, "logprobs": True, "top_logprobs": 2, "seed": 3,
    }  # fmt: skip
    (prompt,) = ChatRequest.model_validate(body).prompts(maker, tokenizer)
    assert prompt.tokens == dialog_prompt_tokens(tokenizer, body["messages"])
    params = prompt.params
    assert (params.stop, params.max_gen_len, params.top_k, params.min_p) == (("\n",), 7, None, 0.25)
    assert (params.repetition_penalty, params.temperature, params.top_p) == (1.5, 0.5, 0.95)
    assert (params.logprobs, params.top_logprobs, prompt.seed, prompt.strip) == (True, 2, 3, True)


def test_penalties_and_biases(maker: PromptMaker, tokenizer: Tokenizer) -> None:
    last = tokenizer.n_words - 1
    biases = {
        "foo": 0,
        str(last): -100,
        str(last + 1): 1,
        "-1": 1,
        "1e1": 1,
        "\N{SUPERSCRIPT TWO}": 1,
        "9" * 5000: 1,
        "4": 2.5,
    }
    body = CompletionRequest(prompt="a", presence_penalty=-2, frequency_penalty=1.5, logit_bias=biases)
    (prompt,) = body.prompts(maker, tokenizer)
    params = prompt.params
    assert params.logit_bias == ((4, 2.5), (last, -100.0))
    assert (params.presence_penalty, params.frequency_penalty) == (-2, 1.5)
    for wrong in ({"logit_bias": {"1": 101}}, {"presence_penalty": 2.1}, {"frequency_penalty": -3}):
        with pytest.raises(ValidationError):
            CompletionRequest.model_validate({"prompt": "a", **wrong})
    with pytest.raises(ValidationError, match="1025 keys; at most 1024"):
        CompletionRequest(prompt="a", logit_bias={str(id): 0 for id in range(1025)})


def test_formats_of_an_answer(maker: PromptMaker, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    wrapped = {"name": "n", "strict": True, "description": "d", "schema": schema}
    for sent, expected in (
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar.json_object()),
        ({"type": "json_schema", "json_schema": wrapped}, Grammar.json_schema(schema)),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, Grammar.json_schema(True)),
    ):
        body = {"messages": [{"role": "user", "content": "u"}], "n": 3, "response_format": sent}
        made = ChatRequest.model_validate(body).prompts(maker, tokenizer)
        assert [prompt.params.grammar for prompt in made] == [expected] * 3
        matchers = {id(prompt.matcher) for prompt in made}
        assert len(matchers) == (1 if expected is None else 3)  # one for each request, prepared off the event loop
    for sent, reason in (
        ({"type": "json_schema"}, "one was expected"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "frob"}}}, "Invalid type: frob"),
        ({"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}}, "at most 65536"),
    ):
        with pytest.raises(GrammarError, match=reason):
            CompletionRequest.model_validate({"prompt": "a", "response_format": sent}).prompts(maker, tokenizer)


def test_lengths_where_none_is_asked_for(maker: PromptMaker, tokenizer: Tokenizer) -> None:
    (text,) = CompletionRequest(prompt="a").prompts(maker, tokenizer)
    (chat,) = ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}]}).prompts(maker, tokenizer)
    (huge,) = CompletionRequest(prompt="a", max_tokens=4096).prompts(maker, tokenizer)
    assert (text.params.max_gen_len, chat.params.max_gen_len) == (16, None)
    assert maker.request(huge).n_max == 512 - len(huge.tokens)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": []}, "empty list"),
        ({"prompt": [1, 2], "suffix": "x"}, "a text was expected"),
        ({"prompt": [10**6]}, "vocabulary"),
        ({"prompt": "a", "stop": ["x"] * 65}, "at most 64"),
    ],
)
def test_what_is_no_prompt(body: dict[str, object], reason: str, maker: PromptMaker, tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=reason):
        CompletionRequest.model_validate(body).prompts(maker, tokenizer)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"logit_bias": {str(id): "x" for id in range(5000)}}),
        (LlamaCppRequest, {"prompt": [None] * 5000}),
        (LlamaCppRequest, {"prompt": [[None]] * 5000}),
        (LlamaCppRequest, {"logit_bias": [[id, "x"] for id in range(5000)]}),
        (InfillRequest, {"input_prefix": "", "input_suffix": "", "input_extra": [1] * 5000}),
    ],
)
def test_many_wrong_items_are_not_told_one_by_one(kind: type[BaseModel], body: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 10  # one for each type that a field may have
