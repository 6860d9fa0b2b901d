"""Checkpoints in llama.cpp's GGUF: one file that holds weights, architecture and tokenizer.

It knows nothing of how many ranks run: `read` gives any part of a full tensor, reading only the bytes that hold it.
Architecture `llama` stores what Meta does: rows of attn_q and attn_k as adjacent pairs, norms as they multiply. `gemma`
has those rows as two halves, and norms with the 1 that they are added to; here they are without it. Sources:
docs/gguf.md of ggml; the table of tensor names, the loaders and the converter of these architectures in llama.cpp.
"""

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from codellama.checkpoint.faults import some
from codellama.checkpoint.gguf_blocks import check_package, read_part
from codellama.checkpoint.gguf_header import MAGIC, Header, StoredTensor, read_header
from codellama.checkpoint.gguf_vocabulary import build_sentencepiece
from codellama.checkpoint.head_rows import needs_pairs, read_pairs
from codellama.checkpoint.layout import EMBEDDING, OUTPUT, PlainNumbers, tensor_shapes
from codellama.config import ModelArgs, choose_rope_theta, feed_forward_params
from codellama.errors import CheckpointError, shown
from codellama.tokenizer import Tokenizer

NAMES = {
    "tok_embeddings": "token_embd",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "norm": "output_norm",
    "output": "output",
}
"""Canonical names → GGUF's. `layers.N.` is `blk.N.` there."""

ROPE_FREQS = "rope_freqs.weight"
"""Divides the rotary frequencies. Ones change nothing; other values are a way of scaling them."""

ARCHITECTURES = ("llama", "gemma")
"""Values of general.architecture, with which the keys below begin."""

SIZES = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "hidden_dim": "feed_forward_length",
    "vocab_size": "vocab_size",
}
"""Sizes of the architecture. The last may be missing, and the fourth means n_heads then."""

NORM_EPS = "attention.layer_norm_rms_epsilon"
ROPE_THETA = "rope.freq_base"
HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
"""Of `llama` they may be missing, and are dim / n_heads; of `gemma` the first must be there, and the others are it."""
GEMMA_ROPE_THETA = 10_000.0
"""Of a `gemma` file without the key: its converter writes none, as every model of the architecture has this one."""
ROPE_SCALING = "rope.scaling."
NONE_OF = ("expert_count", "expert_used_count")
"""May be missing; else 0."""
UNUSED = ("context_length", "tensor_data_layout")
"""Describe the training and the history of the file; nothing here depends on them."""


