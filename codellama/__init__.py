"""Code Llama inference: load any checkpoint on any number of processes, complete, infill, chat.

Names are loaded when they are first used, so that the parts that need no torch start fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codellama.command import run_command
    from codellama.config import ModelArgs, RuntimeArgs, SamplingParams
    from codellama.errors import (
        CheckpointError,
        CodeLlamaError,
        ContextLengthError,
        GrammarError,
        MemoryBudgetError,
        NumericalError,
        ParallelSizeError,
        PromptError,
        RankError,
        SafetyError,
    )
    from codellama.grammar import Grammar
    from codellama.llama import Llama
    from codellama.model import Transformer
    from codellama.prompt_file import read_prompt, split_prompt
    from codellama.prompts import Dialog, Message, dialog_prompt_tokens, infilling_prompt_tokens
    from codellama.results import ChatPrediction, CompletionPrediction, InfillingPrediction
    from codellama.safety import SafetyHook, keyword_filter
    from codellama.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "ChatPrediction",
    "CheckpointError",
    "CodeLlamaError",
    "CompletionPrediction",
    "ContextLengthError",
    "Dialog",
    "Grammar",
    "GrammarError",
    "InfillingPrediction",
    "Llama",
    "MemoryBudgetError",
    "Message",
    "ModelArgs",
    "NumericalError",
    "ParallelSizeError",
    "PromptError",
    "RankError",
    "RuntimeArgs",
    "SafetyError",
    "SafetyHook",
    "SamplingParams",
    "Tokenizer",
    "Transformer",
    "dialog_prompt_tokens",
    "infilling_prompt_tokens",
    "keyword_filter",
    "read_prompt",
    "run_command",
    "split_prompt",
]

_HOMES = {
    "codellama.command": ("run_command",),
    "codellama.config": ("ModelArgs", "RuntimeArgs", "SamplingParams"),
    "codellama.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "codellama.grammar": ("Grammar",),
    "codellama.llama": ("Llama",),
    "codellama.model": ("Transformer",),
    "codellama.prompt_file": ("read_prompt", "split_prompt"),
    "codellama.prompts": ("Dialog", "Message", "dialog_prompt_tokens", "infilling_prompt_tokens"),
    "codellama.results": ("ChatPrediction", "CompletionPrediction", "InfillingPrediction"),
    "codellama.safety": ("SafetyHook", "keyword_filter"),
    "codellama.tokenizer": ("Tokenizer",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'codellama' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
