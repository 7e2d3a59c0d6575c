"""Large files written from start to end past the page cache, hashed on the way.

A merged model is as large as its base. Written through the page cache it would drive out of memory what other programs
use, and every page would have to be found first; from buffers of our own, straight to the disk, it costs neither.
Where the file system has no such writes, they go through the cache after all.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import queue
import threading
from pathlib import Path
from types import TracebackType

BUFFER_BYTES = 4 << 20
BUFFERS = 3  # one is filled, one is written, one waits

_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux
_ALIGNMENT = 4096  # bytes, enough for any disk


class OutputFile:
    """A file of known length; another thread does the writing.

    Raises:
        OSError: From any call, also for what was written before: no room, or a disk that fails.
    """

    def __init__(self, path: Path, length: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._file = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags, 0o666)
        self._digest = hashlib.sha256()
        self._free: queue.Queue[mmap.mmap] = queue.Queue()
        self._full: queue.Queue[tuple[mmap.mmap, int] | None] = queue.Queue()
        for _ in range(BUFFERS):
            self._free.put(mmap.mmap(-1, BUFFER_BYTES))  # lies at the start of a page
        self._buffer = self._free.get()
        self._filled = 0
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._write_all, name="writes the model", daemon=True)
        try:
            _reserve(self._file, length)
        except BaseException:
            os.close(self._file)
            raise
        self._thread.start()

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._thread.is_alive():
            self._full.put(None)
            self._thread.join()
        os.close(self._file)

    def append(self, data: memoryview | bytes) -> None:
        """Adds bytes to the end."""
        self._digest.update(data)
        view = memoryview(data)
        while view:
            if self._filled == BUFFER_BYTES:
                self._pass_on()
            size = min(len(view), BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + size] = view[:size]
            self._filled += size
            view = view[size:]

    def finish(self) -> str:
        """Waits until everything is on the disk; returns the sha256 as hexadecimal digits."""
        self._pass_on()
        self._full.put(None)
        self._thread.join()
        if self._problem is not None:
            raise self._problem
        os.fsync(self._file)
        return self._digest.hexdigest()

    def _pass_on(self) -> None:
        if self._problem is not None:
            raise self._problem
        self._full.put((self._buffer, self._filled))
        self._buffer, self._filled = self._free.get(), 0

    def _write_all(self) -> None:
        while entry := self._full.get():
            buffer, size = entry
            if self._problem is None:
                try:
                    self._write(memoryview(buffer)[:size])
                except Exception as error:  # whoever appends would wait for a buffer for ever; it is raised there
                    self._problem = error
            self._free.put(buffer)

    def _write(self, data: memoryview) -> None:
        while data:
            if len(data) % _ALIGNMENT:
                self._write_through_the_cache()
            try:
                written = os.write(self._file, data)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._write_through_the_cache():
                    raise
                continue
            data = data[written:]

    def _write_through_the_cache(self) -> bool:
        """Gives up on direct writes: at the file's end, and where the file system wants another alignment."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        if not flags & _DIRECT:
            return False
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~_DIRECT)
        return True


def _reserve(file: int, length: int) -> None:
    """Takes the room on the disk before anything is written, so that a lack of it shows at once."""
    try:
        os.posix_fallocate(file, 0, length)
    except AttributeError:
        return  # macOS
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
