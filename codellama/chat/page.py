"""The chat page: a Streamlit script, run anew at each click.

It knows an HTTP client and chats as data, and nothing else of this package: any server with OpenAI's protocol will do.
What must last between two runs is in `Desk`. An answer is read while the script runs; a click interrupts the script,
and the next run reads on, unless the click was meant to stop it. That needs Streamlit's runner.fastReruns to be off, as
`web.py` has it: runs follow each other then.
"""

import html
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from streamlit.runtime.scriptrunner import StopException

from codellama.chat.client import KEY_VARIABLE, URL_VARIABLE, Answer, Model, Sampling, Server, ServerError
from codellama.chat.conversation import (
    FRAME,
    Chat,
    ChatFileError,
    Message,
    estimate_tokens,
    export_chats,
    import_chats,
    messages_to_leave_out,
    room_for_messages,
)
from codellama.chat.markdown import to_markdown

MARKER = "<FILL>"
EXAMPLE = f'''def remove_non_ascii(s: str) -> str:
    """ {MARKER}
    return result
'''
STYLE = """
.stMainBlockContainer { padding-top: 3.5rem; }
.st-key-stop { position: fixed; bottom: 7.5rem; z-index: 100; width: auto; }
.st-key-code textarea, .filled { font-family: "Source Code Pro", monospace; font-size: .875rem; }
.filled { background: rgba(128, 128, 128, .1); border-radius: .5rem; padding: 1rem; white-space: pre-wrap; }
.filled mark { background: rgba(46, 160, 67, .3); color: inherit; border-radius: .2rem; }
"""
UNKNOWN_CONTEXT = 16_384  # tokens that the slider offers where the server does not tell its context
REDRAW = 0.08  # seconds between two looks of a growing answer: more often, and the browser is kept busy

Draw = Callable[[str], object]


@dataclass
class Running:
    """An answer that is being read, and what to do with its text and a note at its end."""

    answer: Answer
    keep: Callable[[str, str], None]
    text: str = ""
    began: float = field(default_factory=time.monotonic)
    first: float | None = None

    def note(self, how: str = "") -> str:
        """Say how long it took, and how it ended if not by itself."""
        if self.answer.finish_reason == "length":
            how = how or "cut off at the most tokens"
        tokens, now = self.answer.completion_tokens, time.monotonic()
        parts = [] if tokens is None else [f"{tokens} token{'s' * (tokens != 1)}"]
        if tokens is not None and tokens > 1 and self.first is not None and now > self.first:
            parts.append(f"{(tokens - 1) / (now - self.first):.0f} a second")
        return " · ".join([*parts, how] if how else parts)


@dataclass
class Desk:
    """All that a visitor has: chats, the text with a gap, and the answer that is being read."""

    server: Server
    chats: list[Chat] = field(default_factory=lambda: [Chat()])
    at: int = 0
    models: list[Model] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    estimated: bool = False
    running: Running | None = None
    error: str = ""
    is_editing: bool = False
    imported: int = 0
    code: str = EXAMPLE
    filled: tuple[str, str, str] | None = None
    filled_note: str = ""

    @property
    def chat(self) -> Chat:
        """The chat that is looked at."""
        return self.chats[self.at]

    def stop(self) -> None:
        """Hang up; what has come is kept."""
        self.is_editing, self.error = False, ""
        if self.running is not None:
            running, self.running = self.running, None
            running.answer.close()
            running.keep(running.text, running.note("stopped"))

    def show(self, at: int) -> None:
        """Look at another chat."""
        self.stop()
        self.at = at

    def add(self, *chats: Chat) -> None:
        """Put chats in front, and look at the first of them."""
        self.stop()
        self.chats[:0] = chats
        self.at = 0

    def delete(self) -> None:
        """Forget the chat that is looked at."""
        self.stop()
        del self.chats[self.at]
        self.chats = self.chats or [Chat()]
        self.at = min(self.at, len(self.chats) - 1)

    def count(self, text: str, model: Model) -> int:
        """Count tokens, or estimate them where the server does not count."""
        if text not in self.counts:
            counted = self.server.count_tokens(text, model.name)
            self.estimated = counted is None
            if counted is None:
                return estimate_tokens(text)
            self.counts[text] = counted
        return self.counts[text]

    def costs(self, model: Model) -> tuple[int, list[int]]:
        """Count the tokens of the chat's system message, and of each message."""
        chat = self.chat
        system = self.count(chat.system, model) + FRAME if chat.system.strip() else 0
        return system, [self.count(message.content, model) + FRAME for message in chat.messages]

    def ask(self, model: Model, sampling: Sampling, question: str | None = None) -> None:
        """Have the chat's last question answered, or a new one."""
        self.stop()
        chat = self.chat
        if question is not None:
            chat.messages.append(Message("user", question))
        if model.context is not None:
            system, costs = self.costs(model)
            room = room_for_messages(model.context, sampling.max_tokens) - system
            chat.left_out = messages_to_leave_out(costs, [message.role for message in chat.messages], room)

        def keep(text: str, note: str) -> None:
            if text.strip():
                chat.messages.append(Message("assistant", text, note))

        self.running = Running(self.server.answer(model.name, chat.to_send(), sampling), keep)

    def ask_again(self, model: Model, sampling: Sampling, question: str | None = None) -> None:
        """Have the last question answered anew, or another one in its place."""
        self.stop()
        chat = self.chat
        assert chat.last_question is not None
        kept = chat.messages[: chat.last_question + 1]
        chat.messages = kept if question is None else [*kept[:-1], Message("user", question)]
        self.ask(model, sampling)

    def fill(self, model: Model, sampling: Sampling) -> None:
        """Fill the gap."""
        self.stop()
        prefix, *suffixes = self.code.split(MARKER)
        if len(suffixes) != 1:
            self.error = f"The text holds {len(suffixes)} {MARKER} markers; exactly one was expected."
            return
        suffix = suffixes[0]

        def keep(text: str, note: str) -> None:
            self.filled, self.filled_note = (prefix, text, suffix), note

        self.filled = None
        self.running = Running(self.server.fill(model.name, prefix, suffix, sampling), keep)


