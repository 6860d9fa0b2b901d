"""The same model on a GPU and on the CPU: logits, tokens, scores, and memory. `make gpu` runs this file.

What is asked for in float32 is equal tokens: products are not rounded to TF32 unless a program asks for it, and greedy
tokens of these models are no near-ties.
"""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from codellama.assembly import DEMO
from codellama.device import choose_device, choose_dtype, free_memory
from codellama.errors import MemoryBudgetError
from codellama.llama import Llama
from tests.support import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use"),
]

DEVICE = "cuda"
SHARED = [1, *range(40, 120)]
"""More than a prompt must have in common with a row before the row is used again."""
PROMPTS = [[1, 50], [1, 60, 70, 80], [1, *range(90, 130)], [1, 44, 45], [1, *range(200, 207)], [1, 99]]


@pytest.fixture(scope="module")
def on_gpu(tiny_folder: Path) -> Iterator[Llama]:
    with Llama.build(tiny_folder, max_seq_len=512, max_batch_size=4, dtype="float32", device=DEVICE) as llama:
        yield llama


def logits(device: str, dtype: torch.dtype, ids: Tensor) -> Tensor:
    """Of every position, on the CPU and in float32; weights are rounded to the dtype first."""
    weights = {name: tensor.to(dtype) for name, tensor in tiny.random_weights(tiny.ARGS).items()}
    model = tiny.whole_model(tiny.ARGS, {name: tensor.to(device) for name, tensor in weights.items()})
    ids = ids.to(device)
    positions = torch.arange(ids.shape[1], device=device).expand(ids.shape)
    with torch.inference_mode():
        return model.logits(model(ids, positions)).float().cpu()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(tiny.VOCAB, (3, 70), generator=torch.Generator().manual_seed(7))


