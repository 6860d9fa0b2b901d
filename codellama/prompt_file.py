"""Prompts from files and standard input, checked before a model is loaded.

Under torchrun the prompts of world rank 0 are the ones that count. So other ranks read nothing and check nothing, and
get empty texts. This module knows nothing of tokens.
"""

import os
import sys
from pathlib import Path

from codellama.errors import PromptError

MARKER = "<FILL>"


def read_prompt(file: str) -> str:
    r"""Read a text. Line ends stay as they are, since \r\n and \n are different tokens.

    Args:
        file: - is standard input.

    Raises:
        PromptError: there is no such file, it cannot be read, or it is not UTF-8 text.
    """
    if not _is_world_rank_0():
        return ""
    if file == "-":
        if sys.stdin.isatty():
            print("reading standard input; end it with Ctrl-D", file=sys.stderr)
        content = sys.stdin.buffer.read()
    else:
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise PromptError(f"{file} cannot be read: {error.strerror}") from error
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        name = "standard input" if file == "-" else file
        raise PromptError(f"{name} is not UTF-8 text ({error.reason} at {error.start})") from error


def read_text(file: str | None, prompt: str | None) -> str:
    """Take a text from a flag, a file or standard input.

    Raises:
        PromptError: both a file and a prompt are given; or as `read_prompt`.
    """
    if file is not None and prompt is not None:
        raise PromptError("both a file and --prompt are given; one was expected")
    return prompt if prompt is not None else read_prompt(file if file is not None else "-")


def split_prompt(text: str) -> tuple[str, str]:
    """Split a text at its one <FILL> into what stands before the gap and what stands after it.

    Raises:
        PromptError: it has none, or several.
    """
    if not _is_world_rank_0():
        return "", ""
    prefix, *suffixes = text.split(MARKER)
    if len(suffixes) != 1:
        raise PromptError(f"the text holds {len(suffixes)} {MARKER} markers; exactly one was expected")
    return prefix, suffixes[0]


def _is_world_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"
