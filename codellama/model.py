"""The Llama architecture as Code Llama uses it: tokens and positions in, hidden states out, logits on request.

It knows nothing of checkpoints, requests or sampling. The view of the cache that it is handed decides which rows are
read, and how many positions of them. Parameters are made on the meta device and carry Meta's names.

Source: Llama 2 (arXiv 2307.09288, section 2), Code Llama (arXiv 2308.12950), RMSNorm (arXiv 1910.07467), rotary
embedding (arXiv 2104.09864), grouped-query attention (arXiv 2305.13245), SwiGLU (arXiv 2002.05202).

Shapes: B batch rows, T new tokens per row, S cache length, H query heads here, K key/value heads here, G = H / K query
heads that share one, D head_dim. "Here" is on this model-parallel rank.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codellama.cache import KVCache
from codellama.config import ModelArgs
from codellama.memory import query_tile
from codellama.parallel import ColumnParallelLinear, Parallel, ParallelEmbedding, RowParallelLinear


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32, then scale."""

    def __init__(self, dim: int, eps: float) -> None:
        """Make an uninitialised scale of `[dim]`."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; cast back before the scale, as the weights were trained."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.type_as(x) * self.weight


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position · theta^(-2i/D) for each pair i of a head.

    Computed in float64: in float32 an angle near 100,000 is off by up to 0.004.

    Args:
        positions: `[B, T]`.
        head_dim: D.
        theta: base of the frequencies.

    Returns:
        Two float32 tensors `[B, T, 1, D/2]`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions[:, :, None, None].double() * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the adjacent pairs (x0, x1), (x2, x3), … of every head by their angle.

    Args:
        x: `[B, T, heads, D]`.
        cos: `[B, T, 1, D/2]`, and sin alike.
    """
    even, odd = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)  # [B, T, heads, D/2] each
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


def attend(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """Causal attention: a token at position p sees the cache positions 0 … p.

    Neither keys nor values are repeated for grouped heads. Positions must rise by one along a row, so S = T can only
    mean that they are 0 … T-1.

    Args:
        query: `[B, T, H, D]`.
        key: `[B, K, S, D]`, and value alike.
        positions: `[B, T]`, each below S.

    Returns:
        `[B, T, H, D]`.
    """
    B, T, H, D = query.shape
    K, S = key.shape[1:3]
    G = H // K
    if S == T and positions[:, 0].max() <= 0:
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, is_causal=True, enable_gqa=G > 1
        )  # [B, H, T, D]
        return mixed.transpose(1, 2)
    positions = positions.clamp(min=0)  # padding sees the first position, and is nobody's
    columns = torch.arange(S, device=positions.device)
    if T == 1:  # the heads that share a key become the rows of its query
        mask = (columns <= positions[:, :, None])[:, None]  # [B, 1, 1, S]
        return F.scaled_dot_product_attention(query.view(B, K, G, D), key, value, attn_mask=mask).view(B, 1, H, D)
    # One mask for all heads: keys are laid out per group by a view, and the mask broadcasts.
    key = key.flatten(0, 1)[:, None].expand(-1, G, -1, -1)  # [B·K, G, S, D]
    value = value.flatten(0, 1)[:, None].expand(-1, G, -1, -1)
    mixed = torch.empty_like(query)
    copies = K if B > 1 else 1  # one mask serves all heads of one row; heads of several rows need a copy each
    step = query_tile(B * copies, S, query.element_size())
    for start in range(0, T, step):
        tile = query[:, start : start + step]  # [B, t, H, D]
        hidden = columns > positions[:, start : start + step, None]  # [B, t, S]
        mask = query.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]  # [B, 1, t, S]
        if copies > 1:
            mask = mask.repeat_interleave(copies, dim=0)  # [B·K, 1, t, S]
        grouped = tile.view(B, -1, K, G, D).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [B·K, G, t, D]
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask)
        del hidden, mask  # before the next ones
        mixed[:, start : start + step] = out.view(B, K, G, -1, D).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return mixed


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, args: ModelArgs, parallel: Parallel) -> None:
        """Make this rank's heads; where ranks outnumber key/value heads, several ranks hold a copy of one head."""
        super().__init__()
        self.head_dim = args.head_dim
        self.n_local_heads = args.n_heads // parallel.size
        self.n_local_kv_heads = max(1, args.kv_heads // parallel.size)
        kv_dim = self.n_local_kv_heads * parallel.size * args.head_dim
        self.wq = ColumnParallelLinear(args.dim, args.dim, parallel)
        self.wk = ColumnParallelLinear(args.dim, kv_dim, parallel)
        self.wv = ColumnParallelLinear(args.dim, kv_dim, parallel)
        self.wo = RowParallelLinear(args.dim, args.dim, parallel)

    def forward(
        self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor], layer: int, cache: KVCache | None
    ) -> Tensor:
        """Mix `[B, T, dim]` over the positions that each token sees; with a cache, write the new ones first."""
        B, T, _ = x.shape
        query = self.wq(x).view(B, T, self.n_local_heads, self.head_dim)
        key = self.wk(x).view(B, T, self.n_local_kv_heads, self.head_dim)
        value = self.wv(x).view(B, T, self.n_local_kv_heads, self.head_dim)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is None:
            keys, values = key.transpose(1, 2), value.transpose(1, 2)
        else:
            keys, values = cache.update_(layer, positions, key, value)
        mixed: Tensor = self.wo(attend(query, keys, values, positions).flatten(2))
        return mixed


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, args: ModelArgs, parallel: Parallel) -> None:
        """Make this rank's part of the hidden layer."""
        super().__init__()
        self.w1 = ColumnParallelLinear(args.dim, args.hidden_dim, parallel)
        self.w2 = RowParallelLinear(args.hidden_dim, args.dim, parallel)
        self.w3 = ColumnParallelLinear(args.dim, args.hidden_dim, parallel)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, dim]` to `[B, T, dim]`."""
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each behind a norm and around a residual."""

    def __init__(self, args: ModelArgs, parallel: Parallel) -> None:
        """Make one layer."""
        super().__init__()
        self.attention = Attention(args, parallel)
        self.feed_forward = FeedForward(args, parallel)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor], layer: int, cache: KVCache | None
    ) -> Tensor:
        """Map `[B, T, dim]` to `[B, T, dim]`."""
        x = x + self.attention(self.attention_norm(x), positions, rotary, layer, cache)
        x = x + self.feed_forward(self.ffn_norm(x))
        return x


class Transformer(nn.Module):
    """The whole model on this rank. Parameters are empty (meta) until a checkpoint is loaded into them."""

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
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = ColumnParallelLinear(args.dim, args.vocab_size, parallel, gather_output=True)

    def forward(self, tokens: Tensor, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        """Compute the hidden states after the last norm.

        Args:
            tokens: ids `[B, T]`.
            positions: `[B, T]`, rising by one along each row; from 0 where there is no cache.
            cache: the view to write to and attend over, `B` rows and longer than the largest position.

        Returns:
            `[B, T, dim]` in the weights' dtype, the same on every rank.
        """
        hidden: Tensor = self.tok_embeddings(tokens)
        rotary = rotary_angles(positions, self.args.head_dim, self.args.rope_theta)
        for layer, block in enumerate(self.layers):
            hidden = block(hidden, positions, rotary, layer, cache)
        hidden = self.norm(hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Score the vocabulary: `[..., dim]` → float32 `[..., vocab_size]`, the same on every rank."""
        scores: Tensor = self.output(hidden)
        return scores.float()
