"""The same float16 weights in every format, on 1, 2 and 4 processes: the same bits in memory, and the same tokens."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from codellama import Llama
from tests.support import tiny
from tests.support.distributed import run_ranks
from tests.support.gguf import write_gguf

NAMES = ("meta 1", "meta 2", "meta 4", "huggingface", "gguf F16", "gguf F32")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("formats")
    weights = tiny.random_weights(tiny.ARGS, dtype=torch.float16)
    metas = [tiny.tiny_checkpoint(root / f"meta{n}", n, dtype=torch.float16) for n in (1, 2, 4)]
    theirs = tiny.tiny_huggingface(root / "huggingface", dtype=torch.float16)
    ggufs = [write_gguf(root / kind, weights=weights, kind=kind) for kind in ("F16", "F32")]
    return [*metas, theirs, *ggufs]


def load(paths: list[Path]) -> list[Any]:
    """A digest of this rank's weights, and greedy tokens, for each path."""
    found = []
    for path in paths:
        with Llama.build(path, max_seq_len=64, dtype="float32", device="cpu") as llama:
            content = hashlib.sha256()
            for name, parameter in sorted(llama.model.named_parameters()):
                content.update(f"{name}{tuple(parameter.shape)}".encode() + parameter.numpy().tobytes())
            tokens, _ = llama.generate([[1, 5, 9, 30], [1, 7], [1, *range(3, 43)]], 12, temperature=0)
            found.append((content.hexdigest(), tokens))
    return found


@pytest.fixture(scope="module")
def alone(paths: list[Path]) -> list[Any]:
    return load(paths)


def test_one_process(alone: list[Any]) -> None:
    assert dict(zip(NAMES, alone, strict=True)) == dict.fromkeys(NAMES, alone[0])


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes(processes: int, paths: list[Path], alone: list[Any]) -> None:
    ranks = run_ranks(processes, load, paths)
    for found in ranks:
        assert dict(zip(NAMES, found, strict=True)) == dict.fromkeys(NAMES, found[0])
        assert found[0][1] == alone[0][1]
    assert len({found[0][0] for found in ranks}) == processes, "each rank holds another part"
