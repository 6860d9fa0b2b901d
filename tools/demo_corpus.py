"""The text that the demo checkpoint learns from: Python sources that are on every machine that can run this package.

It knows nothing of tokens. Files are told apart by the hash of their path, so a held-out file is held out in every run
and on every machine; the tokenizer, the weights and the dialogs are made from the other files alone.
"""

import ast
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {
    "torch/nn": "BSD-3-Clause",
    "torch/optim": "BSD-3-Clause",
    "torch/distributions": "BSD-3-Clause",
    "torch/distributed": "BSD-3-Clause",
    "torch/utils": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "mpmath": "BSD-3-Clause",
    "jinja2": "BSD-3-Clause",
    "fsspec": "BSD-3-Clause",
    "fairscale": "BSD-3-Clause",
    "fire": "Apache-2.0",
    "setuptools": "MIT",
}
"""Beside the standard library (PSF-2.0): what is installed with the dependencies, and its licence."""

LEFT_OUT = {
    "test", "tests", "testing", "idle_test", "encodings", "pydoc_data", "idlelib", "lib2to3", "site-packages",
    "_vendor", "_internal", "__pycache__", "turtledemo",
}  # fmt: skip
"""Folders that are tables, copies, or tests rather than code that one writes."""

HELD_OUT_ONE_IN = 40


@dataclass(frozen=True)
class Source:
    """One Python file; name is its path below the package's parent."""

    name: str
    text: str
    held_out: bool


@dataclass(frozen=True)
class Function:
    """One short documented function: what its docstring asks for, and its code without the docstring."""

    name: str
    signature: str
    summary: str
    code: str


def read_sources() -> list[Source]:
    """Read every file once, in the order of names; a file that repeats another one's text is left out."""
    roots = [(Path(sysconfig.get_paths()["stdlib"]), "")]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package.split("/")[0])
        assert spec is not None, f"{package} comes with the dependencies"
        assert spec.submodule_search_locations is not None, f"{package} is a folder"
        site = Path(spec.submodule_search_locations[0]).parent
        roots.append((site, package))
    seen: set[str] = set()
    sources = []
    for parent, package in roots:
        for path in sorted((parent / package).rglob("*.py")):
            name = path.relative_to(parent).as_posix()
            if not LEFT_OUT.isdisjoint(name.split("/")) or path.stat().st_size > 400_000:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few files of the standard library declare another encoding
            digest = hashlib.sha256(text.encode()).hexdigest()
            if digest in seen or not text.strip():
                continue
            seen.add(digest)
            held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0
            sources.append(Source(name, text, held_out))
    return sources


def functions(source: Source, max_lines: int = 12) -> Iterator[Function]:
    """Yield the short documented functions of a file, written in one uniform style by `ast.unparse`."""
    try:
        tree = ast.parse(source.text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
            continue
        doc = ast.get_docstring(node)
        if not doc or len(node.body) < 2:
            continue
        summary = " ".join(doc.split("\n\n")[0].split())
        bare = ast.FunctionDef(
            name=node.name, args=node.args, body=node.body[1:], decorator_list=[], returns=None, type_comment=None
        )
        code = ast.unparse(ast.fix_missing_locations(ast.copy_location(bare, node)))
        if not 10 < len(summary) < 160 or len(code.split("\n")) > max_lines or len(code) > 500:
            continue
        if any(mark in summary + code for mark in ("```", ">>>", "[INST]", "<<SYS>>", "NotImplemented")):
            continue
        yield Function(node.name, code.split("\n")[0].removeprefix("def ").removesuffix(":"), summary, code)
