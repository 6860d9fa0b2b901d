"""Run a module as a program that ends when whoever started it is gone, even if that was killed.

As `python -m codellama.chat.tethered FD MODULE ARGUMENTS`. It knows nothing of the module, and loads nothing else.
"""

import os
import runpy
import signal
import sys
import threading


def _watch(descriptor: int) -> None:
    """Wait for the end of a pipe that the starter alone holds open, then end this process in its own way."""
    while os.read(descriptor, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Watch, and be the module."""
    descriptor, module = int(sys.argv[1]), sys.argv[2]
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_watch, args=(descriptor,), name="tether", daemon=True).start()
    del sys.argv[1:3]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
