"""The processes of one job: one alone, or several side by side under torchrun.

All of them run the same code, each over its own share of the samples, and meet in the few calls
below. What decides how a run goes on is computed by the first and told to the others, so that
they never part. Arrays of NumPy travel over gloo, gradients on GPUs over NCCL.
"""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import OptionError, RankError, first_line

if TYPE_CHECKING:
    import torch

__all__ = ["ALONE", "Ranks", "among", "current", "joined"]

T = TypeVar("T")
S = TypeVar("S")
Array = npt.NDArray[Any]

TIMEOUT, TIMEOUT_S = "DYT_COMPILE_TIMEOUT_S", 1800.0
"""How long a rank waits for another one: the variable that sets it, and what it is without. It has
to be longer than the longest fit of a site, which the first rank makes while the others wait."""

TOLD = "dyt_compile/told"
"""Counts the ranks that have an error to tell: the first of them does."""


class Ranks:
    """A process alone: what it would ask of others it has already.

    number, size: which of how many; local: which of those on this machine; threads: of ONNX
    Runtime, 0 for as many as it likes.
    """

    number, size, local, threads = 0, 1, 0, 0

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first rank, where alone it runs; all have it then."""
        return make()

    def gathered(self, own: T) -> list[T]:
        """What each rank has, in their order."""
        return [own]

    def spread(self, function: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """The function's values for all items, each computed by one rank."""
        return list(map(function, items))

    def collected(self, make: Callable[[], Sequence[Array]]) -> Iterator[list[Array]]:
        """On the first rank, what `make` gives on each of the others, one after the other."""
        return iter(())

    def add(self, arrays: Iterable[Array]) -> None:
        """Make the first rank's arrays the sums over all ranks; the others' are lost."""

    def tensors(self, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """As `first`, of tensors: without a second copy of all of them."""
        return make()

    def shares(self, own: torch.Tensor) -> torch.Tensor:
        """Which part of the sum over all ranks each number is; of nothing an equal one."""
        return own.new_ones(own.shape)

    def adding(
        self, module: torch.nn.Module, parts: Iterable[torch.nn.Module] | None = None
    ) -> torch.nn.Module:
        """The module with gradients that are sums over the ranks; they start from equal values.

        parts: each rank holds a share of the weights, and gathers those of one part at a time.
        """
        return module

    def meeting(self) -> AbstractContextManager[None]:
        """Around what talks to other ranks by itself, such as the gradients of `adding`."""
        return nullcontext()


ALONE = Ranks()
_current: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def current() -> Ranks:
    """The ranks of this job."""
    return _current.get()


@contextmanager
def among(ranks: Ranks) -> Iterator[None]:
    """Let what is done inside be done by these ranks, or by one of them ALONE."""
    token = _current.set(ranks)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Take the place that torchrun gives this process in its environment; without one, be alone.

    An error is told by one rank: the others end by SystemExit. Raises OptionError for a timeout
    that is no number above 0, RankError where the ranks do not meet, or one is lost.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    ranks, store = _met(_timeout_s())
    if ranks.number:
        logging.getLogger("dyt_compile").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    before = signal.signal(signal.SIGTERM, ranks.ended)
    try:
        with among(ranks):
            yield ranks
        ranks.leave()
        signal.signal(signal.SIGTERM, before)
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, since this process ends by now
        if not _is_first_to_tell(store):
            raise SystemExit(1) from error
        raise


class _TorchRanks(Ranks):
    """One of several processes, which meet by torch.distributed."""

    def __init__(self, number: int, size: int, timeout_s: float) -> None:
        import torch

        self.number, self.size = number, size
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.threads = torch.get_num_threads()
        self._timeout_s = timeout_s

    def first(self, make: Callable[[], T]) -> T:
        """Broadcast."""
        held: list[Any] = [None if self.number else make()]
        with self.meeting():
            _distributed().broadcast_object_list(held, src=0)
        found: T = held[0]
        return found

    def gathered(self, own: T) -> list[T]:
        """Of small things."""
        held: list[Any] = [None] * self.size
        with self.meeting():
            _distributed().all_gather_object(held, own)
        return held

    def spread(self, function: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """Dealt by turns."""
        parts = self.gathered([function(item) for item in items[self.number :: self.size]])
        return [parts[place % self.size][place // self.size] for place in range(len(items))]

    def collected(self, make: Callable[[], Sequence[Array]]) -> Iterator[list[Array]]:
        """From point to point."""
        own = [np.require(a, requirements=["C", "W"]) for a in make()] if self.number else []
        shapes = self.gathered([(array.shape, array.dtype.name) for array in own])
        if self.number:
            with self.meeting():
                for array in own:
                    _distributed().send(_bytes(array), dst=0)
            return
        for other in range(1, self.size):
            arrays = [np.empty(shape, dtype) for shape, dtype in shapes[other]]
            with self.meeting():
                for array in arrays:
                    _distributed().recv(_bytes(array), src=other)
            yield arrays

    def add(self, arrays: Iterable[Array]) -> None:
        """Reduce."""
        import torch

        with self.meeting():
            for array in arrays:
                _distributed().reduce(torch.from_numpy(array), dst=0)

    def tensors(self, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Broadcast, one by one."""
        import torch

        held = {} if self.number else make()
        about = self.first(lambda: {name: (t.shape, t.dtype) for name, t in held.items()})
        for name, (shape, dtype) in about.items():
            tensor = held.setdefault(name, torch.empty(shape, dtype=dtype))
            with self.meeting():
                _distributed().broadcast(tensor, src=0)
        return held

    def shares(self, own: torch.Tensor) -> torch.Tensor:
        """Of an all-reduced sum."""
        total = own.clone()
        with self.meeting():
            _distributed().all_reduce(total)
        return own.div(total).nan_to_num(nan=1 / self.size)

    def adding(
        self, module: torch.nn.Module, parts: Iterable[torch.nn.Module] | None = None
    ) -> torch.nn.Module:
        """DistributedDataParallel, which by itself would divide the sums by the ranks, or FSDP2."""
        from torch.nn.parallel import DistributedDataParallel

        from .shards import sharded

        if parts is not None:
            with self.meeting():
                return sharded(module, parts, self._another_group())
        with self.meeting():
            # A model may hold parameters that the output measured does not depend on.
            parallel = DistributedDataParallel(
                module, find_unused_parameters=True, gradient_as_bucket_view=True
            )
        parallel.register_comm_hook(None, lambda _, bucket: _added(bucket.buffer()))
        return parallel

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Tell an error of torch.distributed in words."""
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"rank {self.number} of {self.size} cannot go on with the others: one of them has "
                f"ended, or did not answer within {self._timeout_s:g} s ({first_line(error)})"
            ) from error

    def ended(self, number: int, frame: Any) -> NoReturn:
        """What SIGTERM does."""
        raise RankError(
            f"rank {self.number} of {self.size} was ended from outside: another rank has ended, "
            "or the job was stopped"
        )

    def _another_group(self) -> Any:
        """All ranks once more, for what keeps its group until Python ends, as caches of DTensor do.

        By then its threads are idle, and none aborts the process.
        """
        return _distributed().new_group(timeout=timedelta(seconds=self._timeout_s))

    def leave(self) -> None:
        """Wait for the others, and end the meeting."""
        with self.meeting():
            _distributed().barrier()
            _distributed().destroy_process_group()


def _met(timeout_s: float) -> tuple[_TorchRanks, Any]:
    """This process's place, and what all of them can read and write even when some are gone."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings come from every rank
    import torch

    # Dynamo imports it, and then defaults of its functions keep the group: its threads would still
    # run while Python ends, and one that lets go of a tensor by then aborts the process.
    import torch.distributed.nn

    distributed = _distributed()
    wait = timedelta(seconds=timeout_s)
    try:
        store, number, size = next(distributed.rendezvous("env://", timeout=wait))
        if torch.cuda.is_available() and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=distributed.PrefixStore("dyt_compile", store),
            rank=number,
            world_size=size,
            timeout=wait,
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise RankError(
            f"the ranks do not meet: {first_line(error)}; start them with torchrun"
        ) from error
    return _TorchRanks(number, size, timeout_s), store


def _timeout_s() -> float:
    text = os.environ.get(TIMEOUT, str(TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise OptionError(f"{TIMEOUT} is {text!r}; allowed: a number of seconds above 0")
    return seconds


def _is_first_to_tell(store: Any) -> bool:
    """Whether no other rank tells an error; where nobody can say, this one does."""
    try:
        return int(store.add(TOLD, 1)) == 1
    except RuntimeError:
        return True


def _added(tensor: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    """The sum over all ranks, in its place, once it is there."""
    future: Any = _distributed().all_reduce(tensor, async_op=True).get_future()
    added: torch.futures.Future[torch.Tensor] = future.then(lambda done: done.value()[0])
    return added


def _bytes(array: Array) -> torch.Tensor:
    """An array's memory: torch has no unsigned integers to send."""
    import torch

    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed
