"""A dense Llama written from the papers, in float64: no cache, no parallelism, no batching, no shared code.

RMSNorm: arXiv 1910.07467; rotary embedding: arXiv 2104.09864, as a rotation matrix for each pair; grouped-query
attention: arXiv 2305.13245; SwiGLU: arXiv 2002.05202.
"""

import math

import torch
from torch import Tensor

from codellama.config import ModelArgs


def oracle_logits(args: ModelArgs, weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Logits of every position of one sequence, float64 [len(ids), vocab_size]."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    n_kv_heads = args.n_kv_heads or args.n_heads
    size = args.dim // args.n_heads
    x = torch.stack([w["tok_embeddings.weight"][id] for id in ids])
    for layer in range(args.n_layers):
        p = f"layers.{layer}."
        h = norm(x, w[p + "attention_norm.weight"], args.norm_eps)
        heads = []
        for head in range(args.n_heads):
            shared = head // (args.n_heads // n_kv_heads)
            q = h @ w[p + "attention.wq.weight"][head * size : (head + 1) * size].T
            k = h @ w[p + "attention.wk.weight"][shared * size : (shared + 1) * size].T
            v = h @ w[p + "attention.wv.weight"][shared * size : (shared + 1) * size].T
            q, k = turn(q, args.rope_theta), turn(k, args.rope_theta)
            scores = q @ k.T / math.sqrt(size)
            for row in range(len(ids)):
                scores[row, row + 1 :] = -math.inf
            heads.append(torch.softmax(scores, dim=-1) @ v)
        x = x + torch.cat(heads, dim=-1) @ w[p + "attention.wo.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"], args.norm_eps)
        gate = h @ w[p + "feed_forward.w1.weight"].T
        up = h @ w[p + "feed_forward.w3.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"], args.norm_eps) @ w["output.weight"].T


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + eps) * weight


def turn(x: Tensor, theta: float) -> Tensor:
    """Rotate each adjacent pair of row m by the angle m · theta^(-2i/D), with the matrix of the paper."""
    turned = torch.empty_like(x)
    length, size = x.shape
    for m in range(length):
        for i in range(size // 2):
            angle = m * theta ** (-2 * i / size)
            matrix = torch.tensor(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
            )
            turned[m, 2 * i : 2 * i + 2] = matrix @ x[m, 2 * i : 2 * i + 2]
    return turned
