"""The public API at one rank: results, texts, batching; each bad input, before anything runs."""

import math
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from codellama import ContextLengthError, Llama, MemoryBudgetError, NumericalError, ParallelSizeError, PromptError
from tests.support import tiny
from tests.support.oracle import oracle_logits

PROMPT = "def f(x):\n    return"


def test_greedy_tokens_and_logprobs_equal_the_oracle(llama: Llama) -> None:
    weights = tiny.random_weights(tiny.ARGS)
    prompt = llama.tokenizer.encode(PROMPT, bos=True, eos=False)
    (tokens,), logprobs = llama.generate([prompt], 12, temperature=0, logprobs=True, stop_token=-1)
    assert logprobs is not None
    ids = list(prompt)
    for token, logprob in zip(tokens, logprobs[0], strict=True):
        expected = torch.log_softmax(oracle_logits(tiny.ARGS, weights, ids)[-1], dim=-1)
        assert token == int(expected.argmax())
        assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
        ids.append(token)
    assert len(tokens) == 12


def test_score_and_echo_equal_the_oracle(llama: Llama) -> None:
    weights = tiny.random_weights(tiny.ARGS)
    ids = llama.tokenizer.encode("for i in range(10): print(i)" * 20, bos=True, eos=False)
    assert len(ids) > 256, "longer than a tile of logits"
    expected = torch.log_softmax(oracle_logits(tiny.ARGS, weights, ids), dim=-1)
    chosen = [0.0, *(float(expected[at, id]) for at, id in enumerate(ids[1:]))]
    assert llama.score([ids])[0] == pytest.approx(chosen, abs=2e-4)
    echoed, logprobs = llama.generate([ids], 3, temperature=0, logprobs=True, echo=True, stop_token=-1)
    assert logprobs is not None
    assert echoed[0][: len(ids)] == ids
    assert len(echoed[0]) == len(logprobs[0]) == len(ids) + 3
    assert logprobs[0][: len(ids)] == pytest.approx(chosen, abs=2e-4)


def test_each_request_is_the_same_alone_and_among_neighbours(tiny_folder: Path) -> None:
    """16 sampled prompts of 4 to 500 tokens over 4 rows, in chunks of 64: tokens as alone, in any order."""
    llama = Llama.build(tiny_folder, max_seq_len=512, max_batch_size=4, dtype="float32", chunk_size=64)
    generator = torch.Generator().manual_seed(5)
    lengths = [4, 500, 17, 33, 250, 64, 65, 128, 5, 90, 411, 7, 300, 63, 150, 12]
    prompts = [torch.randint(tiny.VOCAB, (length,), generator=generator).tolist() for length in lengths]
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1}
    alone = [llama.generate([prompt], 12, seed=index, logprobs=True, **options) for index, prompt in enumerate(prompts)]
    maker = llama.prompts
    order = list(range(16))
    for turn in (order, order[::-1]):
        made = [maker.ids(prompts[i], _params(seed=i, max_gen_len=12, **options)) for i in turn]
        done = llama.engine.run([maker.request(prompt) for prompt in made])
        for index, completion in zip(turn, done, strict=True):
            tokens, logprobs = alone[index]
            assert list(completion.tokens) == tokens[0]
            assert logprobs is not None
            assert [score.logprob for score in completion.scores] == pytest.approx(logprobs[0], abs=1e-4)


def _params(**options: Any) -> Any:
    from codellama import SamplingParams

    return SamplingParams(logprobs=True, stop_tokens=frozenset({2}), **options)


def test_seeds(llama: Llama, tiny_folder: Path) -> None:
    once = llama.text_completion([PROMPT] * 3, temperature=1.0, max_gen_len=16, seed=7)
    again = llama.text_completion([PROMPT], temperature=1.0, max_gen_len=16, seed=7)
    assert once == again * 3
    free = [llama.text_completion([PROMPT], temperature=1.0, max_gen_len=16)[0]["generation"] for _ in range(4)]
    assert len(set(free)) == 4
    runs = []
    for _ in range(2):
        seeded = Llama.build(tiny_folder, max_seq_len=64, dtype="float32", seed=3)
        runs.append(seeded.text_completion([PROMPT] * 2, temperature=1.0, max_gen_len=16))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_a_list_of_seeds_gives_each_prompt_its_own(llama: Llama) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "max_gen_len": 16}
    alone = [llama.text_completion([PROMPT], **options, seed=seed)[0] for seed in (7, 8, 7, 9, -1)]
    assert llama.text_completion([PROMPT] * 5, **options, seed=[7, 8, 7, 9, -1]) == alone
    assert alone[0] == alone[2]
    assert len({result["generation"] for result in alone}) == 4
    streamed = "".join(llama.stream_completion(PROMPT, **options, seed=(8,)))
    assert streamed == alone[1]["generation"]
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        llama.text_completion([PROMPT], **options, seed=[7, 8])
    with pytest.raises(TypeError, match=r"seed is 1\.5"):
        llama.text_completion([PROMPT], **options, seed=[1.5])  # type: ignore[list-item]


