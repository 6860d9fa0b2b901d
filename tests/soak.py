"""A long hard life: thousands of requests, many of them abandoned or hostile, against a server of its own process.

It measures what tests in CI cannot: memory that grows, places that are never given back, answers that slow down. It
talks to 127.0.0.1 only, prints a line for each part, and ends with status 1 when one failed.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.clients.run import server
from tests.support import hostile
from tests.support.hostile import GOOD, connected, content, exchange, post, read_all, status

ROWS, QUEUE = 4, 64  # the command's defaults
WARM_UP = 2000  # requests until each thread has met the largest bodies: the allocator keeps some memory for each
ENDLESS = json.dumps({"prompt": "1, 2, 3, 4, ", "max_tokens": 2000, "temperature": 0}).encode()

ANSWER = ENDLESS.replace(b"2000", b"200")  # an answer of 200 tokens: what is left of 200 requests is part of a second


class Soak:
    """One server, and what is done to it."""

    def __init__(self, port: int, pid: int, n: int, seed: int) -> None:
        self.port, self.pid, self.n = port, pid, n
        self._random = random.Random(seed)
        self.failed = False

    def report(self, what: str, ok: bool, found: str) -> None:
        self.failed |= not ok
        print(f"{'ok' if ok else 'FAILED'}  {what}: {found}", flush=True)

    def rss(self) -> float:
        """MB that the server has in memory."""
        with open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 1e6

    def timed(self, body: bytes = GOOD) -> float:
        began = time.monotonic()
        while (found := status(exchange(self.port, post(body)))) == 503:  # try again, as clients do
            time.sleep(0.01)
        assert found == 200, found
        return time.monotonic() - began

    def free(self) -> bool:
        """True when as many prompts fit as fit into an idle server, and all are answered."""
        body = json.dumps({"prompt": ["a"] * (ROWS + QUEUE), "max_tokens": 1}).encode()
        answer = exchange(self.port, post(body))
        return status(answer) == 200 and len(json.loads(content(answer))["choices"]) == ROWS + QUEUE

    def requests(self) -> None:
        """Send n mixed requests over a few connections at once; every tenth is abandoned while it runs."""
        seeds = [self._random.getrandbits(32) for _ in range(WARM_UP + self.n)]
        found: Counter[str] = Counter()
        fifth = max(1, self.n // 5)
        with ThreadPoolExecutor(ROWS + 2) as pool:
            found.update(pool.map(self._one, seeds[:WARM_UP]))
            sizes = [self.rss()]
            normal = min(self.timed() for _ in range(5))
            for begin in range(WARM_UP, WARM_UP + self.n, fifth):
                found.update(pool.map(self._one, seeds[begin : begin + fifth]))
                sizes.append(self.rss())
        growth = sizes[-1] / sizes[0] - 1
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
        shown = ", ".join(f"{size:.1f}" for size in sizes)
        self.report(f"{WARM_UP} and {self.n} requests", set(found) <= {"answered", "refused", "abandoned"}, listed)
        self.report("memory", growth < 0.03, f"{growth:+.2%}; MB after the warm-up and each fifth: {shown}")
        self.report("all places are free", self.free(), f"{ROWS + QUEUE} prompts at once")
        after = min(self.timed() for _ in range(5))
        self.report("one request", after < 2 * normal, f"{after * 1e3:.0f} ms, before {normal * 1e3:.0f} ms")

    def _one(self, seed: int) -> str:
        try:
            return self._ask(seed)
        except OSError as error:
            return f"{error!r} with seed {seed}"

    def _ask(self, seed: int) -> str:
        drawn = random.Random(seed)
        if drawn.random() < 0.1:
            with connected(self.port) as connection:
                connection.sendall(post(ENDLESS.replace(b"{", b'{"stream":true,', 1)))
                for _ in range(drawn.randrange(4)):
                    connection.recv(4096)
            return "abandoned"
        if drawn.random() < 0.05:
            body, expected = hostile.COMPLETIONS[drawn.choice(sorted(hostile.COMPLETIONS))]
            return self._judge(exchange(self.port, post(body)), expected)
        answer = exchange(self.port, self._request(drawn))
        if b"data: " in answer and not content(answer).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            return "cut short"
        return self._judge(answer, 200)

    @staticmethod
    def _judge(answer: bytes, expected: int) -> str:
        if status(answer) != expected:
            return f"status {status(answer)} instead of {expected}"
        return "answered" if expected == 200 else "refused"

    @staticmethod
    def _request(drawn: random.Random) -> bytes:
        words = " ".join(
            drawn.choice(["add", "list", "x = 1\n", "def f(y):", "🦙"]) for _ in range(drawn.randrange(60))
        )
        body: dict[str, Any] = {"max_tokens": drawn.randrange(1, 12), "stream": drawn.random() < 0.5}
        body |= {"temperature": drawn.choice([0, 0.8]), "n": drawn.choice([1, 1, 1, 2]), "seed": drawn.getrandbits(30)}
        body |= drawn.choice([{}, {"stop": ["\n\n", "def"]}, {"stream_options": {"include_usage": True}}])
        kind = drawn.choice(["chat", "text", "gap"])
        if kind != "chat":
            gap = {"suffix": "\n    return x\n"} if kind == "gap" else {"echo": drawn.random() < 0.5, "logprobs": 2}
            return post(json.dumps({**body, **gap, "prompt": words}).encode())
        body["messages"] = [{"role": "user", "content": words}]
        return post(json.dumps(body).encode()).replace(b"/v1/completions", b"/v1/chat/completions", 1)

    def abandoned(self) -> None:
        """Abandon 200 requests after 0.2 s, then ask once."""
        normal = max(self.timed(ANSWER) for _ in range(5))
        hostile.abandon(self.port, 200, 0.2, ENDLESS)
        waited = self.timed(ANSWER)
        self.report(
            "one after 200 abandoned", waited < 2 * normal, f"{waited * 1e3:.0f} ms, alone {normal * 1e3:.0f} ms"
        )
        self.report("all places are free", self.free(), f"{ROWS + QUEUE} prompts at once")

    def connections(self, n: int = 1000) -> None:
        """Hold n connections open, half of them with half a request, and ask on each."""
        whole = post(GOOD)
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(connected(self.port)) for _ in range(n)]
            for connection in opened[::2]:
                connection.sendall(whole[:50])
            waited = self.timed()
            self.report(f"one beside {n} connections", waited < 5, f"{waited * 1e3:.0f} ms")
            for index, connection in enumerate(opened):
                connection.sendall(whole[50:] if index % 2 == 0 else whole)
            statuses = Counter(status(read_all(connection)) for connection in opened)
        self.report(f"{n} requests at once", set(statuses) <= {200, 503}, str(dict(statuses)))

    def slow(self, n: int = 100, seconds: float = 5) -> None:
        """Send bodies a byte at a time, and see that others are answered meanwhile."""
        whole = post(b'{"prompt":"%s","max_tokens":1}' % (b"a " * 500))
        with contextlib.ExitStack() as stack:
            opened: list[socket.socket] = [stack.enter_context(connected(self.port)) for _ in range(n)]
            until, sent, slowest = time.monotonic() + seconds, 0, 0.0
            while time.monotonic() < until and sent < len(whole):
                for connection in opened:
                    connection.sendall(whole[sent : sent + 1])
                sent += 1
                if sent % 100 == 0:
                    slowest = max(slowest, self.timed())
            for connection in opened:
                connection.sendall(whole[sent:])
            statuses = Counter(status(read_all(connection)) for connection in opened)
        ok = slowest < 2 and set(statuses) <= {200, 503}
        self.report(f"{n} slow clients", ok, f"others waited {slowest * 1e3:.0f} ms at most; {dict(statuses)}")


def contract(cases: int) -> bool:
    """Run the test of the schema with many cases for each route."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/server/test_contract.py"]
    variables = {**os.environ, "CONTRACT_CASES": str(cases)}
    done = subprocess.run([*command, "--timeout", "1200"], env=variables, capture_output=True, text=True)
    said = done.stdout.strip().splitlines()
    print(f"{'ok' if done.returncode == 0 else 'FAILED'}  {cases} generated requests to each of 7 routes: {said[-1]}")
    if done.returncode != 0:
        print("\n".join(said))
    return done.returncode == 0


def main(requests: int, cases: int, seed: int) -> int:
    """Run all; return the exit status."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    with server() as (url, pid):
        soak = Soak(int(url.split(":")[2].split("/")[0]), pid, requests, seed)
        parts: list[Callable[[], None]] = [soak.requests, soak.abandoned, soak.connections, soak.slow]
        for part in parts:
            part()
    failed = soak.failed
    if cases:
        failed |= not contract(cases)
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000, help="mixed requests, a tenth of them abandoned")
    parser.add_argument("--cases", type=int, default=300, help="generated requests for each route; 0 is none")
    parser.add_argument("--seed", type=int, default=0, help="of the mixture")
    sys.exit(main(**vars(parser.parse_args())))
