"""Rung 10 of the parity ladder: the demo checkpoint, end to end.

The golden outputs are greedy, in float32, made by `python -m tests.golden.make_demo`; transformers confirms tokens
of each kind.
"""

import hashlib
import json

import pytest
import torch

from codellama import Llama, dialog_prompt_tokens, infilling_prompt_tokens
from codellama.llama import DEMO
from tests.golden.make_demo import OUTPUTS, example_outputs
from tests.support.distributed import run_ranks
from tests.support.peers import transformers_model
from tools.demo_corpus import read_sources
from tools.evaluate_demo import bits_per_byte


@pytest.fixture(scope="module")
def demo() -> Llama:
    return Llama.build(max_seq_len=512, max_batch_size=4, dtype="float32", device="cpu")


def test_no_ckpt_dir_is_the_demo_checkpoint_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        llama = Llama.build(max_seq_len=64, dtype="float32")
    assert llama.tokenizer.n_words == llama.model.args.vocab_size == 4096
    assert "demo checkpoint" in caplog.text
    assert "memory per rank: weights 20.2 MB + cache" in caplog.text


def test_the_folder_is_whole_and_small() -> None:
    files = {path.name: path for path in DEMO.iterdir() if path.is_file()}
    assert {"params.json", "consolidated.00.pth", "tokenizer.model", "checklist.chk", "MODEL_CARD.md"} <= files.keys()
    assert sum(path.stat().st_size for path in files.values()) < 20e6
    for line in files["checklist.chk"].read_text().splitlines():
        md5, name = line.split()
        assert hashlib.md5(files[name].read_bytes()).hexdigest() == md5, name


def test_the_examples_give_their_golden_outputs(demo: Llama) -> None:
    assert example_outputs(demo) == json.loads(OUTPUTS.read_text())


def _outputs_of_a_rank() -> object:
    return example_outputs(Llama.build(max_seq_len=512, max_batch_size=4, dtype="float32", device="cpu"))


def test_two_processes_give_the_same() -> None:
    golden = json.loads(OUTPUTS.read_text())
    assert run_ranks(2, _outputs_of_a_rank) == [golden, golden]


def test_transformers_gives_the_same_tokens(demo: Llama) -> None:
    args, words = demo.model.args, demo.tokenizer
    theirs = transformers_model(args, dict(demo.model.state_dict()))
    prompts = [
        words.encode("def mean(numbers):\n    ", bos=True, eos=False),
        infilling_prompt_tokens(words, "def gcd(a, b):\n    while b:\n        ", "\n    return a\n"),
        dialog_prompt_tokens(words, [{"role": "user", "content": "Write a function that adds two numbers."}]),
    ]
    for prompt in prompts:
        (tokens,), _ = demo.generate([prompt], 24, temperature=0, stop_token=-1)
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.inference_mode():
            logits = theirs(ids).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == tokens


def test_the_demo_model_has_learnt(demo: Llama) -> None:
    """A part of `python -m tools.evaluate_demo`, with room for other versions of the files it reads."""
    held_out = [source for source in read_sources() if source.held_out and len(source.text) < 6000]
    assert bits_per_byte(demo, held_out[:4]) < 1.6
    results = demo.text_completion(["def is_odd(n):\n    ", "def mean(numbers):\n    "], temperature=0)
    assert [result["finish_reason"] for result in results] == ["stop", "stop"]
    assert all(result["generation"].startswith("return ") for result in results)


def test_an_int8_cache_costs_a_thousandth_at_most(demo: Llama) -> None:
    held_out = [source for source in read_sources() if source.held_out and len(source.text) < 6000][:2]
    with Llama.build(max_seq_len=1024, dtype="float32", device="cpu", cache_dtype="int8") as llama:
        assert llama.engine.cache.keys[0].dtype == torch.int8
        assert bits_per_byte(llama, held_out) == pytest.approx(bits_per_byte(demo, held_out), rel=1e-3)
