"""A recorder for machines without a GPU: like a CUDA graph it replays operations on the memory that they had."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class Log(TorchDispatchMode):
    """Keeps the operations that run in it, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, result))
        return result


class TapeRecorder:
    """Runs a step once to warm up, then records it. Numbers that Python computed are frozen, as in a graph.

    Attributes:
        replays: how often any of the steps was replayed.
    """

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, step: Callable[[], object]) -> Callable[[], object]:
        step()
        with Log() as log:
            step()

        def replay() -> None:
            self.replays += 1
            for operation, args, kwargs, result in log.calls:
                again = operation(*args, **kwargs)
                given = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
                for held, new in zip(tensors(result), tensors(again), strict=True):
                    if held.untyped_storage().data_ptr() not in given:  # else a view, or the argument itself
                        held.copy_(new)

        return torch.inference_mode()(replay)
