"""The chat as people meet it: processes in terminals, keys, and what is shown."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.chat_server import ChatServer, sse
from tests.support.pseudo_terminal import ALT_ENTER, CTRL_C, CTRL_D, PseudoTerminal

HERE = ("-m", "codellama", "chat", "--dtype", "float32", "--device", "cpu", "--temperature", "0")
PROMPT = r"(^|\n)> ?$"
ENDLESS = "import import import"  # the demo model repeats itself, until the context is full: seconds
STOPPED = "stopped; what was shown is kept as the answer"


@pytest.fixture
def state(tmp_path: Path) -> dict[str, str]:
    return {"XDG_STATE_HOME": str(tmp_path / "state")}


def messages(path: Path) -> list[str]:
    return [message["content"] for message in json.loads(path.read_text())["messages"]]


def test_a_chat_with_the_model_here(tmp_path: Path, state: dict[str, str]) -> None:
    file = tmp_path / "chat.json"
    with PseudoTerminal(*HERE, "--max_seq_len", "4096", env=state) as terminal:
        terminal.expect(PROMPT)
        terminal.type(f"{ENDLESS}\r")
        terminal.expect("class _CodeWrapper")  # long before the answer's end
        terminal.type(CTRL_C)
        terminal.expect(STOPPED)
        terminal.expect(PROMPT)
        terminal.type("/set max_gen_len 12\r")
        terminal.expect("max_gen_len is 12")
        terminal.expect(PROMPT)
        terminal.type("def f\\\r")
        terminal.expect("…")
        terminal.type(f"  한국어{ALT_ENTER}".encode()[:4])  # a letter comes in two halves
        terminal.type(f"  한국어{ALT_ENTER}".encode()[4:])
        terminal.type("\x1b[200~pasted\nlines\x1b[201~")
        terminal.expect("lines")
        terminal.type("\r")
        terminal.expect("Here is")
        terminal.expect(PROMPT)
        terminal.type(f"/save {file}\r")
        terminal.expect("saved as")
        terminal.expect(PROMPT)
        terminal.type("half a line")
        terminal.expect("half a line")
        terminal.type(CTRL_C)
        terminal.expect(PROMPT)
        terminal.type(CTRL_C)
        terminal.expect("Ctrl-C again, or Ctrl-D, ends the chat")
        terminal.expect(PROMPT)
        terminal.type(CTRL_C)
        assert terminal.end() == 0
    said = messages(file)
    assert said[0] == ENDLESS
    assert said[1].startswith("class _CodeWrapper")
    assert said[2] == "def f\n  한국어\npasted\nlines"
    assert len(said) == 4
    assert "Traceback" not in terminal.shown


def test_history_and_files_across_starts(tmp_path: Path, state: dict[str, str]) -> None:
    """Over a server, whose Hangul comes in single bytes; the second start goes on with what the first one saved."""
    file, answer = tmp_path / "chat.json", "네, **한글**입니다.\n\n```python\nprint('안녕')\n```\n"
    cut = [bytes([byte]) for byte in b"".join(sse(answer))]
    with ChatServer((200, cut), (200, sse("둘째"))) as server:
        words = ("-m", "codellama", "chat", "--base_url", server.url)
        with PseudoTerminal(*words, env=state) as terminal:
            terminal.expect(PROMPT)
            terminal.type("첫 질문\r")
            terminal.expect("네, 한글입니다.")
            terminal.expect(r"print\('안녕'\)")
            terminal.expect(PROMPT)
            terminal.type(f"/save {file}\r")
            terminal.expect("saved as")
            terminal.expect(PROMPT)
            terminal.type(CTRL_D)
            assert terminal.end() == 0
        assert messages(file) == ["첫 질문", answer.strip()]
        with PseudoTerminal(*words, env=state) as terminal:
            terminal.expect(PROMPT)
            terminal.type(f"/load {file}\r")
            terminal.expect("1 turns are loaded")
            terminal.expect(PROMPT)
            terminal.type("\x1b[A\x1b[A\x1b[A")  # up: /load, /save, the question
            terminal.expect("첫 질문")
            terminal.type("\r")
            terminal.expect("둘째")
            terminal.expect(PROMPT)
            terminal.type("/exit\r")
            assert terminal.end() == 0
        sent = [[message["content"] for message in body["messages"]] for body in server.bodies()]
    assert sent == [["첫 질문"], ["첫 질문", answer.strip(), "첫 질문"]]
    history = tmp_path / "state" / "codellama" / "history"
    assert history.stat().st_mode & 0o077 == 0


def test_ctrl_c_leaves_a_server_that_hangs(state: dict[str, str]) -> None:
    """And a plain terminal does without the extra's screen."""
    hangs = [*sse("시작")[:1], *([b": wait\n\n", 0.05] * 1000)]
    with ChatServer((200, hangs), (200, sse("again"))) as server:
        words = ("-m", "codellama", "chat", "--base_url", server.url)
        with PseudoTerminal(*words, env=state | {"TERM": "dumb"}) as terminal:
            terminal.expect(PROMPT)
            terminal.type("one\\\r")
            terminal.expect("…")
            terminal.type("two\r")
            terminal.expect("시작")
            terminal.type(CTRL_C)
            terminal.expect(STOPPED)
            assert server.gone.wait(10)
            terminal.expect(PROMPT)
            terminal.type(CTRL_C)
            terminal.expect("Ctrl-C again")
            terminal.expect(PROMPT)
            terminal.type("three\r")
            terminal.expect("again")
            terminal.expect(PROMPT)
            terminal.type(CTRL_D)
            assert terminal.end() == 0
        assert [[message["content"] for message in body["messages"]] for body in server.bodies()] == [
            ["one\ntwo"], ["one\ntwo", "시작", "three"],
        ]  # fmt: skip


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_two_ranks_under_torchrun(tmp_path: Path, state: dict[str, str]) -> None:
    """Ctrl-C, which a terminal would send to torchrun, stops the answer on both ranks; both sleep at the prompt."""
    file = tmp_path / "chat.json"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    with PseudoTerminal(*torchrun, *HERE, "--max_seq_len", "4096", env=state) as terminal:
        terminal.expect(PROMPT)
        ranks = children(terminal.process.pid)
        assert len(ranks) == 2
        for question in (ENDLESS, f"{ENDLESS} import"):
            terminal.type(f"{question}\r")
            terminal.expect("class|import|def")
            terminal.expect("\n.*\n")
            terminal.type(CTRL_C)
            terminal.expect(STOPPED)
            terminal.expect(PROMPT)
        terminal.type("[INST]\r")
        terminal.expect("contains")
        terminal.expect(PROMPT)
        before = [cpu_seconds(rank) for rank in ranks]
        os.kill(ranks[1], signal.SIGINT)  # whoever sends it
        time.sleep(2)
        used = [after - before for after, before in zip(map(cpu_seconds, ranks), before, strict=True)]
        terminal.type("/set max_gen_len 5\r")
        terminal.expect("is 5")
        terminal.expect(PROMPT)
        terminal.type("def f\r")
        terminal.expect("Here")
        terminal.expect(PROMPT)
        terminal.type(f"/save {file}\r")
        terminal.expect("saved as")
        terminal.expect(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.end() == 0
    assert max(used) < 0.5
    said = messages(file)
    assert said[::2] == [ENDLESS, f"{ENDLESS} import", "def f"]
