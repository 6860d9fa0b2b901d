"""The command `codellama`: complete, infill and chat in a terminal, alone or under torchrun.

It reads files and standard input and prints; all else is the generator's. A command only describes its work:
python-fire calls a function before it has looked at all flags, so nothing may load until the last one is understood.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fire
from fire.decorators import SetParseFns

from codellama.config import SamplingParams
from codellama.errors import CodeLlamaError, PromptError
from codellama.prompts import TAGS

if TYPE_CHECKING:
    from codellama.llama import Llama
    from codellama.prompts import Message

MARKER = "<FILL>"


@dataclass(frozen=True)
class Work:
    """What a command will do once every flag is understood."""

    run: tuple[Callable[..., None], Mapping[str, Any]]  # a tuple, since Fire would call a function


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
) -> Work:
    """Continue a text, streaming it to the terminal.

    Args:
        file: what to continue; - is standard input.
        prompt: the text itself, instead of a file.
        ckpt_dir: folder of the weights; none is the bundled demo checkpoint.
        tokenizer_path: none is tokenizer.model beside the weights.
        temperature: 0 is greedy.
        top_p: keep the most probable tokens that hold this share.
        max_seq_len: tokens of prompt and generation together.
        max_gen_len: tokens to generate at most.
        seed: makes the sample repeat.
        device: cpu, cuda or cuda:N.
        dtype: bfloat16, float16 or float32.
    """
    return Work((_complete, locals()))


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
    suffix_first: bool = False,
) -> Work:
    """Fill the gap marked <FILL> in a text and print the whole, streaming. The flags are those of `complete`.

    Args:
        suffix_first: show the model the text after the gap first.
    """
    return Work((_infill, locals()))


def chat(
    file: str | None = None,
    *,
    prompt: str | None = None,
    system: str | None = None,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.2,
    top_p: float = 0.95,
    max_seq_len: int = 2048,
    max_gen_len: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Work:
    """Ask an Instruct model: one question from a file, a flag or standard input, or a chat in the terminal.

    The flags are those of `complete`.

    Args:
        system: a system message.
    """
    return Work((_chat, locals()))


_TEXT = ("file", "prompt", "ckpt_dir", "tokenizer_path", "device", "dtype")
COMMANDS = {
    "complete": SetParseFns(**dict.fromkeys(_TEXT, str))(complete),
    "infill": SetParseFns(**dict.fromkeys(_TEXT, str))(infill),
    "chat": SetParseFns(**dict.fromkeys((*_TEXT, "system"), str))(chat),
}


def main() -> None:
    """Understand every flag, then work; an error of ours is one line and exit status 1."""
    args = sys.argv[1:] or ["--help"]
    if "--" not in args:
        args += ["--", "--separator", "\0"]  # else Fire takes a lone - for itself, and it means standard input
    work = fire.Fire(COMMANDS, args, name="codellama", serialize=lambda _: None)
    if not isinstance(work, Work):
        return  # help was asked for
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run, flags = work.run
    try:
        SamplingParams(**{name: flags[name] for name in ("temperature", "top_p", "max_gen_len", "seed")})
        run(**flags)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again at its end
        sys.exit(1)
    except (CodeLlamaError, ValueError, TypeError, OSError) as error:
        sys.exit(f"codellama: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _complete(file: str | None, prompt: str | None, temperature: float, top_p: float, **flags: Any) -> None:
    text = _read(file, prompt)
    llama, max_gen_len = _build(flags)
    _show(llama, llama.stream_completion(text, temperature, top_p, max_gen_len), before=text)


def _infill(
    file: str | None, prompt: str | None, temperature: float, top_p: float, suffix_first: bool, **flags: Any
) -> None:
    prefix, suffix = _split(_read(file, prompt))
    llama, max_gen_len = _build(flags)
    pieces = llama.stream_infilling(prefix, suffix, temperature, top_p, max_gen_len, suffix_first)
    _show(llama, pieces, before=prefix, after=suffix)


def _chat(
    file: str | None, prompt: str | None, system: str | None, temperature: float, top_p: float, **flags: Any
) -> None:
    dialog: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    once = file is not None or prompt is not None or not sys.stdin.isatty()
    question = _read(file, prompt) if once else ""
    llama, max_gen_len = _build(flags)
    while True:
        try:
            question = question if once else llama.parallel.share(_ask)
        except EOFError:
            return
        turn: list[Message] = [*dialog, {"role": "user", "content": question}]
        try:
            answer = _show(llama, llama.stream_chat(turn, temperature, top_p, max_gen_len))
        except PromptError as error:
            if once:
                raise
            print(f"codellama: {error}", file=sys.stderr)  # the chat goes on without this turn
            continue
        if once:
            return
        if any(tag in answer for tag in TAGS):
            print("codellama: the answer holds tags of the chat format, so this turn is forgotten", file=sys.stderr)
        else:
            dialog = [*turn, {"role": "assistant", "content": answer}]


def _build(flags: dict[str, Any]) -> tuple["Llama", int | None]:
    from codellama.llama import Llama  # late: --help and a misspelled flag need no torch

    max_gen_len = flags.pop("max_gen_len")
    return Llama.build(**flags, max_batch_size=1), max_gen_len


def _ask() -> str:
    """Ask until there is a question."""
    while not (question := input("> ")).strip():
        pass
    return question


def _show(llama: "Llama", pieces: Iterator[str], before: str = "", after: str = "") -> str:
    """Print a text as it grows, on world rank 0 alone, and return what was generated."""
    generated = [next(pieces, "")]  # what is wrong with the prompt is said before anything is printed
    if llama.parallel.world_rank == 0:
        print(f"{before}{generated[0]}", end="", flush=True)
    for piece in pieces:
        generated.append(piece)
        print(piece, end="", flush=True)
    if llama.parallel.world_rank == 0:
        print(after, end="" if after.endswith("\n") else "\n", flush=True)
    return "".join(generated)


def _read(file: str | None, prompt: str | None) -> str:
    """Take the text from the flag, the file, or standard input; under torchrun, on rank 0 alone."""
    if file is not None and prompt is not None:
        raise PromptError("both a file and --prompt are given; one was expected")
    if os.environ.get("RANK", "0") != "0":
        return ""  # world rank 0's text is the one that counts
    if prompt is not None:
        return prompt
    if file is not None and file != "-":
        content = Path(file).read_bytes()  # text mode would turn \r\n into \n
    else:
        if sys.stdin.isatty():
            print("reading standard input; end it with Ctrl-D", file=sys.stderr)
        content = sys.stdin.buffer.read()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise PromptError(f"{file or 'standard input'} is not UTF-8 text ({error.reason} at {error.start})") from error


def _split(text: str) -> tuple[str, str]:
    parts = text.split(MARKER)
    if os.environ.get("RANK", "0") != "0":
        return "", ""
    if len(parts) != 2:
        raise PromptError(f"the text holds {len(parts) - 1} {MARKER} markers; exactly one was expected")
    return parts[0], parts[1]
