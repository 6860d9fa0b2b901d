"""Descriptions of checkpoints: their numbers against the files and against what is allocated."""

from pathlib import Path

import pytest
import torch

from codellama.checkpoint.convert import convert
from codellama.checkpoint.info import info
from codellama.config import RuntimeArgs
from codellama.errors import CheckpointError
from codellama.memory import plan_budget
from tests.support import tiny


@pytest.mark.parametrize("format", ["meta", "huggingface"])
def test_a_checkpoint_in_numbers(tmp_path: Path, format: str) -> None:
    convert(tiny.tiny_checkpoint(tmp_path / "source"), tmp_path / "ckpt", format=format, dtype="float16")
    found = info(tmp_path / "ckpt", 64, 3, "bfloat16")
    assert found.format == format
    weights = tiny.random_weights(tiny.ARGS)
    assert found.parameters == sum(tensor.numel() for tensor in weights.values())
    assert found.dtypes == ("float16",)
    assert found.args.hidden_dim == tiny.ARGS.hidden_dim
    assert found.files["tokenizer.model"] == len(tiny.tokenizer_bytes())
    assert sum(found.files.values()) > 2 * found.parameters
    assert (found.infilling, found.chat) == (True, "instruct")
    runtime = RuntimeArgs(max_seq_len=64, max_batch_size=3)
    assert found.budgets == {size: plan_budget(found.args, runtime, size, 2, 2) for size in (1, 2, 4, 8)}
    text = found.describe()
    assert f"parameters   {found.parameters:,}" in text
    assert "bfloat16, 3 rows of 64 tokens" in text


def test_sizes_that_do_not_divide_are_left_out(tmp_path: Path) -> None:
    args = tiny.ModelArgs(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=320, multiple_of=40, rope_theta=1e4)
    assert info(tiny.tiny_checkpoint(tmp_path / "ckpt", args=args)).budgets.keys() == {1, 2}


@pytest.mark.parametrize(
    ("pieces", "infilling", "chat"), [((), False, "instruct"), ((*tiny.INFILLING, "<step>"), True, "steps")]
)
def test_what_the_tokenizer_allows(tmp_path: Path, pieces: tuple[str, ...], infilling: bool, chat: str) -> None:
    found = info(tiny.tiny_checkpoint(tmp_path / "ckpt", pieces=pieces))
    assert (found.infilling, found.chat) == (infilling, chat)


def test_what_is_refused(tmp_path: Path) -> None:
    folder = tiny.tiny_checkpoint(tmp_path / "ckpt")
    with pytest.raises(ValueError, match="dtype is"):
        info(folder, dtype=torch.int8)
    (folder / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks params\.json"):
        info(folder)
