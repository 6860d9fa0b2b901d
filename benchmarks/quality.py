"""What quantization costs: perplexity of the demo checkpoint on files that it was never trained on, and bytes.

python -m benchmarks.quality
python -m benchmarks.quality --files 0

All is computed in float32, so that only the weights differ. The files are the held-out ones of tools/demo_corpus.py.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import fire

from benchmarks.machine import report
from codellama import Llama
from codellama.checkpoint.layout import is_matrix, tensor_shapes
from codellama.errors import QuantizationError
from codellama.linear import Matrix
from codellama.model import Transformer
from tools.demo_corpus import Source, read_sources
from tools.evaluate_demo import bits_per_byte

KINDS = ("int8", "int4", "int4-g64", "int4-g128")


def quality(files: int = 2, quantize: str | Sequence[str] = KINDS, ckpt_dir: str | None = None) -> None:
    """Measure the checkpoint as it is, and in each quantization that divides it.

    Args:
        files: so many held-out files, 0 for all.
        quantize: names, with commas between them.
        ckpt_dir: another checkpoint than the demo, of the same language.
    """
    kinds = quantize.split(",") if isinstance(quantize, str) else quantize
    sources = [source for source in read_sources() if source.held_out][: files or None]
    rows, refused = [measure(None, sources, ckpt_dir)], {}
    for kind in kinds:
        try:
            rows.append(measure(kind, sources, ckpt_dir))
        except QuantizationError as error:
            refused[kind] = str(error)
            print(f"{kind}: {error}")
    for row in rows:
        row["change"] = row["perplexity"] / rows[0]["perplexity"] - 1
    report("quality", {"files": len(sources), "ckpt_dir": ckpt_dir, "refused": refused}, rows)


def measure(quantize: str | None, sources: list[Source], ckpt_dir: str | None) -> dict[str, Any]:
    """Perplexity of a token, bits of a byte, and the weights by their bytes in 16 bits: matrices, and everything."""
    build = partial(Llama.build, ckpt_dir, None, max_seq_len=512, max_batch_size=8, progress=False)
    with build(dtype="float32", device="cpu", quantize=quantize) as llama:
        tokens = sum(len(llama.tokenizer.encode(source.text, bos=False, eos=False)) for source in sources)
        size = sum(len(source.text.encode()) for source in sources)
        bits = bits_per_byte(llama, sources)
        matrices, everything = shares(llama.model)
    return {
        "weights": quantize or "float32",
        "perplexity": 2 ** (bits * size / tokens),
        "bits_per_byte": bits,
        "matrices_by_16_bit": matrices,
        "all_by_16_bit": everything,
    }


def shares(model: Transformer) -> tuple[float, float]:
    """Bytes of the matrices by those in 16 bits; the same of all weights, of which the others are in 16 bits."""
    matrices = [module for module in model.modules() if isinstance(module, Matrix)]
    held = sum(matrix.nbytes for matrix in matrices)
    half = 2 * sum(matrix.out_features * matrix.in_features for matrix in matrices)
    names = [name for name in tensor_shapes(model.args) if not is_matrix(name)]
    beside = 2 * sum(model.get_parameter(name).numel() for name in names)
    return held / half, (held + beside) / (half + beside)


if __name__ == "__main__":
    fire.Fire(quality)
