"""Every exception that a caller of this package can cause or meet.

    CodeLlamaError
    ├── CheckpointError              missing file, unknown format, missing or unexpected tensor, wrong shape
    │   └── ParallelSizeError        (ValueError) the model-parallel size does not divide heads or tensors
    ├── PromptError                  (ValueError) roles out of order, special tags in content, no infilling pieces
    │   ├── ContextLengthError       the prompt does not fit; carries both numbers
    │   └── GrammarError             a grammar is refused, or cannot be followed to its end
    ├── MemoryBudgetError            (MemoryError) it does not fit; names the largest max_seq_len that does
    ├── NumericalError               (ArithmeticError) NaN logits; names the ranks whose columns hold them
    ├── SafetyError                  a safety hook refused a chat or its answer; carries the reason
    ├── QuantizationError            (ValueError) an unknown way to quantize, or groups that do not divide a matrix
    ├── EvaluationError              (ValueError) a file of problems or samples is not what it should be
    └── RankError                    (RuntimeError) another rank died, raised, or asked for something else

A plain wrong argument (a negative temperature, a string where ids are expected) is a ValueError or a TypeError.
This module knows nothing of torch. Exceptions travel between ranks, so each can be pickled.
"""


class CodeLlamaError(Exception):
    """The root: `except CodeLlamaError` catches whatever this package raises on purpose."""


class CheckpointError(CodeLlamaError):
    """The files given are not a checkpoint that this package can load."""


class ParallelSizeError(CheckpointError, ValueError):
    """The checkpoint cannot be split over this many model-parallel ranks."""


class PromptError(CodeLlamaError, ValueError):
    """A prompt cannot be expressed as token ids: its roles, its tags, or the tokenizer do not allow it."""


class ContextLengthError(PromptError):
    """A prompt leaves no room to generate.

    Attributes:
        prompt_length: tokens of the prompt.
        max_seq_len: tokens that a row of the cache holds, prompt and generation together.
    """

    def __init__(self, prompt_length: int, max_seq_len: int, where: str = "the prompt") -> None:
        """Say which prompt is too long, and by how much."""
        self.prompt_length = prompt_length
        self.max_seq_len = max_seq_len
        self.where = where
        super().__init__(
            f"{where} has {prompt_length} tokens, but max_seq_len is {max_seq_len} and at least one token must be "
            f"left to generate: shorten it, or build with max_seq_len > {prompt_length}"
        )

    def __reduce__(self) -> tuple[type["ContextLengthError"], tuple[int, int, str]]:
        """Pickle by the three arguments, since the message alone cannot rebuild them."""
        return type(self), (self.prompt_length, self.max_seq_len, self.where)


class GrammarError(PromptError):
    """A grammar is refused, llguidance is not installed, or nothing that the grammar allows can come next."""


class MemoryBudgetError(CodeLlamaError, MemoryError):
    """Weights, cache and workspace need more memory than the device has free."""


class NumericalError(CodeLlamaError, ArithmeticError):
    """The model produced logits that are not numbers."""


class SafetyError(CodeLlamaError):
    """A safety hook refused a chat, or the answer to it. The message is the reason that it gave."""


class QuantizationError(CodeLlamaError, ValueError):
    """Weights cannot be quantized in this way."""


class EvaluationError(CodeLlamaError, ValueError):
    """A file of problems is not in its format, or samples do not belong to this run."""


class RankError(CodeLlamaError, RuntimeError):
    """The group of processes cannot go on: another rank died, raised, or asked for something else."""


def shown(value: object) -> str:
    """Spell what a file holds for a message: one line of plain characters, cut after 80."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