def test_more_prompts_than_rows_and_their_order(llama: Llama) -> None:
    prompts = [f"x = {i}" for i in range(11)]
    together = llama.text_completion(prompts, temperature=0, max_gen_len=5)
    alone = [llama.text_completion([prompt], temperature=0, max_gen_len=5)[0] for prompt in prompts]
    assert together == alone
    assert llama.text_completion([]) == []


def test_result_keys(llama: Llama) -> None:
    (plain,) = llama.text_completion([PROMPT], temperature=0, max_gen_len=4)
    assert plain.keys() == {"generation", "finish_reason"}
    assert plain["finish_reason"] == "length"
    (full,) = llama.text_completion([PROMPT], temperature=0, max_gen_len=4, logprobs=True, top_logprobs=3)
    assert full.keys() == {"generation", "finish_reason", "tokens", "logprobs", "top_logprobs"}
    for piece, logprob, top in zip(full["tokens"], full["logprobs"], full["top_logprobs"], strict=True):
        assert len(top) == 3
        assert max(top, key=lambda rival: top[rival]) == piece
        assert top[piece] == pytest.approx(logprob, abs=1e-6)
    (gap,) = llama.text_infilling(["def "], ["\n"], temperature=0, max_gen_len=4)
    assert gap.keys() == {"generation", "full_text", "finish_reason"}
    assert gap["full_text"] == f"def {gap['generation']}\n"
    (answer,) = llama.chat_completion([[{"role": "user", "content": "hi"}]], temperature=0, max_gen_len=4)
    assert answer["generation"]["role"] == "assistant"
    assert answer.keys() == {"generation", "finish_reason"}


def test_the_70b_format_adds_a_destination(tmp_path: Path) -> None:
    folder = tiny.tiny_checkpoint(tmp_path, pieces=(*tiny.INFILLING, "<step>"))
    llama = Llama.build(folder, max_seq_len=128, dtype="float32")
    (answer,) = llama.chat_completion([[{"role": "user", "content": "hi"}]], temperature=0, max_gen_len=4)
    assert answer["generation"]["destination"] == "user"


def test_prompt_and_generation_are_exactly_the_text(llama: Llama) -> None:
    """The generation decodes as the continuation of its prompt: ids of both together give both texts together."""
    for seed in range(20):
        prompt = "x =\r\n\ty" * (seed % 3) + "  "
        (result,) = llama.text_completion([prompt], temperature=1.5, top_p=1, max_gen_len=30, seed=seed, echo=True)
        ids = llama.tokenizer.encode(prompt, bos=True, eos=False)
        (tokens,), _ = llama.generate([ids], 30, temperature=1.5, top_p=1, seed=seed, echo=True)
        tokenizer = llama.tokenizer
        special = (tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id)
        assert result["generation"] == tokenizer.decode([id for id in tokens if id not in special])


def test_streams_concatenate_to_the_result(llama: Llama) -> None:
    for seed in range(8):
        options: dict[str, Any] = {"temperature": 1.2, "max_gen_len": 40, "seed": seed, "stop": ["e", "\n\n"]}
        (whole,) = llama.text_completion([PROMPT], **options)
        pieces = list(llama.stream_completion(PROMPT, **options))
        assert "".join(pieces) == whole["generation"]
        assert "e" not in whole["generation"]
        (gap,) = llama.text_infilling(["def "], ["\n"], **options)
        assert "".join(llama.stream_infilling("def ", "\n", **options)) == gap["generation"]
        dialog: Any = [{"role": "user", "content": "hi"}]
        (answer,) = llama.chat_completion([dialog], **options)
        text = answer["generation"]["content"]
        assert "".join(llama.stream_chat(dialog, **options)) == text == text.strip()


