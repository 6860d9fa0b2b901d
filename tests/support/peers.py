"""The same weights in another implementation: transformers' LlamaForCausalLM and GemmaForCausalLM."""

import torch
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from codellama.config import ModelArgs


def transformers_model(args: ModelArgs, weights: dict[str, torch.Tensor], tied: bool = False) -> LlamaForCausalLM:
    """Their model with our weights; tied shares the embedding's with the output."""
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(to_transformers(args, weights), strict=True)
    return model


def transformers_gemma(args: ModelArgs, weights: dict[str, torch.Tensor]) -> GemmaForCausalLM:
    """Their Gemma with our weights."""
    config = GemmaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        pad_token_id=None,
    )
    model = GemmaForCausalLM(config).eval()
    tied = {"output.weight": weights["tok_embeddings.weight"]}
    model.load_state_dict(to_transformers(args, weights | tied), strict=True)
    return model


def to_transformers(args: ModelArgs, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename, and turn the rows of q and k from adjacent pairs to two halves."""
    names = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    ends = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    state = {}
    for name, tensor in weights.items():
        stem = name.removesuffix(".weight")
        if stem in ends:
            state[f"{ends[stem]}.weight"] = tensor
            continue
        _, layer, inner = stem.split(".", 2)
        if inner in ("attention.wq", "attention.wk"):
            heads = tensor.shape[0] // args.head_dim
            tensor = tensor.view(heads, args.head_dim // 2, 2, args.dim).transpose(1, 2).reshape(tensor.shape)
        state[f"model.layers.{layer}.{names[inner]}.weight"] = tensor
    return state
