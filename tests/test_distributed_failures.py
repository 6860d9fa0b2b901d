import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from codellama import Llama
from codellama.errors import CheckpointError, NumericalError, ParallelSizeError, RankError
from tests.support import tiny
from tests.support.distributed import end_ranks, run_ranks, start_ranks
from tests.test_distributed import IDS, attempt, build


def live(folder: Path, size: int, victim: int, when: str) -> None:
    runtime: dict[str, Any] = {"max_seq_len": 8192, "max_batch_size": 1, "dtype": "float32", "device": "cpu"}
    llama = Llama.build(folder, model_parallel_size=size, **runtime)
    rank = llama.parallel.world_rank
    llama.generate([[1, 2], [3]], 2, temperature=0)
    if rank == victim:
        how = signal.SIGINT if "Ctrl-C" in when else signal.SIGKILL
        threading.Timer(0.8, os.kill, (os.getpid(), how)).start()
    if rank == (victim if "leader waits" in when else 0) and "own code" in when:
        time.sleep(60)
    llama.generate([[1, 2], [3, 4]], 1500 if size == 1 else 8000, temperature=0)


@pytest.mark.parametrize(
    ("size", "model_parallel_size", "victim", "when"),
    [
        (2, 2, 0, "all generate"),
        (2, 2, 1, "all generate"),
        (4, 4, 3, "all generate"),
        (4, 2, 3, "all generate"),
        (4, 1, 2, "all generate"),
        (2, 2, 1, "the leader is in its own code"),
        (2, 2, 0, "the leader is in its own code"),
        (4, 4, 3, "the leader is in its own code"),
        (4, 2, 3, "the leader is in its own code"),
        (4, 4, 2, "the leader waits for its own code"),
        (4, 2, 3, "the leader waits for its own code"),
        (2, 2, 1, "the leader is in its own code, Ctrl-C"),
    ],
)
def test_a_rank_that_dies_ends_all_in_seconds(
    size: int, model_parallel_size: int, victim: int, when: str, tiny_folder: Path, tmp_path: Path
) -> None:
    ranks = start_ranks(size, live, tiny_folder, model_parallel_size, victim, when, stderr=tmp_path)
    ends = end_ranks(ranks, tmp_path, timeout=40)
    died = ends[victim].time
    assert ends[victim].code == (0 if "Ctrl-C" in when else -signal.SIGKILL)
    for rank, end in enumerate(ends):
        if rank != victim:
            print(f"rank {rank} ended {end.time - died:.2f} s later: exit {end.code}")  # noqa: T201
            assert end.time - died < 10
            assert f"rank {rank} lost " in f"{end.answer}{end.stderr}"


def damaged(folder: Path, size: int, victim: int) -> list[Any]:
    llama = build(folder, model_parallel_size=size)
    row = llama.model.output.weight[0]
    good = row.clone()
    if llama.parallel.world_rank == victim:
        row.fill_(float("nan"))
    found = [
        attempt(lambda: llama.generate([[1, 2], [3, 4]], 4, temperature=0)),
        attempt(lambda: list(llama.stream_completion("a", temperature=0, max_gen_len=4))),
        attempt(lambda: llama.generate(IDS[2:] * 2, 2, logprobs=True, echo=True)),  # at the first of two pieces
    ]
    row.copy_(good)
    return [*found, llama.generate([[1, 2], [3, 4]], 4, temperature=0)[0]]


@pytest.mark.parametrize(("processes", "size", "victim", "streams"), [(2, 2, 1, True), (4, 2, 3, False)])
def test_nan_on_one_rank_is_named_on_all(
    processes: int, size: int, victim: int, streams: bool, tiny_folder: Path, llama: Llama
) -> None:
    expected = llama.generate([[1, 2], [3, 4]], 4, temperature=0)[0]
    for call, stream, long, after in run_ranks(processes, damaged, tiny_folder, size, victim, timeout=60):
        for kind, text in [call, long, *([stream] if streams else [])]:
            assert kind is NumericalError
            assert f"NaN instead of logits on rank {victim}: " in text
        assert after == expected


