"""What is measured of one HTTP request: how long, how many tokens, how it ended. The log and the metrics read it.

It knows nothing of HTTP beyond an id, and nothing of what was asked or answered.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from codellama.generation.request import Delta


@dataclass
class Record:
    """One request, from its first byte on. Times are seconds of `time.perf_counter`.

    Attributes:
        prompt_tokens: of all its prompts; one that is answered several times counts once.
        cached_tokens: those of them that the cache held already.
        generated_tokens: of all its answers.
        gaps: seconds between pieces of one answer, for each of the tokens that a piece brought.
        ends: how each answer ended; "gone" where the client left before.
    """

    id: str
    started: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    first_token: float | None = None
    last_token: float | None = None
    gaps: list[tuple[float, int]] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    _latest: dict[int, float] = field(default_factory=dict)

    def take(self, index: int, delta: Delta, n_tokens: int) -> None:
        """Note a piece of an answer.

        Args:
            index: which answer.
            n_tokens: generated ones that it brought.
        """
        if n_tokens:
            now = time.perf_counter()
            self.first_token = self.first_token or now
            if index in self._latest:
                self.gaps.append((now - self._latest[index], n_tokens))
            self.last_token = self._latest[index] = now
            self.generated_tokens += n_tokens
        if delta.finish_reason is not None:
            self.ends.append(delta.finish_reason)

    @property
    def total(self) -> float:
        """Seconds until now."""
        return time.perf_counter() - self.started

    @property
    def wait(self) -> float | None:
        """Seconds until the first token, or None where none came."""
        return None if self.first_token is None else self.first_token - self.started

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first one; None where there is nothing to divide."""
        if self.first_token is None or self.last_token is None or self.last_token == self.first_token:
            return None
        return (self.generated_tokens - 1) / (self.last_token - self.first_token)

    def describe(self) -> Sequence[str]:
        """Say what was generated, in words of the form name=value; nothing where nothing was asked for."""
        if not self.prompt_tokens:
            return ()
        words = [f"prompt={self.prompt_tokens}", f"cached={self.cached_tokens}", f"generated={self.generated_tokens}"]
        if self.wait is not None:
            words.append(f"first={self.wait:.3f}s")
        if self.rate is not None:
            words.append(f"rate={self.rate:.1f}/s")
        return [*words, f"end={','.join(self.ends) or 'none'}"]
