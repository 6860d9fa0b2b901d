"""The command `codellama chat`: its flags, checked before torch is loaded.

It chooses who answers, the model here or a server, and where it is shown: once, in the terminal, or as a page.
"""

import logging
import os
import sys
from typing import Any

from codellama.chat.dialogue import Conversation, Settings
from codellama.config import RuntimeArgs
from codellama.errors import CodeLlamaError, PromptError
from codellama.printing import show
from codellama.prompt_file import read_text
from codellama.prompts import Message
from codellama.quantization import Quantization


def chat(
    file: str | None = None,
    *,
    prompt: str | None = None,
    system: str | None = None,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.2,
    top_p: float = 0.95,
    max_seq_len: int = 2048,
    max_gen_len: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    checkpoint_format: str | None = None,
    base_url: str | None = None,
    model_id: str | None = None,
    api_key_file: str | None = None,
    web: bool = False,
    port: int = 8501,
    browser: bool = True,
) -> None:
    """Ask an Instruct model one question, or talk with it until Ctrl-D.

    A question from a file, a flag or a pipe is answered once. In a terminal, without any of them, the dialog goes on,
    and each question is asked with all that was said before; /help lists what else can be typed. Colours, history and
    the page need the extra: pip install 'codellama[chat]'.

    Args:
        file: the question; - is standard input.
        prompt (TEXT): the question itself, in place of FILE.
        system (TEXT): how to answer, in a system message before the first question.
        base_url (URL): ask an OpenAI-compatible server such as http://127.0.0.1:8000/v1 and load no model. Its key
            stands in the variable CODELLAMA_API_KEY or OPENAI_API_KEY.
        model_id (NAME): which of the server's models; without it, the first one.
        api_key_file (FILE): holds the server's key in its first line.
        web: show the chat as a page in the browser.
        port: of the page.
        browser: open the page.

    Examples:
        codellama chat --ckpt_dir CodeLlama-7b-Instruct
        codellama chat --prompt "How do I sort a dict by value?" --system "Be brief."
        codellama chat --base_url http://127.0.0.1:8000/v1
        codellama chat --web --ckpt_dir CodeLlama-7b-Instruct
        torchrun --nproc_per_node 2 -m codellama chat --ckpt_dir CodeLlama-13b-Instruct
    """
    settings = Settings(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len, seed=seed)
    RuntimeArgs(max_seq_len=max_seq_len)
    Quantization.parse(quantize)
    loading: dict[str, Any] = {
        "ckpt_dir": ckpt_dir, "tokenizer_path": tokenizer_path, "device": device, "dtype": dtype,
        "quantize": quantize, "checkpoint_format": checkpoint_format,
        "max_seq_len": None if max_seq_len == 2048 else max_seq_len,
    }  # fmt: skip
    if (base_url is not None or web) and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(f"{'--web' if web else '--base_url'} takes one process; start it without torchrun")
    if base_url is not None:
        _refuse(loading, "loads a model here, but with --base_url a server has it")
    else:
        _refuse({"api_key_file": api_key_file, "model_id": model_id}, "is about the server of a --base_url")
    if web:
        asked: dict[str, Any] = {
            "file": file, "prompt": prompt, "system": system, "model_id": model_id, "max_gen_len": max_gen_len,
            "temperature": None if temperature == 0.2 else temperature, "top_p": None if top_p == 0.95 else top_p,
        }  # fmt: skip
        _refuse(asked, "is set in the page itself, so leave it out with --web")
        from codellama.chat.web import open_page  # late: it needs the extra

        flags = {name: value for name, value in (loading | {"seed": seed}).items() if value is not None}
        open_page(base_url, api_key_file, flags, port=port, headless=not browser)
        return
    if port != 8501 or not browser:
        raise ValueError(f"{'--port' if port != 8501 else '--no-browser'} is about the page; give --web, too")
    once = file is not None or prompt is not None or not sys.stdin.isatty()
    question = read_text(file, prompt) if once else ""
    if once and not question.strip() and os.environ.get("RANK", "0") == "0":  # other ranks read nothing
        raise PromptError("the question is empty; one was expected from a file, --prompt, a pipe, or a terminal")
    conversation = Conversation(system or "", settings, question=question if once else None)
    if base_url is not None:
        _ask_server(conversation, once, base_url, api_key_file, model_id)
    else:
        _ask_here(conversation, once, loading | {"max_seq_len": max_seq_len})


def _ask_server(
    conversation: Conversation, once: bool, base_url: str, api_key_file: str | None, model_id: str | None
) -> None:
    try:
        from codellama.chat.remote import RemoteModel, find_key  # late: it needs the extra
    except ModuleNotFoundError as error:
        raise CodeLlamaError(
            f"{error.name} is not installed; --base_url needs pip install 'codellama[chat]'"
        ) from error
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # else it writes each address between the lines of the chat
    model = RemoteModel(base_url, find_key(api_key_file), model_id)
    if once:
        try:
            show(model.stream(conversation.dialog(), conversation.settings), is_first=True)
        finally:
            model.end()
        return
    from codellama.chat.screen import choose_screen
    from codellama.chat.terminal import Terminal

    Terminal(conversation, model, choose_screen(alone=True)).run()


def _ask_here(conversation: Conversation, once: bool, loading: dict[str, Any]) -> None:
    from codellama.chat.model import LocalModel, follow
    from codellama.llama import Llama  # late: help and a misspelled flag need no torch

    settings = conversation.settings
    llama = Llama.build(max_batch_size=1, seed=settings.seed, **loading)
    here = llama.parallel
    if here.share(lambda: once):  # world rank 0 has the terminal
        dialog: list[Message] = conversation.dialog()
        pieces = llama.stream_chat(dialog, settings.temperature, settings.top_p, settings.max_gen_len)
        show(pieces, here.world_rank == 0)
    elif here.world_rank > 0:
        follow(llama)
    else:
        from codellama.chat.screen import choose_screen
        from codellama.chat.terminal import Terminal

        alone = here.world is None
        Terminal(conversation, LocalModel(llama), choose_screen(alone=alone), by_key=not alone).run()


def _refuse(flags: dict[str, Any], reason: str) -> None:
    """Refuse what would have no effect."""
    for name, value in flags.items():
        if value is not None:
            raise ValueError(f"{'FILE' if name == 'file' else f'--{name}'} {reason}")
