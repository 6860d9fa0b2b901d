"""Texts that must have a form have it, whatever the model prefers; a hostile form is refused, and harms nobody."""

import json
import pickle
import sys
import time
from typing import Any

import jsonschema_rs
import pytest

from codellama import Grammar, GrammarError, Llama, PromptError, SamplingParams
from codellama.generation.grammar import Grammars
from codellama.generation.prompt import Prompt
from codellama.generation.request import Completion
from codellama.tokenizer import Tokenizer
from tests.support.schemas import SCHEMAS, Schema

CHAT = [{"role": "user", "content": "Write JSON."}]


@pytest.fixture(scope="module")
def demo() -> Llama:
    """The demo checkpoint, float32, many rows."""
    return Llama.build(max_seq_len=256, max_batch_size=25, dtype="float32", device="cpu")


def run(llama: Llama, prompts: list[Prompt]) -> list[Completion]:
    return llama.engine.run([llama.prompts.request(prompt) for prompt in prompts])


def one(llama: Llama, text: str, **params: Any) -> Completion:
    return run(llama, [llama.prompts.text(text, SamplingParams(**params))])[0]


def valid(schema: Schema, text: str) -> bool:
    """Judge by another implementation, formats too."""
    return jsonschema_rs.is_valid(schema, json.loads(text), validate_formats=True)


def test_the_schemas_are_fifty_different_ones() -> None:
    assert len({json.dumps(schema) for schema in SCHEMAS}) == len(SCHEMAS) == 50
    assert not valid(SCHEMAS[-1], '{"list": [], "flag": true, "note": ""}')
    assert not valid({"type": "string", "format": "date"}, '"2024-13-01"')


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_fifty_of_fifty_are_valid(demo: Llama, temperature: float) -> None:
    """A model of four layers knows no JSON at all: what is valid is the grammar's doing."""
    made = [
        demo.prompts.chat(
            CHAT, SamplingParams(temperature=temperature, seed=index, grammar=Grammar.json_schema(schema))
        )
        for index, schema in enumerate(SCHEMAS)
    ]
    done = run(demo, made)
    assert [completion.finish_reason for completion in done] == ["stop"] * 50
    broken = [text for schema, text in zip(SCHEMAS, (c.text for c in done), strict=True) if not valid(schema, text)]
    assert broken == []


def test_the_first_blank_is_json_in_a_completion_too(demo: Llama) -> None:
    blanks = 0
    for seed in range(12):
        grammar = Grammar.json_schema({"enum": [1, 2]})
        text = one(demo, "x =", temperature=1.0, seed=seed, grammar=grammar).text
        assert json.loads(text) in (1, 2)
        blanks += text.startswith(" ")
    assert blanks > 0


def test_an_object_that_does_not_end_is_cut_by_the_length(demo: Llama) -> None:
    done = one(
        demo, "", temperature=1.0, seed=0, max_gen_len=5, grammar=Grammar.json_schema({"minItems": 9, "type": "array"})
    )
    assert (done.finish_reason, len(done.tokens)) == ("length", 5)
    assert done.text.lstrip().startswith("[")


def test_a_text_that_is_complete_ends_without_a_stop_token(demo: Llama) -> None:
    """Nothing may follow, so no stop token is waited for; where the text may go on, the model's stop token ends it."""
    for stop in (frozenset[int](), frozenset({-1, 31999})):
        prompt = demo.prompts.ids([1], SamplingParams(grammar=Grammar.regex("[ab]{3}"), stop_tokens=stop))
        (done,) = run(demo, [prompt])
        assert (len(done.text), set(done.text) <= set("ab"), done.finish_reason) == (3, True, "stop")
    ends = demo.tokenizer.encode("q", bos=False, eos=False)[-1]
    ids = SamplingParams(grammar=Grammar.regex("[ab]{2,3}"), stop_tokens={ends}, logit_bias={ends: 100})
    (done,) = run(demo, [demo.prompts.ids([1], ids)])
    assert (len(done.text), done.finish_reason) == (2, "stop")  # not before two, though it is the most probable


def test_lark_and_any_object(demo: Llama) -> None:
    lark = Grammar.lark('start: "(" start ")" | "x"')
    text = one(demo, "f", temperature=1.0, seed=1, max_gen_len=40, grammar=lark).text
    depth = text.count("(")
    assert text == "(" * depth + "x" + ")" * depth
    bias = {id: 100.0 for id in range(demo.tokenizer.n_words) if demo.tokenizer.token_bytes(id) == b"}"}
    assert json.loads(one(demo, "", grammar=Grammar.json_object(), logit_bias=bias).text) == {}


