"""transformers' own Llama as an engine, greedy, with its key/value cache: only calls of its public interface."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.engines.pipe import Answer, resident_peak, serve


def start(options: Mapping[str, Any]) -> tuple[int, Callable[[Sequence[int], int, int], Answer]]:
    """Load `huggingface`, a folder, in `dtype`."""
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    place = torch.device(options["device"])
    model = LlamaForCausalLM.from_pretrained(options["huggingface"], dtype=getattr(torch, options["dtype"]))
    model = model.to(place).eval()

    def wait() -> None:
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    @torch.inference_mode()
    def generate(prompt: Sequence[int], new_tokens: int, rows: int) -> Answer:
        if rows != 1:
            raise ValueError(f"rows is {rows}; 1 was expected")
        wait()
        begin = time.perf_counter()
        out = model(input_ids=torch.tensor([list(prompt)], device=place), use_cache=True, logits_to_keep=1)
        tokens = [int(out.logits[0, -1].argmax())]
        between = time.perf_counter()
        while len(tokens) < new_tokens:
            ids = torch.tensor([tokens[-1:]], device=place)
            out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            tokens.append(int(out.logits[0, -1].argmax()))
        return between - begin, time.perf_counter() - between, [tokens]

    embedding = model.get_input_embeddings().weight.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - embedding, generate


def peak() -> int | None:
    """On a GPU what torch allocated there, else resident memory."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else resident_peak()


if __name__ == "__main__":
    serve(start, peak)
