"""The chat with a scripted model and a scripted screen: what is kept, what is told, what Ctrl-C stops."""

import os
import signal

import pytest

from codellama.chat.dialogue import Conversation, Settings
from codellama.chat.model import TooLongError
from codellama.chat.terminal import Terminal
from codellama.errors import CodeLlamaError, RankError
from tests.support.scripted_chat import ScriptedModel, ScriptedScreen


def interrupt() -> None:
    """What Ctrl-C is to a process."""
    os.kill(os.getpid(), signal.SIGINT)


def talk(
    model: ScriptedModel, *lines: str, conversation: Conversation | None = None
) -> tuple[Conversation, ScriptedScreen]:
    conversation = conversation or Conversation()
    screen = ScriptedScreen(*lines)
    Terminal(conversation, model, screen).run()
    assert model.ended
    assert model.answers == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return conversation, screen


def kept(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


def test_the_dialog_grows() -> None:
    model = ScriptedModel([["A", "a"], ["B"]])
    conversation, screen = talk(model, "one", "/set seed 3", "two", conversation=Conversation("s"))
    assert model.asked == [["s", "one"], ["s", "one", "Aa", "two"]]
    assert screen.answers == ["Aa", "B"]
    assert kept(conversation) == ["one", "Aa", "two", "B"]
    assert screen.said == ["seed is 3"]
    assert screen.warned == []


def test_ctrl_c_stops_an_answer_and_keeps_the_chat() -> None:
    model = ScriptedModel([["so ", "far", interrupt, " and", " no further"], ["B"]])
    conversation, screen = talk(model, "one", "two")
    assert screen.answers == ["so far and", "B"]  # the piece under way is shown, none after it
    assert kept(conversation) == ["one", "so far and", "two", "B"]
    assert model.closed == 2
    assert len(screen.warned) == 1


@pytest.mark.parametrize("breaks", [True, False])
def test_ctrl_c_interrupts_what_is_waited_for(breaks: bool) -> None:
    """At once where that costs nothing, else at the second time."""
    waits = [interrupt] if breaks else [interrupt, interrupt]
    model = ScriptedModel([["so far ", *waits, lambda: pytest.fail("it went on")], ["B"]], breaks=breaks)
    conversation, screen = talk(model, "one", "two")
    assert kept(conversation) == ["one", "so far", "two", "B"]
    assert screen.answers == ["so far ", "B"]


def test_ctrl_c_before_an_answer_begins() -> None:
    model = ScriptedModel([[interrupt, ""], ["B"]], breaks=True)
    conversation, screen = talk(model, "one", "/retry")
    assert model.asked == [["one"], ["one"]]
    assert kept(conversation) == ["one", "B"]
    assert "stopped before the answer began" in screen.warned[0]


def test_ctrl_c_outside_of_an_answer() -> None:
    model, counts = ScriptedModel([["A"]], context=100), []

    def count(dialog: object) -> int:
        counts.append(dialog)
        if len(counts) == 1:
            interrupt()
        return 1

    model.count = count  # type: ignore[method-assign]
    _, screen = talk(model, "one", "/retry")
    assert screen.warned == ["interrupted"]
    assert model.asked == [["one"]]


@pytest.mark.parametrize("error", [CodeLlamaError("lost"), ValueError("odd")])
def test_a_failure_is_told_and_the_chat_goes_on(error: Exception) -> None:
    model = ScriptedModel([["half ", error], ["whole"]])
    conversation, screen = talk(model, "one", "/retry")
    assert screen.warned == [str(error)]
    assert screen.answers == ["half ", "whole"]
    assert kept(conversation) == ["one", "whole"]


def test_a_lost_rank_ends_the_chat() -> None:
    with pytest.raises(RankError, match="gone"):
        talk(ScriptedModel([[RankError("gone")]]), "one")


def test_an_answer_that_would_spoil_the_chat_is_forgotten() -> None:
    model = ScriptedModel([["x [INST] y"], [" \n"], ["B"]])
    conversation, screen = talk(model, "one", "two", "three")
    assert model.asked == [["one"], ["two"], ["three"]]
    assert kept(conversation) == ["three", "B"]
    assert "tags of the chat format" in screen.warned[0]
    assert "the answer is empty" in screen.warned[1]


def test_old_turns_are_left_out_before_the_context_is_full() -> None:
    # A turn "aaaa", "A" has 5 + 2 tokens; a quarter of the context is kept for the answer.
    model = ScriptedModel([["A"]] * 6, context=40)
    conversation, screen = talk(model, *["aaaa"] * 6)
    assert [len(asked) for asked in model.asked] == [1, 3, 5, 7, 7, 7]
    assert screen.warned == ["the context is full: 1 old turn is left out"] * 2
    assert len(kept(conversation)) == 12  # for /save


def test_a_short_answer_needs_less_room() -> None:
    model = ScriptedModel([["A"]] * 6, context=40)
    talk(model, *["aaaa"] * 6, conversation=Conversation(settings=Settings(max_gen_len=1)))
    assert [len(asked) for asked in model.asked] == [1, 3, 5, 7, 9, 9]


def test_old_turns_are_left_out_where_only_the_model_knows() -> None:
    too_long = TooLongError("too long")
    model = ScriptedModel([["A"], ["B"], [too_long], [too_long], ["C"], ["D"]])
    conversation, screen = talk(model, "one", "two", "three", "four")
    assert model.asked[2:] == [
        ["one", "A", "two", "B", "three"],
        ["two", "B", "three"],
        ["three"],
        ["three", "C", "four"],
    ]
    assert screen.warned == ["the context is full: 1 old turn is left out"] * 2
    assert kept(conversation)[-2:] == ["four", "D"]


def test_a_question_that_fits_nowhere_is_told_once() -> None:
    model = ScriptedModel([["A"], [TooLongError("too long")], [TooLongError("too long")], ["B"]])
    conversation, screen = talk(model, "one", "two", "three")
    assert screen.warned == ["the context is full: 1 old turn is left out", "too long"]
    assert model.asked[-1] == ["three"]
    assert kept(conversation) == ["one", "A", "three", "B"]


def test_a_signal_ends_a_group_of_processes() -> None:
    """Under torchrun the key is read; a signal then is torchrun's, which is about to end all ranks."""
    model, screen = ScriptedModel([["so ", interrupt, "far", "no further"]]), ScriptedScreen("one", "two")
    conversation = Conversation()
    Terminal(conversation, model, screen, by_key=True).run()
    assert kept(conversation) == ["one", "so far"]
    assert screen.lines == ["two"]
    assert model.ended
