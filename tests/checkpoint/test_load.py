"""Loading: memory is the rank's own weights, reading ahead is bounded, and a failure is raised."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.load import run_processes, write_random
from codellama.checkpoint import load_model, open_checkpoint
from codellama.checkpoint.loading import READERS, Loading
from codellama.checkpoint.meta import MetaCheckpoint
from codellama.errors import CheckpointError
from codellama.model import Transformer
from codellama.parallel import Parallel
from tests.support import tiny


def test_memory_is_the_ranks_own_weights(tmp_path: Path) -> None:
    """170 MB of weights; half of them on each of two processes. Nothing else of the file counts."""
    write_random(tmp_path / "ckpt", 0.2)
    alone, halved = (run_processes(tmp_path / "ckpt", size) for size in (1, 2))
    assert alone["weights_MB"] > 160
    assert halved["weights_MB"] == pytest.approx(alone["weights_MB"] / 2, rel=0.01)
    assert alone["above_MB"] < 40
    assert halved["above_MB"] < 40


def test_few_tensors_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "ckpt"))
    read, begun, placed, ahead = MetaCheckpoint.read, [], [], []

    def count(self: MetaCheckpoint, name: str, *span: Any, out: torch.Tensor | None) -> torch.Tensor:
        begun.append(name)
        ahead.append(len(begun) - len(placed))
        return read(self, name, *span, out=out)

    monkeypatch.setattr(MetaCheckpoint, "read", count)
    model = Transformer(checkpoint.args)
    loading = Loading(checkpoint, model, Parallel(), torch.device("cpu"), torch.float32, None)
    for name in loading.run(list(checkpoint.names())):
        placed.append(name)
    assert sorted(begun) == sorted(checkpoint.names())
    assert max(ahead) <= READERS + 1
    weights = tiny.random_weights(tiny.ARGS)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_a_failure_of_a_reader_is_raised(tmp_path: Path) -> None:
    folder = tiny.tiny_checkpoint(tmp_path / "ckpt")
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / "consolidated.00.pth", 200_000)
    with pytest.raises(CheckpointError, match="has become shorter"):
        load_model(checkpoint, Parallel(), torch.device("cpu"), torch.float32)
