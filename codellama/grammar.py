"""Grammar: what form a generated text must have, as data.

It knows nothing of tokens, nor of how a form is kept to.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from codellama.errors import GrammarError, shown

_LARGEST_GRAMMAR = 64 * 1024  # bytes


@dataclass(frozen=True)
class Grammar:
    """What form a generated text must have; make it with one of the methods below.

    Attributes:
        kind: how source is to be read.
        source: a JSON schema that is an object, a regular expression of Rust's syntax, or llguidance's Lark.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "regex", "lark"):
            raise ValueError(f"kind is {self.kind!r}; json_schema, regex or lark was expected")
        if not isinstance(self.source, str):
            raise TypeError(f"a grammar is {self.source!r}; a string was expected")
        try:
            size = len(self.source.encode())
        except UnicodeEncodeError as error:
            raise GrammarError("the grammar holds a lone surrogate; it is not valid Unicode") from error
        if size > _LARGEST_GRAMMAR:
            raise GrammarError(f"the grammar has {size} bytes; at most {_LARGEST_GRAMMAR} are possible")
        if self.kind == "json_schema":
            try:
                schema = json.loads(self.source)
            except (ValueError, RecursionError) as error:
                raise GrammarError(f"the JSON schema is not JSON that can be read: {error}") from error
            if not isinstance(schema, dict):
                raise GrammarError(f"the JSON schema is {shown(schema)}; an object was expected")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> "Grammar":
        """JSON that a schema describes; True is any JSON.

        Raises:
            GrammarError: it cannot be written as JSON, or is too large.
            TypeError: it is no object.
        """
        if not isinstance(schema, Mapping | bool):
            raise TypeError(f"a JSON schema is {shown(schema)}; an object was expected")
        try:
            source = json.dumps({} if schema is True else schema, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"the JSON schema cannot be written as JSON: {error}") from error
        return cls("json_schema", source)

    @classmethod
    def json_object(cls) -> "Grammar":
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """A text that a regular expression matches as a whole. It has no look-around and no references back."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> "Grammar":
        """A text of a context-free grammar, in llguidance's dialect of Lark."""
        return cls("lark", text)
