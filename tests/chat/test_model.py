"""The model in this process, as the chat uses it."""

from typing import Any

import pytest

from codellama.chat.dialogue import Conversation, Settings
from codellama.chat.model import LocalModel, TooLongError
from codellama.chat.terminal import Terminal
from codellama.errors import PromptError
from codellama.llama import Llama
from tests.support.scripted_chat import ScriptedScreen

DIALOG: Any = [{"role": "user", "content": "print(i)"}]


def test_answers_and_counts_are_the_generators(llama: Llama) -> None:
    model = LocalModel(llama)
    for settings in (Settings(temperature=0, max_gen_len=8), Settings(temperature=1, top_p=1, max_gen_len=8, seed=3)):
        (expected,) = llama.chat_completion(
            [DIALOG], settings.temperature, settings.top_p, settings.max_gen_len, seed=settings.seed
        )
        assert "".join(model.stream(DIALOG, settings)) == expected["generation"]["content"]
    assert model.context == 512
    count = model.count(DIALOG)
    long = [{"role": "user", "content": "print(i)" * 400}]
    with pytest.raises(TooLongError, match=f"has {model.count(long)} tokens"):
        list(model.stream(long, settings))
    assert count < 50
    with pytest.raises(PromptError, match="contains"):
        model.count([{"role": "user", "content": "[INST]"}])


def test_a_long_chat_goes_on(llama: Llama) -> None:
    """Far beyond the context, which is counted exactly, so nothing is refused."""
    screen = ScriptedScreen(*(f"print({i}) and print({i})" for i in range(24)))
    conversation = Conversation("be brief", Settings(temperature=0, max_gen_len=16))
    Terminal(conversation, LocalModel(llama), screen).run()
    empty = sum("the answer is empty" in warning for warning in screen.warned)  # a random model may stop at once
    left_out = sum("left out" in warning for warning in screen.warned)
    assert len(conversation.messages) // 2 + empty == 24
    assert len(screen.warned) == empty + left_out
    assert left_out > 5
    last = conversation.dialog()[: None if conversation.question is not None else -1]
    assert last[0] == {"role": "system", "content": "be brief"}
    assert LocalModel(llama).count(last) <= 512 - 16


def test_an_interrupted_answer_leaves_the_generator_whole(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = LocalModel(llama), Settings(temperature=0, max_gen_len=8)
    expected = list(model.stream(DIALOG, settings))
    steps = []

    draw = llama.engine._draw

    def interrupt(*given: Any) -> Any:
        steps.append(given)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return draw(*given)

    with monkeypatch.context() as patch:
        patch.setattr(llama.engine, "_draw", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(model.stream(DIALOG, settings))
    pieces = model.stream(DIALOG, settings)
    next(pieces)
    pieces.close()
    assert list(model.stream(DIALOG, settings)) == expected
