"""What an evaluation is asked to do, checked before anything is read or loaded; and the seed of each sample.

It knows nothing of problems or models.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codellama.config import RuntimeArgs, SamplingParams
from codellama.errors import EvaluationError
from codellama.evaluation.pass_at_k import MODELS, VARIANTS
from codellama.evaluation.tasks import TASKS
from codellama.quantization import Quantization


@dataclass(frozen=True)
class Settings:
    """What to run. The fields are the command's flags and are explained there.

    Raises:
        EvaluationError: values that do not go together, or that there are not.
        ValueError: a value outside its range.
    """

    task: str
    data: Path
    output_dir: Path
    ckpt_dir: str | None = None
    tokenizer_path: str | None = None
    checkpoint_format: str | None = None
    n: int = 1
    ks: tuple[int, ...] = (1,)
    temperature: float = 0.0
    top_p: float = 0.95
    max_gen_len: int = 512
    max_seq_len: int = 2048
    max_batch_size: int = 4
    seed: int = 0
    limit: int | None = None
    chat: bool = False
    suffix_first: bool = False
    timeout: float = 10.0
    n_workers: int = 1
    model: str | None = None
    variant: str | None = None
    model_parallel_size: int | None = None
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise EvaluationError(f"{self.task} is no benchmark; there are {', '.join(TASKS)}")
        SamplingParams(
            temperature=self.temperature, top_p=self.top_p, max_gen_len=self.max_gen_len, seed=self.seed
        )  # fmt: skip
        Quantization.parse(self.quantize)
        RuntimeArgs(max_seq_len=self.max_seq_len, max_batch_size=self.max_batch_size)
        least = {"n": self.n, "max_gen_len": self.max_gen_len, "n_workers": self.n_workers, "limit": self.limit}
        for name, number in least.items():
            if number is not None and number < 1:
                raise EvaluationError(f"{name} is {number}; at least 1 was expected")
        if not (0 < self.timeout < math.inf):
            raise EvaluationError(f"timeout is {self.timeout}; seconds above 0 were expected")
        wrong = [k for k in self.ks if not 1 <= k <= self.n]
        if wrong or not self.ks:
            raise EvaluationError(
                f"k is {','.join(map(str, self.ks)) or 'empty'}, but there are {self.n} samples of each problem: k "
                f"goes from 1 to n; ask for more with --n"
            )
        if self.n > 1 and self.is_greedy:
            raise EvaluationError(
                f"n is {self.n}, but greedy samples are all the same: give --temperature 0.8 (and --top_p 0.95), as "
                f"the paper does for pass@10 and pass@100"
            )
        if (self.model is None) != (self.variant is None):
            raise EvaluationError("model and variant go together: --model 7b --variant base")
        for name, value, known in (("model", self.model, MODELS), ("variant", self.variant, VARIANTS)):
            if value is not None and value not in known:
                raise EvaluationError(f"{name} is {value}; one of {', '.join(known)} was expected")
        if self.chat and self.suffix_first:
            raise EvaluationError("chat and suffix_first exclude each other: a chat has no suffix")

    @property
    def is_greedy(self) -> bool:
        """True where the most probable token is taken without drawing."""
        return self.temperature == 0 or self.top_p == 0

    def parameters(self, data: str) -> dict[str, Any]:
        """List what decides about each sample and its result; not how many there are, nor what runs at once.

        Args:
            data: fingerprint of the problems.
        """
        weights = None if self.ckpt_dir is None else str(Path(self.ckpt_dir).resolve())
        tokenizer = None if self.tokenizer_path is None else str(Path(self.tokenizer_path).resolve())
        names = (
            "task", "checkpoint_format", "temperature", "top_p", "max_gen_len", "max_seq_len", "seed", "chat",
            "suffix_first", "timeout", "device", "dtype", "quantize",
        )  # fmt: skip
        own = {name: getattr(self, name) for name in names}
        return {**own, "data": data, "ckpt_dir": weights, "tokenizer_path": tokenizer}


def parse_ks(text: str) -> tuple[int, ...]:
    """Read a list such as 1,10,100.

    Raises:
        EvaluationError: it is none.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise EvaluationError(f"k is {text}; integers with commas between, such as 1,10,100, were expected")
    return tuple(sorted({int(word) for word in words}))


def sample_seed(seed: int, task_id: str | int, index: int) -> int:
    """Make the seed of one sample: the same whatever else is generated, in whichever order."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index} {task_id}".encode()).digest()[:8]) >> 1
