"""How many tokens a pass of the model gives where guesses are looked up in what is there, and what that gains.

Edits: a small file, then its beginning again with another name, greedily gone on with by the demo checkpoint. Texts
must be the same with and without guesses; both run in turn, and the shortest time of each counts.

python -m benchmarks.speculation
"""

import time
from collections.abc import Sequence

import fire

from benchmarks.machine import report
from codellama import Llama, SamplingParams

NAMES = ("count", "total", "values", "items", "result", "index", "lines", "words", "nodes", "keys")
BODY = """def add_{0}(self, {0}, limit=10):
    for item in {0}:
        if item not in self.{0}:
            self.{0}.append(item)
    if len(self.{0}) > limit:
        raise ValueError("too many {0}")
    return self.{0}


def get_{0}(self, name, default=None):
    if name in self.{0}:
        return self.{0}[name]
    return default
"""


def edits(count: int) -> list[str]:
    """Make prompts: a file, and the first line of it with another name."""
    prompts = []
    for index in range(count):
        old, new = NAMES[index % len(NAMES)], NAMES[(index + 1 + index // len(NAMES)) % len(NAMES)]
        again = BODY.format(new).split("\n")
        prompts.append(f"{BODY.format(old)}\n\n" + "\n".join(again[: 1 + index % 3]) + "\n")
    return prompts


def speculation(
    guesses: int | Sequence[int] = (4, 8), prompts: int = 20, new_tokens: int = 64, repeats: int = 2, rows: int = 1
) -> None:
    """Time greedy answers of the demo checkpoint with and without guesses."""
    llama = Llama.build(max_seq_len=512, max_batch_size=rows, dtype="float32", device="cpu")
    texts = edits(prompts)

    def run(speculate: int) -> tuple[float, list[str], float]:
        params = SamplingParams(max_gen_len=new_tokens, speculate=speculate)
        requests = [llama.prompts.request(llama.prompts.text(text, params)) for text in texts]
        begin = time.perf_counter()
        done = llama.engine.run(requests)
        seconds = time.perf_counter() - begin
        tokens, steps = sum(len(answer.tokens) for answer in done), sum(answer.n_steps for answer in done)
        return seconds, [answer.text for answer in done], tokens / steps

    table = []
    for speculate in [guesses] if isinstance(guesses, int) else guesses:
        pairs = [(run(0), run(speculate)) for _ in range(repeats)]
        (plain, expected, _), (guessed, found, pace) = (min(side) for side in zip(*pairs, strict=True))
        same = sum(one == other for one, other in zip(expected, found, strict=True))
        table.append(
            {"guesses": speculate, "same_texts": same, "tokens_per_pass": pace, "time_with_to_without": guessed / plain}
        )
    report("speculation", {"prompts": prompts, "new_tokens": new_tokens, "rows": rows}, table)


if __name__ == "__main__":
    fire.Fire(speculation)
