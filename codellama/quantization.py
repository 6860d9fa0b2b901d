"""What `quantize=` may ask for, and what it costs: int8 per output channel, or int4 in groups.

It knows nothing of tensors, files or torch.
"""

import re
from dataclasses import dataclass
from typing import Literal

from codellama.errors import QuantizationError

GROUPS = (32, 64, 128)
"""Input features that share a scale in int4: fewer are more exact, and take more memory."""

_NAME = re.compile(r"int8|int4(?:-g(\d+))?")


@dataclass(frozen=True)
class Quantization:
    """How the matrices of a model are held; the embedding and the norms stay as they are.

    int8: w = code · scale, one float32 scale for each output channel. int4: w = (code - 8) · scale + zero, a bfloat16
    scale and zero for each group of input features; codes are 0 to 15.

    Attributes:
        method: int8 or int4.
        group: input features that share a scale; None for int8.
    """

    method: Literal["int8", "int4"]
    group: int | None = None

    @classmethod
    def parse(cls, text: str | None) -> "Quantization | None":
        """Read what a user asks for: int8, int4 (groups of 32), int4-g64, int4-g128; None is none.

        Raises:
            QuantizationError: anything else.
        """
        if text is None:
            return None
        match = _NAME.fullmatch(text) if isinstance(text, str) else None
        if match is None or (match[1] and int(match[1]) not in GROUPS):
            names = ", ".join(["int8", "int4", *(f"int4-g{group}" for group in GROUPS[1:])])
            raise QuantizationError(f"quantize is {text!r}; one of {names} was expected")
        if text == "int8":
            return cls("int8")
        return cls("int4", int(match[1] or GROUPS[0]))

    def __str__(self) -> str:
        return self.method if self.group in (None, GROUPS[0]) else f"{self.method}-g{self.group}"

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a matrix of this size."""
        if self.group is None:
            return out_features * in_features + 4 * out_features
        return out_features * in_features // 2 + 4 * out_features * (in_features // self.group)

    def check(self, in_features: dict[str, int]) -> None:
        """Refuse matrices that the groups do not divide.

        Args:
            in_features: what a rank holds of each kind of matrix.

        Raises:
            QuantizationError: naming them.
        """
        odd = [f"{name} ({n} inputs)" for name, n in in_features.items() if self.group is not None and n % self.group]
        if odd:
            raise QuantizationError(
                f"groups of {self.group} do not divide {', '.join(odd)}: "
                f"choose a smaller group, fewer ranks, or quantize='int8'"
            )
