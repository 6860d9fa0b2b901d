"""How the library is made, kept, and done without."""

import logging
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import torch  # noqa: F401  (its OpenMP is the library's)

from codellama.native.build import (
    AVX2,
    AVX512,
    SWITCH,
    UnavailableError,
    cache_folder,
    cpu_features,
    find_compiler,
    instruction_sets,
    load_library,
)
from codellama.native.kernels import load_kernels

QUICK = (*AVX2, "-O0")  # compiles in a second


@pytest.fixture(autouse=True)
def _possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    try:
        instruction_sets(cpu_features())
        find_compiler(None)
    except UnavailableError as reason:
        pytest.skip(str(reason))


def test_it_is_compiled_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_library(QUICK, tmp_path)
        (made,) = tmp_path.iterdir()
        load_library(QUICK, tmp_path, compiler="no-such-compiler")
    (compiler,) = find_compiler(None)
    (record,) = caplog.records
    assert record.getMessage() == f"compiling CPU kernels with {compiler} into {made}; once, some seconds"
    assert list(tmp_path.iterdir()) == [made]


def test_other_flags_are_another_library(tmp_path: Path) -> None:
    load_library(QUICK, tmp_path)
    with pytest.raises(UnavailableError, match="found none of no-such-compiler"):
        load_library((*QUICK, "-g"), tmp_path, compiler="no-such-compiler")


def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    program = """if True:
        import sys
        from pathlib import Path
        from codellama.native.build import compile_library
        print("ready", flush=True)
        sys.stdin.readline()
        print(compile_library(sys.argv[2:], Path(sys.argv[1])))
    """
    command = [sys.executable, "-c", program, str(tmp_path), *QUICK]
    both = [subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    made = {process.communicate(timeout=200)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert [f"{path}\n" for path in tmp_path.iterdir()] == list(made)
    load_library(QUICK, tmp_path, compiler="no-such-compiler")


def test_it_brings_no_openmp_of_its_own(tmp_path: Path) -> None:
    load_library(QUICK, tmp_path)
    (made,) = tmp_path.iterdir()
    content = made.read_bytes()
    assert b"GOMP_parallel" in content
    assert b"libgomp" not in content


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'x.cpp:1: error: no such thing' >&2; exit 1", "failed with status 1: x.cpp:1: error: no such thing"),
        ("exit 3", "failed with status 3: it said nothing"),
        ("exit 0", "cannot use "),
        ('for last; do :; done; echo nonsense > "$last"', "cannot use "),
    ],
)
def test_a_broken_compiler(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_kernels() is None
    (record,) = caplog.records
    assert said in record.getMessage()


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_kernels() is None
    assert [record.getMessage() for record in caplog.records] == [
        "without our own CPU kernels: no C++ compiler: found none of g++, c++, clang++"
    ]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="XDG_CACHE_HOME names another folder"):
        load_library(QUICK, tmp_path / "file")


def test_the_switch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert load_kernels() is None
    assert [record.getMessage() for record in caplog.records] == [f"without our own CPU kernels: {SWITCH} is 0"]
    monkeypatch.setenv(SWITCH, "no")
    with pytest.raises(ValueError, match=f"{SWITCH} is 'no'; 0 .* or 1 was expected"):
        load_kernels()


def test_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/somebody/.cache/codellama")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/codellama")


def test_a_variant_for_each_cpu() -> None:
    haswell = {"sse2", "avx2", "fma", "f16c"}
    skylake = haswell | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    assert instruction_sets(haswell) == instruction_sets(skylake) == AVX2
    assert instruction_sets(skylake | {"avx512_vnni"}) == AVX512
    assert instruction_sets(skylake | {"avx512_vnni", "avx512_bf16"}) == (*AVX512, "-mavx512bf16")
    with pytest.raises(UnavailableError, match="need AVX2"):
        instruction_sets({"sse2", "avx"})


def test_a_compiler_may_have_arguments() -> None:
    assert find_compiler("env g++ -pipe") == ["env", "g++", "-pipe"]