def test_stop_strings_cut_text_and_tokens(llama: Llama) -> None:
    (free,) = llama.text_completion([PROMPT], temperature=0, max_gen_len=40, logprobs=True)
    stop = free["generation"][10:13]
    cut = free["generation"].index(stop)
    (stopped,) = llama.text_completion([PROMPT], temperature=0, max_gen_len=40, logprobs=True, stop=stop)
    assert stopped["generation"] == free["generation"][:cut]
    assert stopped["finish_reason"] == "stop"
    assert stopped["tokens"] == free["tokens"][: len(stopped["tokens"])]
    assert len(stopped["tokens"]) == len(stopped["logprobs"]) < 40


def test_stop_token_ends_and_is_not_returned(llama: Llama) -> None:
    prompt = llama.tokenizer.encode(PROMPT, bos=True, eos=False)
    (free,), _ = llama.generate([prompt], 20, temperature=0, stop_token=-1)
    (stopped,), _ = llama.generate([prompt], 20, temperature=0, stop_token=free[6])
    assert stopped == free[: free.index(free[6])]


def test_an_eos_inside_the_prompt_does_not_cut_the_echo(llama: Llama) -> None:
    ids = [1, 40, llama.tokenizer.eos_id, 50]
    (tokens,), _ = llama.generate([ids], 3, temperature=0, echo=True, stop_token=-1)
    assert tokens[:4] == ids


def test_a_prompt_of_almost_max_seq_len_still_generates(tiny_folder: Path) -> None:
    llama = Llama.build(tiny_folder, max_seq_len=32, dtype="float32")
    (tokens,), _ = llama.generate([[1] + [40] * 30], None, temperature=0, stop_token=-1)
    assert len(tokens) == 1
    with pytest.raises(ContextLengthError, match=r"32 tokens, but max_seq_len is 32") as caught:
        llama.generate([[1, 40], [40] * 32], 5)
    assert (caught.value.prompt_length, caught.value.max_seq_len) == (32, 32)
    assert len(llama.score([[40] * 32])[0]) == 32


def test_logits_processor_decides(llama: Llama) -> None:
    seen: list[list[int]] = []

    def only_41(ids: Any, logits: torch.Tensor) -> torch.Tensor:
        seen.append(list(ids))
        masked = torch.full_like(logits, -math.inf)
        masked[41] = 0
        return masked

    (tokens,), logprobs = llama.generate([[1, 40]], 3, logits_processor=only_41, logprobs=True)
    assert tokens == [41, 41, 41]
    assert seen == [[1, 40], [1, 40, 41], [1, 40, 41, 41]]
    assert logprobs is not None
    assert max(logprobs[0]) < -0.5, "scored by the model, not by the processor"


