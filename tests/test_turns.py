"""One call at a time: who waits, who is refused, and who is let go."""

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codellama.llama import Llama

OPTIONS: dict[str, Any] = {"temperature": 0, "max_gen_len": 5}


@pytest.fixture
def own(tiny_folder: Path) -> Iterator[Llama]:
    with Llama.build(tiny_folder, max_seq_len=64, max_batch_size=1, dtype="float32", device="cpu") as built:
        yield built


def in_thread(function: Any) -> list[Any]:
    """Run a function in a thread and wait until it has ended; returns what it returned, or raised."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for ever"
    return found


def test_a_stream_whose_thread_has_ended_is_let_go(own: Llama) -> None:
    expected = own.text_completion(["def"], **OPTIONS)
    kept: list[Any] = []

    def leave_open() -> None:
        stream = own.stream_completion("def", temperature=0, max_gen_len=40)
        kept.extend([stream, next(stream)])

    in_thread(leave_open)
    assert in_thread(lambda: own.text_completion(["def"], **OPTIONS)) == [expected]
    with pytest.raises(RuntimeError, match="this stream was ended: the thread that read it had ended"):
        next(kept[0])


def test_a_stream_may_be_read_by_another_thread_than_the_one_that_began_it(own: Llama) -> None:
    whole = "".join(own.stream_completion("def", temperature=0, max_gen_len=20))
    stream = own.stream_completion("def", temperature=0, max_gen_len=20)
    (first,) = in_thread(lambda: next(stream))
    second = next(stream)  # of this thread, which is alive
    waiting = threading.Thread(target=lambda: own.text_completion(["def"], **OPTIONS))
    waiting.start()
    waiting.join(0.7)
    assert waiting.is_alive(), "its turn comes after the stream"
    assert first + second + "".join(stream) == whole
    waiting.join(20)
    assert not waiting.is_alive()


def test_a_second_call_of_the_thread_that_streams_is_refused(own: Llama) -> None:
    stream = own.stream_completion("def", **OPTIONS)
    next(stream)
    with pytest.raises(RuntimeError, match="this thread has an open stream of this generator"):
        own.text_completion(["def"], **OPTIONS)
    stream.close()
    assert len(own.text_completion(["def"], **OPTIONS)) == 1


@pytest.mark.parametrize("kind", ["call", "stream"])
def test_a_processor_that_calls_its_generator_is_told_so(own: Llama, kind: str) -> None:
    def nested(ids: Any, logits: Any) -> Any:
        own.text_completion(["def"], **OPTIONS)

    def ask() -> Any:
        if kind == "call":
            return own.text_completion(["def"], **OPTIONS, logits_processor=nested)
        return list(own.stream_completion("def", **OPTIONS, logits_processor=nested))

    with pytest.raises(RuntimeError, match="a logits_processor cannot generate with the generator that calls it"):
        ask()
    assert len(own.text_completion(["def"], **OPTIONS)) == 1


def test_a_processor_in_a_stream_that_was_handed_on_is_told_so(own: Llama) -> None:
    nested: list[bool] = []

    def process(ids: Any, logits: Any) -> Any:
        if nested:
            own.text_completion(["def"], **OPTIONS)
        return logits

    stream = own.stream_completion("def", temperature=0, max_gen_len=20, logits_processor=process)
    next(stream)
    nested.append(True)
    (error,) = in_thread(lambda: list(stream))
    assert "a logits_processor cannot generate with the generator that calls it" in str(error)


def test_a_call_that_waits_while_the_generator_is_closed_is_refused(own: Llama) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(ids: Any, logits: Any) -> Any:
        begun.set()
        assert go_on.wait(20)
        return logits

    def first() -> None:
        own.text_completion(["def"], temperature=0, max_gen_len=1, logits_processor=wait)

    found: list[Exception] = []

    def second() -> None:
        try:
            own.text_completion(["def"], **OPTIONS)
        except RuntimeError as error:
            found.append(error)

    threads = [threading.Thread(target=function) for function in (first, own.close, second)]
    for thread in threads:
        thread.start()
        assert begun.wait(20)
    go_on.set()
    for thread in threads:
        thread.join(20)
    own.close()
    assert all("this generator is closed" in str(error) for error in found)


def test_a_forgotten_stream_is_closed(own: Llama) -> None:
    next(own.stream_completion("def", temperature=0, max_gen_len=40))
    assert len(own.text_completion(["def"], **OPTIONS)) == 1


def test_a_closed_generator_frees_its_memory_and_refuses_calls(own: Llama) -> None:
    tensors = [weakref.ref(tensor) for tensor in (*own.model.parameters(), *own.engine._runner.cache.keys)]
    stream = own.stream_completion("def", temperature=0, max_gen_len=40)
    next(stream)
    own.close()
    own.close()
    with pytest.raises(RuntimeError, match="this stream was ended: its generator was closed"):
        next(stream)
    assert [reference() for reference in tensors if reference() is not None and not reference().is_meta] == []
    for call in (lambda: own.text_completion(["def"]), lambda: list(own.stream_completion("def"))):
        with pytest.raises(RuntimeError, match="this generator is closed"):
            call()
