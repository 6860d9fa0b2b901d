"""An OpenAI-compatible server. One file knows HTTP, one OpenAI's words, one the engine; `serve.py` starts them."""
