"""Checkpoints: open a folder, and load one rank's part of it into a model. One file per weight format.

This is the only place that shards weights.
"""

from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from codellama.checkpoint.layout import Checkpoint, rank_span, tensor_shapes
from codellama.checkpoint.meta import MetaCheckpoint, find_shards, write_meta
from codellama.errors import CheckpointError
from codellama.model import Transformer
from codellama.parallel import Parallel
from codellama.tokenizer import Tokenizer

__all__ = ["Checkpoint", "load_model", "open_checkpoint", "tensor_shapes", "write_meta"]


def open_checkpoint(
    ckpt_dir: str | Path, tokenizer_path: str | Path | None = None, rope_theta: float | None = None
) -> Checkpoint:
    """Open a checkpoint and check it against its params.json; no weights are read yet.

    Args:
        ckpt_dir: the folder.
        tokenizer_path: None means `tokenizer.model` beside the weights.
        rope_theta: base of the rotary frequencies, where params.json has none.

    Raises:
        CheckpointError: naming the file, what was found and what was expected.
    """
    folder = Path(ckpt_dir)
    if not folder.is_dir():
        what = "is a file; the folder that holds it was expected" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}")
    find_shards(folder)  # before the tokenizer: a folder without weights is the wrong folder
    words_path = folder / "tokenizer.model" if tokenizer_path is None else tokenizer_path
    checkpoint = MetaCheckpoint(folder, Tokenizer(words_path), rope_theta)
    words, rows = checkpoint.tokenizer().n_words, checkpoint.args.vocab_size
    if words != rows:
        raise CheckpointError(
            f"the tokenizer has {words} pieces, but the embedding of {folder} has {rows} rows: "
            f"use the tokenizer.model that came with these weights"
        )
    return checkpoint


def load_model(
    checkpoint: Checkpoint, parallel: Parallel, device: torch.device, dtype: torch.dtype, progress: bool = False
) -> Transformer:
    """Make this rank's part of the model and fill it; each rank copies only its own slices, tensor by tensor.

    Args:
        checkpoint: an open checkpoint.
        parallel: which part to load.
        device: where the weights go.
        dtype: what they are converted to.
        progress: show a bar on stderr when it takes longer than a second.

    Raises:
        ParallelSizeError: the model cannot be split over this many ranks.
    """
    model = Transformer(checkpoint.args, parallel)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == set(checkpoint.names()), "the model's names are the canonical names"
    total = sum(parameter.numel() for parameter in parameters.values()) * dtype.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", delay=1, disable=not progress) as bar:
        for name, parameter in parameters.items():
            span = rank_span(name, checkpoint.args, parallel.rank, parallel.size)
            tensor = checkpoint.read(name, *span) if span else checkpoint.read(name)
            assert tensor.shape == parameter.shape, f"{name}: {tuple(tensor.shape)} for {tuple(parameter.shape)}"
            owner, _, leaf = name.rpartition(".")
            loaded = nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, loaded)
            bar.update(loaded.nbytes)
    return model.eval()
