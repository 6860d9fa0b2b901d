"""A dense Llama or Gemma written from the papers, in float64: no cache, no parallelism, no batching, no shared code.

RMSNorm: arXiv 1910.07467; rotary embedding: arXiv 2104.09864, as a rotation matrix for each pair; grouped-query
attention: arXiv 2305.13245; SwiGLU, GeGLU: arXiv 2002.05202; GELU with tanh: arXiv 1606.08415; Gemma: arXiv 2403.08295.
"""

import math

import torch
from torch import Tensor

from codellama.config import ModelArgs


def oracle_logits(args: ModelArgs, weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Logits of every position of one sequence, float64 [len(ids), vocab_size]."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    n_kv_heads = args.n_kv_heads or args.n_heads
    size = args.head_dim
    x = torch.stack([w["tok_embeddings.weight"][id] for id in ids]) * (args.embedding_scale or 1)
    for layer in range(args.n_layers):
        p = f"layers.{layer}."
        h = norm(x, args.norm_offset + w[p + "attention_norm.weight"], args.norm_eps)
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
        h = norm(x, args.norm_offset + w[p + "ffn_norm.weight"], args.norm_eps)
        gate = h @ w[p + "feed_forward.w1.weight"].T
        up = h @ w[p + "feed_forward.w3.weight"].T
        opened = gate / (1 + torch.exp(-gate)) if args.activation == "silu" else gelu(gate)
        x = x + (opened * up) @ w[p + "feed_forward.w2.weight"].T
    output = w["tok_embeddings.weight" if args.tied_output else "output.weight"]
    return norm(x, args.norm_offset + w["norm.weight"], args.norm_eps) @ output.T


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


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
