"""The command `codellama`: complete, infill, chat and serve, alone or under torchrun; look after checkpoints.

A command is a function in COMMANDS; its parameters are the flags, and its docstring is the help. It checks what can be
checked without torch first. All that is done with a model is the generator's.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from codellama import __version__
from codellama.chat.command import chat
from codellama.command import run_command
from codellama.config import RuntimeArgs, SamplingParams
from codellama.evaluation.command import evaluate
from codellama.printing import show
from codellama.prompt_file import read_text, split_prompt
from codellama.quantization import Quantization
from codellama.server.command import serve

if TYPE_CHECKING:
    from codellama.llama import Llama


def complete(
    file: str | None = None,
    *,
    prompt: str | None = None,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.2,
    top_p: float = 0.9,
    max_seq_len: int = 2048,
    max_gen_len: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    checkpoint_format: str | None = None,
) -> None:
    """Continue a text and print both as the continuation grows.

    Args:
        file: the text to continue; without it, or with -, standard input.
        prompt (TEXT): the text itself, in place of FILE.
        ckpt_dir (FOLDER): the weights, also a GGUF file; without it, the small demo checkpoint.
        tokenizer_path (FILE): without it, tokenizer.model beside the weights.
        temperature: 0 always takes the most probable token; higher draws more freely.
        top_p: draw from the most probable tokens that together have this probability.
        max_seq_len: tokens of prompt and generation together.
        max_gen_len: tokens to generate at most; without it, as many as max_seq_len leaves.
        seed: makes the result repeat; without it, each run draws anew.
        device (NAME): cpu, cuda or cuda:N; without it, the GPU where there is one.
        dtype (NAME): bfloat16, float16 or float32; without it, what the device computes best.
        quantize (NAME): int8 or int4 (int4-g64, int4-g128): round the weights as they are loaded, to half or a third.
        checkpoint_format (NAME): meta, huggingface, gguf or quantized, for a folder of several; without it, the first.

    Examples:
        codellama complete unfinished.py --ckpt_dir CodeLlama-7b
        codellama complete --prompt "def fibonacci(n):" --max_gen_len 64
        codellama complete - --temperature 0 < unfinished.py
    """
    _check(temperature, top_p, max_gen_len, seed, max_seq_len, quantize)
    text = read_text(file, prompt)
    llama = _build(ckpt_dir, tokenizer_path, max_seq_len, seed, device, dtype, quantize, checkpoint_format)
    pieces = llama.stream_completion(text, temperature, top_p, max_gen_len)
    show(pieces, llama.parallel.world_rank == 0, before=text)


def infill(
    file: str | None = None,
    *,
    prompt: str | None = None,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_seq_len: int = 2048,
    max_gen_len: int | None = 256,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    checkpoint_format: str | None = None,
    suffix_first: bool = False,
) -> None:
    """Fill the gap marked <FILL> in a text and print the whole.

    Args:
        file: the text with the gap; without it, or with -, standard input.
        max_gen_len: tokens to generate at most.
        suffix_first: show the model what stands after the gap first.

    Examples:
        codellama infill unfinished.py --ckpt_dir CodeLlama-7b
        codellama infill --prompt "def add(a, b): return <FILL>" --suffix_first
    """
    _check(temperature, top_p, max_gen_len, seed, max_seq_len, quantize)
    prefix, suffix = split_prompt(read_text(file, prompt))
    llama = _build(ckpt_dir, tokenizer_path, max_seq_len, seed, device, dtype, quantize, checkpoint_format)
    pieces = llama.stream_infilling(prefix, suffix, temperature, top_p, max_gen_len, suffix_first)
    show(pieces, llama.parallel.world_rank == 0, before=prefix, after=suffix)


def convert(
    source: str,
    target: str,
    *,
    format: str | None = None,
    model_parallel_size: int = 1,
    dtype: str | None = None,
    quantize: str | None = None,
    tokenizer_path: str | None = None,
    rope_theta: float | None = None,
    checkpoint_format: str | None = None,
) -> None:
    """Write weights of any format as a folder in another one.

    That is Meta's layout, in any number of files, or Hugging Face's; or, with --quantize, int8 or int4 codes, which are
    loaded as they are, in half or a third of the memory. Memory stays small, whatever the model. The folder appears
    when it is whole; nothing is overwritten.

    Args:
        source: the folder or GGUF file to read.
        target: the folder to make.
        format (NAME): meta or huggingface; without it, meta. Leave it out with --quantize.
        model_parallel_size: number of files, in Meta's layout.
        dtype (NAME): bfloat16, float16 or float32; without it, that of the source. With --quantize, of what is no code.
        quantize (NAME): int8, int4, int4-g64 or int4-g128: round the matrices once, and for good.
        rope_theta: base of the rotary frequencies, where the source does not say it.

    Examples:
        codellama convert CodeLlama-7b-hf CodeLlama-7b
        codellama convert CodeLlama-7b CodeLlama-7b-two --model_parallel_size 2 --dtype float16
        codellama convert codellama-7b.Q8_0.gguf CodeLlama-7b-hf --format huggingface --dtype bfloat16
        codellama convert CodeLlama-7b CodeLlama-7b-int8 --quantize int8
    """
    Quantization.parse(quantize)
    from codellama.checkpoint.convert import convert

    convert(
        source,
        target,
        format=format,
        model_parallel_size=model_parallel_size,
        dtype=dtype,
        quantize=quantize,
        tokenizer_path=tokenizer_path,
        rope_theta=rope_theta,
        checkpoint_format=checkpoint_format,
        progress=sys.stderr.isatty(),
    )


def verify(
    path: str,
    *,
    full: bool = False,
    checkpoint_format: str | None = None,
    tokenizer_path: str | None = None,
    rope_theta: float | None = None,
) -> None:
    """Look for faults in weights.

    Files, md5 sums, names, shapes, values, tokenizer: each is a line of the report. The exit status is 1 if there are
    faults.

    Args:
        path: the folder or GGUF file.
        full: look at every value, where a sample is looked at otherwise.

    Examples:
        codellama verify CodeLlama-7b
        codellama verify codellama-7b.Q8_0.gguf --full
    """
    from codellama.checkpoint.verify import verify

    report = verify(
        path,
        full=full,
        checkpoint_format=checkpoint_format,
        tokenizer_path=tokenizer_path,
        rope_theta=rope_theta,
    )
    print(report.format())
    if not report.ok:
        sys.exit(1)


def info(
    path: str,
    *,
    max_seq_len: int = 2048,
    max_batch_size: int = 4,
    dtype: str | None = None,
    quantize: str | None = None,
    checkpoint_format: str | None = None,
    tokenizer_path: str | None = None,
    rope_theta: float | None = None,
) -> None:
    """Say what a checkpoint is, without loading it.

    The memory is told for 1, 2, 4 and 8 processes, where they divide the model.

    Args:
        path: the folder or GGUF file.
        max_batch_size: prompts that are generated for at once.

    Examples:
        codellama info codellama-7b.Q8_0.gguf
        codellama info CodeLlama-13b --max_seq_len 16384 --max_batch_size 1
    """
    Quantization.parse(quantize)
    from codellama.checkpoint.info import info

    print(
        info(
            path,
            max_seq_len,
            max_batch_size,
            dtype,
            quantize=quantize,
            checkpoint_format=checkpoint_format,
            tokenizer_path=tokenizer_path,
            rope_theta=rope_theta,
        ).describe()
    )


COMMANDS: dict[str, Callable[..., None]] = {
    "complete": complete, "infill": infill, "chat": chat, "serve": serve,
    "convert": convert, "verify": verify, "info": info, "evaluate": evaluate,
}  # fmt: skip


def main() -> None:
    """Run the command that the command line names."""
    about = (
        "Complete, infill and chat with Code Llama models, or serve them; convert, verify and describe their weights."
    )
    run_command(COMMANDS, "codellama", about=about, version=__version__)


def _check(
    temperature: float, top_p: float, max_gen_len: int | None, seed: int | None, max_seq_len: int, quantize: str | None
) -> None:
    """Refuse wrong values before anything is read or loaded."""
    SamplingParams(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len, seed=seed)
    RuntimeArgs(max_seq_len=max_seq_len)
    Quantization.parse(quantize)


def _build(
    ckpt_dir: str | None,
    tokenizer_path: str | None,
    max_seq_len: int,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    quantize: str | None,
    checkpoint_format: str | None,
) -> "Llama":
    from codellama.llama import Llama  # late: help and a misspelled flag need no torch

    return Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        max_batch_size=1,
        seed=seed,
        device=device,
        dtype=dtype,
        quantize=quantize,
        checkpoint_format=checkpoint_format,
    )
