import io
import socket
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import layers as fairscale
from torch import Tensor
from torch.nn import functional as F

from codellama.config import ModelArgs
from codellama.errors import ParallelSizeError, PromptError, RankError
from codellama.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from codellama.parallel import Parallel, join
from tests.support.distributed import run_ranks

CPU = torch.device("cpu")
ARGS = ModelArgs(dim=48, n_layers=1, n_heads=8, n_kv_heads=2, vocab_size=320, multiple_of=40, rope_theta=1e4)


def attempt(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        return type(error), str(error)


def weights() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weights of a linear to 24 features and back from 24 to 16, ids, an embedding."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, generator=random)
    up, down = torch.randn(24, 16, generator=random), torch.randn(16, 24, generator=random)
    table = torch.randn(10, 16, generator=random)
    return x, up, down, torch.tensor([[3, 9], [0, 1]]), table


def layers(size: int | None) -> dict[str, Any]:
    torch.manual_seed(5)
    before = torch.get_default_dtype(), torch.get_default_device(), torch.random.get_rng_state(), sys.stdout
    printed = io.StringIO()
    with redirect_stdout(printed):
        parallel = join(size, CPU)
        column = ColumnParallelLinear(16, 24, parallel)
        gathering = ColumnParallelLinear(16, 24, parallel, gather_output=True)
        row = RowParallelLinear(24, 16, parallel)
        embedding = ParallelEmbedding(10, 16, parallel)
    after = torch.get_default_dtype(), torch.get_default_device(), torch.random.get_rng_state(), sys.stdout
    built = (column, gathering, row, embedding)
    meta = [layer.weight.device.type for layer in built]
    x, up, down, ids, table = weights()
    rank, n = parallel.rank, parallel.size
    parts = (up.chunk(n)[rank], up.chunk(n)[rank], down.chunk(n, 1)[rank], table.chunk(n, 1)[rank])
    shapes = [layer.weight.shape for layer in built] == [part.shape for part in parts]
    for layer, part in zip(built, parts, strict=True):
        layer.weight = torch.nn.Parameter(part, requires_grad=False)
    kinds = (fairscale.ColumnParallelLinear, fairscale.RowParallelLinear, fairscale.ParallelEmbedding)
    return {
        "place": (parallel.rank, parallel.size, parallel.replica, parallel.n_replicas, parallel.world_rank),
        "kinds": [isinstance(layer, kind) for layer, kind in zip((column, row, embedding), kinds, strict=True)],
        "meta": meta,
        "shapes": shapes,
        "untouched": (
            before[:2] == after[:2], torch.equal(before[2], after[2]), before[3] is after[3], printed.getvalue()
        ),
        "share": column(x),
        "gathered": gathering(x),
        "summed": row(column(x)),
        "embedded": embedding(ids),
    }  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4])
def test_layers_compute_what_the_dense_ones_do(size: int) -> None:
    x, up, down, ids, table = weights()
    dense = F.linear(x, up)
    ranks = [layers(None)] if size == 1 else run_ranks(size, layers, None)
    for rank, found in enumerate(ranks):
        assert found["place"] == (rank, size, 0, 1, rank)
        assert found["kinds"] == [True, True, True]
        assert found["meta"] == ["meta"] * 4
        assert found["shapes"] is True
        assert found["untouched"] == (True, True, True, "")
        torch.testing.assert_close(found["share"], dense.chunk(size, dim=-1)[rank])
        torch.testing.assert_close(found["gathered"], dense)
        torch.testing.assert_close(found["summed"], F.linear(dense, down))
        assert torch.equal(found["embedded"], F.embedding(ids, table))


def test_ranks_of_a_replica_are_neighbours() -> None:
    found = run_ranks(4, layers, 2)
    assert [rank["place"] for rank in found] == [(0, 2, 0, 2, 0), (1, 2, 0, 2, 1), (0, 2, 1, 2, 2), (1, 2, 1, 2, 3)]
    x, up, *_ = weights()
    for rank in found:
        torch.testing.assert_close(rank["gathered"], F.linear(x, up))


