"""The chat page: a Streamlit script, run anew at each click.

It knows an HTTP client and chats as data, and nothing else of this package: any server with OpenAI's protocol will do.
What must last between two runs is a `Desk`. An answer is read while the script runs; a click interrupts the script,
and the next run reads on, unless the click was meant to stop it. That needs Streamlit's runner.fastReruns to be off, as
`web.py` has it: runs follow each other then.
"""

import html
import os
import time
from collections.abc import Callable
from typing import Literal

import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from streamlit.runtime.scriptrunner import StopException

from codellama.chat.client import KEY_VARIABLE, URL_VARIABLE, Model, Sampling, Server, ServerError
from codellama.chat.conversation import Chat, ChatFileError, Message, export_chats, import_chats
from codellama.chat.desk import MARKER, Desk
from codellama.chat.markdown import to_markdown

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
        chats = st.container()
        model, sampling = _draw_settings(desk)
        _draw_files(desk)
        context = st.container()
    if desk.question is not None and model is not None:
        desk.ask(model, sampling, desk.question)
    with chats:  # now that a new question is among them
        _draw_chats(desk)
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
        st.error(to_markdown(str(error)))
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
        max_tokens=st.slider(
            "Max new tokens", 1, max(2, longest), min(512, longest), help="An answer is cut off there."
        ),
        seed=st.number_input(
            "Seed", 0, 2**31 - 1, None, 1, placeholder="another one each time", help="Makes an answer repeat."
        ),
    )
    return model, sampling


def _draw_files(desk: Desk) -> None:
    with st.expander("Export and import"):
        st.download_button(
            "Export this chat", export_chats([desk.chat]), "chat.json", "application/json", on_click="ignore",
            width="stretch",
        )  # fmt: skip
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
    # A callback keeps the question before anything can interrupt it; the next run asks it, when it knows the settings.
    st.chat_input(
        "Ask for code",
        key="question",
        disabled=model is None,
        on_submit=lambda: desk.receive(st.session_state.question),
    )
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
            st.button(
                "Undo", icon=":material/undo:", type="tertiary", help="Forget the last question and its answer",
                on_click=desk.forget,
            )  # fmt: skip


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
