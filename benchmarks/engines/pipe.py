"""Questions and answers between `benchmarks.peers` and its engines: lines of JSON. The standard library is enough.

A process prints one line when it is ready, {"weight_bytes": …}, or {"missing": why} when it cannot be. Then it answers
each question, {"prompt": ids, "new_tokens": n, "rows": n}, with {"first_s": …, "rest_s": …, "tokens": [[…]]}, seconds
to the first token, seconds for the others, and the greedy tokens of each row, and with "peak_bytes", the most memory so
far.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

Answer = tuple[float, float, list[list[int]]]
"""Seconds to the first token, seconds from there to the last one, and the tokens of each row."""


@contextlib.contextmanager
def own_stdout() -> Iterator[TextIO]:
    """Keep the pipe for answers: what libraries print, in Python or in C, goes to stderr instead."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        yield answers


def serve(
    start: Callable[[Mapping[str, Any]], tuple[int, Callable[[Sequence[int], int, int], Answer]]],
    peak: Callable[[], int | None],
) -> None:
    """Start an engine with the options of the command line, one JSON object, and answer until the pipe is closed.

    Args:
        start: takes the options; returns the bytes of weights that a token reads, and a function that takes a prompt, a
            number of new tokens and a number of rows. It raises ImportError or NotImplementedError for what is not
            installed or not there.
        peak: the most memory that this process has held, in bytes.
    """
    with own_stdout() as answers:

        def say(answer: Mapping[str, Any]) -> None:
            print(json.dumps(answer), file=answers, flush=True)

        try:
            weight_bytes, generate = start(json.loads(sys.argv[1]))
        except (ImportError, NotImplementedError) as error:
            say({"missing": str(error)})
            return
        say({"weight_bytes": weight_bytes})
        for line in sys.stdin:
            question = json.loads(line)
            first_s, rest_s, tokens = generate(question["prompt"], question["new_tokens"], question["rows"])
            say({"first_s": first_s, "rest_s": rest_s, "tokens": tokens, "peak_bytes": peak()})


def resident_peak() -> int | None:
    """Most resident memory of this process in bytes, as Linux counts it; None elsewhere."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = [line.split() for line in status.read_text().splitlines()]
    return next((int(words[1]) * 1024 for words in lines if words and words[0] == "VmHWM:"), None)