def broken(folder: Path, victim: int) -> list[Any]:
    """One rank alone fails inside the model, and goes on as if nothing had happened."""
    llama = build(folder)

    def fail(*_: Any) -> None:
        raise MemoryError("on this rank alone")

    if llama.parallel.rank == victim:
        llama.model.layers[1].attention.wo.forward = fail  # type: ignore[method-assign]
    started = time.monotonic()
    found = [attempt(lambda: llama.generate([[1, 2]], 4, temperature=0)) for _ in range(2)]
    return [time.monotonic() - started, *found]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_fails_inside_the_model_ends_all(victim: int, tiny_folder: Path) -> None:
    for rank, (seconds, *calls) in enumerate(run_ranks(2, broken, tiny_folder, victim, timeout=30)):
        assert seconds < 10
        for kind, text in calls:
            assert kind is RankError
            said = "failed inside the model: MemoryError: on this rank alone" if rank == victim else "lost contact"
            assert text.startswith(f"rank {rank} {said}")


def interrupt(ids: Any, logits: Any) -> Any:
    raise KeyboardInterrupt


def interrupted(folder: Path) -> Any:
    llama = build(folder)
    try:
        llama.generate([[1, 2]], 4, temperature=0, logits_processor=interrupt)
    except (KeyboardInterrupt, RankError) as error:
        return type(error), attempt(lambda: llama.generate([[1, 2]], 4, temperature=0))


def test_after_a_caught_interrupt_the_next_call_says_so_at_once(tiny_folder: Path) -> None:
    (kind, after), (other, _) = run_ranks(2, interrupted, tiny_folder, timeout=30)
    assert (kind, after) == (KeyboardInterrupt, (RankError, "rank 0 was interrupted"))
    assert other is RankError


def disagree(folder: Path) -> list[Any]:
    """The leader of the second replica alone gets an argument that is no use."""
    llama = build(folder, model_parallel_size=2)
    processor: Any = "no" if llama.parallel.world_rank == 2 else None
    found = attempt(lambda: llama.generate(IDS[:2], 3, temperature=0, logits_processor=processor))
    return [found, llama.generate(IDS[:2], 3, temperature=0)[0]]


def test_a_mistake_in_one_replica_is_raised_in_all(tiny_folder: Path, llama: Llama) -> None:
    mistake = (TypeError, "logits_processor is 'no'; a callable was expected")
    expected = [mistake, llama.generate(IDS[:2], 3, temperature=0)[0]]
    assert run_ranks(4, disagree, tiny_folder, timeout=30) == [expected] * 4


def unfit(good: Path, cut: Path) -> list[Any]:
    mine = int(os.environ["RANK"])
    return [
        attempt(lambda: build(good, model_parallel_size=2)),
        attempt(lambda: build(good)),
        attempt(lambda: build(good.parent / "nowhere" if mine == 1 else good)),
        attempt(lambda: build(cut if mine == 2 else good)),
    ]


def test_what_one_rank_cannot_load_is_raised_on_all(tiny_folder: Path, tmp_path: Path) -> None:
    cut = tiny.tiny_checkpoint(tmp_path / "cut")
    weights = (cut / "consolidated.00.pth").read_bytes()
    (cut / "consolidated.00.pth").write_bytes(weights[: len(weights) // 2])
    first, *others = run_ranks(3, unfit, tiny_folder, cut)
    assert others == [first] * 2
    assert [kind for kind, _ in first] == [ParallelSizeError, ParallelSizeError, CheckpointError, CheckpointError]
    assert "model_parallel_size 2 does not fit 3 processes" in first[0][1]
    assert "3 ranks, which does not divide n_heads 8" in first[1][1]
    assert "nowhere does not exist" in first[2][1]
    assert "cannot be read, it is probably truncated" in first[3][1]