class GGUFCheckpoint(PlainNumbers):
    """A GGUF file, checked when it is opened: its header, every name, every shape, every block type."""

    format_name: ClassVar = "gguf"
    looks_like: ClassVar = "a file that begins with GGUF, or a folder with one, is llama.cpp's format"

    def __init__(self, path: Path, tokenizer_path: Path | None = None, rope_theta: float | None = None) -> None:
        """Open a file, or the one GGUF file of a folder; nothing of the weights is read yet.

        Raises:
            CheckpointError: what is missing or wrong, the file, and what was expected.
        """
        self._path = find_file(path)
        header = read_header(self._path)
        architecture = _check_metadata(header)
        self._gemma = architecture == "gemma"
        self._stored = {name: tensor for name, tensor in header.tensors.items() if name != ROPE_FREQS}
        self.args = _read_args(header, architecture, rope_theta)
        self._shapes = tensor_shapes(self.args)
        self._theirs = {name: gguf_name(name) for name in self._shapes}
        if OUTPUT in self._theirs and self._theirs[OUTPUT] not in self._stored:
            self._theirs[OUTPUT] = self._theirs[EMBEDDING]
        self._check()
        check_package({tensor.block.name for tensor in header.tensors.values()})
        if ROPE_FREQS in header.tensors:
            self._check_rope_freqs(header.tensors[ROPE_FREQS])
        if tokenizer_path is None:
            self._tokenizer = Tokenizer.from_bytes(build_sentencepiece(header), f"the vocabulary of {self._path}")
        else:
            self._tokenizer = Tokenizer(tokenizer_path)

    @staticmethod
    def probe(path: Path) -> bool:
        """Say whether a file begins as GGUF does, or a folder holds such a file."""
        return bool(_gguf_files(path))

    @staticmethod
    def files(
        path: Path, tokenizer_path: Path | None = None, rope_theta: float | None = None
    ) -> Iterable[tuple[Path, Callable[[], object]]]:
        """List the file, by its header, and the tokenizer where one is given."""
        file = find_file(path)
        yield file, partial(read_header, file)
        if tokenizer_path is not None:
            yield tokenizer_path, partial(Tokenizer, tokenizer_path)

    def names(self) -> Iterable[str]:
        """Canonical names of all tensors."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the full tensor."""
        return self._shapes[name]

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer inside the file, or the one that was given."""
        return self._tokenizer

    def read(
        self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Copy a tensor, or its part from start to stop along dim: float32 where it is stored in blocks."""
        stored = self._stored[self._theirs[name]]
        spans = [(0, extent) for extent in stored.shape]
        if dim is not None:
            spans[dim] = (start, stored.shape[dim] if stop is None else stop)
        if len(spans) == 1:
            vector = self._read(stored, spans)[0]
            return vector - 1 if self._gemma else vector
        if self._gemma and needs_pairs(name):
            return read_pairs(partial(self._read, stored), spans, self.args.head_dim)
        return self._read(stored, spans)

    def _read(self, stored: StoredTensor, spans: list[tuple[int, int]]) -> Tensor:
        """Read a part as a matrix; a vector is one row."""
        rows, columns = spans if len(spans) == 2 else [(0, 1), *spans]
        try:
            with self._path.open("rb", buffering=0) as file:
                return read_part(file, stored.offset, stored.block, stored.shape[-1], rows, columns)
        except EOFError as error:
            raise CheckpointError(f"{self._path} became shorter after it was opened") from error

    def _check(self) -> None:
        expected = {self._theirs[name]: shape for name, shape in self._shapes.items()}
        missing = [name for name in expected if name not in self._stored]
        if missing:
            raise CheckpointError(f"{self._path} lacks {some(missing)}; its metadata asks for {len(expected)} tensors")
        extra = [shown(name) for name in self._stored if name not in expected]
        if extra:
            raise CheckpointError(f"{self._path} holds {some(extra)}, which its metadata has no place for")
        wrong = [
            f"{name} is {list(self._stored[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if self._stored[name].shape != shape
        ]
        if wrong:
            raise CheckpointError(f"{self._path}: {some(wrong)}")

    def _check_rope_freqs(self, stored: StoredTensor) -> None:
        expected = (self.args.head_dim // 2,)
        if stored.shape != expected:
            raise CheckpointError(f"{self._path}: {ROPE_FREQS} is {list(stored.shape)}, expected {list(expected)}")
        if not torch.all(self._read(stored, [(0, expected[0])]) == 1):
            raise CheckpointError(
                f"{self._path} scales its rotary frequencies by {ROPE_FREQS}; Code Llama has no such scaling, "
                f"and this package does not compute it"
            )


def gguf_name(name: str) -> str:
    """Translate a canonical name: layers.3.attention.wq.weight is blk.3.attn_q.weight."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if match:
        return f"blk.{match[1]}.{NAMES[match[2]]}.weight"
    return f"{NAMES[name.removesuffix('.weight')]}.weight"


def find_file(path: Path) -> Path:
    """Return a GGUF file, or the only one of a folder.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    files = _gguf_files(path)
    if not files:
        raise CheckpointError(f"{path} holds no GGUF file: none begins with {MAGIC!r}")
    if len(files) > 1:
        listed = some([file.name for file in files])
        raise CheckpointError(
            f"{path} holds {len(files)} GGUF files: {listed}. Name one of them in place of the folder"
        )
    return files[0]


def _gguf_files(path: Path) -> list[Path]:
    candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in candidates if file.is_file() and _begins_as_gguf(file)]


def _begins_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:  # a file that may not be read is not one that can be loaded
        return False


