"""Many clients of one server: throughput, time to the first token, time between tokens.

python -m benchmarks.serving
python -m benchmarks.serving --shape 207m
python -m benchmarks.serving --base_url http://127.0.0.1:8000/v1

Without --base_url it starts `codellama serve` on a random model. All times are those that a client sees.
"""

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fire
import httpx2
import torch

from benchmarks.machine import RandomCheckpoint, report, shape_args, tokenizer_bytes
from codellama.checkpoint import write_meta
from codellama.device import choose_device, choose_dtype
from codellama.tokenizer import Tokenizer

CHUNK = 512
PEAKED = 9.0  # the output layer is scaled by this, so that sampling meets logits as uneven as a trained model's


@dataclass
class Answer:
    """What a client saw of one stream."""

    begin: float
    times: list[float] = field(default_factory=list)  # of the pieces of text
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> float:
        """Seconds to the first piece."""
        return self.times[0] - self.begin

    @property
    def between(self) -> list[float]:
        """Seconds from piece to piece."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


async def ask(client: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> Answer:
    """Read a stream to its end."""
    body = {"model": "any", "stream": True, "stream_options": {"include_usage": True}, **body}
    answer = Answer(time.perf_counter())
    async with client.stream("POST", path, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            answer.usage = event["usage"] or answer.usage
            for choice in event["choices"]:
                piece = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
                if piece:
                    answer.times.append(time.perf_counter())
                    answer.text += piece
    return answer


class Clients:
    """Requests of known sizes to one server; prompts are random ids, so that none begins like another."""

    def __init__(self, client: httpx2.AsyncClient, vocab_size: int, prompt: int, new_tokens: int) -> None:
        """Remember what a usual request is like."""
        self.client, self.vocab_size, self.prompt, self.new_tokens = client, vocab_size, prompt, new_tokens
        self.rng = random.Random(0)

    async def complete(self, length: int | None = None, new_tokens: int | None = None, delay: float = 0.0) -> Answer:
        """Continue a prompt of so many ids, after a while."""
        ids = [1, *(self.rng.randrange(300, self.vocab_size) for _ in range((length or self.prompt) - 1))]
        await asyncio.sleep(delay)
        return await ask(self.client, "/completions", {"prompt": ids, "max_tokens": new_tokens or self.new_tokens})

    async def together(self, n: int, rounds: int) -> dict[str, Any]:
        """Let n clients ask one thing after the other."""

        async def one() -> list[Answer]:
            return [await self.complete() for _ in range(rounds)]

        begin = time.perf_counter()
        answers = [answer for several in await asyncio.gather(*(one() for _ in range(n))) for answer in several]
        return summary(f"{n} at once", answers, time.perf_counter() - begin)

    async def poisson(self, requests: int, rate: float) -> dict[str, Any]:
        """Let requests come by chance, so many per second on average."""
        at, arrivals = 0.0, []
        for _ in range(requests):
            arrivals.append(at)
            at += self.rng.expovariate(rate)
        begin = time.perf_counter()
        answers = await asyncio.gather(*(self.complete(delay=delay) for delay in arrivals))
        return summary("poisson", answers, time.perf_counter() - begin)

    async def short_behind_long(self, long: int, short: int, repeats: int) -> dict[str, float]:
        """Ask something short while a long prompt is read: time to its first token against a chunk's time."""
        alone = [(await self.complete(long, 1)).first for _ in range(repeats)]
        chunk = min(alone) / -(-long // CHUNK)
        waited = []
        for _ in range(repeats):
            both = asyncio.gather(self.complete(long, 1), self.complete(short, 1, delay=min(alone) * self.rng.random()))
            waited.append((await both)[1].first)
        return {"chunk_s": chunk, "short_s": max(waited), "short_chunks": max(waited) / chunk}

    async def second_turn(self, tokenizer: Tokenizer, history: int) -> dict[str, float]:
        """Go on with a chat: time to the first token of the second turn against that of the first."""
        words = []
        while len(tokenizer.encode(" ".join(words), bos=True, eos=False)) < history:
            words += [f"item{self.rng.randrange(10**6)}" for _ in range(10)]
        messages = [{"role": "user", "content": " ".join(words)}]
        body: dict[str, Any] = {"messages": messages, "max_tokens": 16}
        first = await ask(self.client, "/chat/completions", body)
        messages += [{"role": "assistant", "content": "It is done."}, {"role": "user", "content": "And what follows?"}]
        second = await ask(self.client, "/chat/completions", body)
        cached = second.usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "first_s": first.first,
            "second_s": second.first,
            "second_of_first": second.first / first.first,
            "cached": cached,
            "prompt": second.usage["prompt_tokens"],
        }


