"""What a server says of itself when it is ready: where it is, what it runs, and how to ask it.

It knows nothing of HTTP, and never shows a key.
"""

from typing import TYPE_CHECKING

from codellama.server.settings import KEY_VARIABLE, Settings

if TYPE_CHECKING:
    from codellama.assembly import Parts


def write_banner(parts: "Parts", settings: Settings, host: str, port: int) -> str:
    """Write it, for the address that was bound."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    root = f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
    key = "" if settings.api_key is None else f' -H "Authorization: Bearer ${KEY_VARIABLE}"'
    weights = sum(parameter.nbytes for parameter in parts.model.parameters())
    cache = sum(tensor.nbytes for tensor in (*parts.engine.cache.keys, *parts.engine.cache.values))
    runtime = parts.runtime
    body = '{"messages": [{"role": "user", "content": "Write hello world in C."}]}'
    lines = [
        f"{settings.model_id} is served at {root}/v1 (Ctrl-C or SIGTERM ends it)",
        f"  memory   {_size(weights)} weights, {_size(cache)} cache per process: "
        f"{runtime.max_batch_size} answers at once, {runtime.max_seq_len} tokens each",
        f"  try it   curl {root}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
        f"  clients  OPENAI_BASE_URL={root}/v1 OPENAI_API_KEY={'any' if not key else f'${KEY_VARIABLE}'}",
    ]
    return "\n".join(lines)


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"
