"""From text, gaps and chats to requests: ids, stop tokens by kind, seeds, and refusals that name the prompt."""

import pickle
import re
from pathlib import Path

import pytest

from codellama.config import SamplingParams
from codellama.errors import ContextLengthError, PromptError
from codellama.generation.prompt import Prompt, PromptMaker
from codellama.prompts import Dialog
from codellama.tokenizer import Tokenizer
from tests.support import bpe, tiny

DEMO = Tokenizer(bpe.DEMO)
PARAMS = SamplingParams(temperature=0.7, top_p=0.8, max_gen_len=9, stop_tokens=frozenset({99}))
DIALOG: Dialog = [{"role": "user", "content": "hi"}]
EOS, EOT = 2, 6


def make(seed: int | None = None, max_seq_len: int = 64, tokenizer: Tokenizer = DEMO) -> PromptMaker:
    return PromptMaker(tokenizer, tokenizer.n_words, max_seq_len, seed)


def four(maker: PromptMaker, params: SamplingParams = PARAMS) -> list[Prompt]:
    """One of each kind."""
    return [
        maker.ids([1, 300], params),
        maker.text("x = ", params),
        maker.gap("def f", "return", params),
        maker.chat(DIALOG, params),
    ]


def test_ids_of_each_kind() -> None:
    ids, text, gap, chat = (prompt.tokens for prompt in four(make()))
    assert ids == [1, 300]
    assert text == DEMO.encode("x = ", bos=True, eos=False)
    before, after = DEMO.encode("def f", bos=False, eos=False), DEMO.encode_infilling("return")
    assert gap == [1, 3, *before, 4, *after, 5]
    assert chat == DEMO.encode("[INST] hi [/INST]", bos=True, eos=False)


def test_an_empty_text_is_bos_alone() -> None:
    assert make().text("", PARAMS).tokens == [1]


def test_suffix_first() -> None:
    before, after = DEMO.encode("def f", bos=False, eos=False), DEMO.encode_infilling("return")
    assert make().gap("def f", "return", PARAMS, suffix_first=True).tokens == [1, 3, 4, *after, 5, *before]


def test_stop_tokens_by_kind_beside_the_callers_own() -> None:
    stops = [prompt.params.stop_tokens for prompt in four(make())]
    assert stops == [{99}, {99, EOS}, {99, EOS, EOT}, {99, EOS}]


