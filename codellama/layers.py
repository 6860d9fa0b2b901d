"""The parallel layers: fairscale's, with our collectives, and with matrices that are held in any way.

The only file that imports fairscale. It knows nothing of attention, of files, or of how a matrix is held.

fairscale's layers need its own global groups, refuse to be set up twice and touch a whole master weight, so ours are
subclasses that take rank, size and group from a Parallel object and start on the meta device; isinstance, weight names
and weight axes stay fairscale's.

Shapes: features are split over the ranks of one model-parallel group; every rank sees the same tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from fairscale.nn.model_parallel import layers as fairscale
from torch import Tensor, nn
from torch.nn import functional as F

from codellama.linear import Matrix
from codellama.parallel import Parallel, gather_last, sum_over_ranks


class Held:
    """What the two linear layers share: a weight of their own, or rows of a matrix that a loader made.

    Attributes:
        weight: this rank's part, as a parameter; None where the matrix holds no plain numbers.
        matrix: what is multiplied, if it was loaded; several layers with one input may share it.
        first: the matrix's row in which this layer's part begins.
    """

    weight: nn.Parameter | None
    matrix: Matrix | None
    first: int
    local_shape: tuple[int, int]

    def hold(self, matrix: Matrix, first: int) -> None:
        """Take rows of a matrix, from `first` on, in place of the weight."""
        self.matrix, self.first = matrix, first
        self.weight = None

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load as any module does; parameters that are replaced, not filled, are no part of the matrix any more."""
        state_dict, prefix, metadata = args[:3]
        if metadata.get("assign_to_params_buffers") and f"{prefix}weight" in state_dict:
            self.matrix = None
        super()._load_from_state_dict(*args)  # type: ignore[misc]

    def dense(self) -> Tensor:
        """This rank's part of the weight in plain numbers; a view where it is held so."""
        if self.matrix is None:
            assert self.weight is not None, "a layer has a weight or a matrix"
            return self.weight
        return self.matrix.dense(self.first, self.first + self.local_shape[0])

    def multiply(self, x: Tensor) -> Tensor:
        """Map `[..., K]` to `[..., N]`, this rank's features on both sides."""
        if self.matrix is None:
            assert self.weight is not None, "a layer has a weight or a matrix"
            return F.linear(x, self.weight)
        if self.local_shape[0] == self.matrix.out_features:
            y: Tensor = self.matrix(x)
            return y
        return F.linear(x, self.dense())  # a part of a shared matrix by itself, which only research code asks for


def multiply_all(x: Tensor, layers: Sequence["ColumnParallelLinear"]) -> Sequence[Tensor]:
    """Give one input to several layers; where they share a matrix, it is read in one product."""
    matrix = layers[0].matrix
    if matrix is None or matrix.out_features != sum(layer.local_shape[0] for layer in layers):
        return [layer(x) for layer in layers]
    return torch.split(matrix(x), [layer.local_shape[0] for layer in layers], dim=-1)


class ColumnParallelLinear(Held, fairscale.ColumnParallelLinear):
    """A linear layer whose output features are split: weight `[out_features / size, in_features]`."""

    def __init__(self, in_features: int, out_features: int, parallel: Parallel, gather_output: bool = False) -> None:
        """Make this rank's rows; with gather_output every rank gets all output features."""
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.gather_output = gather_output
        self.parallel = parallel
        self.local_shape = out_features // parallel.size, in_features
        self.matrix, self.first = None, 0
        self.weight = nn.Parameter(torch.empty(self.local_shape, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`, or to this rank's share of it."""
        y = self.multiply(x)
        return gather_last(y, self.parallel) if self.gather_output else y


class RowParallelLinear(Held, fairscale.RowParallelLinear):
    """A linear layer whose input features are split: weight `[out_features, in_features / size]`."""

    def __init__(self, in_features: int, out_features: int, parallel: Parallel) -> None:
        """Make this rank's columns."""
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.parallel = parallel
        self.local_shape = out_features, in_features // parallel.size
        self.matrix, self.first = None, 0
        self.weight = nn.Parameter(torch.empty(self.local_shape, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's `[..., in_features / size]` to the sum over ranks, `[..., out_features]`."""
        return sum_over_ranks(self.multiply(x), self.parallel)


class ParallelEmbedding(fairscale.ParallelEmbedding):
    """An embedding whose dimension, not its vocabulary, is split: weight `[num_embeddings, embedding_dim / size]`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, parallel: Parallel) -> None:
        """Make this rank's columns."""
        nn.Module.__init__(self)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.parallel = parallel
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim // parallel.size, device="meta"))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ids `[...]` to `[..., embedding_dim]` on every rank."""
        return gather_last(F.embedding(tokens, self.weight), self.parallel)
