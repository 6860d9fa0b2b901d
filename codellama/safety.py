"""The safety hook: somebody's function that may refuse a chat before it is answered, and an answer before it is read.

It knows nothing of what is safe, of ranks, of HTTP or of torch. docs/safety.md says how a hook is written.
"""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from codellama.errors import CodeLlamaError, SafetyError
from codellama.generation.prompt import Prompt
from codellama.generation.request import Completion, Delta
from codellama.prompts import Message

SafetyHook = Callable[[Sequence[Message]], str | None]
"""Called with a chat that ends with the user's message or with the answer so far; returns None, or why to refuse."""

MAX_HELD = 256
"""Characters of a stream that wait for the end of their sentence; then they are checked without it."""

_END = re.compile(r"""\n|[.!?…]+["')\]*_`]*\s|[。！？]""")


def ask(hook: SafetyHook | None, prompt: Prompt, answer: str | None = None) -> str | None:
    """Ask a hook about a prompt, or about its answer as far as it is written; no hook refuses nothing.

    Args:
        prompt: a chat, or a text that is told as one message of the user: around a gap, what stands on both sides.

    Returns:
        The reason to refuse, or None.

    Raises:
        TypeError: the hook is none, or it answered something else.
    """
    if hook is None:
        return None
    if not callable(hook) or inspect.iscoroutinefunction(hook):
        raise TypeError(f"safety is {hook!r}; a function of the messages was expected, not async")
    messages: list[Message] = [message.copy() for message in prompt.dialog]  # a hook may change its own
    if not messages:
        messages = [{"role": "user", "content": prompt.before + prompt.after}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    reason = hook(messages)
    if reason is not None and (not isinstance(reason, str) or not reason.strip()):
        raise TypeError(f"the safety hook returned {reason!r}; None, or a reason to refuse in words, was expected")
    return reason


def admit(hook: SafetyHook | None, prompt: Prompt) -> Prompt:
    """Return the prompt, unless the hook refuses it.

    Raises:
        SafetyError: it does.
    """
    reason = ask(hook, prompt)
    if reason is not None:
        raise SafetyError(reason)
    return prompt


class AnswerGate:
    """Holds an answer back until the hook has read it, sentence by sentence and line by line."""

    def __init__(self, hook: SafetyHook | None, prompt: Prompt, *, whole: bool = False) -> None:
        """Begin; without a hook everything passes at once, and with whole nothing before the answer's end."""
        self._hook, self._prompt, self._whole = hook, prompt, whole
        self._passed = ""
        self._held: list[Delta] = []

    def push(self, *deltas: Delta) -> Delta:
        """Take the next deltas and return what may be handed on now, which may be an empty delta.

        Tokens and scores wait for the last character of their delta's text, since they spell it. What is held when a
        generation fails or is cancelled is dropped: the hook has not read it.

        Raises:
            SafetyError: the hook refuses the answer; all that is held has been dropped.
        """
        if self._hook is None:
            return _joined(deltas)
        self._held += deltas
        reason = self._held[-1].finish_reason
        if reason in ("error", "cancelled"):
            return Delta("", finish_reason=reason, error=self._held.pop().error)
        if reason is None and self._whole:
            return Delta("")
        text = "".join(delta.text for delta in self._held)
        end = len(text) if reason is not None else complete(text)
        if end:
            refusal = ask(self._hook, self._prompt, self._passed + text[:end])
            if refusal is not None:
                self._held = []
                raise SafetyError(refusal)
            self._passed += text[:end]
        return _joined(self._take(end) if reason is None else self._held)

    def _take(self, end: int) -> list[Delta]:
        """Cut so many characters off what is held; deltas without text go with the text that follows them."""
        taken = []
        while end:
            delta = self._held.pop(0)
            if len(delta.text) > end:
                self._held.insert(0, replace(delta, text=delta.text[end:]))
                delta = Delta(delta.text[:end])
            taken.append(delta)
            end -= len(delta.text)
        return taken


def complete(text: str) -> int:
    """Length of the beginning of a text that consists of whole sentences and lines.

    Where it would become longer than MAX_HELD without an end of one, it is cut between two words.
    """
    ends = [match.end() for match in _END.finditer(text)]
    if ends or len(text) <= MAX_HELD:
        return max(ends, default=0)
    return text.rfind(" ") + 1 or len(text)


@dataclass(frozen=True)
class Refused:
    """A refused chat of a batch call; its prompt is here where it was not run."""

    reason: str
    prompt: Prompt | None = None


class Screening:
    """The hook's part in a batch call over ranks: world rank 0 admits and judges, every rank merges."""

    def __init__(self, hook: SafetyHook | None) -> None:
        """Screen one call."""
        self._hook = hook
        self._chats: list[Prompt | Refused] = []

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Ask about each chat, and return those that may run."""
        for prompt in prompts:
            reason = ask(self._hook, prompt)
            self._chats.append(prompt if reason is None else Refused(reason, prompt))
        return [chat for chat in self._chats if isinstance(chat, Prompt)]

    def judge(self, done: Sequence[tuple[Prompt, Completion]]) -> list[Refused | None]:
        """Ask about each answer, and return for each chat of the call whether it was refused, before or after."""
        answers = (completion.text for _, completion in done)
        return [chat if isinstance(chat, Refused) else self._judge(chat, next(answers)) for chat in self._chats]

    def _judge(self, prompt: Prompt, answer: str) -> Refused | None:
        reason = ask(self._hook, prompt, answer) if answer else None
        return None if reason is None else Refused(reason)

    @staticmethod
    def merge(
        done: Sequence[tuple[Prompt, Completion]], refused: Sequence[Refused | None]
    ) -> list[tuple[Prompt, Completion]]:
        """Put each refused chat in its place, with an empty completion whose error is the refusal."""
        merged, rest = [], iter(done)
        for refusal in refused:
            prompt, completion = next(rest) if refusal is None or refusal.prompt is None else (refusal.prompt, None)
            if refusal is not None:
                completion = Completion((), "", (), "content_filter", SafetyError(refusal.reason))
            assert completion is not None, "what was not run was refused"
            merged.append((prompt, completion))
        return merged


def load_hook(name: str) -> SafetyHook:
    """Find the hook that a command line names as MODULE:FUNCTION.

    Modules of the current folder come first, as with `python -m`.

    Raises:
        ValueError: it has another form, or names something that is not there or is no function.
        CodeLlamaError: the module is there and fails.
    """
    module_name, _, path = str(name).partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")]):
        raise ValueError(f"safety is {name!r}; MODULE:FUNCTION was expected, such as my_filter:check for my_filter.py")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        parents = [module_name[:at] for at, letter in enumerate(module_name + ".") if letter == "."]
        if isinstance(error, ModuleNotFoundError) and error.name in parents:
            raise ValueError(
                f"safety is {name!r}, but there is no module {error.name} in the current folder or installed"
            ) from error
        raise CodeLlamaError(
            f"safety is {name!r}, but {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    try:
        hook = reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise ValueError(f"safety is {name!r}, but {error}") from error
    if not callable(hook) or isinstance(hook, type) or inspect.iscoroutinefunction(hook):
        raise ValueError(
            f"safety is {name!r}, which is {hook!r}; a function that takes the messages and returns None or a reason "
            f"was expected, not async"
        )
    found: SafetyHook = hook
    return found


def keyword_filter(words: Collection[str], reason: str = "This chat holds words that are not allowed.") -> SafetyHook:
    """Make a hook that refuses every message that holds one of these words, in capitals or not.

    Args:
        words: whole words, or phrases of them, between which any white space may stand.
        reason: what the reader is told; the word itself is not.

    Raises:
        TypeError: words is one text.
        ValueError: there are none, or one is empty.
    """
    if isinstance(words, str):
        raise TypeError(f"words is the text {words!r}; a list of words was expected")
    phrases = [r"\s+".join(map(re.escape, word.split())) for word in words]
    if not phrases or not all(phrases):
        raise ValueError(f"words is {list(words)!r}; at least one word was expected, and none that is empty")
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", re.IGNORECASE)

    def check(messages: Sequence[Message]) -> str | None:
        return reason if any(pattern.search(message["content"]) for message in messages) else None

    return check


def _joined(deltas: Sequence[Delta]) -> Delta:
    """Make one delta of several."""
    return Delta(
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.tokens),
        tuple(score for delta in deltas for score in delta.scores),
        deltas[-1].finish_reason if deltas else None,
        deltas[-1].error if deltas else None,
        deltas[-1].stopped_by if deltas else None,
        max((delta.n_reused for delta in deltas), default=0),
        max((delta.n_steps for delta in deltas), default=0),
    )
