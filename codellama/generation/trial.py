"""Prepare a grammar with llguidance; run as a program, try it where a crash or a hang harms nobody.

A short schema can overflow the stack of llguidance 1.9.1 (a chain of references) or keep it busy for minutes (patterns
that must all hold), and a thread cannot be stopped. So a grammar is first prepared in a process of its own, with bounds
on time, memory and stack. That process loads this file alone: it imports nothing of this package.
"""

import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

SECONDS = 2  # of processor time
MEMORY = 2 * 2**30
STACK = 4 * 2**20  # half of what a thread has where the grammar is used
MAX_LEXER_STATES = 50_000
"""A state takes one to two kB: no request holds more than 100 MB."""


def prepare(source: str, tokenizer: "LLTokenizer") -> "LLMatcher":
    """Compile a grammar and compute its first mask.

    Raises:
        ValueError: llguidance refuses it, or it has no text.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    first = b"" if matcher.is_error() else matcher.compute_logit_bias()
    if matcher.is_error():
        raise ValueError(plain(matcher.get_error()))
    if first.count(0) == len(first):
        raise ValueError("no text can satisfy it")
    return matcher


def follow(matcher: "LLMatcher", steps: int = 64) -> None:
    """Go on as long as one token alone is possible: a form that contradicts itself may do so behind a first blank.

    Raises:
        ValueError: the way ends where the text is not complete.
    """
    for _ in range(steps):
        mask = matcher.compute_logit_bias()
        if matcher.is_error() or mask.count(0) == len(mask):
            raise ValueError("no text can satisfy it")
        if matcher.is_accepting() or mask.count(0) < len(mask) - 1:
            return
        matcher.consume_token(mask.find(max(mask)))


def plain(message: str) -> str:
    """Cut llguidance's message down to one line."""
    return " ".join(message.replace("<non-verbose/>", "").split())[:200] or "it is not satisfiable"


class Bytes:
    """A tokenizer for the trial, in the words that llguidance asks for: a token for each byte, and an end."""

    bos_token_id = None
    eos_token_id = 256
    special_token_ids = (256,)
    tokens = (*(bytes([value]) for value in range(256)), b"<end>")

    def __call__(self, text: bytes) -> list[int]:
        """Encode a text."""
        return list(text)


def bound() -> None:
    """Bound what this process may take; a bound that is narrower already stays."""
    import resource  # unknown to some systems that can do all else

    bounds = [(resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_CORE, 0)]
    if sys.platform == "linux":  # others count what is mapped, and refuse
        bounds.append((resource.RLIMIT_AS, MEMORY))
    for kind, most in bounds:
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> None:
    """Try the grammar on standard input and say what is wrong with it, or nothing."""
    bound()
    from llguidance import LLTokenizer, TokenizerWrapper

    source, found = sys.stdin.buffer.read().decode(), []

    def work() -> None:
        try:
            follow(prepare(source, LLTokenizer(TokenizerWrapper(Bytes()))))
        except BaseException as error:  # a panic of llguidance is none of Exception's
            found.append(str(error) if isinstance(error, ValueError) else f"llguidance fails: {plain(str(error))}")

    threading.stack_size(STACK)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    sys.stdout.buffer.write("".join(found).encode())


if __name__ == "__main__":
    main()
