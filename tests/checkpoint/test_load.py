"""Loading: memory is the rank's own weights, reading ahead is bounded, and a failure is raised."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks.load import run_processes, write_random
from codellama.checkpoint import READERS, load_model, open_checkpoint
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
    read, begun, ahead = MetaCheckpoint.read, [], []
    model = Transformer(checkpoint.args)

    def count(self: MetaCheckpoint, name: str, *span: int) -> torch.Tensor:
        begun.append(name)
        placed = sum(not parameter.is_meta for parameter in model.parameters())
        ahead.append(len(begun) - placed)
        return read(self, name, *span)

    monkeypatch.setattr(MetaCheckpoint, "read", count)
    monkeypatch.setattr("codellama.checkpoint.Transformer", lambda *_: model)
    load_model(checkpoint, Parallel(), torch.device("cpu"), torch.float32)
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
