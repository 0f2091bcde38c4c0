"""One run at a time of a profile and seed, and one of a study: a lock with host and process id of its holder.

It is the file .lock in the folder that is locked, outputs/<profile>/seed-<seed> or outputs/<profile>/study.

The lock is the operating system's (flock), which ends with its process; so a dead process on this host holds
nothing. A file of another host is believed, for not every file system shares locks between hosts.
What the holder starts (the kernels of the chain, the processes of one GPU each) holds it, too: the
environment says so.

    with lock.held("smoke/seed-17"):
        ...
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from elva_core import files

# environment variable: host and process id, as in the files, of this process and those that started it
HOLDER = "ELVA_LOCK_HOLDER"
_held: dict[Path, TextIO] = {}  # locks of this process


class LockedError(RuntimeError):
    """Somebody else works there; the message names host and process, and what to do."""


def _path(place: str) -> Path:
    return files.OUTPUTS / place / ".lock"


def _holders() -> list[str]:
    return [name for name in os.environ.get(HOLDER, "").split(",") if name]


def take(place: str) -> bool:
    """Takes the lock of a folder of outputs/ until `give_back` or the end of this process.

    Returns:
        Whether it was free; False where this process, or the one that started it, has it already.

    Raises:
        LockedError: another process holds it.
    """
    path, host = _path(place), socket.gethostname()
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+", encoding="utf-8")
        if (holder := _read(file)) and holder in _holders():
            file.close()
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = not _alive(_read(file), host)
        holder = _read(file)
        if not free or (holder and holder.split()[0] != host):
            file.close()
            raise LockedError(_refusal(place, holder, free))
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # given back, and so removed, between our opening and locking it
    holder = f"{host} {os.getpid()}"
    file.truncate(0)
    file.write(holder)
    file.flush()
    os.fsync(file.fileno())  # other hosts read it while it is open
    _held[path] = file
    os.environ[HOLDER] = ",".join(dict.fromkeys([*_holders(), holder]))
    return True


def _read(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip()


def _alive(holder: str, host: str) -> bool:
    """Whether the process that a lock file names runs on this host."""
    name, _, process = holder.partition(" ")
    try:
        return name == host and os.kill(int(process), 0) is None
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True


def _refusal(place: str, holder: str, free: bool) -> str:
    host, _, process = (holder or "this-host ?").partition(" ")
    where = f"outputs/{place} is in use by process {process} on host {host}"
    if free:  # another host's, whose processes cannot be seen from here
        return f"{where}; wait until it ends, or, if it no longer runs there, delete {_path(place)}"
    return f"{where}; wait until it ends, or end it with: kill {process} (a notebook: shut its kernel down)"


def give_back(place: str) -> None:
    """Frees the lock, if this process has it."""
    if file := _held.pop(_path(place), None):
        holder = _read(file)
        _path(place).unlink(missing_ok=True)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)  # also for processes that were forked from this one
        file.close()
        if not _held:
            os.environ[HOLDER] = ",".join(name for name in _holders() if name != holder)


@contextmanager
def held(place: str) -> Iterator[None]:
    """The lock for a block; nothing happens where it is held already. Errors as `take`."""
    taken = take(place)
    try:
        yield
    finally:
        if taken:
            give_back(place)


@contextmanager
def held_by_launch(place: str) -> Iterator[None]:
    """The lock for a block of all processes that `accelerate launch` has started; the first takes it.

    Raises:
        LockedError: in the first, another process holds it; SystemExit with status 1 in the others.
    """
    from elva_core import distributed

    processes, taken, refusal = distributed.processes(), False, None
    if processes.is_main_process:
        try:
            taken = take(place)
        except LockedError as error:
            refusal = error
    answer = {processes.process_index: (os.environ.get(HOLDER), refusal is not None)}
    holder, refused = distributed.gathered(answer)[0]
    if refusal:
        raise refusal
    if refused:
        raise SystemExit(1)
    os.environ[HOLDER] = holder
    try:
        yield
    finally:
        if taken:
            give_back(place)
