"""What needs no torch loads none, and the public names are there."""

import subprocess
import sys
from pathlib import Path

import pytest

import codellama

TORCH_FREE = (
    "codellama",
    "codellama.errors",
    "codellama.config",
    "codellama.grammar",
    "codellama.flags",
    "codellama.command",
    "codellama.prompt_file",
    "codellama.tokenizer",
    "codellama.prompts",
    "codellama.memory",
    "codellama.generation.grammar",
    "codellama.generation.trial",
    "codellama.safety",
    "codellama.generation.request",
    "codellama.generation.prompt",
    "codellama.generation.scheduler",
    "codellama.cli",
    "codellama.printing",
    "codellama.chat.command",
    "codellama.chat.commands",
    "codellama.chat.dialogue",
    "codellama.chat.interrupt",
    "codellama.chat.blocks",
    "codellama.chat.model",
    "codellama.chat.remote",
    "codellama.chat.rich_screen",
    "codellama.chat.screen",
    "codellama.chat.terminal",
    "codellama.chat.transcript",
    "codellama.chat.page",
    "codellama.chat.tethered",
    "codellama.chat.web",
    "codellama.server.app",
    "codellama.server.schemas",
    "codellama.server.dialogs",
    "codellama.server.answers",
    "codellama.server.running",
    "codellama.server.guard",
    "codellama.server.faults",
    "codellama.server.service",
    "codellama.server.address",
    "codellama.server.access",
    "codellama.server.banner",
    "codellama.server.command",
    "codellama.server.llama_cpp",
    "codellama.server.metrics",
    "codellama.server.record",
    "codellama.server.settings",
    "codellama.server.safety",
    "codellama.server.ending",
    "codellama.server.group",
    "codellama.server.proxy",
    "codellama.server.totals",
    "codellama.evaluation.execution",
    "codellama.evaluation.guest",
    "codellama.evaluation.command",
    "codellama.evaluation.run",
)
# One fresh interpreter; each import happens in a fork of it, so that none is helped by the one before.
PROGRAM = """
import importlib, os, sys
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        importlib.import_module(name)
        heavy = sorted({"torch", "fairscale", "transformers"} & sys.modules.keys())
        print(name, *heavy, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def loaded(*names: str) -> dict[str, list[str]]:
    """Which heavy modules each import brings."""
    command = [sys.executable, "-c", PROGRAM, *names]
    root = Path(codellama.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_torch_free_modules() -> None:
    assert loaded(*TORCH_FREE) == {name: [] for name in TORCH_FREE}


def test_the_probe_sees_torch() -> None:
    assert "torch" in loaded("codellama.cache")["codellama.cache"]


def test_all_is_sorted_and_resolvable() -> None:
    assert codellama.__all__ == sorted(set(codellama.__all__))
    assert [name for name in codellama.__all__ if getattr(codellama, name, None) is None] == []
    assert set(codellama.__all__) <= set(dir(codellama))


def test_names_are_the_homes_own() -> None:
    from codellama.errors import PromptError
    from codellama.tokenizer import Tokenizer

    assert codellama.PromptError is PromptError
    assert codellama.Tokenizer is Tokenizer


@pytest.mark.parametrize("name", ["Llama", "ModelArgs", "Tokenizer", "Transformer"])
def test_the_references_four_names(name: str) -> None:
    assert name in codellama.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'codellama' has no attribute 'LLaMA'"):
        getattr(codellama, "LLaMA")  # noqa: B009
