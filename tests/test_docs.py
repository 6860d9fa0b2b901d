"""The documentation: its Python runs, its commands and links lead somewhere, and its tables say what the code says."""

import importlib
import inspect
import re
import runpy
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from codellama import ModelArgs, ParallelSizeError, RuntimeArgs, SamplingParams, cli
from codellama.checkpoint import gguf, huggingface
from codellama.checkpoint.gguf_blocks import BLOCKS
from codellama.checkpoint.layout import SHARD_DIM
from codellama.config import feed_forward_params
from codellama.flags import Explanation, UsageError, flags_of, parse
from codellama.memory import plan_budget
from codellama.parallel import Parallel

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.ko.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EACH_PAGE = [pytest.param(path, id=path.name) for path in PAGES]
LANGUAGES = ("python", "python no-run", "sh", "text", "text layers")
OTHER_PROGRAMS = ("pip", "./download.sh", ".venv/bin/mypy", ".venv/bin/lint-imports", ".venv/bin/ruff")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page on which the text begins."""

    language: str
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    """Take a page apart. A fence that is not closed, or of an unknown language, would hide what is in it."""
    language, begin, lines = None, 0, page.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.startswith("```"):
            continue
        if language is None:
            language, begin = line.removeprefix("```"), number
            assert language in LANGUAGES, f"line {number}: a fence of {language!r}"
        else:
            assert line == "```", f"line {number}: a fence inside the fence of line {begin}"
            yield Block(language, "\n".join(lines[begin : number - 1]), begin + 1)
            language = None
    assert language is None, f"the fence of line {begin} is not closed"


def commands(script: str) -> Iterator[list[str]]:
    """Split a sh block into commands of words; redirections are dropped."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        assert set(words).isdisjoint({"|", "&&", "&", ";"}), f"one command per line: {line}"
        while "<" in words:
            at = words.index("<")
            del words[at : at + 2]
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words:
            yield words


def check(script: str) -> None:
    """Fail unless all that the commands of a sh block name exists: programs, scripts, modules, targets, flags."""
    for words in commands(script):
        check_command(words)


def check_command(words: list[str]) -> None:
    program, rest = words[0], words[1:]
    if program == "make":
        check_make(rest)
    elif program == "codellama":
        check_codellama(rest)
    elif program == "torchrun":
        args = get_args_parser().parse_args(rest)
        module = ["-m"] if args.module else []
        check_python([*module, args.training_script, *args.training_script_args])
    elif program.removeprefix(".venv/bin/") == "python":
        check_python(rest)
    else:
        assert program in OTHER_PROGRAMS, f"{program} is no program of this repository"


