"""Checkpoints: open one of any format, and load one rank's part of it into a model. One file per weight format."""

import logging
from pathlib import Path

import torch
from tqdm import tqdm

from codellama.checkpoint.gguf import GGUFCheckpoint
from codellama.checkpoint.huggingface import HuggingFaceCheckpoint
from codellama.checkpoint.huggingface_writer import write_huggingface
from codellama.checkpoint.layout import EMBEDDING, OUTPUT, Checkpoint, rank_inputs, tensor_shapes
from codellama.checkpoint.loading import Loading
from codellama.checkpoint.meta import MetaCheckpoint
from codellama.checkpoint.meta_writer import write_meta
from codellama.checkpoint.quantized import QuantizedCheckpoint
from codellama.errors import CheckpointError, QuantizationError
from codellama.model import Transformer
from codellama.parallel import Parallel
from codellama.quantization import Quantization

__all__ = [
    "Checkpoint",
    "choose_quantization",
    "load_model",
    "open_checkpoint",
    "tensor_shapes",
    "write_huggingface",
    "write_meta",
]

logger = logging.getLogger(__name__)

FORMATS: tuple[type[Checkpoint], ...] = (
    MetaCheckpoint,
    HuggingFaceCheckpoint,
    GGUFCheckpoint,
    QuantizedCheckpoint,
)
"""Every weight format, in the order in which a folder that holds several of them is read."""


def open_checkpoint(
    ckpt_dir: str | Path,
    tokenizer_path: str | Path | None = None,
    rope_theta: float | None = None,
    *,
    checkpoint_format: str | None = None,
) -> Checkpoint:
    """Open a checkpoint and check names and shapes of all tensors; no weights are read yet.

    The format is found from content: each class in FORMATS looks whether the path holds its own. Where several do, the
    first one is taken, and a warning says so.

    Args:
        ckpt_dir: the folder, or the file where the format is one file.
        tokenizer_path: None means the one beside the weights, or inside them.
        rope_theta: base of the rotary frequencies, where the weights' own description has none.
        checkpoint_format: the name of one of FORMATS; None finds it.

    Raises:
        CheckpointError: naming the file, what was found and what was expected.
    """
    path = Path(ckpt_dir)
    kind = choose_format(path, checkpoint_format)
    checkpoint = kind(path, None if tokenizer_path is None else Path(tokenizer_path), rope_theta)
    check_vocabulary(checkpoint, path)
    return checkpoint


def check_vocabulary(checkpoint: Checkpoint, path: Path) -> None:
    """Refuse a tokenizer of another size than the embedding.

    Raises:
        CheckpointError: with both numbers.
    """
    words, rows = checkpoint.tokenizer().n_words, checkpoint.args.vocab_size
    if words != rows:
        raise CheckpointError(
            f"the tokenizer has {words} pieces, but the embedding of {path} has {rows} rows: "
            f"use the tokenizer.model that came with these weights"
        )


def choose_format(path: Path, name: str | None) -> type[Checkpoint]:
    """Find the format of a folder or file from its content, or check that it holds the one that is named.

    Raises:
        CheckpointError: there is nothing there, or nothing of this format.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    known = [kind.format_name for kind in FORMATS]
    if name is not None and name not in known:
        raise CheckpointError(f"checkpoint_format is {name!r}; known are {', '.join(known)}")
    found = [kind for kind in FORMATS if kind.probe(path)]
    if not found:
        expected = "; ".join(kind.looks_like for kind in FORMATS)
        raise CheckpointError(f"{path} holds no weights in a format that this package reads: {expected}")
    if name is None:
        if len(found) > 1:
            others = ", ".join(kind.format_name for kind in found[1:])
            logger.warning(
                f"{path} holds weights in {len(found)} formats: {found[0].format_name} is read; "
                f"pass checkpoint_format to choose another one ({others})"
            )
        return found[0]
    chosen = [kind for kind in found if kind.format_name == name]
    if not chosen:
        looks = FORMATS[known.index(name)].looks_like
        raise CheckpointError(f"{path} holds no weights in the format {name}, but {found[0].format_name}: {looks}")
    return chosen[0]


def choose_quantization(checkpoint: Checkpoint, asked: Quantization | None) -> Quantization | None:
    """Say how the matrices are held: as the checkpoint stores them, where it stores codes, else as asked for.

    Raises:
        QuantizationError: other codes than the checkpoint's are asked for.
    """
    stored = checkpoint.quantization
    if stored is not None and asked not in (None, stored):
        raise QuantizationError(
            f"quantize is {str(asked)!r}, but these weights are stored as {stored}: leave quantize out, or load the "
            f"original weights, or convert those with --quantize {asked}"
        )
    return stored or asked


def load_model(
    checkpoint: Checkpoint,
    parallel: Parallel,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = False,
    quantization: Quantization | None = None,
) -> Transformer:
    """Make this rank's part of the model and fill it; each rank copies only its own slices, tensor by tensor.

    Args:
        checkpoint: an open checkpoint.
        parallel: which part to load.
        device: where the weights go.
        dtype: what they are held in; see `compute_dtype` for what they are multiplied in.
        progress: show a bar on stderr when it takes longer than a second.
        quantization: how matrices are rounded as they come; embedding and norms are not. Codes are loaded as they are.

    Raises:
        ParallelSizeError: the model cannot be split over this many ranks.
        QuantizationError: its groups do not divide the matrices, or the checkpoint has other codes.
        CheckpointError: a number is too large for dtype.
    """
    model = Transformer(checkpoint.args, parallel)
    parameters = dict(model.named_parameters())
    own = parameters.keys() - ({OUTPUT} if checkpoint.args.tied_output else set())
    assert own == set(checkpoint.names()), "the model's names are the canonical names"
    quantization = choose_quantization(checkpoint, quantization)
    if quantization is not None:
        quantization.check(rank_inputs(checkpoint.args, parallel.size))
    loading = Loading(checkpoint, model, parallel, device, dtype, quantization)
    parameters.setdefault(OUTPUT, parameters[EMBEDDING])  # which a tied output of one rank is made of
    sizes = {name: parameters[name].numel() * dtype.itemsize for name in loading.names}
    total = sum(sizes.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", delay=1, disable=not progress) as bar:
        for name in loading.run(loading.names):
            bar.update(sizes[name])
    return model.eval()
