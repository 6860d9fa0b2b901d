"""GGUF against llama.cpp: weights, next tokens and ids that tests/golden/make_gguf.py stored."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from codellama.checkpoint import open_checkpoint
from tests.golden import make_gguf
from tests.support.agreement import Agreement, compare, our_log_probs


@cache
def stored(name: str) -> np.ndarray:
    with np.load(make_gguf.STORED) as file:
        array: np.ndarray = file[name]
    return array


def agreement(path: Path, model: str, kind: str) -> Agreement:
    ours = our_log_probs(path, stored(f"{model}.ids").tolist())
    return compare(stored(f"{model}.{kind}.log_probs"), stored(f"{model}.{kind}.top"), ours)


@pytest.mark.parametrize("kind", make_gguf.BLOCKS)
def test_blocks_of_the_package_hold_the_weights_that_llama_cpp_sees(kind: str, tmp_path: Path) -> None:
    path = make_gguf.write_blocks(tmp_path / "blocks.gguf", kind)
    assert make_gguf.digest(path).tolist() == stored(f"blocks-{kind}.digest").tolist()


@pytest.mark.parametrize("kind", [*make_gguf.TINY, *make_gguf.OTHER])
def test_blocks_of_llama_cpp_hold_the_weights_that_it_sees(kind: str) -> None:
    path = make_gguf.FOLDER / f"tiny-{kind}.gguf"
    assert make_gguf.digest(path).tolist() == stored(f"tiny-{kind}.digest").tolist()


def test_the_stored_files_hold_every_k_type() -> None:
    paths = [make_gguf.FOLDER / f"tiny-{kind}.gguf" for kind in (*make_gguf.TINY, *make_gguf.OTHER)]
    found = {kind for path in paths for kind in make_gguf.kinds(path)}
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"} < found


@pytest.mark.parametrize(("kind", "largest"), [("F16", 1e-5), ("Q8_0", 1e-3), ("Q4_0", 1e-3)])
def test_next_tokens_of_the_demo_model(kind: str, largest: float, tmp_path: Path) -> None:
    found = agreement(make_gguf.write_demo(tmp_path / "demo.gguf", kind), "demo", kind)
    assert found.mean_kl <= largest
    assert found.worst_rank < 5


@pytest.mark.parametrize("kind", make_gguf.TINY)
def test_next_tokens_of_mixtures_of_k_types(kind: str) -> None:
    found = agreement(make_gguf.FOLDER / f"tiny-{kind}.gguf", "tiny", kind)
    assert found.mean_kl <= 1e-3
    assert found.worst_rank < 5


def test_a_wrong_model_does_not_agree() -> None:
    """The measure itself: another type of the same weights is further away than the tolerance."""
    found = agreement(make_gguf.FOLDER / "tiny-q2_k.gguf", "tiny", "q5_k_m")
    assert found.mean_kl > 1e-2


def test_ids_of_llama_cpp(tmp_path: Path) -> None:
    tokenizer = open_checkpoint(make_gguf.write_demo(tmp_path / "demo.gguf", "F16")).tokenizer()
    ends = np.cumsum(stored("texts.lengths"))
    theirs = [part.tolist() for part in np.split(stored("texts.ids"), ends[:-1])]
    texts = make_gguf.texts()
    assert len(theirs) == len(texts) == 1000
    assert [tokenizer.encode(text, bos=False, eos=False) for text in texts] == theirs
