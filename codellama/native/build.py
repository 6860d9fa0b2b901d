"""The C++ sources beside this file as a shared library: compiled on first use, kept in the user's cache folder.

The library includes no header of PyTorch and links no OpenMP of its own: it is called through ctypes with addresses and
finds the OpenMP that PyTorch has loaded. So it compiles in seconds with nothing but a compiler, and stays valid when
PyTorch changes. It knows nothing of tensors.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
SWITCH = "CODELLAMA_NATIVE"
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
# No contraction: a product and a sum must not become one instruction in one kernel and two in another.
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-w")
_SECONDS = 300.0


class UnavailableError(Exception):
    """The kernels cannot be had here; the message says why."""


def load_library(
    flags: Sequence[str] | None = None, folder: Path | None = None, compiler: str | None = None
) -> ctypes.CDLL:
    """Load the library, after compiling it if the folder does not hold it yet.

    Several processes may do this at once: each compiles into a file of its own, which then takes the final name in one
    step.

    Args:
        flags: instruction sets to compile for; those of this CPU by default.
        folder: where it is kept; `codellama` in XDG_CACHE_HOME or ~/.cache by default.
        compiler: CXX, or the first of g++, c++ and clang++ by default.

    Raises:
        UnavailableError: switched off, no such CPU, no compiler, or it failed.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{SWITCH} is {switch!r}; 0 (do without them) or 1 was expected")
    if switch == "0":
        raise UnavailableError(f"{SWITCH} is 0")
    flags = instruction_sets() if flags is None else tuple(flags)
    folder = cache_folder() if folder is None else folder
    path = folder / f"kernels-{_fingerprint(flags)}.so"
    try:
        if not path.exists():
            _compile(path, flags, compiler or find_compiler())
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"{path} cannot be written or loaded: {error}") from error


def instruction_sets() -> tuple[str, ...]:
    """Name the instruction sets of this CPU that the kernels have variants for, as flags of the compiler.

    Raises:
        UnavailableError: it has neither, or this is not Linux.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise UnavailableError(f"they are for x86-64 Linux, and this is {platform.machine()} {platform.system()}")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    has = set(next((line for line in lines if line.startswith("flags")), "").split())
    if not {"avx2", "fma", "f16c"} <= has:
        raise UnavailableError("this CPU has no AVX2")
    if not {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"} <= has:
        return AVX2
    return (*AVX512, "-mavx512bf16") if "avx512_bf16" in has else AVX512


def cache_folder() -> Path:
    """Say where the compiled library is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codellama"


def find_compiler() -> str:
    """Take the compiler that CXX names, or the first of the usual ones.

    Raises:
        UnavailableError: there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise UnavailableError(f"no C++ compiler: {' and '.join(names)} not found")
    return found


def _fingerprint(flags: Sequence[str]) -> str:
    digest = hashlib.sha256(repr((*_FLAGS, *flags)).encode())
    for path in sorted(SOURCES.glob("*.h")) + _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def _sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cpp"))


def _compile(path: Path, flags: Sequence[str], compiler: str) -> None:
    logger.info("compiling CPU kernels with %s, once, into %s", compiler, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *_FLAGS, *flags, *map(str, _sources()), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"{compiler} was not done after {_SECONDS:.0f} s") from error
        if done.returncode != 0:
            complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise UnavailableError(f"{compiler} failed with status {done.returncode}: {complaint}")
        os.replace(made, path)
