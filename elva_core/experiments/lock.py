"""One run at a time of a profile: a lock in outputs/<profile>/.lock with host and process id of who holds it.

The lock is the operating system's (flock), which ends with its process; so a dead process on this host holds
nothing. A file of another host is believed, for not every file system shares locks between hosts.
What the holder starts (the kernels of the chain, the processes of one GPU each) holds it, too: the
environment says so.

    with lock.held("smoke"):
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

HOLDER = "ELVA_LOCK_HOLDER"  # environment variable: host and process id, as in the file
_held: dict[Path, TextIO] = {}  # locks of this process


class LockedError(RuntimeError):
    """Somebody else runs this profile; the message names host and process, and what to do."""


def _path(profile: str) -> Path:
    return files.OUTPUTS / profile / ".lock"


def take(profile: str) -> bool:
    """Takes the lock of a profile until `give_back` or the end of this process.

    Returns:
        Whether it was free; False where this process, or the one that started it, has it already.

    Raises:
        LockedError: another process holds it.
    """
    path, host = _path(profile), socket.gethostname()
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+", encoding="utf-8")
        if (holder := _read(file)) and holder == os.environ.get(HOLDER):
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
            raise LockedError(_refusal(profile, holder, free))
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # given back, and so removed, between our opening and locking it
    holder = f"{host} {os.getpid()}"
    file.truncate(0)
    file.write(holder)
    file.flush()
    os.fsync(file.fileno())  # other hosts read it while it is open
    _held[path], os.environ[HOLDER] = file, holder
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


def _refusal(profile: str, holder: str, free: bool) -> str:
    host, _, process = (holder or "this-host ?").partition(" ")
    where = f"outputs/{profile} is in use by process {process} on host {host}"
    if free:  # another host's, whose processes cannot be seen from here
        return f"{where}; wait until it ends, or, if it no longer runs there, delete {_path(profile)}"
    return f"{where}; wait until it ends, or end it with: kill {process} (a notebook: shut its kernel down)"


def give_back(profile: str) -> None:
    """Frees the lock, if this process has it."""
    if file := _held.pop(_path(profile), None):
        _path(profile).unlink(missing_ok=True)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)  # also for processes that were forked from this one
        file.close()
    if not _held:
        os.environ.pop(HOLDER, None)


@contextmanager
def held(profile: str) -> Iterator[None]:
    """The lock for a block; nothing happens where it is held already. Errors as `take`."""
    taken = take(profile)
    try:
        yield
    finally:
        if taken:
            give_back(profile)


@contextmanager
def held_by_launch(profile: str) -> Iterator[None]:
    """The lock for a block of all processes that `accelerate launch` has started; the first takes it.

    Raises:
        LockedError: in the first, another process holds it; SystemExit with status 1 in the others.
    """
    from elva_core import distributed

    processes, taken, refusal = distributed.processes(), False, None
    if processes.is_main_process:
        try:
            taken = take(profile)
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
            give_back(profile)
