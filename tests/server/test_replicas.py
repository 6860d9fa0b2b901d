"""Several processes of one server: real ones, started as torchrun would, with the demo checkpoint."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest
import torch.distributed as dist

from codellama.assembly import DEMO
from codellama.config import RuntimeArgs
from codellama.errors import ParallelSizeError
from codellama.llama import Llama
from codellama.server.serve import serve
from codellama.server.settings import Settings
from tests.support.distributed import ROOT, end_ranks, free_port, rank_env, start_ranks

ENDLESS = {"prompt": "1, 2, 3, 4, ", "max_tokens": 19000, "temperature": 0, "stream": True}  # repeats itself
T = TypeVar("T")
DEATH = 10.0  # seconds in which all have ended after one has died


def wait_until(condition: Callable[[], T], seconds: float = 60) -> T:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
    return found


class Group:
    """The processes of one server, and what its clients read."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
        self.processes, self._folder = processes, folder
        address = wait_until(lambda: re.search(r"serving on (\S+)/v1", self.said(0)))[1]
        self.client = httpx2.Client(base_url=address, timeout=60, trust_env=False)
        wait_until(self.is_healthy, 100)

    def said(self, rank: int) -> str:
        return (self._folder / f"rank{rank}.txt").read_text()

    def is_healthy(self) -> bool:
        assert [process.poll() for process in self.processes] == [None] * len(self.processes), self.said(0)
        return self.client.get("/health").status_code == 200

    def complete(self, body: dict[str, Any]) -> str:
        text: str = self.client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        return text

    def ends(self, timeout: float) -> list[tuple[int, float]]:
        """Wait for all, and give each one's status and when it ended."""
        started, ends = time.monotonic(), {}
        while len(ends) < len(self.processes) and time.monotonic() < started + timeout:
            for rank, process in enumerate(self.processes):
                if rank not in ends and process.poll() is not None:
                    ends[rank] = (process.returncode, time.monotonic())
            time.sleep(0.01)
        said = [self.said(rank) for rank in range(len(self.processes))]
        assert len(ends) == len(self.processes), f"after {timeout} s only {sorted(ends)} had ended: {said}"
        assert not any("Traceback" in text for text in said), said
        return [ends[rank] for rank in sorted(ends)]


@contextmanager
def group(size: int, model_parallel_size: int, folder: Path) -> Iterator[Group]:
    """Start `codellama serve` on so many processes, by hand and not by torchrun, which would end them for us."""
    port = free_port()
    flags = [
        "--port",
        "0",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--max_seq_len",
        "20000",
        "--seed",
        "1",
        "--grace",
        "4",
    ]
    processes = []
    for rank in range(size):
        command = [
            sys.executable,
            "-m",
            "codellama",
            "serve",
            *flags,
            "--model_parallel_size",
            str(model_parallel_size),
        ]
        with (folder / f"rank{rank}.txt").open("wb") as file:
            env = {**os.environ, **rank_env(rank, size, port)}
            processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stderr=file))
    running = None
    try:
        running = Group(processes, folder)
        yield running
    finally:
        for process in processes:
            process.kill()
            process.wait()
        if running is not None:
            running.client.close()


class Stream(threading.Thread):
    """A client that reads a stream to its end."""

    def __init__(self, client: httpx2.Client, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._client, self._body = client, {**body, "stream": True}
        self.chunks: list[str] = []
        self.broke: str | None = None
        self.start()

    def run(self) -> None:
        try:
            with self._client.stream("POST", "/v1/completions", json=self._body) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        self.chunks.append(line.removeprefix("data: "))
        except httpx2.TransportError as error:
            self.broke = type(error).__name__

    def begun(self) -> bool:
        return len(self.chunks) > 3

    def text(self) -> str:
        """The text of a stream that ended well."""
        assert self.chunks[-1] == "[DONE]"
        return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in self.chunks[:-1])

    def error(self) -> str:
        """The message with which it ended."""
        *_, error, done = self.chunks
        assert done == "[DONE]"
        message: str = json.loads(error)["error"]["message"]
        return message


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """What the library says to some prompts."""
    llama = Llama.build(DEMO, max_seq_len=512, dtype="float32", device="cpu")
    prompts = ["def add(a, b):", "import ", "class Stack:\n"]
    texts = llama.text_completion(prompts, temperature=0, max_gen_len=60)
    return {prompt: text["generation"] for prompt, text in zip(prompts, texts, strict=True)}


def body_of(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 60, "temperature": 0}


@pytest.mark.slow
def test_two_ranks_are_one_server_that_ends_in_peace(tmp_path: Path, expected: dict[str, str]) -> None:
    with group(2, 2, tmp_path) as running:
        streams = [Stream(running.client, body_of(prompt)) for prompt in expected]
        wait_until(lambda: all(stream.chunks for stream in streams))
        for process in running.processes:  # as torchrun does; the answers still run
            process.send_signal(signal.SIGTERM)
        assert [code for code, _ in running.ends(30)] == [0, 0]
        for stream, text in zip(streams, expected.values(), strict=True):
            stream.join(10)
            assert stream.text() == text


