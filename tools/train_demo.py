r"""Train the demo checkpoint: its tokenizer, its weights, and the folder in Meta's layout.

    python -m tools.train_demo tokenizer --output runs/demo
    python -m tools.train_demo train --output runs/demo --minutes 75
    python -m tools.train_demo train --output runs/demo --start runs/demo/weights.pt --minutes 22 --seed 2 \
        --peak 0.5 --dialogs_from 0 --infilling_share 0.6 --decay 0.9
    python -m tools.train_demo export --output runs/demo --folder codellama/demo

The weights are trained with the package's own Transformer. Training is measured in minutes, since the learning rate
must reach 0 exactly when the time is over; two runs therefore differ. `tools.evaluate_demo` measures the result.
"""

import io
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fire
import sentencepiece
import torch
from torch import Tensor
from torch.nn import functional as F

from codellama.checkpoint import write_meta
from codellama.config import ModelArgs
from codellama.model import Transformer
from codellama.tokenizer import Tokenizer
from tools.demo_corpus import functions, read_sources
from tools.demo_examples import ExampleMaker

ARGS: dict[str, Any] = {
    "dim": 256, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 4096, "multiple_of": 64,
    "norm_eps": 1e-5, "rope_theta": 1000000.0,
}  # fmt: skip
CONTEXT = 512
ROWS = 16
DIALOG_SHARE = 0.2


