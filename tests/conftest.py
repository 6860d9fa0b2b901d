"""Fixtures that many test files share."""

from pathlib import Path

import pytest

from codellama.llama import Llama
from codellama.tokenizer import Tokenizer
from tests.support import tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in one file, float32."""
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small tokenizer with the infilling pieces."""
    return tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def llama(tiny_folder: Path) -> Llama:
    """A generator on the tiny checkpoint: float32, 512 tokens, 4 rows."""
    return Llama.build(tiny_folder, max_seq_len=512, max_batch_size=4, dtype="float32", device="cpu")