def test_logits_in_float32(ids: Tensor) -> None:
    torch.testing.assert_close(
        logits(DEVICE, torch.float32, ids), logits("cpu", torch.float32, ids), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_logits_in_16_bits(ids: Tensor, dtype: torch.dtype, error: float) -> None:
    """Against float32 on the same rounded weights: what activations lose, 2^-8 or 2^-11 at each of some ten places."""
    weights = {name: tensor.to(dtype).float() for name, tensor in tiny.random_weights(tiny.ARGS).items()}
    model = tiny.whole_model(tiny.ARGS, weights)
    with torch.inference_mode():
        exact = model.logits(model(ids, torch.arange(ids.shape[1]).expand(ids.shape)))
    assert (logits(DEVICE, dtype, ids) - exact).norm() / exact.norm() < error


def test_greedy_tokens(llama: Llama, on_gpu: Llama) -> None:
    """More prompts than rows, of different lengths."""
    expected, _ = llama.generate(PROMPTS, 24, temperature=0.0)
    tokens, _ = on_gpu.generate(PROMPTS, 24, temperature=0.0)
    assert tokens == expected


def test_sampled_tokens(llama: Llama, on_gpu: Llama) -> None:
    """Random numbers come from the host, so a seed gives the same tokens on any device."""
    expected, _ = llama.generate(PROMPTS, 16, temperature=0.8, top_p=0.9, seed=11)
    for _ in range(2):
        tokens, _ = on_gpu.generate(PROMPTS, 16, temperature=0.8, top_p=0.9, seed=11)
        assert tokens == expected


def test_scores(llama: Llama, on_gpu: Llama) -> None:
    """Of prompt and generation."""
    _, expected = llama.generate(PROMPTS, 8, temperature=0.0, logprobs=True, echo=True)
    _, scores = on_gpu.generate(PROMPTS, 8, temperature=0.0, logprobs=True, echo=True)
    assert expected is not None
    assert scores is not None
    for ours, theirs in zip(scores, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_copied_beginnings(tiny_folder: Path, on_gpu: Llama) -> None:
    """Rows that copy what another one holds give what rows that read it give."""
    prompts = [[*SHARED, 130 + row] for row in range(6)]
    together, _ = on_gpu.generate(prompts, 12, temperature=0.0)
    for prompt, tokens in zip(prompts, together, strict=True):
        with Llama.build(tiny_folder, max_seq_len=128, max_batch_size=1, dtype="float32", device=DEVICE) as alone:
            assert alone.generate([prompt], 12, temperature=0.0)[0] == [tokens]


@pytest.mark.parametrize("chunk_size", [7, 64])
def test_chunks(tiny_folder: Path, llama: Llama, chunk_size: int) -> None:
    """A prompt that is read piece by piece, behind what is in the cache."""
    prompts = [
        [1, *torch.randint(40, tiny.VOCAB, (300,), generator=torch.Generator().manual_seed(3)).tolist()],
        [1, 50],
    ]
    expected, _ = llama.generate(prompts, 12, temperature=0.0)
    sizes = {"max_seq_len": 512, "max_batch_size": 2, "chunk_size": chunk_size}
    with Llama.build(tiny_folder, dtype="float32", device=DEVICE, **sizes) as chunked:
        assert chunked.generate(prompts, 12, temperature=0.0)[0] == expected


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_of_checkpoints(tmp_path: Path, stored: torch.dtype, dtype: str) -> None:
    """A file's numbers, converted once; and it generates."""
    folder = tiny.tiny_checkpoint(tmp_path, dtype=stored)
    with Llama.build(folder, max_seq_len=64, max_batch_size=1, dtype=dtype, device=DEVICE) as llama:
        weight = llama.model.norm.weight
        expected = tiny.random_weights(tiny.ARGS, dtype=stored)["norm.weight"].to(getattr(torch, dtype))
        assert weight.device.type == torch.device(DEVICE).type
        assert torch.equal(weight.cpu(), expected)
        llama.generate([[1, 50, 60]], 5, temperature=0.0)  # which refuses logits that are not finite


def test_demo_in_the_default_dtype() -> None:
    """Text from the bundled model, whole and as a stream, in 16 bits."""
    device = choose_device(None)
    assert device.type == "cuda"
    assert choose_dtype(None, device) in (torch.bfloat16, torch.float16)
    with Llama.build(DEMO, max_seq_len=128, max_batch_size=2) as llama:
        (result,) = llama.text_completion(["def add(a, b):\n    return"], temperature=0.0, max_gen_len=8)
        pieces = llama.stream_completion("def add(a, b):\n    return", temperature=0.0, max_gen_len=8)
        assert "".join(pieces) == result["generation"]
        assert result["generation"].strip()


def test_close_gives_the_memory_back(tiny_folder: Path) -> None:
    """Weights and cache; the first generator leaves what libraries keep for themselves."""
    sizes = {"max_seq_len": 16_384, "max_batch_size": 8}  # a cache of 38 MB
    held = []
    for _ in range(2):
        llama = Llama.build(tiny_folder, dtype="float32", device=DEVICE, **sizes)
        llama.generate([[1, 50, 60]], 4, temperature=0.0)
        busy = torch.cuda.memory_allocated()
        llama.close()
        gc.collect()
        held.append((busy, torch.cuda.memory_allocated()))
    (_, kept), (busy, after) = held
    assert busy - kept > 36e6, "the cache was on the GPU"
    assert after - kept < 1e6


def test_what_does_not_fit_is_refused_before_it_is_allocated(tiny_folder: Path) -> None:
    before = torch.cuda.memory_allocated()
    free = free_memory(torch.device(DEVICE))
    assert free is not None
    positions = free // 288  # a position takes 288 bytes, so that two rows of them cannot fit
    with pytest.raises(MemoryBudgetError):
        Llama.build(tiny_folder, max_seq_len=positions, max_batch_size=2, dtype="float32", device=DEVICE)
    assert torch.cuda.memory_allocated() == before
