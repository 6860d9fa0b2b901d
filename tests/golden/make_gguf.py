"""Write tests/golden/gguf.npz and tests/golden/tiny-*.gguf: what llama.cpp makes of GGUF files, and from them.

    pip install --target build/llama_cpp --no-deps llama-cpp-python==0.3.36 diskcache
    PYTHONPATH=build/llama_cpp .venv/bin/python -m tests.golden.make_gguf

The first command compiles llama.cpp, 10 to 20 minutes on two cores. The second one prints how far our distributions are
from llama.cpp's. It stores, for tests/checkpoint/test_gguf_golden.py, llama.cpp's 32 most probable next tokens at each
of 200 positions, its ids of 1,000 texts, and small random models that it has quantized: the `gguf` package cannot make
K types. It also stores digests of the weights that llama.cpp itself makes of the blocks, which must be ours to the bit.

llama.cpp multiplies blocks with activations that it rounds to blocks of 8 bits; we multiply the same weights with
float32. So the distributions are close and not equal.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

import fire
import numpy as np
import torch

from codellama.checkpoint import open_checkpoint, tensor_shapes
from codellama.checkpoint.gguf_header import read_header
from codellama.config import ModelArgs
from codellama.llama import DEMO
from tests.support import bpe, gguf, tiny
from tests.support.agreement import compare, our_log_probs

FOLDER = Path(__file__).parent
STORED = FOLDER / "gguf.npz"
POSITIONS, TOP = 200, 32
PACKAGE_TYPES = ("F16", "Q8_0", "Q4_0")
"""Written from the demo checkpoint by the gguf package, here and in the test alike."""
QUANTIZED = {"Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
"""Written from the demo checkpoint by llama.cpp, and only measured. The numbers are llama.h's llama_ftype."""
TINY = {"q2_k": 10, "q4_k_m": 15, "q5_k_m": 17}
"""Written from the tiny model and stored. They are mixtures: together they hold Q2_K, Q3_K, Q4_K, Q5_K and Q6_K."""
OTHER = {"iq4_nl": 25}
"""Written from a smaller model and stored, for the digest alone."""
BLOCKS = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Types of small files that the gguf package writes, here and in the test alike, for the digests."""
TINY_ARGS = ModelArgs(
    dim=256,  # 8 heads of 32
    n_layers=2,
    n_heads=8,
    n_kv_heads=2,
    vocab_size=tiny.VOCAB,
    multiple_of=512,  # hidden_dim 512
    ffn_dim_multiplier=0.7,
    rope_theta=10_000.0,
)
TEXT = '''
import argparse
import sys
from collections import Counter


class Words:
    """Counts words of a text."""

    def __init__(self, text: str = "") -> None:
        self.counter = Counter(text.split())

    def add(self, line: str) -> None:
        for word in line.strip().lower().split():
            self.counter[word] += 1

    def most_common(self, number: int = 10) -> list[tuple[str, int]]:
        return self.counter.most_common(number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="the file to read")
    parser.add_argument("--number", type=int, default=10)
    args = parser.parse_args()
    words = Words()
    with open(args.path, encoding="utf-8") as file:
        for line in file:
            words.add(line)
    for word, count in words.most_common(args.number):
        print(f"{count:8d} {word}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''


def texts() -> list[str]:
    """1,000 texts without the spelling of a special piece.

    llama.cpp merges plain text to the id of any piece, and finds user-defined pieces before it adds the implicit space.
    We never give such an id.
    """
    drawn = bpe.random_texts(seed=4, count=1400)
    special = ("<s>", "</s>", "<unk>", "<0x41>", *(piece.replace("▁", "") for piece in tiny.INFILLING))
    return [text for text in drawn if not any(piece in text for piece in special)][:1000]


def tiny_weights() -> dict[str, torch.Tensor]:
    """Random, and the logits half as wide: a random model takes errors of its activations to its logits undamped."""
    weights = tiny.random_weights(TINY_ARGS)
    weights["output.weight"] *= 0.5
    return weights


def write_demo(path: Path, kind: str) -> Path:
    """The demo checkpoint in a type that the gguf package writes."""
    checkpoint = open_checkpoint(DEMO)
    weights = {name: checkpoint.read(name) for name in checkpoint.names()}
    return gguf.write_gguf(path, checkpoint.args, weights, checkpoint.tokenizer().model_bytes, kind)


def write_blocks(path: Path, kind: str) -> Path:
    """A small file in a type that the gguf package writes, from numbers that are the same on every machine."""
    rng = np.random.default_rng(13)
    weights = {
        name: torch.from_numpy(rng.integers(-2000, 2001, shape).astype(np.float32) / 2000)
        for name, shape in tensor_shapes(gguf.ARGS).items()
    }
    return gguf.write_gguf(path, gguf.ARGS, weights, kind=kind)


def digest(path: Path) -> np.ndarray:
    """SHA-256 of all weights in float32, in the order of their canonical names, as open_checkpoint reads them."""
    checkpoint = open_checkpoint(path)
    total = hashlib.sha256()
    for name in checkpoint.names():
        total.update(checkpoint.read(name).float().numpy().tobytes())
    return np.frombuffer(total.digest(), np.uint8)


def kinds(path: Path) -> list[str]:
    return sorted({tensor.block.name for tensor in read_header(path).tensors.values()})


def main() -> str:
    """Make all files and measure."""
    import llama_cpp

    def quantize(source: Path, target: Path, number: int) -> Path:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = number
        params.allow_requantize = True
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
        assert not failed, target
        return target

    def measure(path: Path, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Store the most probable tokens, compare all of them."""
        model = llama_cpp.Llama(
            str(path), n_ctx=len(ids), logits_all=True, n_threads=2, verbose=False, type_k=0, type_v=0
        )
        model.eval(ids)
        logits = np.array(model.scores[: len(ids)], dtype=np.float64)
        log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        order = np.argsort(-log_probs, axis=1, kind="stable")
        found = np.take_along_axis(log_probs, order, axis=1)
        lines.append(f"{path.name:20} {compare(found, order, our_log_probs(path, ids))}")
        return order[:, :TOP].astype(np.uint16), found[:, :TOP].astype(np.float32)

    def digest_as_llama_cpp(path: Path) -> np.ndarray:
        theirs = digest(quantize(path, path.parent / "as-f32", 0))
        lines.append(f"{path.name:20} {kinds(path)} de-quantized alike: {np.array_equal(theirs, digest(path))}")
        return theirs

    stored: dict[str, np.ndarray] = {}
    lines: list[str] = []
    demo_ids = open_checkpoint(DEMO).tokenizer().encode(TEXT, bos=True, eos=False)[:POSITIONS]
    tiny_ids = np.random.default_rng(11).integers(0, tiny.VOCAB, POSITIONS).tolist()
    stored["demo.ids"], stored["tiny.ids"] = np.array(demo_ids, np.uint16), np.array(tiny_ids, np.uint16)
    assert len(demo_ids) == POSITIONS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in PACKAGE_TYPES:
            path = write_demo(folder / f"demo-{kind}", kind)
            stored[f"demo.{kind}.top"], stored[f"demo.{kind}.log_probs"] = measure(path, demo_ids)
        for kind, number in QUANTIZED.items():
            measure(quantize(folder / "demo-F16", folder / f"demo-{kind}", number), demo_ids)
        source = gguf.write_gguf(folder / "source", TINY_ARGS, tiny_weights(), kind="F16")
        for kind, number in TINY.items():
            path = quantize(source, folder / f"tiny-{kind}.gguf", number)
            stored[f"tiny.{kind}.top"], stored[f"tiny.{kind}.log_probs"] = measure(path, tiny_ids)
        source = gguf.write_gguf(folder / "source", gguf.ARGS, kind="F16")
        for kind, number in OTHER.items():
            quantize(source, folder / f"tiny-{kind}.gguf", number)
        for path in sorted(folder.glob("tiny-*.gguf")):
            stored[f"{path.stem}.digest"] = digest_as_llama_cpp(path)
            shutil.copy(path, FOLDER)
        for kind in BLOCKS:
            path = write_blocks(folder / f"blocks-{kind}", kind)
            stored[f"blocks-{kind}.digest"] = digest_as_llama_cpp(path)
        words = llama_cpp.Llama(str(folder / "demo-F16"), vocab_only=True, verbose=False)
        ids = [words.tokenize(text.encode(), add_bos=False, special=False) for text in texts()]
        ours = open_checkpoint(DEMO).tokenizer()
        same = sum(ours.encode(text, False, False) == each for text, each in zip(texts(), ids, strict=True))
        lines.append(f"{same} of {len(ids)} texts have the same ids")
    stored["texts.lengths"] = np.array([len(each) for each in ids], np.uint16)
    stored["texts.ids"] = np.array([id for each in ids for id in each], np.uint16)
    np.savez_compressed(STORED, **stored)
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)
