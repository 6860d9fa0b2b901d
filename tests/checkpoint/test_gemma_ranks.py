"""CodeGemma's architecture on several processes. Their ranks import this file, so it leaves transformers out."""

from pathlib import Path
from typing import Any

from codellama import Llama
from tests.support import tiny
from tests.support.distributed import run_ranks

PROMPTS = [[1, 5, 9, 30], [1, *range(3, 60)]]


def greedy(folders: list[Path]) -> list[Any]:
    """What one rank generates from every checkpoint."""
    found = []
    for folder in folders:
        llama = Llama.build(folder, max_seq_len=96, max_batch_size=2, dtype="float32", device="cpu")
        found.append(llama.generate(PROMPTS, 10, temperature=0))
    return found


def test_ranks_generate_the_same_tokens(tmp_path: Path) -> None:
    """One of the two has a key/value head that all ranks hold; both have an output that is the embedding."""
    folders = [tiny.tiny_huggingface(tmp_path / name, args) for name, args in tiny.GEMMAS.items()]
    expected = greedy(folders)
    assert all(len(set(ids)) > 4 for tokens, _ in expected for ids in tokens)  # not one token over and over
    for size in (2, 4):
        for found in run_ranks(size, greedy, folders):
            assert found == expected