BAD: list[tuple[Callable[[Llama], object], type[Exception], str]] = [
    (lambda m: m.text_completion("one"), TypeError, "a list of prompts was expected; found str"),
    (lambda m: m.text_completion([3]), TypeError, "int; a string was expected"),
    (lambda m: m.text_completion(["a"], temperature=-1), ValueError, "temperature is -1"),
    (lambda m: m.text_completion(["a"], temperature=math.nan), ValueError, "temperature is nan"),
    (lambda m: m.text_completion(["a"], top_p=1.5), ValueError, r"top_p is 1.5; .*\[0, 1\]"),
    (lambda m: m.text_completion(["a"], max_gen_len=-1), ValueError, "max_gen_len is -1"),
    (lambda m: m.text_completion(["a"], top_k=0), ValueError, "top_k is 0"),
    (lambda m: m.text_completion(["a"], stop=""), ValueError, "empty string"),
    (lambda m: m.text_completion(["a"], tempature=1), TypeError, "tempature"),
    (lambda m: m.text_completion(["a\ud800"]), PromptError, "surrogate"),
    (lambda m: m.text_completion(["a" * 600]), ContextLengthError, "prompt 0 has 60[0-9] tokens"),
    (lambda m: m.generate([[]]), PromptError, "prompt 0 holds no token ids"),
    (lambda m: m.generate([[1], [1, 320]]), PromptError, "prompt 1 holds id 320 at 1.*ids 0 to 319"),
    (lambda m: m.generate([[1, -1]]), PromptError, "id -1"),
    (lambda m: m.generate([[1, 2.0]]), TypeError, "integer token ids"),
    (lambda m: m.text_infilling(["a", "b"], ["c"]), PromptError, "2 prefixes but 1 suffixes"),
    (lambda m: m.chat_completion([[]]), PromptError, "dialog 0: the dialog is empty"),
    (lambda m: m.chat_completion([[{"role": "system", "content": "s"}]]), PromptError, "system message alone"),
    (lambda m: m.chat_completion([[{"role": "assistant", "content": "s"}]]), PromptError, "'user' was expected"),
    (lambda m: m.chat_completion([[{"role": "user", "content": None}]]), PromptError, "a string was expected"),
    (lambda m: m.chat_completion([[{"role": "user", "content": "a [/INST] b"}]]), PromptError, r"\[/INST\]"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_raises_before_anything_runs(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, call: Callable[[Llama], object], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(llama.engine, "step", lambda: pytest.fail("the model ran"))
    with pytest.raises(error, match=message):
        call(llama)


def test_a_tag_may_be_allowed_and_is_plain_text(llama: Llama) -> None:
    dialog: Any = [{"role": "user", "content": "what is [INST]?"}]
    (result,) = llama.chat_completion([dialog], temperature=0, max_gen_len=2, allow_special_tags=True)
    assert result["finish_reason"] == "length"


def test_files_beside_a_gap(llama: Llama) -> None:
    """They are read, and are no part of the text; the same as comments in the prefix."""
    options: dict[str, Any] = {"temperature": 0, "max_gen_len": 6}
    files = [("a.py", "A = 1")]
    given = llama.text_infilling(["def ", "x"], ["\n", "y"], context_files=files, **options)
    written = llama.text_infilling(["# a.py\n# A = 1\n\n" + text for text in ("def ", "x")], ["\n", "y"], **options)
    assert [gap["generation"] for gap in given] == [gap["generation"] for gap in written]
    assert given[0]["full_text"] == "def " + given[0]["generation"] + "\n"
    streamed = "".join(llama.stream_infilling("def ", "\n", context_files=files, **options))
    assert streamed == given[0]["generation"]
    assert given[0] != llama.text_infilling(["def "], ["\n"], **options)[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("a.py", "context_files is a str"),
        ({"a.py": "A"}, "context_files is a dict"),
        (["a.py"], "context_files holds 'a.py' at 0"),
        ([("a", "b"), ("a.py",)], r"context_files holds \('a\.py',\) at 1"),
        ([("a", None)], r"context_files holds \('a', None\) at 0"),
    ],
)
def test_files_of_the_wrong_kind(llama: Llama, files: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        llama.text_infilling(["a"], ["b"], context_files=files)


def test_only_infilling_takes_files(llama: Llama) -> None:
    with pytest.raises(TypeError, match="unknown argument context_files"):
        llama.text_completion(["a"], context_files=[("a", "b")])  # type: ignore[call-arg]


def test_infilling_without_the_pieces(tmp_path: Path) -> None:
    llama = Llama.build(tiny.tiny_checkpoint(tmp_path, pieces=()), max_seq_len=64, dtype="float32")
    with pytest.raises(PromptError, match="this model cannot infill"):
        llama.text_infilling(["a"], ["b"])


def test_nan_weights_are_named_and_the_generator_recovers(tiny_folder: Path) -> None:
    llama = Llama.build(tiny_folder, max_seq_len=64, dtype="float32")
    expected = llama.generate([[1, 40]], 6, temperature=0)
    saved = llama.model.norm.weight.clone()
    llama.model.norm.weight[3] = math.nan
    with pytest.raises(NumericalError, match="NaN instead of logits on rank 0"):
        llama.generate([[1, 40], [1, 50]], 6, temperature=0)
    llama.model.norm.weight.copy_(saved)
    assert llama.generate([[1, 40]], 6, temperature=0) == expected


def test_build_refuses_bad_arguments(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="max_seq_len is 0"):
        Llama.build(tiny_folder, max_seq_len=0)
    with pytest.raises(ValueError, match="dtype is 'int3'"):
        Llama.build(tiny_folder, dtype="int3")
    with pytest.raises(ValueError, match="cpu and cuda are supported"):
        Llama.build(tiny_folder, device="meta")
    with pytest.raises(ParallelSizeError, match="model_parallel_size 3 does not fit 1 processes"):
        Llama.build(tiny_folder, model_parallel_size=3)
    monkeypatch.setattr("codellama.assembly.free_memory", lambda device: 2_000_000)
    with pytest.raises(MemoryBudgetError, match=r"max_seq_len up to (\d+) fits") as caught:
        Llama.build(tiny_folder, max_seq_len=100_000, dtype="float32")
    assert "cache 115 MB" in str(caught.value)
    fits = int(str(caught.value).split("max_seq_len up to ")[1].split()[0])
    assert 0 < fits < 100_000
    Llama.build(tiny_folder, max_seq_len=fits, dtype="float32")
    with pytest.raises(MemoryBudgetError, match=f"up to {fits} fits"):
        Llama.build(tiny_folder, max_seq_len=fits + 1, dtype="float32")


def test_the_callers_process_stays_as_it_was(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (torch.get_default_dtype(), torch.empty(0).device, torch.initial_seed(), torch.get_rng_state().tolist())
    llama = Llama.build(tiny_folder, max_seq_len=64)
    Llama.build(tiny_folder, max_seq_len=32).text_completion(["x"], temperature=1.0, max_gen_len=4)
    llama.text_completion(["x"], temperature=1.0, max_gen_len=4)
    after = (torch.get_default_dtype(), torch.empty(0).device, torch.initial_seed(), torch.get_rng_state().tolist())
    assert before == after
    assert capsys.readouterr() == ("", "")
    assert not torch.distributed.is_initialized()


def test_calls_of_two_threads_queue(llama: Llama) -> None:
    prompts = [f"import {name}" for name in "abcdefgh"]
    expected = [llama.text_completion([prompt], temperature=0, max_gen_len=8) for prompt in prompts]
    results: dict[int, object] = {}

    def call(index: int) -> None:
        results[index] = llama.text_completion([prompts[index]], temperature=0, max_gen_len=8)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[index] for index in range(8)] == expected


def test_a_closed_stream_leaves_nothing_behind(llama: Llama) -> None:
    stream = llama.stream_completion(PROMPT, temperature=0, max_gen_len=200)
    next(stream)
    with pytest.raises(RuntimeError, match="open stream"):
        llama.text_completion([PROMPT])
    stream.close()  # type: ignore[attr-defined]
    assert not llama.engine.step()
    assert llama.text_completion([PROMPT], temperature=0, max_gen_len=3)[0]["finish_reason"] == "length"


def test_a_model_that_generates_special_pieces_shows_none(llama: Llama) -> None:
    tokenizer = llama.tokenizer
    special = [tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id]

    def prefer(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[special[len(ids) % 4]] = 99.0
        return logits

    (result,) = llama.text_completion([""], temperature=0, max_gen_len=8, logprobs=True, logits_processor=prefer)
    assert result["generation"] == ""
    assert sorted(set(result["tokens"])) == sorted(tokenizer.token_piece(id) for id in special)
    assert "".join(llama.stream_completion("", temperature=0, max_gen_len=8, logits_processor=prefer)) == ""


def test_a_reused_beginning_changes_no_token(tiny_folder: Path) -> None:
    """Prompts that begin like earlier ones, sampled; each alone in a fresh generator, and all in one that remembers."""
    rng = random.Random(4)
    prompts: list[list[int]] = []
    for _ in range(24):
        begin = rng.choice(prompts)[: rng.randrange(60)] if prompts else []
        prompts.append([*(begin or [1]), *(rng.randrange(3, 320) for _ in range(rng.randrange(1, 40)))])
    options = {"temperature": 0.8, "seed": 5, "logprobs": True, "stop_token": -1}
    with Llama.build(tiny_folder, max_seq_len=256, max_batch_size=3, dtype="float32", device="cpu") as remembering:
        turns = [remembering.generate([prompt], 9, **options) for prompt in prompts]
        held = [ids for ids in remembering.engine._scheduler._table._held.values() if ids]
    assert len(held) == 3
    for prompt, (tokens, scores) in zip(prompts, turns, strict=True):
        with Llama.build(tiny_folder, max_seq_len=256, max_batch_size=1, dtype="float32", device="cpu") as fresh:
            expected, their_scores = fresh.generate([prompt], 9, **options)
        assert tokens == expected
        assert scores[0] == pytest.approx(their_scores[0], abs=1e-4)