def check_make(rest: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in rest:
        name, is_setting, _ = word.partition("=")
        pattern = rf"^{name} \?= " if is_setting else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {word}"


def check_codellama(rest: list[str]) -> None:
    assert rest[0] in cli.COMMANDS, f"codellama has no command {rest[0]}"
    check_words(cli.COMMANDS[rest[0]], rest[1:])


def check_words(function: Callable[..., None], words: list[str]) -> None:
    """Understand the flags as the program itself does."""
    if "--help" not in words:
        explanations = dict.fromkeys(inspect.signature(function).parameters, Explanation("", ""))
        parse(flags_of(function, explanations), words, function.__name__)


def check_python(rest: list[str]) -> None:
    if rest[0] != "-m":
        assert re.fullmatch(r"example_\w+\.py", rest[0]), f"{rest[0]} is no example"
        assert (ROOT / rest[0]).is_file(), f"there is no {rest[0]}"
        check_words(runpy.run_path(str(ROOT / rest[0]))["main"], rest[1:])
    elif rest[1] == "codellama":
        check_codellama(rest[2:])
    elif rest[1] == "pytest":
        check_pytest(rest[2:])
    else:
        assert (ROOT / f"{rest[1].replace('.', '/')}.py").is_file(), f"there is no module {rest[1]}"
        module = importlib.import_module(rest[1])
        own = {f.__name__: f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == rest[1]}
        subcommand = [word for word in rest[2:3] if not word.startswith("-")]
        assert set(subcommand) <= own.keys(), f"{rest[1]} has no {subcommand}"
        called = [own[name] for name in subcommand or own]
        flags = {name for function in called for name in inspect.signature(function).parameters}
        check_flags(rest[2 + len(subcommand) :], flags)


def check_pytest(rest: list[str]) -> None:
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    words = iter(rest)
    for word in words:
        if word == "-m":
            named = set(re.findall(r"\w+", next(words))) - {"not", "and"}
            assert named <= {marker.partition(":")[0] for marker in markers}
        elif word == "-k":
            next(words)
        else:
            path, is_one, test = word.partition("::")
            assert (ROOT / path).exists(), f"there is no {path}"
            if is_one:
                assert f"def {test}(" in (ROOT / path).read_text(), f"there is no {word}"


def check_flags(words: list[str], known: set[str]) -> None:
    """Walk through `--name value` and `--name=value`; there are no other words."""
    expecting = False
    for word in words:
        if word.startswith("--"):
            name, is_whole, _ = word.removeprefix("--").partition("=")
            assert name in known | {"help"}, f"no flag --{name}"
            expecting = not is_whole
        elif expecting:
            expecting = False
        else:
            raise AssertionError(f"a word too many: {word}")


def section(page: Path, first_cell: str) -> list[list[str]]:
    """Cells of the one table whose heading begins with this cell, without backticks."""
    found = re.findall(rf"^\| {first_cell} \|.*\n\|[-:| ]+\|\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    assert len(found) == 1, f"{len(found)} tables of {first_cell!r} in {page.name}"
    rows = [line.strip("|").split("|") for line in found[0].splitlines()]
    return [[cell.strip().replace("`", "") for cell in row] for row in rows]


def published(name: str) -> ModelArgs:
    """A published model, as docs/checkpoints.md has it."""
    (row,) = (row for row in section(ROOT / "docs/checkpoints.md", "model \\| dim") if row[0] == name)
    dim, n_layers, n_heads, n_kv_heads, _, multiple_of = map(int, row[1:7])
    return ModelArgs(
        dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, multiple_of=multiple_of,
        ffn_dim_multiplier=float(row[7]) if row[7] else None, vocab_size=int(row[8]), rope_theta=1e6,
    )  # fmt: skip


def published_gemma(name: str) -> ModelArgs:
    """The same for CodeGemma."""
    (row,) = (row for row in section(ROOT / "docs/checkpoints.md", "CodeGemma") if row[0] == name)
    dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size = map(int, row[1:])
    multiple_of, multiplier = feed_forward_params(dim, hidden_dim)
    return ModelArgs(
        dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, vocab_size=vocab_size,
        multiple_of=multiple_of, ffn_dim_multiplier=multiplier, rope_theta=1e4, norm_offset=1, tied_output=True,
    )  # fmt: skip


@pytest.mark.parametrize("path", EACH_PAGE)
def test_python_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, in order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": path.stem}
    for block in blocks(path.read_text()):
        if block.language.startswith("python"):
            code = compile("\n" * (block.line - 1) + block.text, path.name, "exec")
            if block.language == "python":
                exec(code, namespace)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", EACH_PAGE)
def test_commands_name_what_exists(path: Path) -> None:
    for block in blocks(path.read_text()):
        if block.language == "sh":
            check(block.text)


@pytest.mark.parametrize(
    "command",
    [
        "make demos",
        "make test PYTHONS=python3",
        "python example_complete.py",
        "python example_completion.py --ckptdir x",
        "python example_completion.py CodeLlama-7b",
        "torchrun --nprocs 2 example_completion.py",
        "torchrun --nproc_per_node 2 example_infilling.py --max_len 3",
        "torchrun --nproc_per_node 2 -m codellama talk",
        "codellama serve --adress 0.0.0.0",
        "codellama complete --prompts x",
        "codellama complete a.py b.py",
        "codellama complete --max_seq_len many",
        "codellama complete --prompt",
        "python -m codellama infill --suffix_last",
        "python -m benchmarks.decoding",
        "python -m benchmarks.prefill --dtype float32",
        "python -m tools.train_demo training",
        "python -m pytest tests/absent",
        "python -m pytest tests/test_docs.py::test_absent",
        "python -m pytest -m quick",
        "pyhton example_completion.py",
        "make demo && make test",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit, UsageError)):
        check(command)


@pytest.mark.parametrize("page", ["```python\n1", "```pyton\n1\n```", "```sh\n```python\n1\n```"])
def test_a_wrong_fence_is_found(page: str) -> None:
    with pytest.raises(AssertionError, match="fence"):
        list(blocks(page))


def headings(path: Path) -> set[str]:
    """Anchors, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    linked = [*PAGES, *sorted(ROOT.glob("codellama/**/*.md")), *sorted(ROOT.glob("benchmarks/**/*.md"))]
    targets = [(page, link) for page in linked for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    relative = [(page, link) for page, link in targets if "://" not in link]
    assert len(relative) > 10
    for page, link in relative:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in headings(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("path", EACH_PAGE)
def test_named_files_exist(path: Path) -> None:
    named = re.findall(r"`((?:codellama|tests|tools|benchmarks|docs)/[\w./*]*)`", path.read_text())
    assert [name for name in named if not list(ROOT.glob(name))] == []


def test_the_tree_is_the_packages() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    (tree,) = (block.text for block in blocks(page) if block.text.startswith("codellama/\n"))
    listed = re.findall(r"^  (\S+\.py) +\S", tree, re.MULTILINE)
    package = ROOT / "codellama"
    assert sorted(listed) == sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))


def test_the_layers_are_the_contracts() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    (layers,) = (block.text.splitlines() for block in blocks(page) if block.language == "text layers")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert layers == contracts[0]["layers"]


def test_published_sizes() -> None:
    for row in section(ROOT / "docs/checkpoints.md", "model \\| dim"):
        assert published(row[0]).hidden_dim == int(row[5])


def test_memory_of_the_models() -> None:
    """The README's table: weights in all, weights of a process, cache of a process; per row of 1,000 tokens."""
    rows = section(ROOT / "README.md", "model")
    assert [row[0] for row in rows] == ["7B", "13B", "34B", "70B"]
    for name, files, processes, whole, share, cache, *_ in rows:
        runtime = RuntimeArgs(max_seq_len=1000, max_batch_size=1)
        alone, divided = (plan_budget(published(name), runtime, size, 2) for size in (1, int(processes)))
        assert int(files) == int(processes)
        assert whole == f"{alone.weights / 1e9:.1f} GB"
        assert share == f"{divided.weights / 1e9:.1f} GB"
        assert cache == f"{divided.cache / 1e6:.3g} MB"
    for name, processes, whole, cache, *_ in section(ROOT / "README.md", "CodeGemma"):
        budget = plan_budget(published_gemma(name), runtime, int(processes), 2)
        assert whole == f"{budget.weights / 1e9:.1f} GB"
        assert cache == f"{budget.cache / 1e6:.3g} MB"


def test_possible_numbers_of_processes() -> None:
    for name, listed in section(ROOT / "docs/checkpoints.md", "model \\| possible sizes"):
        possible, args = [], published_gemma(name[10:]) if name.startswith("CodeGemma ") else published(name)
        for size in range(1, 129):
            try:
                Parallel(size=size).check_divides(args)
            except ParallelSizeError:
                continue
            possible.append(size)
        assert possible == [int(size) for size in listed.split(",")]


def test_axes() -> None:
    axes = {
        tensor: None if axis == "none" else int(axis)
        for tensor, axis, _ in section(ROOT / "docs/checkpoints.md", "tensor")
    }
    assert axes == SHARD_DIM


def test_names_in_hugging_faces_files() -> None:
    assert dict(section(ROOT / "docs/checkpoints.md", "Meta's name")) == huggingface.NAMES


def test_names_of_gguf() -> None:
    assert dict(section(ROOT / "docs/checkpoints.md", "Meta's")) == gguf.NAMES


def test_block_types_of_gguf() -> None:
    rows = section(ROOT / "docs/checkpoints.md", "type")
    assert rows == [[block.name, str(block.values), str(block.nbytes)] for block in BLOCKS.values()]


def test_error_messages() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "codellama").rglob("*.py"))
    messages = [row[0] for row in section(ROOT / "docs/checkpoints.md", "the message says")]
    assert len(messages) > 20
    assert [message for message in messages if message not in sources] == []


def test_sampling_parameters() -> None:
    documented = {row[0]: row[1] for row in section(ROOT / "docs/generation.md", "parameter")}
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    assert MISSING not in defaults.values()
    assert documented == {
        name: "none" if default in ((), frozenset()) else str(default) for name, default in defaults.items()
    }