def _check_metadata(header: Header) -> str:
    """Refuse what this package does not compute, by name: another architecture, scaling, experts, unknown keys.

    Returns:
        The architecture, one of ARCHITECTURES.
    """
    where = header.path
    architecture = header.text("general.architecture")
    if architecture not in ARCHITECTURES:
        found = "no architecture" if architecture is None else f"the architecture {shown(architecture)}"
        raise CheckpointError(f"{where} has {found}; llama or gemma was expected")
    own = f"{architecture}."
    parts = header.find("split.count", int)
    if parts is not None and parts > 1:
        raise CheckpointError(
            f"{where} is one of {parts} parts of a split GGUF file: join them with `llama-gguf-split --merge`"
        )
    scaling = [key for key in header.values if key.startswith(own + ROPE_SCALING)]
    if scaling and header.text(f"{own}{ROPE_SCALING}type") != "none":
        listed = some([f"{shown(key)} = {header.spell(key)}" for key in scaling])
        raise CheckpointError(f"{where} scales its rotary frequencies ({listed}); this package does not compute that")
    for key in (own + name for name in NONE_OF):
        if header.find(key, int) not in (None, 0):
            raise CheckpointError(f"{where} has {key} = {header.spell(key)}: mixtures of experts are not Code Llama")
    names = {*SIZES.values(), NORM_EPS, ROPE_THETA, *HEAD_SIZES, *NONE_OF, *UNUSED}
    known = {*(own + name for name in names), *scaling}
    unknown = sorted(shown(key) for key in header.values if key.startswith(own) and key not in known)
    if unknown:
        raise CheckpointError(
            f"{where} has keys that this package does not know: {some(unknown)}. They may describe another architecture"
        )
    return architecture


def _read_args(header: Header, architecture: str, rope_theta: float | None) -> ModelArgs:
    """Take the architecture from the metadata; nothing is as large as a size says before the tensors agree."""
    where, own, gemma = header.path, f"{architecture}.", architecture == "gemma"
    sizes = {field: header.find(own + key, int) for field, key in SIZES.items()}
    if gemma:
        sizes["head_dim"] = header.find(own + HEAD_SIZES[0], int)
    embedding = header.tensors.get("token_embd.weight")
    if sizes["vocab_size"] is None and embedding is not None:
        sizes["vocab_size"] = embedding.shape[0]
    if sizes["n_kv_heads"] is None:
        sizes["n_kv_heads"] = sizes["n_heads"]
    checked: dict[str, Any] = {}
    for field, size in sizes.items():
        key = own + SIZES.get(field, HEAD_SIZES[0])
        if size is None:
            raise CheckpointError(f"{where} lacks {key}")
        if not 0 < size < 2**31:
            raise CheckpointError(f"{where}: {key} is {size}; a positive integer below 2**31 was expected")
        checked[field] = size
    if checked["n_layers"] > len(header.tensors):
        raise CheckpointError(
            f"{where}: {own}{SIZES['n_layers']} is {checked['n_layers']}, but the file holds "
            f"{len(header.tensors)} tensors"
        )
    norm_eps = header.find(own + NORM_EPS, float)
    if norm_eps is None:
        raise CheckpointError(f"{where} lacks {own}{NORM_EPS}")
    multiple_of, multiplier = feed_forward_params(checked["dim"], checked.pop("hidden_dim"))
    theta = header.find(own + ROPE_THETA, float)
    if theta is None and rope_theta is None and gemma:
        theta = GEMMA_ROPE_THETA
    if gemma:
        checked |= {"activation": "gelu_tanh", "norm_offset": 1, "tied_output": True}
        checked["embedding_scale"] = math.sqrt(checked["dim"])
    try:
        args = ModelArgs(
            **checked,
            multiple_of=multiple_of,
            ffn_dim_multiplier=multiplier,
            norm_eps=norm_eps,
            rope_theta=choose_rope_theta(theta, rope_theta, str(where)),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    reason = f"as {own}{HEAD_SIZES[0]} is" if gemma else f"{args.dim} over {args.n_heads} heads"
    for key in (own + name for name in HEAD_SIZES):
        size = header.find(key, int)
        if size not in (None, args.head_dim):
            raise CheckpointError(f"{where}: {key} is {size}; {args.head_dim} was expected, {reason}")
    return args
