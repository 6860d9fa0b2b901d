"""This package as an engine: any checkpoint, through the loader and the engine that every caller uses."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.decode import make_engine
from benchmarks.engines.pipe import Answer, serve
from benchmarks.machine import can_quantize, load, peak_bytes, synchronize, weight_bytes
from codellama.checkpoint import open_checkpoint
from codellama.config import SamplingParams
from codellama.device import choose_device, choose_dtype
from codellama.generation.request import Request


def start(options: Mapping[str, Any]) -> tuple[int, Callable[[Sequence[int], int, int], Answer]]:
    """Load `huggingface`, a folder, in `dtype` (None is the default), for `rows` of `max_seq_len`."""
    place = choose_device(options["device"])
    kind = choose_dtype(options["dtype"], place)
    if options["quantize"] is not None and not can_quantize():
        raise NotImplementedError("the loader of this version does not quantize")
    model = load(open_checkpoint(options["huggingface"]), kind, place, options["quantize"])
    length = options["max_seq_len"]
    engine = make_engine(model, options["rows"], length)

    def generate(prompt: Sequence[int], new_tokens: int, rows: int) -> Answer:
        params = SamplingParams(max_gen_len=new_tokens)
        # Rows differ in their last id, so that the others are read once; what a decode step reads is the same.
        prompts = [[*prompt[:-1], (prompt[-1] + row) % model.args.vocab_size] for row in range(rows)]
        requests = [Request(ids, params, 0, model.args.vocab_size, length) for ids in prompts]
        synchronize(place)
        begin = time.perf_counter()
        for request in requests:
            engine.submit(request)
        while not all(request.output for request in requests):
            engine.step()
        synchronize(place)
        between = time.perf_counter()
        while any(request.finish_reason is None for request in requests):
            engine.step()
        synchronize(place)
        return between - begin, time.perf_counter() - between, [list(request.output) for request in requests]

    return weight_bytes(model), generate


if __name__ == "__main__":
    serve(start, lambda: peak_bytes(torch.device("cuda" if torch.cuda.is_initialized() else "cpu")))
