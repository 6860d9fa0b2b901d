"""The serving benchmark, on a server of the demo checkpoint in this process."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serving import measure, percentile, write_random
from codellama.assembly import DEMO
from codellama.checkpoint import open_checkpoint
from codellama.tokenizer import Tokenizer
from tests.server.test_serve import Serving


@pytest.mark.slow
def test_the_serving_benchmark_measures_every_load() -> None:
    sizes = {"streams": 2, "requests": 3, "prompt": 8, "new_tokens": 4, "long": 40, "history": 60}
    arguments: dict[str, Any] = dict(sizes)
    with Serving() as client:
        rows = asyncio.run(measure(f"{client.base_url}/v1", Tokenizer(DEMO / "tokenizer.model"), arguments))
        client.close()
    assert [(row["load"], row["requests"]) for row in rows] == [("1 at once", 2), ("2 at once", 2)] * 2 + [
        ("poisson", 3)
    ]
    assert all(0 < row["first_p50_ms"] <= row["first_p95_ms"] <= row["first_p99_ms"] for row in rows)
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert arguments["second_turn"]["prompt"] > arguments["second_turn"]["cached"] > sizes["history"]
    assert arguments["behind_long"]["short_s"] > 0


@pytest.mark.parametrize(("percent", "value"), [(50, 3), (95, 4), (99, 4), (0, 1)])
def test_percentile(percent: float, value: float) -> None:
    assert percentile([4, 1, 3, 2], percent) == value


def test_the_random_checkpoint_can_be_loaded(tmp_path: Path) -> None:
    write_random(tmp_path, "tiny", torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.n_words == checkpoint.args.vocab_size == 8192
    assert tokenizer.decode([8000, 8001]) == "<8000><8001>"
    text = "def f(x):\n    return x"
    assert tokenizer.encode(text, bos=True, eos=False) == Tokenizer(DEMO / "tokenizer.model").encode(
        text, bos=True, eos=False
    )
