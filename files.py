"""Files that are whole or not there: writing them safely, hashing them, and locks that die with their process."""

import atexit
import errno
import hashlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from configurator import UserError

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None
    import msvcrt

LOCK_POLL = 0.2             # seconds between two looks at a lock that another process holds


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(f)` on a temporary binary file beside `path`; once it is safely on disk, rename it to `path`.

    Raises UserError where that cannot be, as on a full disk; what was at `path` before is then untouched.
    """
    path = Path(path)
    tmp = beside(path, '.tmp')
    try:
        with open(tmp, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        replace(tmp, path)
        if os.name == 'posix':                      # the rename itself must survive a power cut, too
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as e:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        why = e if isinstance(e, OSError) else e.__context__    # torch.save hides a full disk behind its own
        if not isinstance(why, OSError):
            raise
        raise UserError(f'cannot write {path}: {why.strerror or why}; what was there before is untouched') from None


def replace(tmp: Path, path: Path) -> None:
    """os.replace(), which Windows refuses while anybody reads what is at `path`: there, wait for some seconds."""
    for tries_left in range(50, -1, -1):
        try:
            return os.replace(tmp, path)
        except PermissionError:
            if os.name == 'posix' or not tries_left:
                raise
            time.sleep(LOCK_POLL)


def write_text_atomically(path: str | Path, text: str) -> None:
    """write_atomically() for a text, in UTF-8, with its line ends as they are."""
    write_atomically(path, lambda f: f.write(text.encode('utf-8')))


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with open(path, 'rb') as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def beside(path: str | Path, suffix: str) -> Path:
    """The path of a file in the same folder, with `suffix` behind its name."""
    return Path(path).with_name(Path(path).name + suffix)


@contextmanager
def locked(path: str | Path, doing: str = 'working on') -> Iterator[None]:
    """Hold PATH.lock, and wait, after a word on standard error, while another process does.

    It is a lock of the operating system, so that it dies with its process and is never stale.
    """
    lock, said = beside(path, '.lock'), False
    while (fd := try_lock(lock)) is None:
        if not said:
            print(f'{Path(path).name}: waiting for another process that is {doing} it', file=sys.stderr, flush=True)
            said = True
        time.sleep(LOCK_POLL)
    try:
        yield
    finally:
        _let_go(lock, fd)


def _let_go(lock, fd):
    if fcntl:
        lock.unlink(missing_ok=True)            # before letting go: afterwards it may be another's
    os.close(fd)
    if not fcntl:
        with suppress(OSError):     # Windows removes no file that is open anywhere, so afterwards is safe there
            lock.unlink()


def try_lock(lock: Path) -> int | None:
    """An open file descriptor that holds the lock, or None while another process does."""
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:                   # far behind the end: what is locked there, nobody else can read
            os.lseek(fd, 1 << 30, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)      # type: ignore[attr-defined]
            os.lseek(fd, 0, os.SEEK_SET)
        if os.path.samestat(os.fstat(fd), os.stat(lock)):   # a file that its last holder has removed locks nobody out
            return fd
    except (BlockingIOError, PermissionError, FileNotFoundError):
        pass
    except OSError as error:
        # some cluster file systems have no locks: work that cannot be shared is better than none
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            return fd
        raise
    os.close(fd)
    return None


def claim(folder: str | Path, room: int = 0) -> Callable[[], None]:
    """Make `folder`, and hold its run.lock until this process ends, however it ends. Raises UserError if another run
    holds it, naming its host and process, or if nothing could be saved there, which takes `room` bytes."""
    path, me = Path(folder, 'run.lock'), [socket.gethostname(), str(os.getpid())]
    try:
        os.makedirs(folder, exist_ok=True)
        fd = try_lock(path)
        holder = path.read_text(encoding='utf-8').split()
        if fd is None or (holder and holder[0] != me[0]):       # a lock may not reach from one machine to another
            host, pid = holder if len(holder) == 2 else ('this or another machine', '?')
            raise UserError(f'a run on {host}, process {pid}, is writing to {folder}: wait for it, or choose another '
                            f'--out_dir.\nIf that one is no longer there, delete {path}')
        os.truncate(fd, 0)
        os.write(fd, ' '.join(me).encode())
        in_the_way, free = [p for p in Path(folder).glob('*.pt*') if p.is_dir()], shutil.disk_usage(folder).free
    except OSError as e:
        raise UserError(f'cannot write to the folder {str(folder)!r}: {e.strerror}; choose another --out_dir') from None

    def release():
        atexit.unregister(release)
        _let_go(path, fd)

    atexit.register(release)
    if in_the_way:
        raise UserError(f'{in_the_way[0]} is a folder, where a file is to be written: remove it, or choose another '
                        '--out_dir')
    if free < room:
        raise UserError(f'a checkpoint takes {room / 1e6:,.1f} MB and more, of which {free / 1e6:,.1f} MB are left for '
                        f'{folder}: make room, or choose another --out_dir')
    return release