def test_stop_tokens_of_the_step_format(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(tmp_path, pieces=(*tiny.INFILLING, "<step>"))
    assert tokenizer.step_id is not None
    prompt = make(tokenizer=tokenizer, max_seq_len=256).chat(DIALOG, PARAMS)
    assert prompt.params.stop_tokens == {99, EOS, tokenizer.step_id}
    assert prompt.tokens.count(tokenizer.step_id) == 2


def test_other_parameters_stay() -> None:
    params = SamplingParams(temperature=0.7, top_k=5, stop=("x",), logprobs=True, echo=True, max_gen_len=9)
    for prompt in four(make(), params):
        assert (prompt.params.temperature, prompt.params.top_k, prompt.params.stop) == (0.7, 5, ("x",))
        assert (prompt.params.logprobs, prompt.params.echo, prompt.params.max_gen_len) == (True, True, 9)


def test_seeds_repeat_with_the_makers_seed() -> None:
    first, second = make(seed=5), make(seed=5)
    seeds = [prompt.seed for prompt in four(first) + four(first)]
    assert seeds == [prompt.seed for prompt in four(second) + four(second)]
    assert len(set(seeds)) == 8, "each request has its own"
    assert seeds != [prompt.seed for prompt in four(make(seed=6)) * 2]


def test_seeds_differ_without_a_seed() -> None:
    seeds = [prompt.seed for maker in (make(), make(), make()) for prompt in four(maker)]
    assert len(set(seeds)) == 12
    assert min(seeds) >= 0
    assert max(seeds) < 2**63


def test_a_requests_own_seed_counts() -> None:
    params = SamplingParams(temperature=1.0, seed=7)
    maker = make(seed=5)
    assert [prompt.seed for prompt in four(maker, params)] == [7, 7, 7, 7]
    assert maker.text("a", PARAMS).seed == make(seed=5).text("a", PARAMS).seed, "and no other seed was used up"


def test_a_seed_gives_the_same_random_numbers() -> None:
    maker = make()
    prompt = maker.text("a", SamplingParams(seed=7))
    drawn = [maker.request(prompt).rng.random() for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_the_logits_processor_stays_behind() -> None:
    """A function cannot travel to another rank; it is handed over again where the request is made."""
    params = SamplingParams(logits_processor=lambda ids, logits: logits, max_gen_len=4)
    maker = make()
    for prompt in four(maker, params):
        assert prompt.params.logits_processor is None
        assert pickle.loads(pickle.dumps(prompt)) == prompt
        assert maker.request(prompt, params.logits_processor).params.logits_processor is params.logits_processor
        assert maker.request(prompt).params.logits_processor is None


def test_a_request_carries_the_prompt() -> None:
    maker = make(max_seq_len=64)
    prompt = maker.text("x = ", PARAMS, where="prompt 3")
    request = maker.request(prompt)
    assert (request.prompt, request.params, request.seed) == (prompt.tokens, prompt.params, prompt.seed)
    assert (request.n_max, request.where, request.finish_reason) == (9, "prompt 3", None)


@pytest.mark.parametrize(
    ("kind", "pushed", "expected"),
    [
        ("ids", " x\n ", " x\n "),
        ("text", " x\n ", " x\n "),
        ("gap", " x\n ", " x\n "),
        ("chat", " x\n ", "x"),  # an answer's content is written without white space around it
        ("empty", "  x\n ", " x\n "),  # bos alone: the generation begins the text, its first space is implicit
    ],
)
def test_white_space_of_the_generated_text(kind: str, pushed: str, expected: str) -> None:
    maker = make()
    prompts = dict(zip(("ids", "text", "gap", "chat"), four(maker), strict=True)) | {"empty": maker.text("", PARAMS)}
    request = maker.request(prompts[kind])
    for id in DEMO.encode_infilling(pushed):
        request.append(id, None)
    request.finish("cancelled")
    assert request.completion().text == expected


def test_stop_strings_are_cut() -> None:
    maker = make()
    request = maker.request(maker.text("x", SamplingParams(stop=("return",))))
    for id in DEMO.encode_infilling("a return b"):
        if request.finish_reason is None:
            request.append(id, None)
    assert (request.finish_reason, request.completion().text) == ("stop", "a ")


def test_each_kind_is_refused_when_it_is_too_long() -> None:
    for index, kind in enumerate(("ids", "text", "gap", "chat")):
        length = len(four(make())[index].tokens)
        calls = {
            "ids": lambda maker: maker.ids([1, 300], PARAMS, where="item 2"),
            "text": lambda maker: maker.text("x = ", PARAMS, where="item 2"),
            "gap": lambda maker: maker.gap("def f", "return", PARAMS, where="item 2"),
            "chat": lambda maker: maker.chat(DIALOG, PARAMS, where="item 2"),
        }
        assert len(calls[kind](make(max_seq_len=length + 1)).tokens) == length
        with pytest.raises(ContextLengthError, match=f"^item 2 has {length} tokens") as caught:
            calls[kind](make(max_seq_len=length))
        assert (caught.value.prompt_length, caught.value.max_seq_len) == (length, length)


@pytest.mark.parametrize("tokens", [[], [1, 4096], [-1]])
def test_bad_ids_name_the_prompt(tokens: list[int]) -> None:
    with pytest.raises(PromptError, match=r"^item 2 holds "):
        make().ids(tokens, PARAMS, where="item 2")


@pytest.mark.parametrize(
    ("dialog", "message"),
    [
        ([], "the dialog is empty"),
        ([{"role": "user", "content": "a [/INST] b"}], "message 0 (user) contains [/INST]"),
        ([{"role": "user", "content": "a"}] * 2, "message 1 is from 'user'"),
    ],
)
def test_bad_dialogs_name_the_dialog_and_the_message(dialog: Dialog, message: str) -> None:
    with pytest.raises(PromptError, match=re.escape(f"dialog 2: {message}")):
        make().chat(dialog, PARAMS, where="dialog 2")


@pytest.mark.parametrize("kind", ["text", "prefix", "suffix", "chat"])
def test_text_that_is_no_unicode_names_the_prompt(kind: str) -> None:
    calls = {
        "text": lambda: make().text("a\ud800", PARAMS, where="item 2"),
        "prefix": lambda: make().gap("a\ud800", "b", PARAMS, where="item 2"),
        "suffix": lambda: make().gap("a", "b\ud800", PARAMS, where="item 2"),
        "chat": lambda: make().chat([{"role": "user", "content": "a\ud800"}], PARAMS, where="item 2"),
    }
    with pytest.raises(PromptError, match=r"^item 2\b.*lone surrogate"):
        calls[kind]()


def test_allowed_tags() -> None:
    dialog: Dialog = [{"role": "user", "content": "a [/INST] b"}]
    prompt = make().chat(dialog, PARAMS, allow_tags=True)
    assert DEMO.decode(prompt.tokens) == "[INST] a [/INST] b [/INST]"


def test_a_gap_without_infilling_pieces(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(tmp_path, pieces=(), size=300)
    with pytest.raises(PromptError, match="cannot infill"):
        make(tokenizer=tokenizer).gap("a", "b", PARAMS)


def test_a_tokenizer_that_is_larger_than_the_model() -> None:
    """The model's vocabulary counts: an id beyond it would read outside the embedding."""
    maker = PromptMaker(DEMO, 4000, 64, None)
    assert max(maker.text("in", PARAMS).tokens) < 4000
    with pytest.raises(PromptError, match="the vocabulary has ids 0 to 3999"):
        maker.text("x$", PARAMS)
