"""Rung 10 of the parity ladder: the demo checkpoint, end to end."""

import pytest

from codellama import Llama


def test_no_ckpt_dir_is_the_demo_checkpoint_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        llama = Llama.build(max_seq_len=64, dtype="float32")
    assert llama.tokenizer.n_words == llama.model.args.vocab_size == 4096
    assert "demo checkpoint" in caplog.text
    assert "memory per rank: weights 20.2 MB + cache" in caplog.text
