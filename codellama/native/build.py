"""The C++ sources beside this file as a shared library: compiled on first use, kept in the user's cache folder.

The library includes no header of PyTorch and links no OpenMP of its own: it is called through ctypes with addresses and
finds the OpenMP that PyTorch has loaded, which therefore has to be imported before. So it compiles in seconds with
nothing but a compiler, and stays valid when PyTorch changes. This file knows nothing of tensors.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence, Set
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

    Args:
        flags: instruction sets to compile for; those of this CPU by default.
        folder: where it is kept; `cache_folder` by default.
        compiler: CXX, or the first of g++, c++ and clang++ by default.

    Raises:
        UnavailableError: switched off, no such CPU, no compiler, or it failed.
        ValueError: the switch is neither on nor off.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{SWITCH} is {switch!r}; 0 (do without our kernels) or 1 was expected")
    if switch == "0":
        raise UnavailableError(f"{SWITCH} is 0")
    folder = cache_folder() if folder is None else folder
    try:
        return ctypes.CDLL(str(compile_library(flags or instruction_sets(cpu_features()), folder, compiler)))
    except OSError as error:
        raise UnavailableError(f"cannot use {folder}: {error}; XDG_CACHE_HOME names another folder") from error


def compile_library(flags: Sequence[str], folder: Path, compiler: str | None = None) -> Path:
    """Compile the library, unless the folder holds it.

    Several processes may do this at once: each compiles into a file of its own, which takes the final name in one step.

    Returns:
        Where it is. The name changes with the sources and the flags.

    Raises:
        UnavailableError: no compiler, or it failed.
        OSError: the folder cannot be written to.
    """
    path = folder / f"kernels-{_fingerprint(flags)}.so"
    if path.exists():
        return path
    command = find_compiler(compiler or os.environ.get("CXX"))
    logger.info("compiling CPU kernels with %s into %s; once, some seconds", command[0], path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        made = Path(own) / path.name
        command = [*command, *_FLAGS, *flags, *map(str, _sources()), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"{command[0]} was not done after {_SECONDS:.0f} s") from error
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            complaint = next((line for line in lines if "error" in line), lines[-1])
            raise UnavailableError(f"{command[0]} failed with status {done.returncode}: {complaint[:300]}")
        os.replace(made, path)
    return path


def cpu_features() -> frozenset[str]:
    """Read what this CPU can do, in the kernel's words.

    Raises:
        UnavailableError: this is not Linux on x86-64.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise UnavailableError(f"they are for Linux on x86_64, and this is {platform.system()} on {platform.machine()}")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def instruction_sets(features: Set[str]) -> tuple[str, ...]:
    """Choose the variant for a CPU's features, as flags of the compiler.

    Raises:
        UnavailableError: there is none.
    """
    if not {"avx2", "fma", "f16c"} <= features:
        raise UnavailableError("they need AVX2, which this CPU does not have")
    if not {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"} <= features:
        return AVX2
    return (*AVX512, "-mavx512bf16") if "avx512_bf16" in features else AVX512


def cache_folder() -> Path:
    """Say where the compiled library is kept: `codellama` in XDG_CACHE_HOME or ~/.cache.

    Raises:
        UnavailableError: this user has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codellama"
    except RuntimeError as error:
        raise UnavailableError(f"no folder to keep them in: {error}; XDG_CACHE_HOME names one") from error


def find_compiler(asked: str | None) -> list[str]:
    """Find the compiler asked for, which may be a command with arguments, or the first of the usual ones.

    Raises:
        UnavailableError: there is none.
    """
    choices = [shlex.split(asked)] if asked else [["g++"], ["c++"], ["clang++"]]
    for command in choices:
        if shutil.which(command[0]):
            return command
    raise UnavailableError(f"no C++ compiler: found none of {', '.join(command[0] for command in choices)}")


def _fingerprint(flags: Sequence[str]) -> str:
    digest = hashlib.sha256(repr((*_FLAGS, *flags)).encode())
    for path in sorted(SOURCES.glob("*.h")) + _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def _sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cpp"))
