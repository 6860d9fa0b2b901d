import gc
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from codellama import Grammar, Llama
from codellama.errors import RankError
from tests.support import tiny
from tests.support.distributed import free_port, rank_env, run_ranks, run_scripts

IDS = [[1, 5, 9, 30], [1, 7], [1, *range(3, 303)]]  # the last one's scores come in two pieces
COMMON = [1, *range(200, 300)]
TEXTS = ["def f(x):", "import os", "a", "", "for i in"]
DIALOG: Any = [{"role": "user", "content": "print(i)"}]
FORM = Grammar.json_schema({"type": "integer", "minimum": -99, "maximum": 99})
SEEN = [9, 13, 4, 100, 7]


class OddError(Exception):
    """Cannot be pickled."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} is odd")
        self.second = second


def build(folder: Path, **options: Any) -> Llama:
    return Llama.build(folder, max_seq_len=512, max_batch_size=4, dtype="float32", device="cpu", **options)


def attempt(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        return type(error), str(error)


def prefer(ids: Any, logits: torch.Tensor) -> torch.Tensor:
    """A logits_processor: the next id of SEEN."""
    logits[SEEN[len(ids) % len(SEEN)]] = 99.0
    return logits


def divide(ids: Any, logits: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("in the processor")


def raise_odd(ids: Any, logits: torch.Tensor) -> torch.Tensor:
    raise OddError(3, 4)


def scored(llama: Llama) -> Any:
    return llama.generate(IDS, 8, temperature=0, logprobs=True, echo=True)


def answers(folders: list[Path], size: int | None) -> dict[str, Any]:
    """What one rank gets from every kind of call. Where a call is bad, world rank 0 alone makes it badly."""
    generators = [build(folder, model_parallel_size=size, seed=11) for folder in folders]
    greedy = [scored(llama) for llama in generators]
    llama = generators[0]  # the others stay, and must not disturb it
    first = llama.parallel.world_rank == 0
    found: dict[str, Any] = {
        "greedy": greedy,
        "seeded": llama.text_completion(TEXTS, temperature=0.9, seed=3, max_gen_len=6),
        "seeded by build": llama.text_completion(TEXTS, temperature=0.9, max_gen_len=6, logprobs=True),
        "infilled": llama.text_infilling(["def f("], ["return x"], temperature=0, max_gen_len=6),
        "chat": llama.chat_completion([DIALOG] * 3, temperature=0, max_gen_len=6),
        "formed": llama.text_completion(
            TEXTS, 0.9, seed=3, max_gen_len=40, grammar=FORM if first else None, frequency_penalty=1.0 * first
        ),
        "processed": llama.generate(IDS, 5, temperature=0, logits_processor=prefer)[0],
        "rank 0's": [
            llama.text_completion(
                TEXTS[:3] if first else ["x"], temperature=0, max_gen_len=3, echo=first, top_logprobs=2 * first
            ),
            llama.text_infilling(["a", "b"] if first else [], ["c", "d"] if first else [], 0, max_gen_len=3),
        ],
        "copied rows": llama.generate([COMMON, COMMON, [*COMMON[:60], 4, 5]], 8, temperature=0),
        "none": [llama.generate([]), llama.text_completion([]), llama.chat_completion([])],
        "stream": list(llama.stream_completion("def f", temperature=0, max_gen_len=12)),
        "stream of chat": list(llama.stream_chat(DIALOG, temperature=0.7, seed=1, max_gen_len=12)),
    }
    pieces = []
    stream = llama.stream_completion("def f", temperature=0, max_gen_len=400)
    for piece in stream:
        pieces.append(piece)
        if len(pieces) == 2:
            break
    stream.close()
    found["closed early"] = pieces
    for _ in llama.stream_completion("import", temperature=0, max_gen_len=400):
        break  # and the iterator is dropped
    found["after streams"] = scored(llama)
    mistakes: dict[str, Callable[[], Any]] = {
        "too long": lambda: llama.generate([[1], [1] * 600] if first else [[1], [1]]),
        "no ids": lambda: llama.generate([[1], []] if first else [[1], [1]]),
        "bad temperature": lambda: llama.generate([[1]], temperature=-1 if first else 1),
        "not a list": lambda: llama.text_completion("text" if first else ["text"]),
        "a tag": lambda: llama.chat_completion([[{"role": "user", "content": "[INST]"}] if first else DIALOG]),
        "stream too long": lambda: list(llama.stream_completion("x y " * 600 if first else "")),
        "no form": lambda: llama.text_completion(["x"], grammar=Grammar.regex("(?=a)b" if first else "b")),
        "alternatives": lambda: llama.generate([[1]], top_logprobs=3 * first),
        "stream's alternatives": lambda: list(llama.stream_completion("a", top_logprobs=3 * first)),
        "processor": lambda: llama.generate(IDS, 3, logits_processor=divide),
        "stream's processor": lambda: list(llama.stream_completion("a", logits_processor=divide)),
    }
    found["mistakes"] = {}
    for name, mistake in mistakes.items():
        found["mistakes"][name] = attempt(mistake), llama.generate(IDS[:2], 3, temperature=0)[0]
    found["odd"] = [
        attempt(lambda: llama.generate(IDS, 3, logits_processor=raise_odd)),
        attempt(lambda: list(llama.stream_completion("a", logits_processor=raise_odd))),
    ]
    found["after mistakes"] = scored(llama)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same weights in 1, 2 and 4 files."""
    return [tiny.tiny_checkpoint(tmp_path_factory.mktemp("shards") / str(n), n) for n in (1, 2, 4)]


