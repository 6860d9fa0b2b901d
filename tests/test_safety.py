"""The safety hook: what it is asked, where streams are cut, refusals on one rank and on two, and hooks by name."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from codellama import CodeLlamaError, Llama, SafetyError, keyword_filter
from codellama.config import SamplingParams
from codellama.generation.prompt import Prompt
from codellama.generation.request import Delta
from codellama.prompts import Message
from codellama.safety import MAX_HELD, AnswerGate, complete, load_hook
from tests.support.distributed import run_ranks

CHATS: list[Any] = [[{"role": "user", "content": text}] for text in ("print(i)", "bad things", "import os")]
GREEDY: dict[str, Any] = {"temperature": 0, "max_gen_len": 40}
PROMPT = Prompt([1], SamplingParams(), 0, "x", dialog=CHATS[0])


class Recorder:
    """A hook that remembers what it was asked, and refuses what a function says."""

    def __init__(self, refuse: Any = lambda text: False) -> None:
        self.asked: list[list[Message]] = []
        self._refuse = refuse

    def __call__(self, messages: Sequence[Message]) -> str | None:
        self.asked.append(list(messages))
        return "No." if self._refuse(messages[-1]["content"]) else None

    @property
    def answers(self) -> list[str]:
        return [messages[-1]["content"] for messages in self.asked if messages[-1]["role"] == "assistant"]


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 0),
        ("One. Two", 5),
        ("3.14 is pi", 0),
        ("One.", 0),  # what follows may go on with the number
        ("x = 1\ny", 6),
        ('He said "Go!" and', 14),
        ("Really?! Yes.\n\nNo", 15),
        ("終わり。次", 4),
        ("w" * MAX_HELD, 0),
        ("w" * (MAX_HELD + 1), MAX_HELD + 1),
        ("w" * 200 + " " + "v" * 200, 201),
    ],
)
def test_sentences_and_lines(text: str, length: int) -> None:
    assert complete(text) == length


def test_a_gate_hands_on_what_was_read_and_nothing_else() -> None:
    hook = Recorder(lambda text: "bad" in text)
    gate = AnswerGate(hook, PROMPT)
    assert gate.push(Delta("One", (1,))) == Delta("")
    assert gate.push(Delta(". Tw", (2, 3))) == Delta("One. ", (1,))  # 2 and 3 spell Tw, too
    assert gate.push(Delta("o.\n", (4,)), Delta("", (5,))) == Delta("Two.\n", (2, 3, 4))
    assert gate.push(Delta("ba", (6,))) == Delta("")
    assert hook.answers == ["One. ", "One. Two.\n"]
    assert hook.asked[0][:-1] == CHATS[0]
    with pytest.raises(SafetyError, match=r"^No\.$"):
        gate.push(Delta("d", (7,), finish_reason="stop"))
    assert hook.answers[-1] == "One. Two.\nbad"


def test_the_end_is_read_even_in_mid_sentence() -> None:
    hook = Recorder()
    gate = AnswerGate(hook, PROMPT)
    assert gate.push(Delta("One", (1,)), Delta("", (2,), finish_reason="length")) == Delta("One", (1, 2), (), "length")
    assert hook.answers == ["One"]


def test_what_was_held_when_a_generation_fails_is_dropped() -> None:
    hook, failure = Recorder(), RuntimeError()
    gate = AnswerGate(hook, PROMPT)
    last = gate.push(Delta("One", (1,)), Delta("", finish_reason="error", error=failure))
    assert (last, hook.asked) == (Delta("", finish_reason="error", error=failure), [])


def test_a_whole_answer_is_read_once() -> None:
    hook = Recorder()
    gate = AnswerGate(hook, PROMPT, whole=True)
    assert gate.push(Delta("One.\nTwo.\n", (1, 2))) == Delta("")
    assert gate.push(Delta("3", (3,), finish_reason="stop")) == Delta("One.\nTwo.\n3", (1, 2, 3), (), "stop")
    assert hook.answers == ["One.\nTwo.\n3"]


@pytest.mark.parametrize("answer", [True, False, "", " ", 1])
def test_a_hook_that_says_neither_is_an_error(answer: Any) -> None:
    with pytest.raises(TypeError, match="None, or a reason"):
        AnswerGate(lambda messages: answer, PROMPT).push(Delta("Hi.\n"))


def test_a_hook_cannot_change_the_chat() -> None:
    def meddle(messages: Any) -> None:
        messages[0]["content"] = "?"
        messages.clear()

    AnswerGate(meddle, PROMPT).push(Delta("Hi.\n"))
    assert CHATS[0][0]["content"] == "print(i)"


def test_a_refused_chat_costs_its_neighbours_nothing(llama: Llama) -> None:
    free = llama.chat_completion(CHATS, logprobs=True, **GREEDY)
    hook = Recorder(lambda text: "bad" in text)
    first, second, third = llama.chat_completion(CHATS, logprobs=True, safety=hook, **GREEDY)
    for found, expected in ((first, free[0]), (third, free[2])):  # scores may differ in their last bits
        assert (found["generation"], found["tokens"]) == (expected["generation"], expected["tokens"])
        assert found.keys() == expected.keys()
    assert second == {
        "generation": {"role": "assistant", "content": ""},
        "finish_reason": "content_filter", "refusal": "No.", "tokens": [], "logprobs": [],
    }  # fmt: skip
    assert hook.asked[:3] == CHATS
    contents = [result["generation"]["content"] for result in free]
    assert hook.asked[3:] == [[*CHATS[i], {"role": "assistant", "content": contents[i]}] for i in (0, 2)]
    after = llama.chat_completion(CHATS, safety=Recorder(lambda text: text == contents[2]), **GREEDY)
    assert [result["finish_reason"] for result in after] == ["length", "length", "content_filter"]
    assert [result["generation"]["content"] for result in after] == [*contents[:2], ""]


def test_a_stream_is_refused_before_and_after(llama: Llama) -> None:
    free = list(llama.stream_chat(CHATS[0], **GREEDY))
    whole = "".join(free)
    hook = Recorder()
    pieces = list(llama.stream_chat(CHATS[0], safety=hook, **GREEDY))
    assert "".join(pieces) == whole
    assert hook.answers == ["".join(pieces[: n + 1]) for n in range(len(pieces))]
    with pytest.raises(SafetyError, match=r"^No\.$"):
        next(llama.stream_chat(CHATS[1], safety=Recorder(lambda text: "bad" in text), **GREEDY))
    got = []
    with pytest.raises(SafetyError):
        got += llama.stream_chat(CHATS[0], safety=Recorder(lambda text: text == whole), **GREEDY)
    assert got == []
    assert list(llama.stream_chat(CHATS[0], **GREEDY)) == free, "nothing is left of what was refused"


def test_a_hook_that_raises_ends_the_call(llama: Llama) -> None:
    def fail(messages: Any) -> None:
        raise KeyError("classifier")

    with pytest.raises(KeyError):
        llama.chat_completion(CHATS, safety=fail)
    with pytest.raises(KeyError):
        list(llama.stream_chat(CHATS[0], safety=fail))
    with pytest.raises(TypeError, match="a function of the messages"):
        llama.chat_completion(CHATS, safety="module:function")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="nor can a safety hook"):
        llama.chat_completion(CHATS, safety=lambda messages: str(llama.score([[1]])))
    assert len(llama.chat_completion(CHATS, **GREEDY)) == 3


def call_all(folder: Path, size: int) -> Any:
    """What a rank gets; the hook of world rank 0 is the one that counts."""
    llama = Llama.build(folder, None, 256, 4, size, dtype="float32", device="cpu", seed=1)
    first = llama.parallel.world_rank == 0
    hook = Recorder(lambda text: "bad" in text) if first else None
    found = [llama.chat_completion(CHATS, safety=hook, **GREEDY)]
    answer = found[0][2]["generation"]["content"]
    found.append(
        llama.chat_completion(CHATS, safety=Recorder(lambda text: text == answer) if first else None, **GREEDY)
    )
    errors = []
    for refuse in (lambda text: "i" in text, lambda text: text == found[0][0]["generation"]["content"]):
        try:
            list(llama.stream_chat(CHATS[0], safety=Recorder(refuse) if first else None, **GREEDY))
        except SafetyError as error:
            errors.append(str(error))
    streamed = list(llama.stream_chat(CHATS[0], safety=hook, **GREEDY))
    return found, errors, "".join(streamed), llama.chat_completion(CHATS, **GREEDY)


@pytest.mark.parametrize("size", [2, 1])
def test_every_rank_gets_the_same_refusals(tiny_folder: Path, size: int, llama: Llama) -> None:
    free = llama.chat_completion(CHATS, **GREEDY)
    first, second = run_ranks(2, call_all, tiny_folder, size)
    assert first[:2] == second[:2]
    (before, after), errors, streamed, last = first
    assert [result["finish_reason"] for result in before] == ["length", "content_filter", "length"]
    assert [result["finish_reason"] for result in after] == ["length", "length", "content_filter"]
    assert [before[0], before[2], after[0], after[1]] == [free[0], free[2], free[0], free[1]]
    assert errors == ["No.", "No."]
    assert (streamed, second[2]) == (free[0]["generation"]["content"], "")
    assert last == second[3] == free


def test_keywords() -> None:
    check = keyword_filter(["bad", "very   evil", "c++"], "Refused.")
    chat: list[Message] = [{"role": "user", "content": ""}]
    for text, refused in {
        "Bad.": 1, "badly": 0, "very\nEvil plan": 1, "very, evil": 0, "in C++ now": 1, "c+": 0, "forbad": 0,
    }.items():  # fmt: skip
        chat[0]["content"] = text
        assert check(chat) == ("Refused." if refused else None), text
    assert check([{"role": "user", "content": "bad"}, {"role": "assistant", "content": "x"}]) == "Refused."
    for words in ([], [""], ["a", " "]):
        with pytest.raises(ValueError, match="at least one word"):
            keyword_filter(words)
    with pytest.raises(TypeError, match="a list of words"):
        keyword_filter("bad")


def test_hooks_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_filter.py").write_text(
        "from codellama import keyword_filter\n"
        "check = keyword_filter(['bad'])\n"
        "class Box:\n    inner = check\n"
        "async def wait(messages): ...\n"
        "number = 3\n"
    )
    (tmp_path / "broken_filter.py").write_text("import own_absence\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert load_hook("own_filter:check")([{"role": "user", "content": "bad"}]) is not None
    assert load_hook("own_filter:Box.inner") is load_hook("own_filter:check")
    assert sys.path.count(str(tmp_path)) == 1
    for name, said in {
        "own_filter": "MODULE:FUNCTION was expected", "own_filter:": "MODULE:FUNCTION", "own-filter:check": "MODULE:",
        "own_filter.py:check": "there is no module own_filter.py", "absent:check": "there is no module absent in",
        "own_filter:absent": "no attribute 'absent'", "own_filter:number": "which is 3",
        "own_filter:wait": "not async", "own_filter:Box": "a function that takes",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=said):
            load_hook(name)
    with pytest.raises(CodeLlamaError, match=r"broken_filter cannot be imported: ModuleNotFoundError.*own_absence"):
        load_hook("broken_filter:check")
