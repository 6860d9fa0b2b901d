"""The page's script, run by Streamlit's own test driver against a server that says what it is told."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from codellama.chat import page
from codellama.chat.client import Model, Server, ServerError
from tests.support.endpoint import Endpoint, serving_endpoint

HELLO = ["안녕", "하세요 🦙\n\n```python\nprint('안녕')\n```\n", "$HOME"]
SHOWN = "안녕하세요 🦙\n\n```python\nprint('안녕')\n```\n\\$HOME"
OWN = {"codellama", "codellama.chat"} | {
    f"codellama.chat.{name}" for name in ("client", "conversation", "desk", "markdown")
}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    with serving_endpoint() as endpoint:
        monkeypatch.setenv("CODELLAMA_BASE_URL", endpoint.url)
        monkeypatch.setenv("CODELLAMA_API_KEY", "secret")
        yield endpoint


def opened() -> AppTest:
    app = AppTest.from_file(page.__file__, default_timeout=30).run()
    assert not app.exception
    return app


def ask(app: AppTest, question: str) -> AppTest:
    app.chat_input[0].set_value(question).run()
    assert not app.exception
    return app


def click(app: AppTest, label: str) -> AppTest:
    (button,) = [button for button in app.button if button.label == label]
    button.click().run()
    assert not app.exception
    return app


def said(app: AppTest) -> list[tuple[str, str]]:
    """Who said what, as it is shown."""
    return [(message.name, [*message.text, *message.markdown][0].value) for message in app.chat_message]


def refuse(_: Server) -> list[Model]:
    raise ServerError("![x](http://else/where.png)")


def roles(endpoint: Endpoint) -> list[str]:
    return [message["role"] for message in endpoint.messages]


def test_the_page_imports_nothing_else_of_ours() -> None:
    """Neither in its code, nor when it runs."""
    folder = Path(page.__file__).parent
    knows = {"page": OWN, "desk": OWN, "client": set(), "conversation": set(), "markdown": set()}
    for name, allowed in knows.items():
        nodes = list(ast.walk(ast.parse((folder / f"{name}.py").read_text())))
        modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert {module for module in modules if module.startswith("codellama")} <= allowed
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes)
    program = "import sys, codellama.chat.page; print(*sorted(m for m in sys.modules if m.startswith('codellama')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stdout.split()) == OWN | {"codellama.chat.page"}


def test_a_chat(endpoint: Endpoint) -> None:
    endpoint.pieces, endpoint.cut = HELLO, 2
    app = ask(opened(), "한글로 $x 라고\n  말해 줘")
    assert said(app) == [("user", "한글로 $x 라고\n  말해 줘"), ("assistant", SHOWN)]
    ((path, body),) = endpoint.asked
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "한글로 $x 라고\n  말해 줘"}]
    assert (body["model"], body["temperature"], body["max_tokens"], body.get("seed")) == ("scripted", 0.2, 512, None)
    assert set(endpoint.keys) == {"Bearer secret"}
    ask(app, "Again")
    assert roles(endpoint) == ["user", "assistant", "user"]
    assert endpoint.messages[1]["content"] == "".join(HELLO)


def test_settings_are_sent(endpoint: Endpoint) -> None:
    app = opened()
    for slider, value in zip(app.slider, (0.75, 0.5, 33), strict=True):
        slider.set_value(value)
    app.number_input[0].set_value(7)
    app.text_area[0].set_value("Be brief.")
    ask(app.run(), "q")
    body = endpoint.asked[-1][1]
    assert [body[name] for name in ("temperature", "top_p", "max_tokens", "seed")] == [0.75, 0.5, 33, 7]
    assert endpoint.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]


def test_regenerate_and_edit(endpoint: Endpoint) -> None:
    app = ask(ask(opened(), "first"), "second")
    endpoint.pieces = ["other"]
    click(app, "Regenerate")
    assert [text for _, text in said(app)] == ["first", "An answer.", "second", "other"]
    click(app, "Edit")
    (editor,) = [area for area in app.text_area if area.label == "Question"]
    assert editor.value == "second"
    editor.set_value("changed")
    click(app, "Send")
    assert [text for _, text in said(app)] == ["first", "An answer.", "changed", "other"]
    assert [message["content"] for message in endpoint.messages] == ["first", "An answer.", "changed"]
    click(click(app, "Edit"), "Cancel")
    assert len(endpoint.asked) == 4


def test_several_chats(endpoint: Endpoint) -> None:
    app = ask(opened(), "the first")
    app.text_area[0].set_value("Only here.").run()
    click(app, "New chat")
    assert said(app) == []
    assert app.text_area[0].value == ""
    ask(app, "the second")
    assert len(endpoint.messages) == 1
    assert [button.label for button in app.sidebar.button[:3]] == ["New chat", "the second", "the first"]
    click(app, "the first")
    assert [text for _, text in said(app)] == ["the first", "An answer."]
    assert app.text_area[0].value == "Only here."
    click(app, "Delete this chat")
    assert [text for _, text in said(app)] == ["the second", "An answer."]
    click(app, "Delete this chat")
    assert said(app) == []


def test_what_overflows_is_left_out_and_told(endpoint: Endpoint) -> None:
    endpoint.models, endpoint.tokens_per_word = [{"id": "small", "max_model_len": 200}], 20
    app = opened()
    app.text_area[0].set_value("Brief.").run()
    for question in ("one", "two", "three"):
        ask(app, question)
    # 34 tokens of system message, and 34 + 54 of each turn, within the three quarters that the answer leaves
    assert [message["content"] for message in endpoint.messages] == ["Brief.", "three"]
    assert [info.value for info in app.info] == [
        "The 4 messages above no longer fit into the context of the model; they were not sent with the last question."
    ]
    assert len(said(app)) == 6


def test_a_server_that_knows_less(endpoint: Endpoint) -> None:
    """No /tokenize, no length of a context, no usage: as most servers are."""
    endpoint.models, endpoint.tokens_per_word = [{"id": "a"}, {"id": "b"}], None
    endpoint.ends = b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'
    app = opened()
    app.selectbox[0].select_index(1).run()
    ask(app, "q")
    assert endpoint.asked[-1][1]["model"] == "b"
    captions = [caption.value for caption in app.caption]
    assert "cut off at max new tokens" in captions
    assert [text for text in captions if "by estimate; the server does not tell how many it holds" in text]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"status": 400, "fault": {"error": {"message": "[INST] is refused"}}}, "status 400: [INST] is refused"),
        ({"ends": b'data: {"error": {"message": "$broken"}}\n\n'}, r"The server gave up: \$broken"),
        ({"ends": b""}, "hung up before the answer was whole"),
    ],
)
def test_errors_are_messages(endpoint: Endpoint, options: dict[str, object], told: str) -> None:
    for name, value in options.items():
        setattr(endpoint, name, value)
    app = ask(opened(), "q")
    (error,) = app.error
    assert told in error.value
    endpoint.status, endpoint.ends, endpoint.pieces = 200, Endpoint.ends, ["A better one."]
    click(app, "Regenerate")
    assert [list(app.error), said(app)[1:]] == [[], [("assistant", "A better one.")]]


def test_a_chat_goes_on_without_what_a_server_refuses(endpoint: Endpoint) -> None:
    app = ask(opened(), "first")
    endpoint.status, endpoint.fault = 400, "[INST] is refused"
    ask(app, "[INST]")
    endpoint.status = 200
    click(app, "Undo")
    assert [list(app.error), [text for _, text in said(app)]] == [[], ["first", "An answer."]]
    ask(app, "second")
    assert [message["content"] for message in endpoint.messages] == ["first", "An answer.", "second"]
    click(click(app, "Undo"), "Undo")
    assert said(app) == []


def test_what_a_server_says_of_its_models_is_text(endpoint: Endpoint) -> None:
    endpoint.models = []
    app = opened()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "models", refuse)
        app.run()
    assert app.error[0].value == r"!\[x](http://else/where.png)"


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_endpoint() as endpoint:
        monkeypatch.setenv("CODELLAMA_BASE_URL", endpoint.url)
    app = opened()
    assert "No server answers at" in app.error[0].value
    assert app.chat_input[0].disabled
    monkeypatch.delenv("CODELLAMA_BASE_URL")
    assert "codellama chat --web" in opened().error[0].value


def test_infilling(endpoint: Endpoint) -> None:
    app = opened()
    app.segmented_control[0].set_value("Infill").run()
    (editor,) = [area for area in app.text_area if area.key == "code"]
    editor.set_value("if a < b:\n    <FILL>\nend").run()
    endpoint.pieces = ["x = '<b>&'"]
    click(app, "Fill")
    path, body = endpoint.asked[-1]
    assert (path, body["prompt"], body["suffix"]) == ("/v1/completions", "if a < b:\n    ", "\nend")
    html = "<pre class='filled'>if a &lt; b:\n    <mark>x = &#x27;&lt;b&gt;&amp;&#x27;</mark>\nend</pre>"
    assert html in [element.proto.body for element in app.get("html")]
    assert app.code[0].value == "if a < b:\n    x = '<b>&'\nend"
    app.segmented_control[0].set_value("Chat").run()
    app.segmented_control[0].set_value("Infill").run()
    (editor,) = [area for area in app.text_area if area.key == "code"]
    assert editor.value == "if a < b:\n    <FILL>\nend"  # Streamlit forgets what is not drawn, the page does not
    editor.set_value("no gap").run()
    click(app, "Fill")
    assert app.error[0].value == "The text holds 0 <FILL> markers; exactly one was expected."
    assert len(endpoint.asked) == 1
