"""The generator that people embed: text and chats in, text out; the same call on every rank of a torchrun.

It turns prompts into requests and results into dicts. It knows nothing of rows, batches or sampling.
"""

import atexit
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Unpack

import torch

from codellama.assembly import DEMO, Parts, assemble, equip
from codellama.config import Decode, RuntimeArgs
from codellama.generation.prompt import Prompt
from codellama.generation.request import Completion
from codellama.model import Transformer
from codellama.parallel import Parallel
from codellama.prompts import Dialog
from codellama.results import (
    ChatPrediction,
    CompletionPrediction,
    InfillingOptions,
    InfillingPrediction,
    SamplingOptions,
    describe_chat,
    describe_gap,
    describe_text,
    listed,
    paired,
    refuse_alternatives,
    sampling_params,
    seeded,
    split_files,
)
from codellama.safety import AnswerGate, SafetyHook, Screening, admit
from codellama.tokenizer import Tokenizer
from codellama.turns import OpenStreams, StreamRef, TextStream, Turns

__all__ = ["DEMO", "Llama"]


class Llama:
    """Generates with one model.

    Under torchrun every rank makes the same calls in the same order; world rank 0's arguments count (a logits_processor
    is each replica leader's own), and every rank gets all results. Calls from several threads queue.

    Attributes:
        model: this rank's Transformer, for research code.
        tokenizer: text to ids and back.
        runtime: max_seq_len, max_batch_size, chunk_size, cache_dtype.
        parallel: this rank's place.
        prompts: makes prompts; engine: runs them.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        runtime: RuntimeArgs | None = None,
        parallel: Parallel | None = None,
        seed: int | None = None,
    ) -> None:
        """Wrap a loaded model; most callers want `Llama.build`."""
        self._hold(equip(model, tokenizer, runtime or RuntimeArgs(), parallel or Parallel(), seed))

    def _hold(self, parts: Parts) -> None:
        self.model, self.tokenizer, self.runtime = parts.model, parts.tokenizer, parts.runtime
        self.parallel, self.engine, self.prompts = parts.parallel, parts.engine, parts.prompts
        self._turns, self._streams, self._closed = Turns(), OpenStreams(), False
        if self.parallel.world is not None:
            atexit.register(self._streams.close)  # while the other ranks can still be told

    @staticmethod
    def build(
        ckpt_dir: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 2048,
        max_batch_size: int = 4,
        model_parallel_size: int | None = None,
        *,
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        seed: int | None = None,
        rope_theta: float | None = None,
        chunk_size: int = 2048,
        cache_dtype: str | None = None,
        progress: bool | None = None,
        checkpoint_format: str | None = None,
        quantize: str | None = None,
        decode: Decode | None = None,
    ) -> "Llama":
        """Load a checkpoint, on one process or on as many as torchrun started.

        Args:
            ckpt_dir: folder of the weights, or a GGUF file; None is the bundled demo checkpoint.
            tokenizer_path: None is `tokenizer.model` beside the weights.
            max_seq_len: tokens that a row of the cache holds, prompt and generation together.
            max_batch_size: requests that are decoded at once; a call with more queues them.
            model_parallel_size: ranks that share a copy of the weights; None is all. Copies share a call's prompts.
            device: "cpu", "cuda" (this rank's GPU), "cuda:N" or N; None is this rank's GPU where there is one.
            dtype: of the weights; None is bfloat16 where the hardware computes it, else float16.
            seed: makes the requests that bring no seed of their own repeat from run to run.
            rope_theta: for a params.json that has none.
            chunk_size: prompts are prefilled in chunks of so many tokens.
            cache_dtype: "int8" holds keys and values in 8 bits, so that rows can be longer; None in the model's dtype.
            checkpoint_format: meta, huggingface, gguf or quantized, for a folder that holds several; None finds it.
            quantize: "int8", "int4", "int4-g64" or "int4-g128" rounds matrices as they are loaded, if they are not yet.
            decode: "eager" (None), "graph" (CUDA) or "compile": how single tokens are computed; see docs/generation.md.
            progress: show a loading bar; None is on world rank 0 when stderr is a terminal.

        Raises:
            CheckpointError: the files are not what they should be.
            ParallelSizeError, QuantizationError: the model does not split over that many ranks, or in such groups.
            MemoryBudgetError: weights, cache and workspace do not fit.
            RankError: another rank is gone.
        """
        runtime = RuntimeArgs(max_seq_len=max_seq_len, max_batch_size=max_batch_size, chunk_size=chunk_size,
                              cache_dtype=cache_dtype, decode=decode)  # fmt: skip
        llama = Llama.__new__(Llama)
        llama._hold(assemble(ckpt_dir, tokenizer_path, runtime, model_parallel_size, device, dtype, seed, rope_theta,
                             checkpoint_format, progress, quantize))  # fmt: skip
        return llama

    def close(self) -> None:
        """Free weights, cache, and what connects the ranks; every later call is refused. Harmless when repeated.

        With several ranks, every rank makes this call. `with Llama.build(…) as llama:` makes it when the block ends.
        """
        if self._closed:
            return
        self._turns.end_stream("its generator was closed")
        with self._turns.take():
            if self._closed:  # by another thread, meanwhile
                return
            self._closed = True
            atexit.unregister(self._streams.close)
            try:
                self.engine.close()
            finally:
                self.parallel.leave()

    def __enter__(self) -> "Llama":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        stop_token: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue token ids.

        Args:
            prompt_tokens: one list of ids per prompt, bos included.
            max_gen_len: tokens to generate at most; None is as many as the row holds.
            temperature: 0 is greedy.
            top_p: 0 is greedy, 1 keeps all.
            logprobs: also return log-probabilities, one for each returned token.
            echo: return the prompt's ids before the generated ones.
            stop_token: ends a generation and is not returned; None is eos.
            options: see SamplingOptions. A seed is every prompt's own, so equal prompts give equal samples with it; a
                list gives each prompt another one.

        Returns:
            Ids per prompt, and their log-probabilities or None.

        Raises:
            PromptError: a prompt without ids, or ids outside the vocabulary.
            ContextLengthError: a prompt that leaves no room.
        """
        stop_id = self.tokenizer.eos_id if stop_token is None else stop_token

        def make() -> list[Prompt]:
            refuse_alternatives(options)
            params = sampling_params(options, temperature, top_p, max_gen_len, logprobs, echo, stop_id)
            return [self.prompts.ids(ids, params, f"prompt {i}") for i, ids in enumerate(listed(prompt_tokens))]

        done = self._complete(make, options)
        scores = [[score.logprob for score in completion.scores] for _, completion in done] if logprobs else None
        return [list(completion.tokens) for _, completion in done], scores

    def score(self, prompt_tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of given token ids under the model, in nats.

        Returns:
            One list per prompt, one number per id; the first id is given, so its log-probability is 0.
        """
        return self.generate(prompt_tokens, 0, temperature=0, logprobs=True, echo=True)[1] or []

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[CompletionPrediction]:
        """Continue texts; prompt + generation is exactly the text. See `generate` for the arguments."""

        def make() -> list[Prompt]:
            params = sampling_params(options, temperature, top_p, max_gen_len, logprobs, echo)
            return [self.prompts.text(text, params, f"prompt {i}") for i, text in enumerate(listed(prompts))]

        return [describe_text(*done, self.tokenizer) for done in self._complete(make, options)]

    def text_infilling(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        suffix_first: bool = False,
        **options: Unpack[InfillingOptions],
    ) -> list[InfillingPrediction]:
        """Fill the gaps between prefixes and suffixes; context_files=[(path, text), …] are files that stand before.

        Raises:
            PromptError: the tokenizer has no infilling pieces, or the numbers of prefixes and suffixes differ.
        """

        def make() -> list[Prompt]:
            asked, files = split_files(options)
            params = sampling_params(asked, temperature, top_p, max_gen_len, logprobs)
            gaps = enumerate(paired(prefixes, suffixes))
            return [self.prompts.gap(*gap, params, suffix_first, f"gap {index}", files) for index, gap in gaps]

        return [describe_gap(*done, self.tokenizer) for done in self._complete(make, options)]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        allow_special_tags: bool = False,
        safety: SafetyHook | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[ChatPrediction]:
        """Answer chats; white space around an answer is dropped. See `generate` for the other arguments.

        Args:
            dialogs: one chat each: an optional system message, then user and assistant in turn.
            allow_special_tags: let contents hold the chat format's own tags, as plain text.
            safety: may refuse a chat, or its answer; that result has no content, finish_reason "content_filter", and
                the reason as its refusal. Only world rank 0's is called.

        Raises:
            PromptError: roles out of order, or a tag inside a message; naming the message.
        """

        def make() -> list[Prompt]:
            params = sampling_params(options, temperature, top_p, max_gen_len, logprobs)
            chats = enumerate(listed(dialogs))
            return [self.prompts.chat(chat, params, allow_special_tags, f"dialog {index}") for index, chat in chats]

        return [describe_chat(*one, self.tokenizer) for one in self._complete(make, options, Screening(safety))]

    def stream_completion(
        self,
        prompt: str,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Yield the pieces of text_completion's generation as they become certain; nothing on other ranks."""
        return self._stream(
            lambda: self.prompts.text(prompt, sampling_params(options, temperature, top_p, max_gen_len)), options
        )

    def stream_infilling(
        self,
        prefix: str,
        suffix: str,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        suffix_first: bool = False,
        **options: Unpack[InfillingOptions],
    ) -> Iterator[str]:
        """Yield the pieces of text_infilling's generation as they become certain; nothing on other ranks."""

        def make() -> Prompt:
            asked, files = split_files(options)
            params = sampling_params(asked, temperature, top_p, max_gen_len)
            return self.prompts.gap(prefix, suffix, params, suffix_first, context_files=files)

        return self._stream(make, options)

    def stream_chat(
        self,
        dialog: Dialog,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        *,
        allow_special_tags: bool = False,
        safety: SafetyHook | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Yield the pieces of chat_completion's content as they become certain; nothing on other ranks.

        With safety, these are whole sentences and lines, each yielded once the hook has read all up to its end.

        Raises:
            SafetyError: the hook refuses the chat, or what comes next of the answer; on every rank.
        """

        def make() -> Prompt:
            params = sampling_params(options, temperature, top_p, max_gen_len)
            return self.prompts.chat(dialog, params, allow_special_tags)

        return self._stream(make, options, safety)

    def _complete(
        self, make: Callable[[], list[Prompt]], options: SamplingOptions, screening: Screening | None = None
    ) -> list[tuple[Prompt, Completion]]:
        """Run one batch call on all ranks: world rank 0 checks and deals, each replica's leader runs its share."""
        with self._turns.take():
            self._refuse_closed()
            admit_all = list if screening is None else screening.admit
            mine = self.parallel.deal(lambda: admit_all(seeded(make(), options)))

            def work() -> list[tuple[Prompt, Completion]]:
                if self.parallel.is_leader:
                    processor = options.get("logits_processor")
                    done = self.engine.run(self.prompts.request(prompt, processor) for prompt in mine)
                    for completion in done:
                        if completion.error is not None:
                            raise completion.error
                    return list(zip(mine, done, strict=True))
                self.engine.follow()
                return []

            done = self.parallel.collect(work)
            if screening is None:
                return done
            return screening.merge(done, self.parallel.share(lambda: screening.judge(done)))

    def _stream(
        self, make: Callable[[], Prompt], options: SamplingOptions, safety: SafetyHook | None = None
    ) -> TextStream:
        """Run one streaming call on all ranks; the text comes out on world rank 0 alone."""
        self._refuse_closed()
        own: list[StreamRef] = []
        stream = TextStream(self._run_stream(make, options, safety, own), self._turns)
        own.append(weakref.ref(stream))
        self._streams.add(stream)
        return stream

    def _run_stream(
        self, make: Callable[[], Prompt], options: SamplingOptions, safety: SafetyHook | None, own: list[StreamRef]
    ) -> Generator[str]:
        def make_one() -> list[Prompt]:
            refuse_alternatives(options)
            return seeded([admit(safety, make())], options)

        with self._turns.take(own[0]):
            self._refuse_closed()
            mine = self.parallel.deal(make_one)
            with self.parallel.together():
                if not self.parallel.is_leader:
                    self.engine.follow()
                elif not mine:
                    self.engine.run([])
                else:
                    request = self.prompts.request(mine[0], options.get("logits_processor"))
                    gate = AnswerGate(safety, mine[0])
                    with closing(self.engine.stream(request)) as deltas:  # a refusal ends it before the ranks meet
                        for delta in deltas:
                            if delta.error is not None:
                                raise delta.error
                            if text := gate.push(delta).text:
                                yield text

    def _refuse_closed(self) -> None:
        if self._closed:
            raise RuntimeError("this generator is closed; build another one")
