"""What can be typed beside questions: commands that begin with a slash.

A command changes the conversation and says something; it knows nothing of terminals.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from codellama.chat import transcript
from codellama.chat.dialogue import Conversation
from codellama.chat.model import Model
from codellama.errors import CodeLlamaError, PromptError
from codellama.flags import guess

_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)


class CommandError(CodeLlamaError):
    """A command that is not there, or that lacks something."""


@dataclass(frozen=True)
class Reply:
    """What is to be done after a line was understood.

    Attributes:
        text: to be shown.
        asks: the conversation has a question that is to be answered.
        ends: the chat is over.
    """

    text: str = ""
    asks: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Command:
    """A command: what follows its name, what it is for, and what it does."""

    value: str
    purpose: str
    act: Callable[[Conversation, str, Model], Reply]


def understand(conversation: Conversation, typed: str, model: Model) -> Reply:
    """Do what was typed: a command, or a question, which becomes the open one.

    A question that begins like a command is written with two slashes; a path is no command.

    Raises:
        CodeLlamaError, ValueError, OSError: it cannot be done; nothing has changed.
    """
    found = _COMMAND.fullmatch(typed.strip())
    if found is None:
        if any("\ud800" <= letter <= "\udfff" for letter in typed):
            raise PromptError("what was typed is not UTF-8 text")
        conversation.question = typed[1:] if typed.startswith("//") else typed
        return Reply(asks=True)
    name, value = found[1], (found[2] or "").strip()
    if name not in COMMANDS:
        meant = guess(name, COMMANDS)
        hint = f"did you mean /{meant}?" if meant else "/help lists the commands"
        raise CommandError(f"/{name} is no command; {hint} A question that begins with it is written //{name}")
    command = COMMANDS[name]
    if value and not command.value:
        raise CommandError(f"/{name} takes nothing, but {value!r} follows")
    if command.value and not command.value.startswith("[") and not value:
        raise CommandError(f"/{name} needs {command.value}: {command.purpose}")
    return command.act(conversation, value, model)


def _system(conversation: Conversation, value: str, model: Model) -> Reply:
    conversation.system = "" if value == "none" else value
    return Reply(
        "there is no system message" if value == "none" else "the system message counts from the next answer on"
    )


def _set(conversation: Conversation, value: str, model: Model) -> Reply:
    name, _, text = value.replace("=", " ", 1).partition(" ")
    name = name.replace("-", "_")
    conversation.settings = conversation.settings.changed(name, text.strip())
    return Reply(f"{name} is {getattr(conversation.settings, name)}")


def _show(conversation: Conversation, value: str, model: Model) -> Reply:
    settings = conversation.settings
    lines = [
        f"system       {conversation.system or 'none'}",
        *(f"{name:12} {'none' if found is None else found}" for name, found in vars(settings).items()),
        f"turns        {len(conversation.messages) // 2}, of which {conversation.n_dropped // 2} are no longer shown",
    ]
    dialog = conversation.dialog()
    if conversation.messages and conversation.question is None:
        dialog = [*dialog, {"role": "user", "content": ""}]  # what the next question comes on top of
    count = model.count(dialog) if dialog and dialog[-1]["role"] == "user" else 0
    if count is not None and model.context is not None:
        lines.append(f"tokens       {count} of {model.context}")
    return Reply("\n".join(lines))


def _save(conversation: Conversation, value: str, model: Model) -> Reply:
    path = Path(value).expanduser()
    transcript.save(conversation, path)
    return Reply(f"saved as {path}")


def _load(conversation: Conversation, value: str, model: Model) -> Reply:
    loaded = transcript.load(Path(value).expanduser())
    vars(conversation).update(vars(loaded))
    said = f"{len(loaded.messages) // 2} turns are loaded"
    return Reply(said if loaded.question is None else f"{said}; /retry asks the last question, which has no answer")


def _retry(conversation: Conversation, value: str, model: Model) -> Reply:
    if not conversation.take_back():
        raise CommandError("there is no question that could be asked again")
    return Reply(asks=True)


def _undo(conversation: Conversation, value: str, model: Model) -> Reply:
    if not conversation.forget_turn():
        raise CommandError("there is no turn that could be forgotten")
    return Reply("the last turn is forgotten")


def _reset(conversation: Conversation, value: str, model: Model) -> Reply:
    conversation.reset()
    return Reply("a new chat; system message and settings stay")


def _help(conversation: Conversation, value: str, model: Model) -> Reply:
    rows = [(f"/{name} {command.value}".strip(), command.purpose) for name, command in COMMANDS.items()]
    return Reply("\n".join([*(f"{left:18} {right}" for left, right in rows), "", KEYS]))


def _exit(conversation: Conversation, value: str, model: Model) -> Reply:
    return Reply(ends=True)


KEYS = (
    "Enter sends; after a backslash at the end of a line, and with Alt-Enter, the text goes on in a new line.\n"
    "Ctrl-C stops an answer, or clears what is typed; twice, or Ctrl-D, ends the chat."
)

COMMANDS = {
    "system": Command("TEXT", "how to answer, from the next answer on; none for no system message", _system),
    "set": Command("NAME VALUE", "change temperature, top_p, max_gen_len or seed", _set),
    "show": Command("", "what is set, and how full the context is", _show),
    "retry": Command("", "ask the last question again", _retry),
    "undo": Command("", "forget the last question and its answer", _undo),
    "reset": Command("", "begin a new chat", _reset),
    "save": Command("FILE", "write the chat to a file", _save),
    "load": Command("FILE", "go on with a chat that was saved", _load),
    "help": Command("", "print this text", _help),
    "exit": Command("", "end the chat", _exit),
}
