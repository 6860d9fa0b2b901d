"""Model parallelism: which rank we are, how ranks talk, and the collectives of the model.

With `channel.py`, the only file that talks to other ranks. It knows nothing of layers, requests or text.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from codellama.channel import Channel, Failure, one_line, outcome_of, unwrap
from codellama.config import ModelArgs
from codellama.errors import ParallelSizeError, RankError

T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """This process's place among the others; the default is to be alone.

    Ranks of one replica are neighbours: world rank = replica · size + rank.

    Attributes:
        rank: place in the model-parallel group, which holds one copy of the weights together.
        size: number of ranks in that group.
        replica: which copy of the weights this rank belongs to.
        n_replicas: number of copies, each with its own leader (rank 0).
        group: for the collectives inside the model; None at size 1.
        channel: from this replica's leader to its other ranks; None at size 1.
        world: from world rank 0 to all others; None in a world of one, the same as channel where there is one replica.
    """

    rank: int = 0
    size: int = 1
    replica: int = 0
    n_replicas: int = 1
    group: dist.ProcessGroup | None = None
    channel: Channel | None = None
    world: Channel | None = None

    @property
    def world_rank(self) -> int:
        """Place among all processes."""
        return self.replica * self.size + self.rank

    @property
    def is_leader(self) -> bool:
        """True on the rank that decides tokens for its replica."""
        return self.rank == 0

    @property
    def capturable(self) -> bool:
        """True where the collectives of the model can be part of a CUDA graph: there are none, or they are NCCL's."""
        return self.group is None or dist.get_backend(self.group) == "nccl"

    def as_replica(self) -> "Parallel":
        """This place with its replica as its whole world: for replicas that work without each other."""
        return replace(self, n_replicas=1, world=self.channel)

    def check_divides(self, args: ModelArgs) -> None:
        """Refuse a model that cannot be split over this many ranks.

        Raises:
            ParallelSizeError: naming what does not divide.
        """
        sizes = {
            "n_heads": args.n_heads,
            "dim": args.dim,
            "hidden_dim": args.hidden_dim,
            "vocab_size": args.vocab_size,
        }
        odd = [f"{name} {value}" for name, value in sizes.items() if value % self.size]
        if args.kv_heads % self.size and self.size % args.kv_heads:
            odd.append(f"n_kv_heads {args.kv_heads} (neither divides the other)")
        if odd:
            raise ParallelSizeError(
                f"this model cannot be split over {self.size} ranks, which does not divide {', '.join(odd)}: "
                f"choose another model_parallel_size"
            )

    def share(self, make: Callable[[], T]) -> T:
        """Let world rank 0 alone make a value and give it to all ranks, or raise its error on all of them."""
        if self.world is None:
            return make()
        if self.world_rank == 0:
            outcome = outcome_of(make)
            self.world.send_object(outcome)
        else:
            outcome = self.world.receive_object()
        return unwrap(outcome)

    def deal(self, make: Callable[[], list[T]]) -> list[T]:
        """Let world rank 0 alone make a list, of which each replica's leader gets every n-th; other ranks get none.

        What `make` raises is raised on all ranks.
        """
        made: list[T] = []

        def make_here() -> list[T]:
            made.extend(make())
            return made if self.n_replicas > 1 else []  # with one replica, no other rank needs to see it

        dealt = self.share(make_here)
        mine = made if self.world_rank == 0 else dealt
        return mine[self.replica :: self.n_replicas] if self.is_leader else []

    def agree(self, make: Callable[[], T]) -> T:
        """Let each rank make its own value; where any of them fails, raise the first failure on all ranks."""
        if self.world is None:
            return make()
        with self._expecting():
            outcome = outcome_of(make)
        failure = outcome if isinstance(outcome, Failure) else None
        failures = self.world.gather_objects(failure)
        unwrap(next((failure for failure in failures if failure is not None), None))
        return unwrap(outcome)

    def collect(self, make: Callable[[], list[T]]) -> list[T]:
        """Let each leader make its share of a list that was dealt, and give the whole, in order, to all ranks.

        What `make` raises on a leader is raised on all ranks; what it raises on another rank ends that rank, since its
        leader waits for it inside the model.
        """
        if self.world is None:
            return make()
        with self._expecting():
            outcome: list[T] | Failure = outcome_of(make) if self.is_leader else make()
        hands = [unwrap(hand) for hand in self.world.gather_objects(outcome)[:: self.size]]
        whole: list[T] = []
        for index in range(sum(map(len, hands))):
            whole.append(hands[index % self.n_replicas][index // self.n_replicas])
        return whole

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a body on all ranks; what it raises on a leader is raised on all of them when it is over."""
        failure: list[Failure] = []
        try:
            with self._expecting():
                yield
        except GeneratorExit:  # closed early, which is no failure
            self._settle(failure)
            raise
        except RankError:
            raise
        except Exception as error:
            if self.world is None or not self.is_leader:
                raise
            failure.append(Failure(error))
        self._settle(failure)

    def hand_out_(self, values: Tensor) -> None:
        """Overwrite a tensor with the leader's, on all ranks of this replica; a collective of the device."""
        if self.group is not None:
            dist.broadcast(values, group=self.group, group_src=0)

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """Run a body whose collectives every rank must reach. Where it fails, the others wait in one: all is over.

        Raises:
            RankError: in place of what the body raised, if there are other ranks.
        """
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            if self.channel is None:
                raise
            raise self.give_up(f"failed inside the model: {one_line(error)}") from error
        except BaseException:
            self.give_up("was interrupted inside the model")
            raise

    def give_up(self, reason: str) -> RankError:
        """Make this rank's every later call fail at once, and return the error that says why."""
        error = RankError(f"rank {self.world_rank} {reason}")
        for channel in filter(None, (self.channel, self.world)):
            channel.give_up(error)
        return error

    def leave(self) -> None:
        """Take the groups of this place down, on all ranks together; a channel that was given up is not waited for."""
        channels = {id(channel): channel for channel in (self.channel, self.world) if channel is not None}
        for channel in channels.values():
            channel.close()
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)

    @contextmanager
    def _expecting(self) -> Iterator[None]:
        with ExitStack() as stack:
            for channel in filter(None, (self.channel, self.world)):
                stack.enter_context(channel.expecting())
            yield

    def _settle(self, failure: list[Failure]) -> None:
        if self.world is not None:
            for failures in self.world.gather_objects(failure):
                for found in failures:
                    unwrap(found)


def replica_size(model_parallel_size: int | None, world_size: int) -> int:
    """Say how many ranks share one copy of the weights; None means all of them.

    Raises:
        ParallelSizeError: the size does not divide the world.
    """
    size = world_size if model_parallel_size is None else model_parallel_size
    if size < 1 or world_size % size:
        raise ParallelSizeError(
            f"model_parallel_size {size} does not fit {world_size} processes: start a multiple of it, "
            f"torchrun --nproc_per_node {max(size, 1)} …"
        )
    return size


def join(
    model_parallel_size: int | None, device: torch.device, on_lost: Callable[[RankError], None] | None = None
) -> Parallel:
    """Find this process's place: alone in plain Python, or under torchrun one of WORLD_SIZE.

    A world of one uses no process group and no port. A caller's own default process group is used where there is one.
    Every call makes groups of its own, on all ranks, so a second generator in one process is independent of the first.

    Args:
        model_parallel_size: ranks that share one copy of the weights; None means all of them.
        device: where the collectives of the model run: NCCL on CUDA where it is built in, gloo elsewhere.
        on_lost: what a leader does when a follower has died, in place of ending its process by SIGTERM; see Channel.

    Raises:
        ParallelSizeError: the size does not divide the world.
    """
    in_group = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if in_group else int(os.environ.get("WORLD_SIZE", "1"))
    size = replica_size(model_parallel_size, world_size)
    if world_size == 1:
        return Parallel()
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    if not in_group:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise RankError(f"WORLD_SIZE is {world_size} but {', '.join(missing)} is not set: start with torchrun")
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            dist.init_process_group(backend)
        except RuntimeError as error:  # PyTorch's own has a trace of its C++
            raise RankError(
                f"rank {os.environ['RANK']} cannot meet the others at {address}: {one_line(error)}"
            ) from error
    world_rank, n_replicas = dist.get_rank(), world_size // size
    replica, rank = divmod(world_rank, size)
    group, channel = None, None
    for index in range(n_replicas):  # every process takes part in the making of every group
        members = list(range(index * size, (index + 1) * size))
        made = dist.new_group(members, backend=backend) if size > 1 else None
        control = dist.new_group(members, backend="gloo", timeout=CONTROL_TIMEOUT) if size > 1 else None
        if index == replica:
            group, channel = made, Channel(control, members, on_lost) if control is not None else None
    everyone = list(range(world_size))
    world = channel
    if n_replicas > 1:
        world = Channel(dist.new_group(everyone, backend="gloo", timeout=CONTROL_TIMEOUT), everyone, on_lost)
    parallel = Parallel(rank, size, replica, n_replicas, group, channel, world)
    if backend == "nccl" and world is not None:
        gpu = str(torch.cuda.get_device_properties(device).uuid)
        gpus = world.gather_objects((socket.gethostname(), gpu))
        parallel.agree(lambda: refuse_shared_gpus(gpus))
    return parallel


def refuse_shared_gpus(gpus: Sequence[tuple[str, str]]) -> None:
    """Refuse two ranks on one GPU, where NCCL would hang or say "duplicate GPU".

    Args:
        gpus: host and identity of each rank's GPU, in the order of ranks.

    Raises:
        RankError: naming the ranks.
    """
    for rank, gpu in enumerate(gpus):
        if gpu in gpus[:rank]:
            raise RankError(
                f"ranks {gpus.index(gpu)} and {rank} both use GPU {gpu[1]} of {gpu[0]}; each rank needs its own: leave "
                f'device out or pass "cuda", and start as many ranks as there are GPUs'
            )


CONTROL_TIMEOUT = timedelta(days=365)
"""A rank may wait for its leader as long as a person thinks; a leader that died closes the connection at once."""


def sum_over_ranks(x: Tensor, parallel: Parallel) -> Tensor:
    """Add up the ranks' tensors, in place.

    Raises:
        RankError: a rank is gone.
    """
    if parallel.size > 1:
        try:
            dist.all_reduce(x, group=parallel.group)
        except RuntimeError as error:
            raise lost_contact(parallel, error) from error
    return x


def gather_last(x: Tensor, parallel: Parallel) -> Tensor:
    """Join the ranks' parts along the last axis, in rank order.

    Raises:
        RankError: a rank is gone.
    """
    if parallel.size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(parallel.size)]
    try:
        dist.all_gather(parts, x.contiguous(), group=parallel.group)
    except RuntimeError as error:
        raise lost_contact(parallel, error) from error
    return torch.cat(parts, dim=-1)


def lost_contact(parallel: Parallel, error: RuntimeError) -> RankError:
    """Say in one line what a failed collective means."""
    return parallel.give_up(f"lost contact with another rank, which died or raised ({one_line(error)})")