def tokenizer(output: str) -> None:
    """Train the tokenizer on the training files and write it to output/tokenizer.model."""
    folder = Path(str(output))
    folder.mkdir(parents=True, exist_ok=True)
    lines = (line for source in read_sources() if not source.held_out for line in source.text.splitlines())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in lines if line.strip()),
        model_writer=model,
        model_type="bpe",
        vocab_size=ARGS["vocab_size"],
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        max_sentence_length=4096,
        user_defined_symbols=["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"],
        num_threads=2,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def train(
    output: str, minutes: float = 75, seed: int = 0, start: str | None = None, peak: float = 1.0,
    dialogs_from: float = 0.55, infilling_share: float = 0.45, decay: float = 0.6,
) -> None:  # fmt: skip
    """Train the weights for so many minutes and write them to output/weights.pt, at times also in between.

    Args:
        output: folder of tokenizer.model.
        minutes: how long.
        seed: of the initial weights and of the examples.
        start: weights to go on from, instead of random ones.
        peak: factor on the learning rates.
        dialogs_from: share of the run after which dialogs come in.
        infilling_share: share of infilling examples.
        decay: share of the run in which the learning rates go down to 0.
    """
    folder = Path(str(output))
    words = Tokenizer(folder / "tokenizer.model")
    sources = read_sources()
    asked = [function for source in sources if not source.held_out for function in functions(source)]
    maker = ExampleMaker([source for source in sources if not source.held_out], asked, words, seed)
    held_out = [source.text for source in sources if source.held_out]

    torch.manual_seed(seed)
    model = Transformer(ModelArgs(**ARGS)).to_empty(device="cpu")
    initialise_(model)
    before = {"tokens": 0, "steps": 0}
    if start is not None:
        state = torch.load(str(start), weights_only=True)
        model.load_state_dict(state.pop("model"))
        before = state
    matrices = [p for name, p in model.named_parameters() if name.startswith("layers") and p.dim() == 2]
    others = [p for name, p in model.named_parameters() if not (name.startswith("layers") and p.dim() == 2)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    loss_of = torch.compile(model_loss)
    progress = Progress()
    batches = pack(maker, progress, dialogs_from, infilling_share)
    seen, begin, saved = 0, 0.0, 0.0
    step = 0
    while progress.done < 1:
        tokens, weights = next(batches)
        loss = loss_of(model, tokens, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        scale = peak * min(1.0, (step + 1) / 100, (1 - progress.done) / decay)  # warm up, hold, then down to 0
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * scale
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step == 2:
            begin = saved = time.monotonic()  # compilation is over
        seen += tokens.numel()
        if step > 2:
            progress.done = (time.monotonic() - begin) / (60 * minutes)
        if step % 50 == 0:
            speed = seen / max(1e-9, time.monotonic() - begin)
            say(f"step {step} done {progress.done:.3f} loss {loss.item():.4f} tokens {seen} ({speed:.0f}/s)")
        if time.monotonic() - saved > 600 and step > 2:
            saved = time.monotonic()
            save(model, folder, before["tokens"] + seen, before["steps"] + step)
            say(f"step {step} held-out bits per byte {bits_per_byte(model, words, held_out[:12]):.4f}")
    save(model, folder, before["tokens"] + seen, before["steps"] + step)
    say(f"{step} steps, {seen} tokens; held-out bits per byte {bits_per_byte(model, words, held_out):.4f}")


def say(line: str) -> None:
    """Print a line at once, also into a file."""
    print(line, flush=True)


def save(model: Transformer, folder: Path, tokens: int, steps: int) -> None:
    """Write the weights, and how much they have seen in all runs."""
    torch.save({"model": model.state_dict(), "tokens": tokens, "steps": steps}, folder / "weights.pt")


class Progress:
    """How much of the run is over, 0 to 1."""

    done = 0.0


def initialise_(model: Transformer) -> None:
    """Fill the parameters: layers that write to the residual start at 0, so that the model starts as its embedding."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        elif name.endswith(("wo.weight", "w2.weight", "output.weight")):
            torch.nn.init.zeros_(parameter)
        elif name.startswith("tok_embeddings"):
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def model_loss(model: Transformer, tokens: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the negative log-likelihood, in nats, of `[B, T + 1]` ids and their weights."""
    with torch.autocast("cpu", torch.bfloat16):
        positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
        logits = model.logits(model(tokens[:, :-1], positions))
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    shares = weights[:, 1:].flatten()
    return (losses * shares).sum() / shares.sum()


def pack(
    maker: ExampleMaker, progress: Progress, dialogs_from: float, infilling_share: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Lay examples one after another into rows; what overhangs a row is cut, so every row begins with bos."""
    while True:
        ids, weights = [], []
        for _ in range(ROWS):
            share = DIALOG_SHARE if progress.done > dialogs_from else 0.0
            examples = maker.stream(share, infilling_share)
            row: list[int] = []
            shares: list[float] = []
            while len(row) <= CONTEXT:
                example = next(examples)
                row += example.ids
                shares += example.weights
            ids.append(row[: CONTEXT + 1])
            weights.append(shares[: CONTEXT + 1])
        yield torch.tensor(ids), torch.tensor(weights)


@torch.inference_mode()
def bits_per_byte(model: Transformer, words: Tokenizer, texts: list[str]) -> float:
    """Bits per UTF-8 byte of texts, in windows of CONTEXT tokens that each begin with bos."""
    bits, size = 0.0, 0
    for text in texts:
        size += len(text.encode())
        ids = words.encode(text, bos=False, eos=False)
        for start in range(0, len(ids), CONTEXT - 1):
            row = torch.tensor([[words.bos_id, *ids[start : start + CONTEXT - 1]]])
            bits += model_loss(model, row, torch.ones(row.shape)).item() * (row.shape[1] - 1) / math.log(2)
    return bits / size


def export(output: str, folder: str) -> None:
    """Write output's tokenizer and weights to a folder in Meta's layout, in bfloat16."""
    state = torch.load(Path(str(output)) / "weights.pt", weights_only=True)
    tensors = ((name, [tensor]) for name, tensor in state["model"].items())
    words = (Path(str(output)) / "tokenizer.model").read_bytes()
    write_meta(Path(str(folder)), ModelArgs(**ARGS), tensors, 1, words, torch.bfloat16)
    print(json.dumps({"tokens": state["tokens"], "steps": state["steps"]}))


if __name__ == "__main__":
    fire.Fire({"tokenizer": tokenizer, "train": train, "export": export})