@pytest.fixture(scope="module")
def alone(folders: list[Path]) -> dict[str, Any]:
    return answers(folders, None)


def test_alone_the_number_of_files_changes_no_bit(alone: dict[str, Any]) -> None:
    assert alone["greedy"][1:] == alone["greedy"][:1] * 2
    # In other rows, since rows remember: the last bits may differ, as they do among other neighbours.
    assert approximate(alone["after streams"]) == approximate(alone["greedy"][0])
    assert approximate(alone["after mistakes"]) == approximate(alone["greedy"][0])
    assert alone["odd"] == [(OddError, "3 is odd")] * 2
    assert all(json.loads(result["generation"]) in range(-99, 100) for result in alone["formed"])
    assert len({result["generation"] for result in alone["formed"]}) > 1
    raised = {name: answer[0].__name__ for name, (answer, _) in alone["mistakes"].items()}
    assert raised == {
        "too long": "ContextLengthError", "no ids": "PromptError", "bad temperature": "ValueError",
        "not a list": "TypeError", "a tag": "PromptError", "stream too long": "ContextLengthError",
        "no form": "GrammarError", "alternatives": "ValueError", "stream's alternatives": "ValueError",
        "processor": "ZeroDivisionError", "stream's processor": "ZeroDivisionError",
    }  # fmt: skip


@pytest.mark.parametrize(("processes", "model_parallel_size"), [(2, None), (4, None), (4, 2), (4, 1)], ids=str)
def test_any_number_of_processes_gives_the_same(
    processes: int, model_parallel_size: int | None, folders: list[Path], alone: dict[str, Any]
) -> None:
    ranks = run_ranks(processes, answers, folders, model_parallel_size)
    streams = ("stream", "stream of chat", "closed early")
    numeric = ("rank 0's", "greedy", "after streams", "after mistakes", "seeded by build")
    told = (RankError, "another rank raised tests.test_distributed.OddError: 3 is odd")
    for rank, found in enumerate(ranks):
        for tokens, logprobs in [*found["greedy"], found["after streams"], found["after mistakes"]]:
            assert tokens == alone["greedy"][0][0]
            for mine, expected in zip(logprobs, alone["greedy"][0][1], strict=True):
                assert mine == pytest.approx(expected, abs=1e-4)
        for mine, expected in zip(found["seeded by build"], alone["seeded by build"], strict=True):
            assert mine.pop("logprobs") == pytest.approx(expected["logprobs"], abs=1e-4)
            assert mine == {key: value for key, value in expected.items() if key != "logprobs"}
        assert approximate(found["rank 0's"]) == approximate(alone["rank 0's"])
        assert found.pop("odd") == ([(OddError, "3 is odd")] * 2 if rank == 0 else [told] * 2)
        for name in alone.keys() - {*numeric, "odd"}:
            assert found[name] == ([] if name in streams and rank else alone[name]), name


