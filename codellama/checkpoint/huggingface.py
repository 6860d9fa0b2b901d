"""Checkpoints in Hugging Face's layout: config.json and safetensors, one file or several with an index.

It knows nothing of ranks: `read` gives any part of a full tensor, whatever the files. Source: transformers'
modeling_llama.py and modeling_gemma.py, whose names and order of rows are the same.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from codellama.checkpoint.faults import read_json, some, vocabulary_hint
from codellama.checkpoint.head_rows import needs_pairs, read_pairs
from codellama.checkpoint.huggingface_config import args_from_config
from codellama.checkpoint.layout import EMBEDDING, OUTPUT, PlainNumbers, place_for, tensor_shapes
from codellama.checkpoint.piece_names import open_with_names
from codellama.checkpoint.safetensors_header import Entry, read_header
from codellama.errors import CheckpointError, shown
from codellama.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.N.attention.wq.weight": "model.layers.N.self_attn.q_proj.weight",
    "layers.N.attention.wk.weight": "model.layers.N.self_attn.k_proj.weight",
    "layers.N.attention.wv.weight": "model.layers.N.self_attn.v_proj.weight",
    "layers.N.attention.wo.weight": "model.layers.N.self_attn.o_proj.weight",
    "layers.N.feed_forward.w1.weight": "model.layers.N.mlp.gate_proj.weight",
    "layers.N.feed_forward.w2.weight": "model.layers.N.mlp.down_proj.weight",
    "layers.N.feed_forward.w3.weight": "model.layers.N.mlp.up_proj.weight",
    "layers.N.attention_norm.weight": "model.layers.N.input_layernorm.weight",
    "layers.N.ffn_norm.weight": "model.layers.N.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""Canonical names, and what they are called in the files; N is a layer."""

IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Present in old files and unused: the frequencies follow from rope_theta."""

_LAYER = re.compile(r"(?<=layers\.)\d+")


class HuggingFaceCheckpoint(PlainNumbers):
    """A folder in Hugging Face's layout, checked when it is opened: every header, every name and every shape."""

    format_name: ClassVar = "huggingface"
    looks_like: ClassVar = f"a folder with config.json and {WEIGHTS}, or {INDEX}, is Hugging Face's layout"

    def __init__(self, folder: Path, tokenizer_path: Path | None = None, rope_theta: float | None = None) -> None:
        """Open a folder; nothing of the weights is read yet.

        Raises:
            CheckpointError: what is missing or wrong, the file, and what was expected.
        """
        found = _find_tensors(folder)
        config = folder / "config.json"
        if not config.is_file():
            raise CheckpointError(f"{folder} lacks config.json")
        self.args, tied = args_from_config(read_json(config), str(config), rope_theta)
        if self.args.tied_output and huggingface_name(OUTPUT) in found:
            self.args = replace(self.args, tied_output=False)  # what the files hold wins over what is said of it
        self._tokenizer = _open_tokenizer(folder, tokenizer_path)
        if self.args.n_layers > len(found):  # before names are made for a billion layers
            raise CheckpointError(f"{config} asks for {self.args.n_layers} layers, but there are {len(found)} tensors")
        self._shapes = tensor_shapes(self.args)
        self._names = {name: huggingface_name(name) for name in self._shapes}
        if tied and OUTPUT in self._names and self._names[OUTPUT] not in found:
            self._names[OUTPUT] = self._names[EMBEDDING]
        self._check(folder, {name: entry for name, (_, entry) in found.items()})
        self._paths = {name: found[theirs][0] for name, theirs in self._names.items()}

    @staticmethod
    def probe(path: Path) -> bool:
        """Say whether a folder holds model.safetensors, its index, or a file of several."""
        weights = (path / WEIGHTS, path / INDEX, *path.glob("model-[0-9]*-of-[0-9]*.safetensors"))
        return any(file.is_file() for file in weights)

    @staticmethod
    def files(
        path: Path, tokenizer_path: Path | None = None, rope_theta: float | None = None
    ) -> Iterable[tuple[Path, Callable[[], object]]]:
        """List config.json, the tokenizer, the index where there is one, and the files of weights, by their headers."""
        config, index = path / "config.json", path / INDEX
        yield config, lambda: args_from_config(read_json(config), str(config), rope_theta)
        yield tokenizer_path or path / "tokenizer.model", lambda: _open_tokenizer(path, tokenizer_path)
        if index.exists():
            yield index, lambda: _read_index(index)
        for weights in sorted(path.glob("model*.safetensors")):
            yield weights, partial(read_header, weights)

    def names(self) -> Iterable[str]:
        """Canonical names of all tensors."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the full tensor."""
        return self._shapes[name]

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the folder was opened with."""
        return self._tokenizer

    def read(
        self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Copy a tensor, or its part from start to stop along dim, touching only the pages of the file that hold it."""
        spans = [(0, size) for size in self._shapes[name]]
        if dim is not None:
            stop = spans[dim][1] if stop is None else stop
            assert 0 <= start <= stop <= spans[dim][1], f"{name}: {start} to {stop} of axis {dim}"
            spans[dim] = (start, stop)
        if not needs_pairs(name):
            view = self._view(name, spans)
            return place_for(view.shape, view.dtype, out).copy_(view)
        return read_pairs(partial(self._view, name), spans, self.args.head_dim)

    def _view(self, name: str, spans: list[tuple[int, int]]) -> Tensor:
        """Map the file and cut; the map, and the pages that were read, go when the view goes."""
        path = self._paths[name]
        try:
            with safe_open(path, framework="pt") as file:
                view: Tensor = file.get_slice(self._names[name])[tuple(slice(*span) for span in spans)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read, it has changed since it was opened: {error}") from error
        return view

    def _check(self, folder: Path, found: dict[str, Entry]) -> None:
        missing = [name for name in self._names.values() if name not in found]
        if missing:
            raise CheckpointError(f"{folder} lacks {some(missing)}; config.json asks for {len(self._names)} tensors")
        places = set(self._names.values())
        extra = [shown(name) for name in found if name not in places and not IGNORED.fullmatch(name)]
        if extra:
            raise CheckpointError(f"{folder} holds {some(extra)}, which config.json has no place for")
        wrong = [
            f"{theirs} is {list(found[theirs].shape)}, expected {list(self._shapes[name])}"
            for name, theirs in self._names.items()
            if found[theirs].shape != self._shapes[name]
        ]
        if wrong:
            hint = vocabulary_hint(wrong, self.args, self._tokenizer.n_words)
            raise CheckpointError(f"{folder}: {some(wrong)}{hint}")


def huggingface_name(name: str) -> str:
    """Translate a canonical name."""
    layer = _LAYER.search(name)
    return NAMES[_LAYER.sub("N", name)].replace("N", layer[0]) if layer else NAMES[name]


def _open_tokenizer(folder: Path, tokenizer_path: Path | None) -> Tokenizer:
    path = folder / "tokenizer.model" if tokenizer_path is None else tokenizer_path
    if tokenizer_path is None and not path.is_file():
        raise CheckpointError(
            f"{folder} holds no tokenizer.model, and a tokenizer.json alone is not enough: copy the file from the same "
            f"model's page or from its release in Meta's layout, or pass tokenizer_path"
        )
    return open_with_names(path)


def _find_tensors(folder: Path) -> dict[str, tuple[Path, Entry]]:
    """List all tensors of all files, under the names that the files give them."""
    index = folder / INDEX
    if not index.is_file():
        path = folder / WEIGHTS
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {INDEX}, which says what its files hold")
        return {name: (path, entry) for name, entry in read_header(path).entries.items()}
    if (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds both {WEIGHTS} and {INDEX}: remove what does not belong to the model")
    listed = _read_index(index)
    found: dict[str, tuple[Path, Entry]] = {}
    for file in sorted(set(listed.values())):
        path = folder / file
        for name, entry in read_header(path).entries.items():
            if name in found:
                raise CheckpointError(f"{shown(name)} is in two files, {found[name][0]} and {path}")
            found[name] = path, entry
    for name, file in listed.items():
        if name not in found or found[name][0].name != file:
            raise CheckpointError(f"{index} lists {shown(name)} in {file}, which lacks it")
    unlisted = [shown(name) for name in found if name not in listed]
    if unlisted:
        raise CheckpointError(f"{some(unlisted)} of {folder} is not listed in {INDEX}")
    return found


def _read_index(path: Path) -> dict[str, str]:
    """Read which file holds which tensor; the files are there, in the folder of the index."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path} has no weight_map, a table from tensors to files")
    for file in set(map(shown, files.values())):
        if not re.fullmatch(r"'[\w.-]+\.safetensors'", file, re.ASCII):
            raise CheckpointError(f"{path} names the file {file}; a .safetensors file in the same folder was expected")
    missing = sorted({file for file in files.values() if not (path.parent / file).is_file()})
    if missing:
        raise CheckpointError(f"{path.parent} lacks {some(missing)}, which {INDEX} names: download what is missing")
    return files