def test_scores_are_the_models_own(demo: Llama) -> None:
    done = one(demo, "a", grammar=Grammar.regex("zq[0-9]"), logprobs=True, top_logprobs=2)
    ids = demo.tokenizer.encode("a", bos=True, eos=False)
    expected = demo.score([[*ids, *done.tokens]])[0][len(ids) :]
    assert [score.logprob for score in done.scores] == pytest.approx(expected, abs=1e-4)
    assert any(token not in dict(score.top) for token, score in zip(done.tokens, done.scores, strict=True))


def test_the_public_call_streams_stops_and_repeats(demo: Llama) -> None:
    options: dict[str, Any] = {
        "temperature": 1.0,
        "seed": 4,
        "max_gen_len": 40,
        "grammar": Grammar.json_schema(SCHEMAS[33]),
    }
    (answer,) = demo.chat_completion([CHAT], **options)
    assert "".join(demo.stream_chat(CHAT, **options)) == answer["generation"]["content"]
    (cut,) = demo.text_completion(["a"], **options, stop=":", echo=True)
    assert cut["generation"].strip() in ('a{"name"', 'a {"name"')


def test_neighbours_change_nothing(demo: Llama) -> None:
    """Each request has a matcher and counts of its own, also where one prompt is asked n times."""
    params = SamplingParams(temperature=1.0, seed=8, frequency_penalty=1.0, grammar=Grammar.json_schema(SCHEMAS[33]))
    prompt = demo.prompts.text("x", params)
    together = run(demo, demo.prompts.alternatives(prompt, 4))
    alone = [run(demo, [made])[0] for made in demo.prompts.alternatives(prompt, 4)]
    assert [done.tokens for done in together] == [done.tokens for done in alone]
    assert len({done.tokens for done in alone}) > 1


def test_penalties_count_what_was_generated_and_not_the_prompt(demo: Llama) -> None:
    """Against a loop that asks the model anew for each token."""
    ids = demo.tokenizer.encode("a b a b a b a", bos=True, eos=False)
    params = SamplingParams(presence_penalty=0.4, frequency_penalty=0.3, logit_bias={ids[-1]: 1.5}, max_gen_len=24)
    made = demo.prompts.ids(ids, params)
    (done,) = run(demo, [made])
    output: list[int] = []
    while len(output) < 24:
        (scored,) = run(
            demo, [demo.prompts.ids([*ids, *output], SamplingParams(max_gen_len=1, top_logprobs=4096, logprobs=True))]
        )
        values = dict(scored.scores[0].top)
        values[ids[-1]] += 1.5
        for id in set(output):
            values[id] -= 0.4 + 0.3 * output.count(id)
        output.append(max(values, key=lambda id: values[id]))
    assert list(done.tokens) == output
    assert max(output.count(id) for id in output) > 2
    with pytest.raises(PromptError, match=r"logit_bias of the prompt holds id 4096"):
        demo.prompts.ids(ids, SamplingParams(logit_bias={4096: 1}))


def test_a_prompt_travels_without_its_matcher(demo: Llama) -> None:
    prompt = demo.prompts.text("x", SamplingParams(grammar=Grammar.json_schema(SCHEMAS[33])))
    travelled = pickle.loads(pickle.dumps(prompt))
    assert (prompt.matcher is None, travelled.matcher) == (False, None)
    assert run(demo, [travelled])[0] == run(demo, [prompt])[0]


def test_a_grammar_that_fails_ends_its_own_request(demo: Llama) -> None:
    """The processor allows one token, and the grammar does not allow that."""

    def only(ids: Any, logits: Any) -> Any:
        return logits.fill_(-float("inf")).index_fill_(0, logits.new_tensor([300]).long(), 0.0)

    grammar = Grammar.regex("[0-9]+")
    good, bad = (demo.prompts.text("x", SamplingParams(max_gen_len=6, grammar=grammar)) for _ in range(2))
    done = demo.engine.run([demo.prompts.request(good), demo.prompts.request(bad, only)])
    assert [completion.finish_reason for completion in done] == ["length", "error"]
    assert "allows no token that the grammar allows" in str(done[1].error)
    assert done[0].text.strip().isdigit()


def test_a_grammar_that_becomes_too_much_is_told(demo: Llama) -> None:
    """50,000 alternatives at every character: llguidance gives up in the middle of the text, not before it."""
    heavy = {"type": "string", "pattern": "^" + "|".join(f"x.{{0,{n}}}y{n}" for n in range(2000)) + "$"}
    done = one(demo, "x", temperature=1.0, seed=0, max_gen_len=200, grammar=Grammar.json_schema(heavy))
    assert done.finish_reason == "error"
    assert isinstance(done.error, GrammarError)
    assert one(demo, "x", max_gen_len=3, grammar=Grammar.regex("a{9}")).finish_reason == "length"


def chain(count: int, link: Any) -> Schema:
    links = {f"{index:x}": link(f"#/$defs/{index + 1:x}") for index in range(count)}
    return {"$defs": {**links, f"{count:x}": {"type": "null"}}, "$ref": "#/$defs/0"}


HOSTILE = {
    "overflows the stack": (chain(1500, lambda to: {"items": {"$ref": to}}), "too deeply"),
    "takes minutes": (
        {"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(25)]},
        "more than 2 s|memory",
    ),
    "is not supported": ({"not": {}}, "Unimplemented keys"),
    "is no schema": ({"type": "frob"}, "Invalid type: frob"),
    "holds nothing": ({"enum": []}, "Unsatisfiable"),
    "refers to itself": ({"$ref": "#"}, "no text can satisfy"),
    "refers elsewhere": ({"$ref": "http://127.0.0.1/x"}, "not fetch"),
    "has an option of ours": ({"x-guidance": {"lenient": True}, "not": {}}, "Unimplemented keys"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_refused_before_anything_runs(name: str, demo: Llama) -> None:
    schema, reason = HOSTILE[name]
    begin = time.monotonic()
    with pytest.raises(GrammarError, match=f"^prompt 0: .*({reason})"):
        demo.text_completion(["x"], grammar=Grammar.json_schema(schema))
    assert time.monotonic() - begin < 30
    assert one(demo, "x", max_gen_len=3).finish_reason == "length"


def test_what_is_no_grammar() -> None:
    with pytest.raises(GrammarError, match="at most 65536"):
        Grammar.json_schema({"enum": ["x" * 65536]})
    with pytest.raises(GrammarError, match="cannot be written as JSON"):
        Grammar.json_schema({"const": float("nan")})
    nested: Any = {}
    for _ in range(100_000):
        nested = {"items": nested}
    with pytest.raises(GrammarError, match="cannot be written as JSON"):
        Grammar.json_schema(nested)
    while nested:  # taken apart from outside, since the end of such a thing recurses, too
        nested = nested["items"]
    with pytest.raises(GrammarError, match="an object was expected"):
        Grammar("json_schema", "[]")
    with pytest.raises(TypeError, match="an object was expected"):
        Grammar.json_schema("{}")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a Grammar was expected"):
        SamplingParams(grammar={"type": "object"})  # type: ignore[arg-type]
    with pytest.raises(GrammarError, match="lone surrogate"):
        Grammar.regex("\ud800")


def test_without_llguidance(demo: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=r"pip install 'codellama\[grammar\]'"):
        demo.text_completion(["x"], grammar=Grammar.json_object())


def test_special_ids_never_come_and_stops_only_at_the_end(tokenizer: Tokenizer) -> None:
    """Also for a model with more logits than its tokenizer has pieces."""
    matcher = Grammars(tokenizer, tokenizer.n_words + 7).matcher(Grammar.lark('start: "a" | "a" <[2]> "b"'))
    word = {tokenizer.token_bytes(id): id for id in range(tokenizer.n_words)}
    special = [id for id in range(tokenizer.n_words) if not tokenizer.token_bytes(id)]
    mask = matcher.allowed({tokenizer.eot_id or 0})
    assert len(mask) == tokenizer.n_words + 7
    assert [id for id, ok in enumerate(mask) if ok] == [word[b"a"]]
    assert 2 in special
    matcher.advance(word[b"a"])
    assert [id for id, ok in enumerate(matcher.allowed({tokenizer.eot_id or 0})) if ok] == [tokenizer.eot_id]
    with pytest.raises(GrammarError, match="nor an end"):
        matcher.allowed(())
