"""Ranks of one command: connect to the others, and report missing ranks.

Ranks communicate through torch.distributed's key-value store, in which every rank writes a heartbeat: the others wait
for a rank that works for hours, and a rank that died is reported within `timeout_s`. Tensors are exchanged by gloo on
the CPU and by NCCL on GPUs.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from sae_lens_maira.errors import ConfigError, MairaError, RankError
from sae_lens_maira.ranks import RankInfo, announce, local_rank, rank_info

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

TIMEOUT_S = 600.0
_INTERVAL_S = 0.5
_SILENT_AFTER_ERROR_S = 5.0
"""Seconds without a heartbeat after which a rank is named as the cause of a failed exchange of tensors."""
_generations = 0


class Ranks:
    """Processes that run the same command, as seen by one of them.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        timeout_s: A rank without a heartbeat for so many seconds counts as dead.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        connect: "Callable[[], Store] | None" = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Connect and start the heartbeat.

        Args:
            rank: Number of this process.
            size: Number of processes.
            connect: Function that returns a connection to the ranks' store; None if there is no address.
            timeout_s: Seconds without a heartbeat after which a rank counts as dead.
        """
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._group = False
        self._meetings: dict[str, int] = {}
        self._ended = threading.Event()
        self._store: Store | None = None
        if connect is not None:
            self._store = connect()
            self._heard = {r: ("", time.monotonic()) for r in range(size)}
            self._pulse = threading.Thread(
                target=self._beat, args=(connect(),), daemon=True, name="heartbeat"
            )
            self._pulse.start()

    @property
    def connected(self) -> bool:
        """Whether the ranks are connected; true for a single process."""
        return self.size == 1 or self._store is not None

    def barrier(self, name: str) -> None:
        """Wait until every rank has reached the barrier of this name.

        Without an address it returns immediately.

        Args:
            name: Name of the finished work, for the error message.

        Raises:
            RankError: A rank failed or died; the message names it.
        """
        if self._store is None:
            return
        turn = self._meetings[name] = self._meetings.get(name, 0) + 1
        with self._reachable():
            self._store.set(f"at/{name}/{turn}/{self.rank}", "")
            missing = set(range(self.size)) - {self.rank}
            while missing:
                missing = {r for r in missing if not self._store.check([f"at/{name}/{turn}/{r}"])}
                if missing and (lost := self._lost(missing, self.timeout_s)):
                    raise RankError(f"{lost} The others waited for it ({name}). {_AGAIN}")
                if missing:
                    time.sleep(0.05)

    def least(self, name: str, number: int) -> int:
        """The smallest of the numbers of all ranks; a barrier of the same name.

        Args:
            name: What the number is, for the message.
            number: This rank's number.

        Raises:
            RankError: A rank failed or died; the message names it.
        """
        if self._store is None:
            return number
        turn = self._meetings.get(name, 0) + 1
        with self._reachable():
            self._store.set(f"number/{name}/{turn}/{self.rank}", str(number))
        self.barrier(name)
        with self._reachable():
            return min(int(self._store.get(f"number/{name}/{turn}/{r}")) for r in range(self.size))

    def join_group(self, device: str = "cpu") -> None:
        """Start torch.distributed's default group, for the exchange of tensors.

        Args:
            device: Device of the tensors; "cuda" or "cuda:1" uses NCCL, anything else gloo.

        Raises:
            ConfigError: The ranks have no rendezvous address.
            RankError: A rank did not join.
        """
        if self._store is None:
            raise ConfigError(
                f"{self.size} ranks that exchange tensors need a rendezvous address, and there is none. Start them "
                "with torchrun or srun, or set MASTER_ADDR and MASTER_PORT to a host and free port of rank 0."
            )
        import torch
        import torch.distributed as dist
        from torch._C._distributed_c10d import PrefixStore

        on_gpu = device.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(torch.device(device) if ":" in device else local_rank())
        if not self._group:
            with self._reachable():
                dist.init_process_group(
                    "nccl" if on_gpu else "gloo",
                    store=PrefixStore("group", self._store),
                    rank=self.rank,
                    world_size=self.size,
                    timeout=timedelta(seconds=self.timeout_s),
                )
            self._group = True

    def explain(self, error: BaseException) -> RankError:
        """Make the error for a failed exchange of tensors, with the rank that caused it if one failed or died."""
        others = set(range(self.size)) - {self.rank}
        until = time.monotonic() + _SILENT_AFTER_ERROR_S + 2 * _INTERVAL_S
        lost = None
        with suppress(RankError), self._reachable():
            while lost is None and time.monotonic() < until:
                lost = self._lost(others, _SILENT_AFTER_ERROR_S)
                time.sleep(0.05)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return RankError(
            f"{lost or 'The exchange between ranks failed.'} Reported error: {reason[:300]}. {_AGAIN}"
        )

    def close(self, error: BaseException | None = None) -> None:
        """Disconnect; after an error, the other ranks are informed and do not wait."""
        import torch.distributed as dist

        if self._store is not None:
            if error is not None:
                text = str(error).strip() or type(error).__name__
                with suppress(RuntimeError):
                    self._store.set(f"failed/{self.rank}", text[:500])
            self._ended.set()
            self._pulse.join(timeout=10 * _INTERVAL_S)
            with suppress(RuntimeError):
                self._store.set(f"left/{self.rank}", "")
        if self._group:
            self._group = False
            with suppress(RuntimeError):
                dist.destroy_process_group()

    def linger(self, seconds: float = 5.0) -> None:
        """Keep the store of this process running briefly, so that the others can read its contents."""
        until = time.monotonic() + seconds
        with suppress(RuntimeError):
            while self._store is not None and time.monotonic() < until:
                if self._store.check([f"left/{r}" for r in range(self.size)]):
                    return
                time.sleep(0.05)

    def _beat(self, store: "Store") -> None:
        count = 0
        with suppress(RuntimeError):  # the store has ended, which the main thread will report
            while not self._ended.is_set():
                store.set(f"alive/{self.rank}", str(count))
                count += 1
                self._ended.wait(_INTERVAL_S)

    def _lost(self, ranks: set[int], silent_s: float) -> str | None:
        """Sentence about one of these ranks that failed or gave no heartbeat for `silent_s`; None if all are alive."""
        assert self._store is not None
        for r in sorted(ranks):
            if self._store.check([f"failed/{r}"]):
                reason = self._store.get(f"failed/{r}").decode(errors="replace").rstrip(".")
                return f"Rank {r} of {self.size} failed: {reason}."
        now = time.monotonic()
        for r in sorted(ranks):
            beat = self._store.get(f"alive/{r}").decode() if self._store.check([f"alive/{r}"]) else ""
            if beat != self._heard[r][0]:
                self._heard[r] = beat, now
            silence = now - self._heard[r][1]
            if silence > silent_s:
                never = "did not start within" if not beat else "has sent no heartbeat for"
                return f"Rank {r} of {self.size} {never} {silence:.0f} s: its process ended or cannot be reached."
        return None

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        """Convert a lost connection to the store to an error that names the process that served it."""
        try:
            yield
        except MairaError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"The place where the {self.size} ranks meet cannot be reached any more; rank 0 of {self.size}, or "
                f"torchrun on its machine, serves it and has probably ended ({str(error).splitlines()[0][:200]}). "
                f"{_AGAIN}"
            ) from error


_AGAIN = "Look at the output of that rank, then start all ranks again; finished work is kept."


@contextmanager
def distributed(
    rank: int | None = None, world: int | None = None, timeout_s: float = TIMEOUT_S
) -> Iterator[Ranks]:
    """Connect to the other ranks, wait for all of them at the end, and inform them of an error.

    Args:
        rank: Replaces the rank of the environment; needs `world`.
        world: Number of ranks.
        timeout_s: A rank without a heartbeat for so many seconds counts as dead.

    Raises:
        ConfigError: As in `rank_info`.
        RankError: A rank did not join, failed or died; the message names it.
    """
    info = rank_info(rank=rank, world=world)
    announce(info)
    connect = None
    if info.address is not None and info.size > 1:
        connect = _connector(info, timeout_s)
    try:
        ranks = Ranks(info.rank, info.size, connect, timeout_s)
    except RuntimeError as error:
        host, port = info.address or ("", 0)
        raise RankError(
            f"Rank {info.rank} of {info.size} could not reach rank 0 at {host}:{port} within {timeout_s:.0f} s "
            f"({str(error).splitlines()[0][:200]}). Start all ranks at about the same time, and set MASTER_ADDR and "
            "MASTER_PORT to a host and free port that all of them reach."
        ) from error
    failure: BaseException | None = None
    try:
        ranks.barrier("start")
        yield ranks
        ranks.barrier("end")
    except BaseException as error:
        failure = error
        raise
    finally:
        ranks.close(failure)
        if info.rank == 0 and not info.hosted:
            ranks.linger()


def _connector(info: RankInfo, timeout_s: float) -> "Callable[[], Store]":
    """Make a function that opens a connection; each use of `distributed` in a process has separate keys."""
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    global _generations
    _generations += 1
    prefix = f"sae_lens_maira/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_generations}"
    host, port = info.address or ("", 0)

    def connect() -> "Store":
        store = TCPStore(
            host,
            port,
            info.size,
            is_master=info.rank == 0 and not info.hosted,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
        return PrefixStore(prefix, store)

    return connect


__all__ = ["TIMEOUT_S", "Ranks", "distributed"]
