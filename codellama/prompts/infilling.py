"""Infilling prompts: prefix-suffix-middle and suffix-prefix-middle, and what other files stand before them.

It knows nothing of generation. Source: Code Llama (arXiv 2308.12950, section 2.3), after arXiv 2207.14255. CodeGemma's
order of pieces is in `gemma.py`.
"""

from collections.abc import Sequence

from codellama.errors import PromptError
from codellama.prompts.gemma import GapPieces, file_gap, titled
from codellama.tokenizer import Tokenizer


def infilling_prompt_tokens(
    tokenizer: Tokenizer,
    pre: str,
    suf: str,
    suffix_first: bool = False,
    context_files: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """Encode what stands before and after a gap; the model answers with the middle and a piece that ends it.

    Args:
        tokenizer: one with the infilling pieces, Code Llama's or CodeGemma's; they decide the format.
        pre: text before the gap; for Code Llama a text's beginning, with the implicit space.
        suf: text after the gap; encoded as a continuation, without it.
        suffix_first: bos PRE SUF suffix MID prefix, instead of bos PRE prefix SUF suffix MID; Code Llama's alone.
        context_files: path and text of other files. CodeGemma has a piece between files; for Code Llama they are
            comments before `pre`, see `write_comments`.

    Raises:
        PromptError: the tokenizer lacks the pieces, or the format has no such order.
    """
    prefix_id, suffix_id, middle_id = tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id
    if not tokenizer.can_infill or prefix_id is None or suffix_id is None or middle_id is None:
        raise PromptError(
            f"this model cannot infill: its tokenizer ({tokenizer.n_words} pieces) lacks <PRE>, <SUF>, <MID> or <EOT>. "
            f"Code Llama 7B, 13B and 70B base and 7B and 13B Instruct can; 34B and the 7B to 34B Python models cannot. "
            f"CodeGemma 2B and 7B can, with <|fim_prefix|>, <|fim_suffix|>, <|fim_middle|> and <|file_separator|>"
        )
    if tokenizer.file_separator_id is not None:
        if suffix_first:
            raise PromptError(
                "suffix_first is not possible with this model's pieces (CodeGemma's): no order of them with the suffix "
                "first is documented. Leave it out"
            )
        pieces = GapPieces(prefix_id, suffix_id, middle_id, tokenizer.file_separator_id)
        return file_gap(tokenizer, pieces, pre, suf, context_files)
    before = tokenizer.encode(write_comments(context_files) + pre, bos=False, eos=False)
    after = tokenizer.encode_infilling(suf)
    if suffix_first:
        return [tokenizer.bos_id, prefix_id, suffix_id, *after, middle_id, *before]
    return [tokenizer.bos_id, prefix_id, *before, suffix_id, *after, middle_id]


def infilling_stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """A middle ends with EOT, or with any of CodeGemma's four pieces; eos ends any text."""
    assert tokenizer.can_infill, "infilling_prompt_tokens comes first and checks"
    pieces = {tokenizer.eot_id}
    if tokenizer.file_separator_id is not None:
        pieces = {tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.file_separator_id}
    return frozenset({id for id in pieces if id is not None} | {tokenizer.eos_id})


def text_stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """A text ends with eos; a file, where the vocabulary has a piece between files, also with that."""
    ends = {tokenizer.eos_id, tokenizer.file_separator_id}
    return frozenset(id for id in ends if id is not None)


def write_comments(context_files: Sequence[tuple[str, str]]) -> str:
    """Write files as comments: path and text, each line behind `# `, and an empty line after each file.

    The mark is the same for every language. Nothing says which one the gap's file is written in, and a model needs no
    compiler's consent to read it.
    """
    written = ""
    for file in context_files:
        written += "".join(f"# {line}".rstrip() + "\n" for line in titled(*file).splitlines()) + "\n"
    return written
