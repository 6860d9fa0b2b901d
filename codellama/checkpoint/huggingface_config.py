"""config.json of a Hugging Face checkpoint: read strictly into ModelArgs, and written from it.

It knows nothing of tensors. Source: the classes LlamaConfig and GemmaConfig of transformers 4 and 5. Which of the two
an architecture is follows from model_type.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from codellama.checkpoint.faults import some
from codellama.config import ModelArgs, choose_rope_theta, feed_forward_params
from codellama.errors import CheckpointError, shown

SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
}
"""Keys that must be there, and what params.json calls them; intermediate_size must be there, too."""


@dataclass(frozen=True)
class Family:
    """What one model_type means.

    Attributes:
        only: keys for which one value is implemented.
        same: other values of such a key that mean the same.
        activation, norm_offset: of ModelArgs.
        scaled: embeddings are multiplied by the square root of the hidden size.
        own_head_dim: head_dim must be there, and counts; else it may, and must be hidden_size / num_attention_heads.
        tied: what tie_word_embeddings is where it is missing.
        context: what the published models were trained with.
    """

    only: dict[str, object]
    same: dict[str, tuple[object, ...]]
    activation: Literal["silu", "gelu_tanh"]
    norm_offset: int
    scaled: bool
    own_head_dim: bool
    tied: bool
    context: int


LLAMA = Family(
    only={
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "quantization_config": None,
    },
    same={},
    activation="silu",
    norm_offset=0,
    scaled=False,
    own_head_dim=False,
    tied=False,
    context=16_384,
)

GEMMA = Family(
    only={
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "quantization_config": None,
        "use_bidirectional_attention": None,
    },
    # Of two keys, the second is the younger one, and transformers 5 has only the first again. "gelu" in old files meant
    # the approximation, which transformers has always taken there.
    same={"hidden_act": ("gelu",), "hidden_activation": (None,), "use_bidirectional_attention": (False,)},
    activation="gelu_tanh",
    norm_offset=1,
    scaled=True,
    own_head_dim=True,
    tied=True,
    context=8192,
)

FAMILIES = {"llama": LLAMA, "gemma": GEMMA}
"""By model_type."""

REQUIRED = frozenset({"architectures", "model_type"})
"""Keys with one value that must be there. Older versions of transformers did not write the others, and meant it."""

READ = frozenset(
    {"num_key_value_heads", "intermediate_size", "head_dim", "tie_word_embeddings"}
    | {"rope_theta", "rope_parameters", "rope_scaling"}
)
"""Keys with rules of their own, which stand below."""

IGNORED = frozenset(
    {
        # Names, versions, and the dtype of a run: the files say the dtype of each tensor.
        "_name_or_path", "dtype", "torch_dtype", "transformers_version",
        # Ids of special pieces: the tokenizer says them.
        "bos_token_id", "eos_token_id", "pad_token_id",
        # Training, and the first values before it.
        "attention_dropout", "initializer_range",
        # How the computation is arranged; a limit that changes no number; what transformers returns.
        "pretraining_tp", "max_position_embeddings", "use_cache",
        "output_attentions", "output_hidden_states", "return_dict",
    }
)  # fmt: skip
"""Keys that cannot change what is computed."""


def args_from_config(config: dict[str, Any], where: str, rope_theta: float | None = None) -> tuple[ModelArgs, bool]:
    """Read the content of a config.json strictly.

    Args:
        config: the decoded JSON object.
        where: what an error message calls the file.
        rope_theta: counts where the file gives none.

    Returns:
        The architecture, and whether its output may be the embedding where the files hold none. (Of Gemma it always
        is, as ModelArgs then says; a Llama of this kind is read as if it had both.)

    Raises:
        CheckpointError: another architecture, an unknown or missing key, a bad value, a computation that differs.
    """
    family = _find_family(config, where)
    for key, value in family.only.items():
        if (key in config or key in REQUIRED) and config.get(key) not in family.same.get(key, ()):
            _check_only(key, config.get(key), value, where)
    unknown = sorted(config.keys() - SIZES.keys() - family.only.keys() - READ - IGNORED)
    if unknown:
        raise CheckpointError(
            f"{where} has keys that this package does not know: {some([shown(key) for key in unknown])}. They may ask "
            f"for another computation; take them out of the file if you know that they do not"
        )
    sizes = SIZES | ({"head_dim": "head_dim"} if family.own_head_dim else {})
    missing = [key for key in (*sizes, "intermediate_size") if config.get(key) is None]
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}")
    tied = config.get("tie_word_embeddings", family.tied)
    if not isinstance(tied, bool):
        raise CheckpointError(f"{where}: tie_word_embeddings is {shown(tied)}; true or false was expected")
    theta = choose_rope_theta(_find_rope_theta(config, where), rope_theta, where)
    try:
        multiple_of, multiplier = feed_forward_params(config["hidden_size"], config["intermediate_size"])
        args = ModelArgs(
            **{ours: config[theirs] for theirs, ours in sizes.items()},
            n_kv_heads=config.get("num_key_value_heads"),
            multiple_of=multiple_of,
            ffn_dim_multiplier=multiplier,
            rope_theta=theta,
            activation=family.activation,
            norm_offset=family.norm_offset,
            embedding_scale=math.sqrt(config["hidden_size"]) if family.scaled else None,
            tied_output=tied and family is GEMMA,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{where}, in the words of params.json: {error}") from error
    head_dim = config.get("head_dim")
    if head_dim is not None and head_dim != args.head_dim:
        raise CheckpointError(
            f"{where}: head_dim is {shown(head_dim)}; this package computes hidden_size / num_attention_heads only, "
            f"which is {args.head_dim}"
        )
    return args, tied


def _find_family(config: dict[str, Any], where: str) -> Family:
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise CheckpointError(f"{where}: model_type is {shown(name)}; only 'llama' and 'gemma' can be read")
    return family


def _check_only(key: str, found: object, expected: object, where: str) -> None:
    if found == expected and type(found) is type(expected):
        return
    if key in ("architectures", "model_type"):
        raise CheckpointError(f"{where}: {key} is {shown(found)}; only {expected!r} can be read")
    if key == "quantization_config":
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise CheckpointError(f"{where} says that the weights are quantized by {shown(method)}: use the original ones")
    raise CheckpointError(f"{where}: {key} is {shown(found)}; this package computes {expected!r} only")


def _find_rope_theta(config: dict[str, Any], where: str) -> Any:
    """Return rope_theta, from the top or from rope_parameters (transformers 5); None where nothing says it."""
    found = [config["rope_theta"]] if config.get("rope_theta") is not None else []
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise CheckpointError(f"{where}: {key} is {shown(rope)}; a JSON object was expected")
        for word in ("rope_type", "type"):  # the older word is the second
            if rope.get(word, "default") != "default":
                raise CheckpointError(f"{where}: {key} asks for {word} {shown(rope[word])}; only 'default' is computed")
        unknown = sorted(rope.keys() - {"rope_theta", "rope_type", "type"})
        if unknown:
            raise CheckpointError(f"{where}: {key} has {shown(unknown)}, which this package does not know")
        if rope.get("rope_theta") is not None:
            found.append(rope["rope_theta"])
    if any(theta != found[0] for theta in found):
        raise CheckpointError(f"{where} gives two values of rope_theta, {shown(found[0])} and {shown(found[-1])}")
    return found[0] if found else None


def config_from_args(
    args: ModelArgs, dtype: str, bos_id: int, eos_id: int, max_position_embeddings: int | None = None
) -> dict[str, object]:
    """Make the content of a config.json that transformers 4 and 5 read.

    Args:
        args: the architecture.
        dtype: as torch spells it: bfloat16, float16, float32.
        bos_id: the tokenizer's.
        eos_id: the tokenizer's.
        max_position_embeddings: the trained context, in tokens; advice to programs that ask for a limit. None means
            that of the published models.

    Raises:
        CheckpointError: the architecture is none of the families'.
    """
    family = _family_of(args)
    return {
        **{theirs: getattr(args, ours) for theirs, ours in SIZES.items()},
        **{key: value for key, value in family.only.items() if value is not None},
        "intermediate_size": args.hidden_dim,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "tie_word_embeddings": args.tied_output,
        "rope_theta": args.rope_theta,  # where transformers 4 looks; 5 looks into rope_parameters
        "rope_parameters": {"rope_theta": args.rope_theta, "rope_type": "default"},
        "max_position_embeddings": max_position_embeddings or family.context,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
    }


def _family_of(args: ModelArgs) -> Family:
    for family in FAMILIES.values():
        scale = math.sqrt(args.dim) if family.scaled else None
        same = (args.activation, args.norm_offset, args.embedding_scale) == (
            family.activation, family.norm_offset, scale,
        )  # fmt: skip
        sized = family.own_head_dim or (args.head_dim == args.dim / args.n_heads and not args.tied_output)
        if same and sized:
            return family
    raise CheckpointError(
        f"no config.json describes a model with {args.beyond_params}: its differences from Llama must be those of Gemma"
    )
