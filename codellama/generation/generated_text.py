"""Text of a generation as it grows: whole characters, up to a stop string.

It knows nothing of requests, and nothing of torch.
"""

from collections.abc import Sequence

from codellama.tokenizer import TextDecoder, Tokenizer


class StopString:
    """How far the end of a growing text is the beginning of a stop string, by Knuth, Morris and Pratt.

    The work is that of the new characters alone: a client can make both the string and what is held back very long.
    """

    def __init__(self, text: str) -> None:
        """Begin, with nothing of it found."""
        self.text = text
        self.length = 0  # of the longest end of the text that begins this string
        self._shorter = [0]  # for each length - 1: the next shorter one that can hold as well; as far as it was needed

    def push(self, text: str) -> int | None:
        """Add to the text; return how many of these characters complete the string, or None."""
        if not self.length and self.text[0] not in text:
            return None
        for index, character in enumerate(text):
            self.length = self._follow(self.length, character)
            if self.length == len(self.text):
                return index + 1
            if self.length > len(self._shorter):
                self._shorter.append(self._follow(self._shorter[-1], character))
        return None

    def _follow(self, length: int, character: str) -> int:
        while length and self.text[length] != character:
            length = self._shorter[length - 1]
        return length + (self.text[length] == character)


class GeneratedText:
    """Text of a generation as it grows: whole characters only; stop strings are cut and never shown."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, drop_space: bool = False, strip: bool = False
    ) -> None:
        """Begin an empty text.

        Args:
            tokenizer: decodes the ids.
            stop: strings that end the text; the text ends before the one whose end comes first.
            drop_space: drop SentencePiece's implicit space, because the generation begins the text.
            strip: drop white space around the whole, as a chat answer's content is written without it.
        """
        self._decoder = TextDecoder(tokenizer)
        self._stops = [StopString(text) for text in stop]
        self._drop_space = drop_space
        self._strip = strip
        self._held = ""
        self._parts: list[str] = []
        self._decoded = 0
        self._starts: list[int] = []
        self._n_certain = 0
        self._ended = False
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """True once a stop string has ended the text."""
        return self.stopped_by is not None

    @property
    def text(self) -> str:
        """All that has been returned so far."""
        return "".join(self._parts)

    @property
    def n_tokens(self) -> int:
        """Tokens that are certain to stay: a stop string may yet cut off those that have no share in the text."""
        if self._stops and not self._ended:
            certain = self._decoded - len(self._held)
            while self._n_certain < len(self._starts) and self._starts[self._n_certain] < certain:
                self._n_certain += 1
            return self._n_certain
        return len(self._starts)

    def push(self, token: int) -> str:
        """Add a token and return the text that became certain."""
        pending = self._decoder.pending
        text = self._decoder.push([token])
        # A character that this token shows to be broken belongs to the tokens before it.
        self._starts.append(self._decoded + (pending and text.startswith("\N{REPLACEMENT CHARACTER}")))
        return self._take(text, final=False)

    def finish(self) -> str:
        """Return what was held back, since nothing follows."""
        if self.stopped:
            return ""
        self._ended = True
        return self._take(self._decoder.finish(), final=True)

    def _take(self, text: str, final: bool) -> str:
        before = len(self._held)
        self._decoded += len(text)
        self._held += text
        ends = [(before + n, stop) for stop in self._stops if (n := stop.push(text)) is not None]
        if ends:
            _, sure, self.stopped_by = min((end, end - len(stop.text), stop.text) for end, stop in ends)
        else:
            overlap = 0 if final else max((stop.length for stop in self._stops), default=0)
            sure = len(self._held) - overlap
        taken, self._held = self._held[:sure], self._held[sure:]
        return self._trim(taken, ended=final or self.stopped)

    def _trim(self, taken: str, ended: bool) -> str:
        if self._drop_space and taken:
            taken, self._drop_space = taken.removeprefix(" "), False
        if self._strip:
            if not self._parts:
                taken = taken.lstrip()
            if not ended:  # white space at the end may turn out to be inside
                kept = taken.rstrip()
                taken, self._held = kept, taken[len(kept) :] + self._held
            else:
                taken = taken.rstrip()
        if taken:
            self._parts.append(taken)
        return taken