class OddError(Exception):
    """Cannot be pickled."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} is odd")
        self.opened = open
        self.second = lambda: second


def fail(error: Exception) -> Any:
    raise error


def agreements(size: int | None) -> dict[str, Any]:
    """What every way of acting together gives on this rank."""
    parallel = join(size, CPU)
    rank, leader = parallel.world_rank, parallel.is_leader

    def body(error: Exception | None) -> None:
        with parallel.together():
            if error is not None:
                raise error

    return {
        "share": parallel.share(lambda: f"from {rank}"),
        "share failed": attempt(lambda: parallel.share(lambda: fail(PromptError(f"of {rank}")))),
        "agree": parallel.agree(lambda: rank),
        "agree failed": attempt(lambda: parallel.agree(lambda: fail(ValueError(f"{rank}")) if rank == 3 else rank)),
        "deal": parallel.deal(lambda: list("abcde")),
        "deal nothing": parallel.deal(list),
        "deal failed": attempt(lambda: parallel.deal(lambda: fail(ZeroDivisionError("nothing to deal")))),
        "collect": parallel.collect(lambda: [piece.upper() for piece in parallel.deal(lambda: list("abcde"))]),
        "collect failed": attempt(
            lambda: parallel.collect(lambda: fail(KeyError("k")) if leader and parallel.replica == 1 else [])
        ),
        "collect odd": attempt(lambda: parallel.collect(lambda: fail(OddError(1, 2)) if leader else [])),
        "together failed": attempt(lambda: body(ZeroDivisionError("late") if rank == 2 else None)),
        "together odd": attempt(lambda: body(OddError(3, 4) if rank == 0 else None)),
        "together": body(None),
        "large": len(parallel.share(lambda: "x" * 3_000_000)),
    }


def test_ranks_act_together() -> None:
    ranks = run_ranks(4, agreements, 2)
    odd = "another rank raised tests.test_parallel.OddError: "
    for rank, found in enumerate(ranks):
        assert found["share"] == "from 0"
        assert found["share failed"] == (PromptError, "of 0")
        assert found["agree"] == rank
        assert found["agree failed"] == (ValueError, "3")
        assert found["deal"] == {0: ["a", "c", "e"], 2: ["b", "d"]}.get(rank, [])
        assert found["deal nothing"] == []
        assert found["deal failed"] == (ZeroDivisionError, "nothing to deal")
        assert found["collect"] == list("ABCDE")
        assert found["collect failed"] == (KeyError, "'k'")
        assert found["collect odd"] == ((OddError, "1 is odd") if rank == 0 else (RankError, odd + "1 is odd"))
        assert found["together failed"] == (ZeroDivisionError, "late")
        assert found["together odd"] == ((OddError, "3 is odd") if rank == 0 else (RankError, odd + "3 is odd"))
        assert found["large"] == 3_000_000


def test_alone_nothing_is_sent() -> None:
    found = agreements(None)
    assert found["share"] == "from 0"
    assert found["deal"] == list("abcde")
    assert found["collect"] == list("ABCDE")
    assert found["collect odd"] == (OddError, "1 is odd")
    assert found["together odd"] == (OddError, "3 is odd")


def given_up() -> list[Any]:
    parallel = join(None, CPU)

    def body() -> None:
        with parallel.lockstep():
            if parallel.rank == 1:
                raise RuntimeError("out of paper")

    found = [attempt(body)]
    if parallel.rank == 1:
        found += [attempt(lambda: parallel.share(int)), attempt(lambda: parallel.agree(int))]
    return found


def test_a_rank_that_leaves_the_others_behind_is_of_no_more_use() -> None:
    bystander, failed = run_ranks(2, given_up)
    assert bystander == [None]
    assert failed == [(RankError, "rank 1 failed inside the model: out of paper")] * 3


def test_lockstep_alone_changes_nothing() -> None:
    with pytest.raises(ZeroDivisionError, match="mine"), Parallel().lockstep():
        raise ZeroDivisionError("mine")


@pytest.mark.parametrize(
    ("size", "complaint"),
    [
        (3, "3 ranks, which does not divide n_heads 8, hidden_dim 160, vocab_size 320, n_kv_heads 2"),
        (16, "16 ranks, which does not divide n_heads 8: "),
        (6, "n_heads 8, hidden_dim 160, vocab_size 320: "),
    ],
)
def test_a_size_that_does_not_divide_is_named(size: int, complaint: str) -> None:
    with pytest.raises(ParallelSizeError, match=complaint):
        Parallel(size=size).check_divides(ARGS)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_sizes_that_divide(size: int) -> None:
    Parallel(size=size).check_divides(ARGS)


@pytest.mark.parametrize("size", [0, -1, 2])
def test_a_size_that_the_processes_cannot_form(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ParallelSizeError, match=f"model_parallel_size {size} does not fit 3 processes"):
        join(size, CPU)


def test_half_an_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RankError, match="MASTER_ADDR, MASTER_PORT is not set"):
        join(None, CPU)


def test_a_port_that_somebody_else_has_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RankError, match=f"rank 0 cannot meet the others at 127.0.0.1:{place['MASTER_PORT']}: .*"):
            join(None, torch.device("cpu"))
    assert not dist.is_initialized()
