"""files.py: what is written is whole or not there, and a lock lets one process in at a time."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import files
from configurator import UserError
from files import locked, try_lock, write_atomically

needs_flock = pytest.mark.skipif(files.fcntl is None, reason='about flock')


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'old')

    def fails(f):
        f.write(b'new')
        raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(UserError, match='No space left'):
        write_atomically(path, fails)
    assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('room', [0, 1, 63, 64, 500, 1000, 1500, 40_000, 41_000])
def test_a_disk_that_is_full_after_any_number_of_bytes_is_told_as_that(tmp_path, monkeypatch, room):
    class Disk(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > room:
                super().write(bytes(data)[:room - self.tell()])
                raise OSError(errno.ENOSPC, 'No space left on device')
            return super().write(data)
    monkeypatch.setattr('builtins.open', lambda path, mode: Disk(path, 'w'))
    with pytest.raises(UserError, match='file: No space left on device; what was there'):
        write_atomically(tmp_path / 'file', lambda f: torch.save({'w': torch.zeros(10_000)}, f))
    assert list(tmp_path.iterdir()) == []


def test_another_error_while_writing_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match='a bug'):
        write_atomically(tmp_path / 'file', lambda f: exec('raise RuntimeError("a bug")'))
    assert list(tmp_path.iterdir()) == []


def test_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ('fsync', 'replace'):
        do = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, do=do, name=name: (calls.append(name), do(*a)))
    write_atomically(tmp_path / 'file', lambda f: f.write(b'new'))
    assert calls[:2] == ['fsync', 'replace']


def test_one_process_at_a_time_holds_a_lock_and_a_killed_one_lets_go(tmp_path, capsys):
    hold = 'import sys, time; from files import locked\nwith locked(sys.argv[1]): print("held", flush=True); input()'
    other = subprocess.Popen([sys.executable, '-c', hold, tmp_path / 'f'], cwd=Path(files.__file__).parent, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == 'held\n'
    assert try_lock(tmp_path / 'f.lock') is None
    other.kill()
    other.wait()
    with locked(tmp_path / 'f'):
        pass
    assert capsys.readouterr().err == '' and list(tmp_path.iterdir()) == []


def test_a_lock_file_that_was_left_behind_locks_nobody_out(tmp_path):
    (tmp_path / 'f.lock').write_bytes(b'')
    with locked(tmp_path / 'f'):
        pass
    assert list(tmp_path.iterdir()) == []


@needs_flock
def test_a_lock_that_its_holder_removes_is_not_taken_for_held(tmp_path, monkeypatch):
    lock, flock = tmp_path / 'f.lock', files.fcntl.flock

    def late(fd, how):  # between our opening the file and our locking it, its holder removes it and goes
        lock.unlink()
        flock(fd, how)

    monkeypatch.setattr(files.fcntl, 'flock', late)
    assert try_lock(lock) is None
    monkeypatch.undo()
    fd = try_lock(lock)
    assert fd is not None and try_lock(lock) is None
    os.close(fd)


@needs_flock
def test_a_file_system_without_locks_is_good_enough(tmp_path, monkeypatch):
    def refuse(fd, how):
        raise OSError(errno.ENOSYS, 'Function not implemented')

    monkeypatch.setattr(files.fcntl, 'flock', refuse)
    with locked(tmp_path / 'f'):
        pass