def main() -> None:
    """Draw the page."""
    st.set_page_config(page_title="codellama", layout="centered", initial_sidebar_state="expanded")
    if "desk" not in st.session_state:
        if not (address := os.environ.get(URL_VARIABLE)):
            st.error(f"The page knows no server. Start it with `codellama chat --web`, or set {URL_VARIABLE}.")
            return
        st.session_state.desk = Desk(Server(address, os.environ.get(KEY_VARIABLE)))
    st.html(f"<style>{STYLE}</style>")
    desk: Desk = st.session_state.desk
    with st.sidebar:
        _draw_chats(desk)
        model, sampling = _draw_settings(desk)
        _draw_files(desk)
        context = st.container()
    tasks = ["Chat", "Infill"]
    task = st.segmented_control(
        "Task", tasks, default=tasks[0], key="task", on_change=desk.stop, label_visibility="collapsed"
    )
    if task == "Infill":
        _draw_infilling(desk, model, sampling)
    else:
        _draw_chat(desk, model, sampling, context)


def _draw_chats(desk: Desk) -> None:
    st.button("New chat", icon=":material/add:", on_click=lambda: desk.add(Chat()), width="stretch")
    for at, chat in enumerate(desk.chats):
        kind: Literal["secondary", "tertiary"] = "secondary" if at == desk.at else "tertiary"
        st.button(
            to_markdown(chat.title), key=f"show-{chat.id}", type=kind, width="stretch", on_click=desk.show, args=(at,)
        )  # fmt: skip


def _draw_settings(desk: Desk) -> tuple[Model | None, Sampling]:
    st.subheader("Settings", divider="gray")
    model: Model | None = None
    try:
        desk.models = desk.models or desk.server.models()
        model = desk.models[0]
        if len(desk.models) > 1:
            model = st.selectbox("Model", desk.models, format_func=lambda model: model.name)
    except ServerError as error:
        st.error(str(error))
        st.button("Try again")
    chat = desk.chat
    key = f"system-{chat.id}"
    st.session_state.setdefault(key, chat.system)  # Streamlit forgets what was typed where it is not drawn
    chat.system = st.text_area("System prompt", key=key, placeholder="How to answer", height=68)
    longest = UNKNOWN_CONTEXT if model is None or model.context is None else model.context
    sampling = Sampling(
        temperature=st.slider(
            "Temperature", 0.0, 2.0, 0.2, 0.05, help="0 takes the most probable token; higher draws more freely."
        ),
        top_p=st.slider("Top-p", 0.05, 1.0, 0.95, 0.05, help="Draw from the likeliest tokens that have this share."),
        max_tokens=st.slider("Max new tokens", 1, longest, min(512, longest), help="An answer is cut off there."),
        seed=st.number_input(
            "Seed", 0, 2**31 - 1, None, 1, placeholder="another one each time", help="Makes an answer repeat."
        ),
    )
    return model, sampling


def _draw_files(desk: Desk) -> None:
    with st.expander("Export and import"):
        st.download_button(
            "Export all chats", export_chats(desk.chats), "chats.json", "application/json", on_click="ignore",
            width="stretch",
        )  # fmt: skip
        st.button("Delete this chat", on_click=desk.delete, width="stretch")
        file = st.file_uploader("Import chats", type="json", key=f"import-{desk.imported}")
        if file is not None:
            try:
                chats = import_chats(file.getvalue())
            except ChatFileError as error:
                st.error(to_markdown(str(error)))
            else:
                desk.imported += 1  # a new uploader, which is empty
                desk.add(*chats)
                st.rerun()


