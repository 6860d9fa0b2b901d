"""Infilling prompts that editors write out as one text, with the pieces' names as markers.

It knows nothing of token ids; that the pieces are there, it asks the tokenizer.
"""

from codellama.errors import PromptError
from codellama.tokenizer import MIDDLE, PREFIX, SUFFIX, Tokenizer

_LLAMA = ("<PRE>", "<SUF>", "<MID>")
_GEMMA = (PREFIX, SUFFIX, MIDDLE)


def split_markers(text: str, tokenizer: Tokenizer) -> tuple[str, str | None]:
    """Read `<PRE> {prefix} <SUF>{suffix} <MID>` or `<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>`.

    Around Code Llama's markers, a space belongs to the marker; around CodeGemma's there is none. Any other text is a
    prefix without a suffix: markers anywhere else are text.

    Raises:
        PromptError: the model infills, but with the other family's pieces. One that does not infill is not told here.
    """
    for markers, other in ((_LLAMA, _GEMMA), (_GEMMA, _LLAMA)):
        first, second, last = markers
        if not text.startswith(first) or not text.endswith(last) or second not in text:
            continue
        if tokenizer.can_infill and (tokenizer.file_separator_id is not None) != (markers is _GEMMA):
            raise PromptError(
                f"the prompt is written with {first}, {second} and {last}, but this model has {', '.join(other)}: set "
                f"the editor's template to those, or send prompt and suffix apart"
            )
        prefix, _, suffix = text.removeprefix(first).removesuffix(last).partition(second)
        if markers is _LLAMA:
            return prefix.removeprefix(" ").removesuffix(" "), suffix.removesuffix(" ")
        return prefix, suffix
    return text, None
