"""The real openai SDK against a real socket: what it returns, what it raises, and that leaving frees the rows."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from codellama.assembly import DEMO
from codellama.llama import Llama
from tests.support.serving import ENDLESS, RUNTIME, Serving, wait_until

DIALOG: list[Any] = [{"role": "user", "content": "Write a function that adds two numbers."}]
MODEL = "any-name"


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    serving = Serving()
    with serving as client:
        client.close()
        yield serving


@pytest.fixture(scope="module")
def sdk(serving: Serving) -> Iterator[openai.OpenAI]:
    with client(serving) as made:
        yield made


def client(serving: Serving, **options: Any) -> openai.OpenAI:
    url = f"http://127.0.0.1:{serving.port}/v1"
    return openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60, **options)


def chat_text(chunks: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_models(sdk: openai.OpenAI) -> None:
    (model,) = sdk.models.list().data
    assert (model.id, model.object, model.to_dict()["max_model_len"]) == ("codellama-demo", "model", 2048)
    assert sdk.models.retrieve("some/other-name") == model


def test_a_chat_with_all_that_can_be_asked(sdk: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": DIALOG, "max_completion_tokens": 12, "temperature": 2, "n": 3}
    asked |= {"seed": 7, "logprobs": True, "top_logprobs": 2, "top_p": 1}
    whole = sdk.chat.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) == 3
    assert whole.usage is not None
    generated = 0
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        spelled = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
        assert spelled.decode().strip() == choice.message.content
        assert {len(token.top_logprobs) for token in choice.logprobs.content} == {2}
        assert max(token.logprob for token in choice.logprobs.content) <= 0
        generated += len(choice.logprobs.content)
    assert whole.usage.completion_tokens == generated
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + generated

    chunks = list(sdk.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == generated
    for expected in whole.choices:
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == expected.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == expected.message.content
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + [expected.finish_reason]
        assert expected.logprobs is not None
        scored = [token.token for choice in mine if choice.logprobs for token in choice.logprobs.content or []]
        assert scored == [token.token for token in expected.logprobs.content or []]


def test_a_completion_with_stop_and_offsets(sdk: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "import os\n", "temperature": 0, "max_tokens": 40}
    free = sdk.completions.create(**asked).choices[0].text
    stop = free[len(free) // 2 :][:3]
    choice = sdk.completions.create(**asked, stop=[stop, "never said"], echo=True, logprobs=1).choices[0]
    assert choice.text == "import os\n" + free[: free.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    places = zip(choice.logprobs.tokens or [], choice.logprobs.text_offset or [], strict=True)
    assert [token for token, at in list(places)[2:-1] if not choice.text.startswith(token, at)] == []
    pieces = [chunk.choices[0].text for chunk in sdk.completions.create(**asked, stop=stop, stream=True)]
    assert "".join(pieces) == free[: free.index(stop)]


@pytest.mark.parametrize(
    ("raised", "asked", "said"),
    [
        (openai.BadRequestError, {"messages": []}, "messages is empty"),
        (openai.BadRequestError, {"messages": DIALOG, "n": 0}, "n: "),
        (openai.BadRequestError, {"messages": DIALOG, "n": 100}, "100 answers"),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "x " * 2100}]}, "max_seq_len is 2048"),
    ],
)
def test_errors_are_the_sdks(sdk: openai.OpenAI, raised: Any, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(raised, match=said) as caught:
        sdk.chat.completions.create(model=MODEL, **asked)
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(raised, match=said):
        sdk.chat.completions.create(model=MODEL, stream=True, **asked)


def test_an_unknown_path(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.embeddings.create(model=MODEL, input="x", encoding_format="float")
    assert caught.value.type == "not_found_error"


def test_a_key_and_a_server_that_is_not_ready() -> None:
    serving = Serving(api_key="right")
    serving._thread.start()
    try:
        wait_until(lambda: serving.server.started)
        with client(serving) as wrong:
            with pytest.raises(openai.AuthenticationError, match="API key") as refused:
                wrong.models.list()
            assert refused.value.type == "authentication_error"
            right = wrong.with_options(api_key="right")
            assert right.models.list().data[0].id == "codellama-demo"
            with pytest.raises(openai.InternalServerError, match="loading") as early:
                right.chat.completions.create(model=MODEL, messages=DIALOG)
            assert early.value.status_code == 503
            right.close()
    finally:
        serving.__exit__()


@pytest.mark.parametrize("read", [1, 3])
def test_a_stream_that_is_closed_early_frees_its_rows(serving: Serving, sdk: openai.OpenAI, read: int) -> None:
    with sdk.completions.create(model=MODEL, **ENDLESS, n=3, stream=True) as chunks:
        for _ in range(read):
            next(chunks)
    assert serving.ends(3) == ["cancelled"] * 3


def test_async(serving: Serving) -> None:
    async def ask() -> None:
        url = f"http://127.0.0.1:{serving.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=60) as sdk:
            asked: dict[str, Any] = {"model": MODEL, "messages": DIALOG, "max_tokens": 20, "seed": 5}
            whole, chunks = await asyncio.gather(
                sdk.chat.completions.create(**asked), sdk.chat.completions.create(**asked, stream=True)
            )
            assert chat_text([chunk async for chunk in chunks]) == whole.choices[0].message.content
            text = await sdk.completions.create(model=MODEL, prompt=[[1, 2], [1, 3]], max_tokens=2)
            assert [choice.index for choice in text.choices] == [0, 1]
            assert [model.id async for model in sdk.models.list()] == ["codellama-demo"]
            with pytest.raises(openai.BadRequestError, match="vocabulary"):
                await sdk.completions.create(model=MODEL, prompt=[10**7])
            endless = await sdk.completions.create(model=MODEL, **ENDLESS, stream=True)
            async for _ in endless:
                break
            await endless.close()

    asyncio.run(ask())
    assert serving.ends(1) == ["cancelled"]


def test_stream_and_whole_are_the_librarys_50_of_50(sdk: openai.OpenAI) -> None:
    llama = Llama.build(
        DEMO, max_seq_len=512, max_batch_size=3, dtype="float32", device="cpu", chunk_size=RUNTIME.chunk_size
    )
    words = ["add", "parse", "count", "reverse", "merge", "find", "sort", "split", "read"]
    kinds = ("chat", "text", "gap")

    def options(index: int) -> dict[str, Any]:
        return {"temperature": 0} if index % 2 else {"temperature": 0.9, "seed": index}

    def expected(index: int) -> str:
        word, drawn = words[index % len(words)], {"top_p": 0.95, "max_gen_len": 12, **options(index)}
        match kinds[index % 3]:
            case "chat":
                dialog: Any = [{"role": "user", "content": f"Write {word}."}]
                return llama.chat_completion([dialog], **drawn)[0]["generation"]["content"]
            case "text":
                return llama.text_completion([f"def {word}(x):\n"], **drawn)[0]["generation"]
            case _:
                return llama.text_infilling([f"def {word}(x):\n    "], ["\n    return x\n"], **drawn)[0]["generation"]

    def ask(index: int, stream: bool) -> str:
        word, asked = words[index % len(words)], {"model": MODEL, "max_tokens": 12, "top_p": 0.95, **options(index)}
        if kinds[index % 3] == "chat":
            messages: Any = [{"role": "user", "content": f"Write {word}."}]
            answer: Any = sdk.chat.completions.create(messages=messages, stream=stream, **asked)
            return chat_text(answer) if stream else answer.choices[0].message.content
        prompt: dict[str, Any] = {"prompt": f"def {word}(x):\n"}
        if kinds[index % 3] == "gap":
            prompt = {"prompt": f"def {word}(x):\n    ", "suffix": "\n    return x\n"}
        answer = sdk.completions.create(**prompt, stream=stream, **asked)
        return "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text

    texts = [expected(index) for index in range(50)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda index: ask(index, stream=False), range(50))) == texts
        assert list(pool.map(lambda index: ask(index, stream=True), range(50))) == texts
    assert len(set(texts)) > 30
