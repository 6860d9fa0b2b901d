import pickle
import random
import resource
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from codellama import Llama, channel
from codellama.channel import Failure, one_line, outcome_of, unwrap
from codellama.errors import ContextLengthError, RankError
from codellama.parallel import join
from tests.support.distributed import run_ranks

CPU = torch.device("cpu")


class OddError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first}\n{second}")


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __reduce__(self) -> Any:
        raise RuntimeError("no pickle")


def fail(error: Exception) -> Any:
    raise error


def test_a_failure_travels_as_it_is() -> None:
    arrived = pickle.loads(pickle.dumps(outcome_of(lambda: fail(ContextLengthError(9, 8, "prompt 3")))))
    with pytest.raises(ContextLengthError, match="prompt 3 has 9 tokens, but max_seq_len is 8"):
        unwrap(arrived)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OddError(1, 2), "another rank raised tests.test_channel.OddError: 1"),
        (MuteError(), "another rank raised tests.test_channel.MuteError: <exception str() failed>"),
    ],
)
def test_what_cannot_be_pickled_stays_itself_here_and_is_told_elsewhere(error: Exception, text: str) -> None:
    failure = outcome_of(lambda: fail(error))
    assert isinstance(failure, Failure)
    assert failure.error is error
    arrived = pickle.loads(pickle.dumps(failure))
    assert isinstance(arrived.error, RankError)
    assert str(arrived.error) == text


def test_a_lost_rank_is_not_held_back() -> None:
    with pytest.raises(RankError, match="gone"):
        outcome_of(lambda: fail(RankError("gone")))


GLOO = "[/third_party/gloo/pair.cc:553] Closed by peer [1.2.3.4]:9. This is typically a crash.\nLook there."


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(GLOO), "Closed by peer [1.2.3.4]:9"),
        (RuntimeError(), ""),
        (ValueError("one\ntwo"), "ValueError: one"),
        (KeyError("k"), "KeyError: 'k'"),
    ],
)
def test_errors_in_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line


def talk(seed: int) -> list[Any]:
    """Send and gather values of all sizes, while idle messages fly and ranks come late."""
    channel.IDLE_SECONDS = 0.002
    line = join(None, CPU).channel
    assert line is not None
    script = random.Random(seed)
    mine = random.Random(dist.get_rank())
    heard: list[Any] = []
    for step in range(150):
        size = script.choice([1, 2, 253, 254, 255, 256, 4000])
        values = list(range(step, step + size))
        kind = script.choice(["integers", "object", "gather"])
        if mine.random() < 0.2:
            time.sleep(mine.random() * 0.02)
        if kind == "gather":
            heard.append(line.gather_objects((dist.get_rank(), values)))
        elif line.is_leader:
            (line.send_integers if kind == "integers" else line.send_object)(values)
            heard.append(values)
        else:
            heard.append(line.receive_integers() if kind == "integers" else line.receive_object())
    return heard


def test_all_sizes_arrive_in_order_whoever_is_late() -> None:
    first, *others = run_ranks(4, talk, 1, timeout=60)
    assert len(first) == 150
    assert others == [first] * 3
    gathered = [entry for entry in first if isinstance(entry[0], tuple)]
    assert len(gathered) > 30
    assert all([rank for rank, _ in entry] == [0, 1, 2, 3] for entry in gathered)


def disagree() -> list[str]:
    line = join(None, CPU).channel
    assert line is not None
    if line.is_leader:
        line.send_integers([1])
        return []
    texts = []
    for _ in range(2):
        with pytest.raises(RankError) as caught:
            line.receive_object()
        texts.append(str(caught.value))
    return texts


def test_different_calls_are_told_and_then_all_is_over() -> None:
    _, texts = run_ranks(2, disagree)
    assert texts == [
        "rank 1 and the leader, rank 0, are in different calls: "
        "every rank must make the same calls in the same order"
    ] * 2  # fmt: skip


def wait_long(folder: Path, timeout: float, pause: float) -> tuple[list[Any], list[float]]:
    """Answers before, between and after two pauses, and this process's CPU share while it waits for the others."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    llama = Llama.build(folder, max_seq_len=64, dtype="float32", device="cpu")
    answers, shares = [llama.generate([[1, 5]], 4, temperature=0)[0]], []
    for leader_sleeps in (True, False):
        wall, cpu = time.monotonic(), cpu_seconds()
        if llama.parallel.is_leader == leader_sleeps:
            time.sleep(pause)
        answers.append(llama.generate([[1, 5]], 4, temperature=0)[0])
        shares.append((cpu_seconds() - cpu) / (time.monotonic() - wall))
    return answers, shares


def cpu_seconds() -> float:
    """Of all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_waiting_outlasts_the_callers_timeout_and_burns_no_core(tiny_folder: Path, llama: Llama) -> None:
    expected = llama.generate([[1, 5]], 4, temperature=0)[0]
    for answers, shares in run_ranks(2, wait_long, tiny_folder, 2, 4.5):
        assert answers == [expected] * 3
        assert max(shares) < 0.05