def _draw_chat(desk: Desk, model: Model | None, sampling: Sampling, context: DeltaGenerator) -> None:
    chat = desk.chat
    question = st.chat_input("Ask for code", disabled=model is None)
    if question and model is not None:
        desk.ask(model, sampling, question)
    if model is not None:
        _draw_context(desk, model, context)
    if not chat.messages:
        st.markdown("#### What shall we write?")
    for number, message in enumerate(chat.messages):
        if number == chat.left_out > 0:
            st.info(
                f"The {number} messages above no longer fit into the context of the model; they were not sent with the "
                "last question."
            )  # fmt: skip
        with st.chat_message(message.role):
            if desk.is_editing and number == chat.last_question:
                _draw_editor(desk, model, sampling, message)
            elif message.role == "user" and "```" not in message.content:
                st.text(message.content)
            else:
                st.markdown(to_markdown(message.content))
            if message.note:
                st.caption(message.note)
    if desk.running is not None:
        with st.chat_message("assistant"):
            box = st.empty()
            status = st.empty()
            with st.container(key="stop"):  # in one place, however long the answer is: who clicks must hit it
                st.button("Stop", icon=":material/stop:", on_click=desk.stop)
            _follow(desk, status, lambda text: box.markdown(to_markdown(text, growing=True)))
    _draw_error(desk)
    if chat.last_question is not None and model is not None and not desk.is_editing:
        with st.container(horizontal=True, gap="small"):
            st.button(
                "Regenerate", icon=":material/refresh:", type="tertiary", on_click=desk.ask_again,
                args=(model, sampling),
            )  # fmt: skip
            if st.button("Edit", icon=":material/edit:", type="tertiary", help="Change the last question"):
                desk.is_editing = True
                st.rerun()


def _draw_editor(desk: Desk, model: Model | None, sampling: Sampling, message: Message) -> None:
    with st.form("edit", border=False):
        text = st.text_area("Question", message.content, label_visibility="collapsed")
        with st.container(horizontal=True):
            sent = st.form_submit_button("Send", type="primary", disabled=model is None)
            cancelled = st.form_submit_button("Cancel")
    if cancelled or (sent and text.strip()):
        desk.is_editing = False
        if sent and model is not None:
            desk.ask_again(model, sampling, text)
        st.rerun()


def _draw_context(desk: Desk, model: Model, place: DeltaGenerator) -> None:
    """Show how full the context is."""
    system, costs = desk.costs(model)
    used = system + sum(costs[desk.chat.left_out :])
    kind = "tokens, by estimate" if desk.estimated else "tokens"
    with place:
        if model.context is None:
            st.caption(f"Context: about {used:,} {kind}; the server does not tell how many it holds.")
        else:
            st.progress(min(1.0, used / model.context), f"Context: about {used:,} of {model.context:,} {kind}")
        st.caption(to_markdown(f"{model.name} at `{desk.server.base_url}`"))


def _draw_infilling(desk: Desk, model: Model | None, sampling: Sampling) -> None:
    st.session_state.setdefault("code", desk.code)
    desk.code = st.text_area(f"Code with a gap, marked {MARKER}", key="code", height=200)
    st.button(
        "Fill", type="primary", icon=":material/edit_note:", disabled=model is None, on_click=desk.fill,
        args=(model, sampling),
    )  # fmt: skip
    if desk.running is not None:
        prefix, _, suffix = desk.code.partition(MARKER)
        st.button("Stop", icon=":material/stop:", on_click=desk.stop)
        status = st.empty()
        box = st.empty()
        _follow(desk, status, lambda text: box.html(_highlight(prefix, text, suffix)))
    _draw_error(desk)
    if desk.filled is not None:
        st.html(_highlight(*desk.filled))
        if desk.filled_note:
            st.caption(desk.filled_note)
        with st.expander("The whole, to copy"):
            st.code("".join(desk.filled), language="python")


def _highlight(prefix: str, middle: str, suffix: str) -> str:
    before, filled, after = (html.escape(part) for part in (prefix, middle, suffix))
    return f"<pre class='filled'>{before}<mark>{filled}</mark>{after}</pre>"


def _draw_error(desk: Desk) -> None:
    if desk.error:
        st.error(to_markdown(desk.error))


def _follow(desk: Desk, status: DeltaGenerator, draw: Draw) -> None:
    """Draw the answer while it comes; a click ends this run of the script at any call of Streamlit's."""
    running = desk.running
    assert running is not None
    draw(running.text)
    drawn = 0.0
    try:
        for piece in running.answer:
            running.text += piece
            now = time.monotonic()
            if piece and running.first is None:
                running.first = now
            if running.first is None:
                status.caption(f"The model reads … {now - running.began:.0f} s")
            elif now - drawn >= REDRAW:
                draw(running.text)
                status.caption(f"The model writes … {now - running.began:.0f} s")
                drawn = time.monotonic()
    except StopException:  # the visitor has left
        desk.stop()
        raise
    except ServerError as error:
        desk.error = str(error)
    desk.running = None
    running.keep(running.text, running.note("broken off" if desk.error else ""))
    st.rerun()


if __name__ == "__main__":
    main()
