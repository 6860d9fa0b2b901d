"""llama.cpp as an engine, through llama-cpp-python: greedy, on the CPU, with as many threads as the others.

The interpreter that runs this needs llama-cpp-python alone: no torch, nothing of codellama.
"""

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines.pipe import Answer, resident_peak, serve


class LlamaCpp:
    """One model, from a GGUF file or from what llama.cpp's own quantizer makes of it."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Load `gguf` as `type`, for `max_seq_len`, with `threads`.

        Raises:
            ImportError: llama-cpp-python is not installed here.
        """
        try:
            import llama_cpp
        except ImportError as error:
            raise ImportError("llama-cpp-python is not installed for this interpreter (--llama_cpp_python)") from error

        self._library = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # C keeps the address alone
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(None))
        self._threads = options["threads"]
        path = Path(options["gguf"])
        self.path = path if options["type"] == "f16" else self._quantized(path, options["type"])
        self._model = llama_cpp.Llama(
            str(self.path),
            n_ctx=options["max_seq_len"],
            n_batch=512,
            n_ubatch=512,
            n_threads=self._threads,
            n_threads_batch=self._threads,
            n_gpu_layers=0,
            verbose=False,
        )

    def _quantized(self, path: Path, kind: str) -> Path:
        """Make another file of this type beside the first one, unless it is there."""
        target = path.with_name(f"{path.stem}-{kind}.gguf")
        if not target.exists():
            params = self._library.llama_model_quantize_default_params()
            params.nthread = self._threads
            params.ftype = getattr(self._library, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
            status = self._library.llama_model_quantize(str(path).encode(), str(target).encode(), ctypes.byref(params))
            if status:
                raise RuntimeError(f"llama.cpp could not quantize {path} to {kind}: status {status}")
        return target

    def generate(self, prompt: Sequence[int], new_tokens: int, rows: int) -> Answer:
        """Continue a prompt greedily, in one row."""
        if rows != 1:
            raise ValueError(f"rows is {rows}; 1 was expected")
        begin = time.perf_counter()
        self._model.reset()
        self._model.eval(list(prompt))
        tokens = [self._model.sample(temp=0.0)]
        between = time.perf_counter()
        while len(tokens) < new_tokens:
            self._model.eval(tokens[-1:])
            tokens.append(self._model.sample(temp=0.0))
        return between - begin, time.perf_counter() - between, [tokens]


def start(options: Mapping[str, Any]) -> tuple[int, Callable[[Sequence[int], int, int], Answer]]:
    """Load, and take the embedding's share off the size of the file."""
    engine = LlamaCpp(options)
    return int(engine.path.stat().st_size * options["of_file"]), engine.generate


if __name__ == "__main__":
    serve(start, resident_peak)
