"""A conversation: what was said, how answers are sampled, and what of it a model is shown.

It knows nothing of models, of files, or of who reads it.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from codellama.config import SamplingParams
from codellama.prompts import Message


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How answers are sampled.

    Attributes:
        temperature: 0 always takes the most probable token.
        top_p: draw from the most probable tokens that together have this probability.
        max_gen_len: tokens of an answer at most; None is what the context leaves.
        seed: of every answer; None draws anew.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """

    temperature: float = 0.2
    top_p: float = 0.95
    max_gen_len: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        SamplingParams(**asdict(self))

    def changed(self, name: str, text: str) -> "Settings":
        """Set one value as it is typed; none stands for None.

        Raises:
            ValueError: there is no such setting, or the text is no value of it.
        """
        values: dict[str, Any] = asdict(self)
        value: Any
        if name not in values:
            raise ValueError(f"{name} is no setting; the settings are {', '.join(values)}")
        is_whole = name in ("max_gen_len", "seed")
        if is_whole and text.lower() == "none":
            return Settings(**values | {name: None})
        try:
            value = int(text) if is_whole else float(text)
        except ValueError:
            expected = "an integer or none" if is_whole else "a number"
            raise ValueError(f"{name} is {text!r}; {expected} was expected") from None
        return Settings(**values | {name: value})


@dataclass
class Conversation:
    """What was said. A question comes in two steps: it is asked, and then answered or left unanswered.

    Attributes:
        system: how to answer; empty is nothing said about it.
        settings: of the next answer.
        messages: user and assistant in turn, answered.
        question: asked, and not answered yet.
        n_dropped: messages at the beginning that models are no longer shown, since they do not fit; an even number.
    """

    system: str = ""
    settings: Settings = field(default_factory=Settings)
    messages: list[Message] = field(default_factory=list)
    question: str | None = None
    n_dropped: int = 0

    def dialog(self) -> list[Message]:
        """Write what a model is shown: system message, what was said and still fits, and the open question."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        asked: list[Message] = [] if self.question is None else [{"role": "user", "content": self.question}]
        return [*system, *self.messages[self.n_dropped :], *asked]

    def answer(self, text: str) -> None:
        """Take the answer to the question."""
        assert self.question is not None, "what is answered was asked"
        self.messages += [{"role": "user", "content": self.question}, {"role": "assistant", "content": text}]
        self.question = None

    def drop_turn(self) -> bool:
        """Stop showing the oldest question and its answer; False where there is none."""
        if self.n_dropped >= len(self.messages):
            return False
        self.n_dropped += 2
        return True

    def take_back(self) -> bool:
        """Make the last question an open one again, without its answer; False where there is none."""
        if self.question is None:
            if not self.messages:
                return False
            question = self.messages[-2]["content"]
            self.forget_turn()
            self.question = question
        return True

    def forget_turn(self) -> bool:
        """Forget the open question, or else the last one with its answer; False where there is none."""
        if self.question is not None:
            self.question = None
            return True
        if not self.messages:
            return False
        del self.messages[-2:]
        self.n_dropped = min(self.n_dropped, len(self.messages))
        return True

    def reset(self) -> None:
        """Begin anew, with the same system message and settings."""
        self.messages, self.question, self.n_dropped = [], None, 0
