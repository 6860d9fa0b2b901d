"""The command `codellama serve`: its flags, checked before torch is loaded.

It knows nothing of HTTP; `serve.py` starts the server.
"""

import importlib.util

from codellama.config import RuntimeArgs
from codellama.errors import CodeLlamaError
from codellama.quantization import Quantization
from codellama.safety import load_hook
from codellama.server.settings import Settings, find_key

_NEEDED = ("fastapi", "uvicorn", "httpx2", "prometheus_client")


def serve(
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    api_key_file: str | None = None,
    force: bool = False,
    cors: str | None = None,
    model_parallel_size: int | None = None,
    allowed_hosts: str | None = None,
    max_queue: int = 64,
    timeout: float | None = None,
    grace: float = 10.0,
    log_prompts: bool = False,
    safety: str | None = None,
    model_id: str = "codellama",
    max_seq_len: int = 2048,
    max_batch_size: int = 4,
    chunk_size: int = 512,
    cache_dtype: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    decode: str | None = None,
    checkpoint_format: str | None = None,
) -> None:
    """Serve an OpenAI-compatible API to editors and chat clients.

    It needs the extra: pip install 'codellama[serve]'. Clients take http://127.0.0.1:8000/v1 as their base URL.

    Args:
        host (ADDRESS): where to listen; other machines can reach anything but 127.0.0.1.
        port: 0 takes a free one.
        api_key (KEY): what clients must bring; without it, the variable CODELLAMA_API_KEY, else everybody is served.
        api_key_file (FILE): holds the key in its first line, where no one reads it off the command line.
        force: listen on a public address without a key.
        model_parallel_size: processes that share one copy of the weights; without it, all of them.
        cors (ORIGINS): pages of which origins may ask from a browser, with commas between; * is all.
        allowed_hosts (NAMES): under which names, with commas between, clients may ask a server of this machine alone
            that has no key; localhost and addresses always do.
        max_queue: prompts that may wait, beside those that run.
        timeout (SECONDS): what an answer may take at most; without it, as long as it needs.
        grace (SECONDS): what running answers get when the server is told to end.
        log_prompts: write what is asked and answered to the log, too.
        safety (HOOK): MODULE:FUNCTION that reads what is asked and answered, and may refuse it; see docs/safety.md.
        model_id (NAME): what clients see as the name of the model.
        max_batch_size: answers that are generated at once.
        chunk_size: tokens of a prompt that are read between two steps of the others.
        cache_dtype (NAME): int8 holds keys and values in 8 bits, for longer or more rows; without it, as the model is.
        decode (WAY): eager, graph (CUDA) or compile: how single tokens are computed; without it, eager.

    Examples:
        codellama serve --ckpt_dir CodeLlama-7b-Instruct
        codellama serve --ckpt_dir CodeLlama-7b-Instruct --max_seq_len 8192 --port 8080
        torchrun --nproc_per_node 2 -m codellama serve --ckpt_dir CodeLlama-13b-Instruct
    """
    runtime = RuntimeArgs(
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        chunk_size=chunk_size,
        cache_dtype=cache_dtype,
        decode=decode,  # type: ignore[arg-type]  # it is checked there
    )
    Quantization.parse(quantize)
    settings = Settings(
        host=host,
        port=port,
        model_id=model_id,
        api_key=find_key(api_key, api_key_file),
        max_queue=max_queue,
        timeout=timeout,
        grace=grace,
        cors=_listed(cors),
        allowed_hosts=_listed(allowed_hosts),
        log_prompts=log_prompts,
        safety=None if safety is None else load_hook(safety),
    )
    if not force:
        settings.refuse_public()
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CodeLlamaError(
            f"{' and '.join(missing)} not installed; the server needs pip install 'codellama[serve]'"
        )  # fmt: skip
    from codellama.server.serve import serve

    serve(
        ckpt_dir, tokenizer_path, runtime, settings, model_parallel_size,
        device=device, dtype=dtype, quantize=quantize, seed=seed, checkpoint_format=checkpoint_format,
    )  # fmt: skip


def _listed(words: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(",")) if words else ()