def approximate(results: Any) -> Any:
    """Results with their numbers good to 1e-4."""
    if isinstance(results, dict):
        return {key: approximate(value) for key, value in results.items()}
    if isinstance(results, list | tuple):
        return [approximate(value) for value in results]
    return pytest.approx(results, abs=1e-4) if isinstance(results, float) else results


def copied(folders: list[Path]) -> Any:
    return [scored(build(folder)) for folder in folders]


def test_eight_processes_hold_copies_of_two_key_value_heads(folders: list[Path], alone: dict[str, Any]) -> None:
    assert tiny.ARGS.kv_heads == 2
    for found in run_ranks(8, copied, [folders[0], folders[2]]):
        for tokens, logprobs in found:
            assert tokens == alone["greedy"][0][0]
            for mine, expected in zip(logprobs, alone["greedy"][0][1], strict=True):
                assert mine == pytest.approx(expected, abs=1e-4)


def unseeded(folder: Path, size: int) -> list[Any]:
    llama = build(folder, model_parallel_size=size)
    return [llama.text_completion(["a", "b", "c"], temperature=5.0, top_p=1.0, max_gen_len=9) for _ in range(2)]


def test_unseeded_ranks_agree_though_chance_decides(tiny_folder: Path) -> None:
    first, *others = run_ranks(4, unseeded, tiny_folder, 2)
    assert others == [first] * 3
    assert first[0] != first[1]


SCRIPT = """
import json, os, pathlib, sys, time
from codellama import Llama
folder, patient, rank = pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(os.environ["RANK"])
(folder / str(rank)).write_text(str(os.getpid()))
llama = Llama.build(sys.argv[1], max_seq_len=64, dtype="float32", device="cpu")
tokens, _ = llama.generate([[1, 5, 9], [1, 7]], 6, temperature=0)
print(json.dumps([rank, int(os.environ["LOCAL_RANK"]), llama.parallel.size, tokens]), flush=True)
if rank == patient:  # the rest of its script: until the other process is gone, and 1.5 s more
    pid, end = (folder / str(1 - rank)).read_text(), time.monotonic() + 40
    while pathlib.Path("/proc", pid).exists():
        assert time.monotonic() < end, "the other process did not end"
        time.sleep(0.02)
    time.sleep(1.5)
"""


def test_processes_end_each_in_its_own_time(tiny_folder: Path, llama: Llama, tmp_path: Path) -> None:
    """Under torchrun a leader outlives its follower; without it, the other way round; on two nodes both go at once."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for name in "abc":
        (tmp_path / name).mkdir()
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node"]
    nodes = ["1", "--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    port = free_port()

    def run(folder: str, patient: int) -> list[str]:
        return [str(script), str(tiny_folder), str(tmp_path / folder), str(patient)]

    one, *two, leader, follower = run_scripts(
        [
            ([*torchrun, "2", "--master_port", str(free_port()), *run("a", 0)], {}),
            *[([*torchrun, *nodes, "--node_rank", str(node), *run("b", 9)], {}) for node in (0, 1)],
            *[(run("c", 1), rank_env(rank, 2, port)) for rank in (0, 1)],
        ]
    )
    tokens = llama.generate([[1, 5, 9], [1, 7]], 6, temperature=0)[0]
    for end in (one, *two, leader, follower):
        assert end.code == 0, end.stderr
        assert "[rank" not in end.stderr  # how torch marks a traceback of a rank; two agents may complain of each other
        assert "terminate called" not in end.stderr
    assert sorted(map(json.loads, one.answer.splitlines())) == [[0, 0, 2, tokens], [1, 1, 2, tokens]]
    assert [json.loads(end.answer) for end in two] == [[0, 0, 2, tokens], [1, 0, 2, tokens]]
    assert [json.loads(end.answer) for end in (leader, follower)] == [[0, 0, 2, tokens], [1, 1, 2, tokens]]
    assert leader.stderr + follower.stderr == ""
    assert "Traceback" not in one.stderr
    assert follower.time > leader.time


OPEN = """
import os, sys
from codellama import Llama
llama = Llama.build(sys.argv[1], max_seq_len=512, dtype="float32", device="cpu")
stream = llama.stream_completion("def", temperature=0, max_gen_len=400)
print(next(stream, "nothing"))
if os.environ["RANK"] == "0":
    kept = [stream]
    kept.append(kept)  # a cycle: nothing collects it before the interpreter ends
