"""Checkpoints: open one of any format, and load one rank's part of it into a model. One file per weight format.

This is the only place that shards weights.
"""

from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from codellama.checkpoint.gguf import GGUFCheckpoint
from codellama.checkpoint.layout import Checkpoint, rank_span, tensor_shapes
from codellama.checkpoint.meta import MetaCheckpoint, write_meta
from codellama.errors import CheckpointError
from codellama.model import Transformer
from codellama.parallel import Parallel

__all__ = ["Checkpoint", "load_model", "open_checkpoint", "tensor_shapes", "write_meta"]


FORMATS: tuple[type[Checkpoint], ...] = (MetaCheckpoint, GGUFCheckpoint)
"""Every weight format, in the order in which a folder that holds several of them is read."""


def open_checkpoint(
    ckpt_dir: str | Path, tokenizer_path: str | Path | None = None, rope_theta: float | None = None
) -> Checkpoint:
    """Open a checkpoint and check names and shapes of all tensors; no weights are read yet.

    The format is found from content: each class in FORMATS looks whether the path holds its own.

    Args:
        ckpt_dir: the folder, or the file where the format is one file.
        tokenizer_path: None means the one beside the weights, or inside them.
        rope_theta: base of the rotary frequencies, where the weights' own description has none.

    Raises:
        CheckpointError: naming the file, what was found and what was expected.
    """
    path = Path(ckpt_dir)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    found = [kind for kind in FORMATS if kind.probe(path)]
    if not found:
        raise CheckpointError(f"{path} holds no weights in a format that this package reads: {_expected()}")
    checkpoint = found[0](path, None if tokenizer_path is None else Path(tokenizer_path), rope_theta)
    words, rows = checkpoint.tokenizer().n_words, checkpoint.args.vocab_size
    if words != rows:
        raise CheckpointError(
            f"the tokenizer has {words} pieces, but the embedding of {path} has {rows} rows: "
            f"use the tokenizer.model that came with these weights"
        )
    return checkpoint


def _expected() -> str:
    return "; ".join(kind.looks_like for kind in FORMATS)


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
