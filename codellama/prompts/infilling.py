"""Infilling prompts: prefix-suffix-middle and suffix-prefix-middle.

It knows nothing of generation. Source: Code Llama (arXiv 2308.12950, section 2.3), after arXiv 2207.14255.
"""

from codellama.errors import PromptError
from codellama.tokenizer import Tokenizer


def infilling_prompt_tokens(tokenizer: Tokenizer, pre: str, suf: str, suffix_first: bool = False) -> list[int]:
    """Encode what stands before and after a gap; the model answers with the middle and then EOT.

    Args:
        tokenizer: one with the infilling pieces.
        pre: text before the gap; encoded as a text's beginning, with the implicit space.
        suf: text after the gap; encoded as a continuation, without it.
        suffix_first: bos PRE SUF suffix MID prefix, instead of bos PRE prefix SUF suffix MID.

    Raises:
        PromptError: the tokenizer lacks the pieces.
    """
    prefix_id, suffix_id, middle_id = tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id
    if prefix_id is None or suffix_id is None or middle_id is None or tokenizer.eot_id is None:
        raise PromptError(
            f"this model cannot infill: its tokenizer ({tokenizer.n_words} pieces) lacks <PRE>, <SUF>, <MID> or <EOT>. "
            f"Code Llama 7B, 13B and 70B base and 7B and 13B Instruct can; 34B and the 7B to 34B Python models cannot"
        )
    before, after = tokenizer.encode(pre, bos=False, eos=False), tokenizer.encode_infilling(suf)
    if suffix_first:
        return [tokenizer.bos_id, prefix_id, suffix_id, *after, middle_id, *before]
    return [tokenizer.bos_id, prefix_id, *before, suffix_id, *after, middle_id]


def infilling_stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The middle ends with EOT; eos ends any text."""
    assert tokenizer.eot_id is not None, "infilling_prompt_tokens comes first and checks"
    return frozenset({tokenizer.eot_id, tokenizer.eos_id})
