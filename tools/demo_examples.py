"""Training examples for the demo checkpoint: token ids in the exact prompt formats of the package.

It knows nothing of the optimizer. Every example begins with bos; the formats come from
`codellama.prompts`, so the checkpoint learns exactly what the package will ask of it.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from codellama.prompts.infilling import infilling_prompt_tokens
from codellama.tokenizer import Tokenizer
from tools.demo_corpus import Function, Source
from tools.demo_tasks import TASKS

ASKS = (
    "Write a Python function `{signature}`: {summary}",
    "Write a Python function named `{name}`. {summary}",
    "Write a function `{name}` for this: {summary}",
    "{summary} Write it in Python as `{name}`.",
)
TASK_ASKS = (
    "Write a Python function that {does}.",
    "Write a function that {does}.",
    "Write a Python function `{name}` that {does}.",
    "In Python, write a function which {does}.",
    "Can you write a function that {does}?",
    "I need Python code that {does}.",
)
SYSTEMS = (
    "Answer with Python code.", "You are a helpful assistant.", "Provide answers in Python.", "Be brief.",
    "You write short Python functions.",
)  # fmt: skip
ANSWER = "Here is `{name}`:\n\n```python\n{code}\n```"


@dataclass(frozen=True)
class Example:
    """Token ids and the weight of each in the loss, as a thing to be predicted."""

    ids: list[int]
    weights: list[float]


MIDDLE_STARTS, MIDDLE, ENDS = 10.0, 3.0, 5.0
"""Weights in an infilling example; all else weighs 1. What the middle begins with can be known only by looking back
past the suffix to where the prefix ended: one token in a hundred, which a small model learns last without a push."""


class ExampleMaker:
    """Draws examples from training files: plain text, infilling, whole functions, dialogs."""

    def __init__(self, sources: Sequence[Source], dialogs: Sequence[Function], tokenizer: Tokenizer, seed: int) -> None:
        """Draw files by their length, functions and tasks evenly."""
        self._random = random.Random(seed)
        self._sources = [source for source in sources if len(source.text) > 200]
        self._weights = [len(source.text) for source in self._sources]
        self._functions = list(dialogs)
        self._tokenizer = tokenizer

    def stream(self, dialog_share: float, infilling_share: float) -> Iterator[Example]:
        """Yield examples without end."""
        while True:
            draw = self._random.random()
            if draw < dialog_share:
                yield even(self.dialog())
            elif draw < dialog_share + infilling_share:
                yield self.infilling()
            elif draw < dialog_share + infilling_share + 0.08:
                code = self._random.choice(self._functions).code
                yield even(self._tokenizer.encode(code + "\n", bos=True, eos=True))
            else:
                yield even(self.text())

    def text(self) -> list[int]:
        """Draw a window of a file; eos where the file ends in it."""
        source, start, stop = self._window(600, 3000)
        return self._tokenizer.encode(source.text[start:stop], bos=True, eos=stop == len(source.text))

    def infilling(self) -> Example:
        """Draw a gap: mostly one line behind its indentation, sometimes part of it, sometimes several lines."""
        source, start, stop = self._window(100, 1000)
        window = source.text[start:stop]
        lines = window.splitlines(keepends=True)
        choices = [i for i, line in enumerate(lines) if line.strip()]
        if not choices:
            return even(self._tokenizer.encode(window, bos=True, eos=False))
        index = self._random.choice(choices)
        line = lines[index]
        begin = sum(map(len, lines[:index])) + len(line) - len(line.lstrip())
        end = begin + len(line.strip())
        draw = self._random.random()
        if draw < 0.1:
            begin = self._random.randrange(begin, end)
        elif draw < 0.15:
            end = min(len(window), end + sum(map(len, lines[index + 1 : index + self._random.randint(2, 4)])))
        ids = infilling_prompt_tokens(
            self._tokenizer, window[:begin], window[end:], suffix_first=self._random.random() < 0.5
        )
        assert self._tokenizer.eot_id is not None
        middle = self._tokenizer.encode_infilling(window[begin:end])
        weights = [MIDDLE_STARTS if place < 3 else MIDDLE for place in range(len(middle))]
        return Example([*ids, *middle, self._tokenizer.eot_id], [1.0] * len(ids) + weights + [ENDS])

    def dialog(self) -> list[int]:
        """Draw a chat of one or two turns, at times with a system message."""
        ids: list[int] = []
        system = self._random.choice(SYSTEMS) if self._random.random() < 0.2 else None
        for turn in range(2 if self._random.random() < 0.15 else 1):
            user, answer = self._exchange()
            if system and turn == 0:
                user = f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}"
            ids += self._tokenizer.encode(f"[INST] {user} [/INST] {answer} ", bos=True, eos=True)
        return ids

    def _exchange(self) -> tuple[str, str]:
        if self._random.random() < 0.2:
            name, (does, code) = self._random.choice(list(TASKS.items()))
            return self._random.choice(TASK_ASKS).format(name=name, does=does), ANSWER.format(
                name=name, code=code.strip()
            )
        function = self._random.choice(self._functions)
        return ask(function, self._random), ANSWER.format(name=function.name, code=function.code)

    def _window(self, shortest: int, longest: int) -> tuple[Source, int, int]:
        """Draw a file and a span of characters that begins at the start of a line."""
        source = self._random.choices(self._sources, self._weights)[0]
        length = self._random.randint(shortest, longest)
        start = self._random.randrange(max(1, len(source.text) - length // 2))
        start = source.text.rfind("\n", 0, start) + 1
        return source, start, min(len(source.text), start + length)


def even(ids: list[int]) -> Example:
    """Weigh all ids alike."""
    return Example(ids, [1.0] * len(ids))


def ask(function: Function, draw: random.Random) -> str:
    """Put a function's docstring as a user's request."""
    return draw.choice(ASKS).format(name=function.name, signature=function.signature, summary=function.summary)
