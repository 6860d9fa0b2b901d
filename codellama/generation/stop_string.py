"""Where a text ends: a string is looked for while the text grows. It knows nothing of tokens or requests."""


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
