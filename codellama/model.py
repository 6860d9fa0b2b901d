"""The Llama architecture as Code Llama and CodeGemma use it: tokens and positions in, hidden states out, then logits.

It knows nothing of checkpoints, requests or sampling. The view of the cache that it is handed decides which rows are
read, and how many positions of them. Parameters are made on the meta device and carry Meta's names.

Source: Llama 2 (arXiv 2307.09288, section 2), Code Llama (arXiv 2308.12950), RMSNorm (arXiv 1910.07467), rotary
embedding (arXiv 2104.09864), grouped-query attention (arXiv 2305.13245), SwiGLU and GeGLU (arXiv 2002.05202), Gemma
(arXiv 2403.08295, section 2). Where the two differ, ModelArgs says how; nothing here asks which model it is.

Shapes: B batch rows, T new tokens per row, S cache length, H query heads here, K key/value heads here, G = H / K query
heads that share one, D head_dim. "Here" is on this model-parallel rank.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codellama.attention import AttentionPlan
from codellama.cache import KVCache
from codellama.config import ModelArgs
from codellama.layers import ColumnParallelLinear, Held, ParallelEmbedding, RowParallelLinear, multiply_all
from codellama.parallel import Parallel

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""What ModelArgs.activation may name."""


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32, then scale by offset + weight."""

    def __init__(self, dim: int, eps: float, offset: int = 0) -> None:
        """Make an uninitialised scale of `[dim]`."""
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(dim, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis, as the weights were trained: cast back before the scale, or with an offset after."""
        if self.offset:
            scale = self.offset + self.weight.float()
            return F.rms_norm(x.float(), self.weight.shape, scale, self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, eps=self.eps) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, args: ModelArgs, parallel: Parallel) -> None:
        """Make this rank's heads; where ranks outnumber key/value heads, several ranks hold a copy of one head."""
        super().__init__()
        self.head_dim = args.head_dim
        self.n_local_heads = args.n_heads // parallel.size
        self.n_local_kv_heads = max(1, args.kv_heads // parallel.size)
        kv_dim = self.n_local_kv_heads * parallel.size * args.head_dim
        self.wq = ColumnParallelLinear(args.dim, args.heads_dim, parallel)
        self.wk = ColumnParallelLinear(args.dim, kv_dim, parallel)
        self.wv = ColumnParallelLinear(args.dim, kv_dim, parallel)
        self.wo = RowParallelLinear(args.heads_dim, args.dim, parallel)
        self.joint = (self.wq, self.wk, self.wv)  # read in one product, once they share a matrix

    def forward(self, x: Tensor, plan: AttentionPlan, layer: int) -> Tensor:
        """Mix `[B, T, dim]` over the positions that each token sees; with a cache, write the new ones first."""
        B, T, _ = x.shape
        query, key, value = multiply_all(x, self.joint)
        query = query.view(B, T, self.n_local_heads, self.head_dim)
        key = key.view(B, T, self.n_local_kv_heads, self.head_dim)
        value = value.view(B, T, self.n_local_kv_heads, self.head_dim)
        query, key = plan.rotate(query, key)
        mixed: Tensor = self.wo(plan.attend(layer, query, key, value).flatten(2))
        return mixed


def gate(activation: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """activation(x) · y; one new tensor where no gradient needs two, since new memory costs more than the product."""
    return activation(x) * y if torch.is_grad_enabled() else activation(x).mul_(y)


class FeedForward(nn.Module):
    """A gated layer: w2(activation(w1 x) · w3 x); SwiGLU where the activation is silu."""

    def __init__(self, args: ModelArgs, parallel: Parallel) -> None:
        """Make this rank's part of the hidden layer."""
        super().__init__()
        self.w1 = ColumnParallelLinear(args.dim, args.hidden_dim, parallel)
        self.w2 = RowParallelLinear(args.hidden_dim, args.dim, parallel)
        self.w3 = ColumnParallelLinear(args.dim, args.hidden_dim, parallel)
        self.joint = (self.w1, self.w3)
        self.activation = ACTIVATIONS[args.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, dim]` to `[B, T, dim]`."""
        opened, up = multiply_all(x, self.joint)
        y: Tensor = self.w2(gate(self.activation, opened, up))
        return y


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each behind a norm and around a residual."""

    def __init__(self, args: ModelArgs, parallel: Parallel) -> None:
        """Make one layer."""
        super().__init__()
        self.attention = Attention(args, parallel)
        self.feed_forward = FeedForward(args, parallel)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps, args.norm_offset)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps, args.norm_offset)

    def forward(self, x: Tensor, plan: AttentionPlan, layer: int) -> Tensor:
        """Map `[B, T, dim]` to `[B, T, dim]`."""
        x = x + self.attention(self.attention_norm(x), plan, layer)
        x = x + self.feed_forward(self.ffn_norm(x))
        return x


class Transformer(nn.Module):
    """The whole model on this rank. Parameters are empty (meta) until a checkpoint is loaded into them.

    A tied output of one rank has no weight of its own: it multiplies by the embedding, or by a matrix that a loader
    made of it. Of several ranks each holds columns of the embedding and rows of the output, so it has both.
    """

    def __init__(self, args: ModelArgs, parallel: Parallel | None = None) -> None:
        """Make the model's part for one rank; None is the whole of it.

        Raises:
            ParallelSizeError: the sizes do not divide by the model-parallel size.
        """
        super().__init__()
        parallel = parallel or Parallel()
        parallel.check_divides(args)
        self.args = args
        self.tok_embeddings = ParallelEmbedding(args.vocab_size, args.dim, parallel)
        self.layers = nn.ModuleList(TransformerBlock(args, parallel) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps, args.norm_offset)
        self.output = ColumnParallelLinear(args.dim, args.vocab_size, parallel, gather_output=True)
        if args.tied_output and parallel.size == 1:
            self.output.weight = None

    def matrices(self) -> Iterator[tuple[Held, ...]]:
        """List the linear layers; those that take one input, and may share a matrix, together."""
        for block in self.layers:
            assert isinstance(block, TransformerBlock)
            yield block.attention.joint
            yield (block.attention.wo,)
            yield block.feed_forward.joint
            yield (block.feed_forward.w2,)
        yield (self.output,)

    def release(self) -> None:
        """Give the memory of the weights back; nothing can run afterwards."""
        for layers in self.matrices():
            for layer in layers:
                layer.matrix = None
        self.to("meta")

    def forward(
        self, tokens: Tensor, positions: Tensor, cache: KVCache | None = None, on_device: bool | None = None
    ) -> Tensor:
        """Compute the hidden states after the last norm.

        Args:
            tokens: ids `[B, T]`.
            positions: `[B, T]`, rising by one along each row, from 0 where there is no cache. With a cache -1 may
                follow: nothing is written for such a token, and its result is nobody's.
            cache: the view to write to and attend over, `B` rows and longer than the largest position.
            on_device: see AttentionPlan.

        Returns:
            `[B, T, dim]` in the norms' dtype, the same on every rank.
        """
        hidden: Tensor = self.tok_embeddings(tokens).to(self.norm.weight.dtype)
        if self.args.embedding_scale is not None:
            embedding = self.tok_embeddings.weight
            scale = torch.full((), self.args.embedding_scale, dtype=embedding.dtype, device=embedding.device)
            hidden = hidden * scale.to(hidden.dtype)
        plan = AttentionPlan(positions, self.args, cache, on_device)
        for layer, block in enumerate(self.layers):
            hidden = block(hidden, plan, layer)
        hidden = self.norm(hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Score the vocabulary: `[..., dim]` → float32 `[..., vocab_size]`, the same on every rank."""
        if self.output.weight is None and self.output.matrix is None:
            assert self.args.tied_output, "only a tied output may do without a weight"
            return F.linear(hidden, self.tok_embeddings.weight).float()
        scores: Tensor = self.output(hidden)
        return scores.float()

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load as any module does; a tied output's matrix was made of the embedding, and goes with it."""
        state_dict, prefix, metadata = args[:3]
        replaced = metadata.get("assign_to_params_buffers") and f"{prefix}tok_embeddings.weight" in state_dict
        if replaced and self.args.tied_output and self.output.parallel.size == 1:
            self.output.matrix = None
        super()._load_from_state_dict(*args)
