"""From what models write to what a page renders, whole or half-finished.

It knows nothing of pages, and imports nothing else of this package.
"""

import re

from markdown_it import MarkdownIt

_FENCE = re.compile(r"\s*(`{3,}|~{3,})(.*)")
_SPAN = re.compile(r"((?<!`)(`+)(?!`).+?(?<!`)\2(?!`))")  # code inside of a line
_HALF_FENCE = re.compile(r"\s*(`{1,2}|~{1,2})")
_MEANT_BY_NOBODY = re.compile(
    r"(?<!\\)\$"  # a formula, in Streamlit's Markdown
    r"|(?<=!)\["  # an image: the browser would fetch it, from wherever the model says
    r"|:(?=[a-zA-Z_][\w+-]*[\[:]|[+-]1:|material/)"  # Streamlit's colours, badges and icons
)


def to_markdown(text: str, *, growing: bool = False) -> str:
    """Make a model's text ready for Streamlit's Markdown.

    Outside of code, dollars and colons stand for themselves, and images are told, not shown. Lines decide what is code;
    where a parser does not agree with them, images are told there, too.

    Args:
        growing: more will come. What may become a fence at the end is held back, and code inside of a line is closed.
    """
    lines = text.split("\n")
    ready, fence = [], ""
    for number, line in enumerate(lines):
        is_last = growing and number == len(lines) - 1
        found = _FENCE.fullmatch(line)
        if is_last and _HALF_FENCE.fullmatch(line):
            break
        if fence:
            if found and found[1].startswith(fence) and not found[2].strip():
                fence = ""
        elif found and not ("`" in found[2] and found[1][0] == "`"):
            if is_last:
                break  # its language may not be whole
            fence = found[1]
        else:
            line = _escape(line)
            if is_last and _SPAN.sub("", line).count("`") % 2:
                line = line[:-1] if line.endswith("`") else line + "`"
        ready.append(line)
    whole = "\n".join(ready)
    return whole if _images_are_code(whole) else whole.replace("![", r"!\[")


def _images_are_code(text: str) -> bool:
    """Say whether all that is left of images stands in code, whose borders lists and escapes can move."""
    if "![" not in text:
        return True
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inside = [part for token in tokens for part in (token.children or [token])]
    code = [part.content for part in inside if part.type in ("fence", "code_block", "code_inline")]
    return sum(content.count("![") for content in code) == text.count("![")


def _escape(line: str) -> str:
    parts = _SPAN.split(line)  # text, code, its fence, text, code, ...
    escaped = [_MEANT_BY_NOBODY.sub(r"\\\g<0>", part) for part in parts[::3]]
    return "".join(text + code for text, code in zip(escaped, [*parts[1::3], ""], strict=True))