"""


def test_a_stream_still_open_at_the_end_of_the_script_is_closed(tiny_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(OPEN)
    port = free_port()
    ends = run_scripts([([str(script), str(tiny_folder)], rank_env(rank, 2, port)) for rank in (0, 1)])
    assert [(end.code, end.stderr) for end in ends] == [(0, "")] * 2
    assert ends[0].answer != ends[1].answer == "nothing\n"


@pytest.mark.parametrize("env", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}])
def test_alone_no_group_is_made_and_no_socket_opened(
    env: dict[str, str], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    def sockets() -> int:
        targets = [os.readlink(f.path) if f.is_symlink() else "" for f in os.scandir("/proc/self/fd")]
        return sum(target.startswith("socket:") for target in targets)

    before, threads = sockets(), threading.active_count()
    one, two = build(tiny_folder), build(tiny_folder)
    assert one.generate(IDS, 4, temperature=0) == two.generate(IDS, 4, temperature=0)
    assert not dist.is_initialized()
    assert sockets() == before
    assert threading.active_count() == threads


def test_two_threads_take_turns(llama: Llama) -> None:
    prompts = [[[1, 5, 9]], [[1, 7, 2, 30]]]
    expected = [llama.generate(prompt, 40, temperature=0)[0] for prompt in prompts]
    found: dict[int, list[Any]] = {0: [], 1: []}

    def work(index: int) -> None:
        for _ in range(5):
            found[index].append(llama.generate(prompts[index], 40, temperature=0)[0])

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {index: [expected[index]] * 5 for index in (0, 1)}


def test_a_call_inside_the_same_threads_stream_is_refused(llama: Llama) -> None:
    stream = llama.stream_completion("def f", temperature=0, max_gen_len=30)
    first = next(stream)
    with pytest.raises(RuntimeError, match=r"open stream of this generator: exhaust it or close\(\) it first"):
        llama.generate([[1]], 2)
    rest = "".join(stream)
    assert first + rest == llama.text_completion(["def f"], temperature=0, max_gen_len=30)[0]["generation"]


def counted(folder: Path, size: int | None) -> list[tuple[int, int, str]]:
    """Open descriptors and threads after each of several builds that are closed, and what each of them said."""
    counts = []
    for _ in range(10):
        with build(folder, model_parallel_size=size) as llama:
            (result,) = llama.text_completion(["def"], temperature=0, max_gen_len=3)
        gc.collect()
        tasks = len(list(Path("/proc/self/task").iterdir()))
        counts.append((len(os.listdir("/proc/self/fd")), tasks, result["generation"]))
    return counts


@pytest.mark.parametrize("size", [None, 1])
def test_a_closed_generator_leaves_nothing_open(size: int | None, tiny_folder: Path) -> None:
    for counts in run_ranks(2, counted, tiny_folder, size):
        descriptors, tasks, texts = zip(*counts, strict=True)
        assert max(descriptors[2:]) <= descriptors[1], counts
        assert max(tasks[2:]) <= tasks[1], counts
        assert len(set(texts)) == 1


def on_meta_by_default(folder: Path) -> Any:
    torch.set_default_device("meta")
    llama = build(folder)
    return llama.text_completion(TEXTS, temperature=0.7, seed=3, max_gen_len=6, logprobs=True)


def test_a_default_device_of_the_caller_changes_nothing(tiny_folder: Path, llama: Llama) -> None:
    expected = llama.text_completion(TEXTS, temperature=0.7, seed=3, max_gen_len=6, logprobs=True)
    for found in run_ranks(2, on_meta_by_default, tiny_folder):
        assert approximate(found) == approximate(expected)
