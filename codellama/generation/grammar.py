"""Grammars at work: which token ids may come next so that the whole text has a given form.

It needs llguidance, the extra [grammar], only when a grammar is asked for. It knows nothing of prompts, of logits, or
of torch: a mask is one byte for each id.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection
from importlib.util import find_spec
from typing import TYPE_CHECKING

from codellama.errors import GrammarError
from codellama.generation import trial
from codellama.grammar import Grammar
from codellama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_WAIT = 30.0  # seconds for a trial on a machine that is busy; of processor time it gets less
_REMEMBERED = 256  # grammars that need no second trial
# One blank, or a new line and its indentation: a model that likes blanks would write them for ever.
_WHITE_SPACE = r" |\n[ \t]{0,20}"


class Matcher:
    """Where one request stands in its grammar."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int, special: Collection[int]) -> None:
        """Begin; special ids are none of the grammar's."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._special = special
        self._claimed = False

    def claim(self) -> bool:
        """True for the first request that asks for this matcher: it serves one."""
        first, self._claimed = not self._claimed, True
        return first

    def allowed(self, stop_tokens: Collection[int]) -> bytearray:
        """One byte for each id: 0 where it may not come next. Ids that stop may come when the text is complete.

        Raises:
            GrammarError: nothing may come next, or it has become too much to compute.
        """
        mask = bytearray(self._matcher.compute_logit_bias())
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed any further: {trial.plain(self._matcher.get_error())}")
        mask += bytes(self._vocab_size - len(mask))  # a model may have more logits than its tokenizer has pieces
        for id in self._special:
            mask[id] = 0
        complete = self._matcher.is_accepting()
        for id in stop_tokens:
            if 0 <= id < len(mask):
                mask[id] = complete
        if mask.count(0) == len(mask):
            raise GrammarError("the grammar allows no token of this model here, nor an end")
        return mask

    def advance(self, token: int) -> None:
        """Take the token that was chosen; what goes wrong is told by the next `allowed`."""
        self._matcher.consume_token(token)

    @property
    def done(self) -> bool:
        """True where the text is complete and nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


class Grammars:
    """Prepares the grammars of one model. Safe from any thread, and slow: not for a thread that others wait for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Do nothing yet: most generators never see a grammar."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._special = [id for id in range(tokenizer.n_words) if not tokenizer.token_bytes(id)]
        self._words: LLTokenizer | None = None
        self._tried: dict[Grammar, None] = {}
        self._lock = threading.Lock()

    def check(self, grammar: Grammar) -> None:
        """Try a grammar in a process of its own, unless it has been tried.

        Raises:
            GrammarError: llguidance is not installed, refuses the grammar, or needs too much time, memory or stack.
        """
        if find_spec("llguidance") is None:
            raise GrammarError("a grammar needs llguidance, which is not installed: pip install 'codellama[grammar]'")
        if grammar in self._tried:
            return
        command = [sys.executable, "-P", trial.__file__]
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(
                command, input=_written(grammar).encode(), capture_output=True, timeout=_WAIT, env=os.environ | paths
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise GrammarError("the grammar is refused: it could not be prepared in time") from error
        if done.returncode == -signal.SIGXCPU:
            raise GrammarError(f"the grammar is refused: to prepare it takes more than {trial.SECONDS} s")
        if done.returncode < 0:
            raise GrammarError("the grammar is refused: it is nested too deeply, or needs too much memory")
        if done.returncode:
            lines = done.stderr.decode(errors="replace").splitlines()
            raise RuntimeError(f"a grammar could not be tried: {' '.join(lines[-1:])}")
        if done.stdout:
            raise GrammarError(f"the grammar is refused: {done.stdout.decode()}")
        with self._lock:
            self._tried[grammar] = None
            if len(self._tried) > _REMEMBERED:
                del self._tried[next(iter(self._tried))]

    def matcher(self, grammar: Grammar) -> Matcher:
        """Prepare a grammar for one request. Copies of a matcher share the states of their lexer, and their bound.

        Raises:
            GrammarError: it cannot be written with this model's tokens.
        """
        with self._lock:
            self._words = words = self._words or self._load()
        try:
            matcher = trial.prepare(_written(grammar), words)
        except ValueError as error:
            raise GrammarError(f"the grammar is refused: {error}") from error
        return Matcher(matcher, self._vocab_size, self._special)

    def _load(self) -> "LLTokenizer":
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Words(self._tokenizer, self._special)))


class _Words:
    """A tokenizer in the words that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer, special: Collection[int]) -> None:
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = tokenizer.eos_id
        self.special_token_ids = list(special)
        pieces = enumerate(map(tokenizer.token_bytes, range(tokenizer.n_words)))
        self.tokens = [piece or b"<special %d>" % id for id, piece in pieces]  # a name, which no text can spell
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode_infilling(text.decode(errors="replace"))


def _written(grammar: Grammar) -> str:
    """Write a grammar as llguidance reads it."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.source)
    if grammar.kind == "lark":
        return json.dumps({"grammars": [{"lark_grammar": grammar.source}]})
    # SentencePiece's words begin with a blank, so a model may begin with one; JSON allows it.
    options = {"whitespace_flexible": True, "whitespace_pattern": _WHITE_SPACE}
    schema = json.loads(grammar.source) | {"x-guidance": options}
    parts = [{"name": "start", "lark_grammar": 'start: " "? @value'}, {"name": "value", "json_schema": schema}]
    return json.dumps({"grammars": parts})