@pytest.mark.slow
def test_two_copies_share_the_work_and_end_on_the_first_ones_word(tmp_path: Path, expected: dict[str, str]) -> None:
    with group(2, 1, tmp_path) as running:
        assert {prompt: running.complete(body_of(prompt)) for prompt in expected} == expected
        assert running.client.post("/v1/completions", json={"prompt": "a", "n": 500}).status_code == 400
        slow = [Stream(running.client, ENDLESS), Stream(running.client, ENDLESS)]
        wait_until(lambda: all(stream.begun() for stream in slow))
        metrics = running.client.get("/metrics").text
        assert [f'_requests_in_flight{{replica="{i}"}} 1.0\n' in metrics for i in (0, 1)] == [True, True]
        prompt, text = next(iter(expected.items()))
        quick = Stream(running.client, body_of(prompt))
        wait_until(lambda: bool(quick.chunks))
        running.processes[0].send_signal(signal.SIGTERM)
        assert [code for code, _ in running.ends(30)] == [0, 0]
        for stream in (*slow, quick):
            stream.join(10)
        assert quick.text() == text
        assert [stream.error() for stream in slow] == ["the server was stopped before the answer was done"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_parallel_size", "victim", "when"),
    [
        (2, 1, "decoding"),
        (2, 0, "decoding, told twice to end"),
        (1, 1, "idle"),
        (1, 1, "decoding"),
        (1, 0, "decoding"),
    ],
)
def test_a_process_that_dies_ends_all(model_parallel_size: int, victim: int, when: str, tmp_path: Path) -> None:
    with group(2, model_parallel_size, tmp_path) as running:
        streams = [Stream(running.client, ENDLESS) for _ in range(0 if when == "idle" else 2)]
        wait_until(lambda: all(stream.begun() for stream in streams))
        if when == "idle":
            time.sleep(1.5)  # it waits, and the idle messages with it
        signals = [signal.SIGTERM, signal.SIGTERM] if "twice" in when else [signal.SIGKILL]
        for number in signals:
            running.processes[victim].send_signal(number)
            time.sleep(0.3)
        began = time.monotonic()
        ends = running.ends(DEATH)
        seconds = [round(end - began, 2) for _, end in ends]
        print(f"copies of {model_parallel_size}, rank {victim}, {when}: ended after {seconds} s")  # noqa: T201
        assert [code for code, _ in ends] == [-signals[-1] if rank == victim else 1 for rank in (0, 1)]
        assert f"rank {1 - victim} lost " in running.said(1 - victim)
        for stream in streams:
            stream.join(10)
            if victim == 0:
                assert stream.broke is not None
            else:
                assert stream.error()
        with pytest.raises(httpx2.TransportError):
            running.client.get("/health")


def serve_on_short_timeouts(timeout: float) -> str:
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    serve(
        str(DEMO), None, RuntimeArgs(max_seq_len=512), Settings(port=0), 2,
        device="cpu", dtype="float32", quantize=None, seed=None, checkpoint_format=None,
    )  # fmt: skip
    return "ended in peace"


@pytest.mark.slow
def test_after_a_pause_longer_than_the_timeout_all_answer_at_once(tmp_path: Path, expected: dict[str, str]) -> None:
    ranks = start_ranks(4, serve_on_short_timeouts, 4, stderr=tmp_path)
    try:
        wait_until((tmp_path / "rank0.txt").exists)
        address = wait_until(lambda: re.search(r"serving on (\S+)/v1", (tmp_path / "rank0.txt").read_text()))[1]
        with httpx2.Client(base_url=address, timeout=20, trust_env=False) as client:
            wait_until(lambda: client.get("/health").status_code == 200)
            time.sleep(6)
            streams = [Stream(client, body_of(prompt)) for prompt in expected]
            for stream, text in zip(streams, expected.values(), strict=True):
                stream.join(10)
                assert stream.text() == text
        os.kill(ranks[0][0].pid, signal.SIGTERM)
        assert [end.answer for end in end_ranks(ranks, tmp_path, timeout=30)] == ["ended in peace"] * 4
    finally:
        for process, _ in ranks:
            process.kill()


@pytest.mark.parametrize("size", [0, 2])
def test_a_size_that_does_not_divide_is_refused_before_anything_is_loaded(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ParallelSizeError, match=f"model_parallel_size {size} does not fit 3 processes"):
        serve(
            None, None, RuntimeArgs(), Settings(port=0), size,
            device=None, dtype=None, quantize=None, seed=None, checkpoint_format=None,
        )  # fmt: skip