def summary(load: str, answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """One row of the table."""
    tokens = sum(answer.usage["completion_tokens"] for answer in answers)
    firsts = [answer.first for answer in answers if answer.times]
    gaps = [gap for answer in answers for gap in answer.between]
    row: dict[str, Any] = {"load": load, "requests": len(answers), "tokens_per_s": tokens / seconds}
    for name, values in (("first", firsts), ("between", gaps)):
        for percent in (50, 95, 99):
            row[f"{name}_p{percent}_ms"] = 1000 * percentile(values, percent)
    return row


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def write_random(folder: Path, shape: str, dtype: torch.dtype) -> None:
    """Write a checkpoint of random weights, with the demo's tokenizer made as large as the shape says."""
    args = shape_args(shape)
    weights = RandomCheckpoint(args, dtype, torch.device("cpu"))
    tensors = ((name, weights.read(name).mul_(PEAKED if name == "output.weight" else 1)) for name in weights.names())
    write_meta(folder, args, ((name, [tensor]) for name, tensor in tensors), 1, tokenizer_bytes(args.vocab_size))


@contextlib.contextmanager
def started(folder: str, rows: int, max_seq_len: int, device: str | None) -> Iterator[str]:
    """Run `codellama serve` on a free port, and end it; gives the base URL."""
    command = [sys.executable, "-m", "codellama", "serve", "--port", "0", "--ckpt_dir", folder]
    command += ["--max_batch_size", str(rows), "--max_seq_len", str(max_seq_len), "--chunk_size", str(CHUNK)]
    command += ["--max_queue", "1000", *(["--device", device] if device else [])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            if not line.startswith("serving on "):
                raise RuntimeError(line + process.stderr.read())
            yield line.split()[2]
        finally:
            process.terminate()
            process.communicate()


async def measure(base_url: str, tokenizer: Tokenizer, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Run all loads, one after the other; the fractions that are asked for go into arguments."""
    async with httpx2.AsyncClient(base_url=base_url, timeout=600, trust_env=False) as client:
        until = time.perf_counter() + 600
        while (await client.get("/../health")).status_code != 200:
            if time.perf_counter() > until:
                raise RuntimeError("the server has not become ready within ten minutes")
            await asyncio.sleep(0.2)
        clients = Clients(client, tokenizer.n_words, arguments["prompt"], arguments["new_tokens"])
        await clients.complete()  # warm
        streams = arguments["streams"]
        rows = [await clients.together(n, rounds) for _ in range(2) for n, rounds in ((1, 2), (streams, 1))]
        one, many = (max(row["tokens_per_s"] for row in rows[at::2]) for at in (0, 1))
        rate = 0.7 * many / arguments["new_tokens"]
        rows.append(await clients.poisson(arguments["requests"], rate))
        arguments["many_of_one"] = many / one
        arguments["arrivals_per_s"] = rate
        arguments["behind_long"] = await clients.short_behind_long(arguments["long"], 16, 2)
        arguments["second_turn"] = await clients.second_turn(tokenizer, arguments["history"])
        return rows


def serving(
    base_url: str | None = None,
    tokenizer_path: str | None = None,
    shape: str = "small",
    dtype: str | None = None,
    device: str | None = None,
    streams: int = 8,
    requests: int = 24,
    prompt: int = 128,
    new_tokens: int = 64,
    long: int = 4000,
    history: int = 2000,
) -> None:
    """Measure a running server, whose tokenizer must be given, or one of a random model."""
    arguments: dict[str, Any] = {
        "shape": shape if base_url is None else base_url,
        "streams": streams, "requests": requests, "prompt": prompt, "new_tokens": new_tokens,
        "long": long, "history": history,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        if base_url is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            kind = choose_dtype(dtype, choose_device(device))
            arguments["dtype"] = str(kind)
            write_random(Path(folder), shape, kind)
            max_seq_len = max(long, history + 200, prompt + new_tokens) + 64
            base_url = stack.enter_context(started(folder, streams, max_seq_len, device))
            tokenizer_path = f"{folder}/tokenizer.model"
        elif tokenizer_path is None:
            raise ValueError("base_url needs a tokenizer_path, the tokenizer.model of what is served there")
        rows = asyncio.run(measure(base_url, Tokenizer(tokenizer_path), arguments))
    for name in ("many_of_one", "behind_long", "second_turn"):
        print(f"{name}: {arguments[name]}")
    report("serving", arguments, rows)


if __name__ == "__main__":
    fire.Fire(serving)
