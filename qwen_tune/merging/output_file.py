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
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

PART_BYTES = 8 << 20
"""Of a part, as a rule: enough for a disk to be fast."""

_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux
_ALIGNMENT = 4096  # bytes, enough for any disk


@dataclass(frozen=True)
class Part:
    """The next bytes of a file, to be filled in: `data`, in page-aligned memory."""

    buffer: mmap.mmap
    begin: int
    """Bytes in front: the end of the part before, where that filled no page of the disk."""
    end: int

    @property
    def data(self) -> memoryview:
        return memoryview(self.buffer)[self.begin : self.end]


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
        self._taken = 0
        self._tail = b""  # of what was appended: less than a page of the disk
        self._free: queue.Queue[mmap.mmap] = queue.Queue()
        # A slow disk stops whoever appends, or the whole model would wait in memory.
        self._full: queue.Queue[memoryview | None] = queue.Queue(maxsize=1)
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

    def take(self, size: int) -> Part:
        """A buffer for the next bytes; several may be filled at a time, and are appended in turn."""
        begin = self._taken % _ALIGNMENT
        self._taken += size
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            buffer = None
        if buffer is None or len(buffer) < begin + size:
            buffer = mmap.mmap(-1, max(begin + size, PART_BYTES + _ALIGNMENT))  # lies at the start of a page
        return Part(buffer, begin, begin + size)

    def append(self, part: Part) -> None:
        """Appends a part that is filled; its buffer is reused afterwards."""
        if self._problem is not None:
            raise self._problem
        self._digest.update(part.data)
        filled = memoryview(part.buffer)[: part.end]
        filled[: part.begin] = self._tail
        whole = part.end - part.end % _ALIGNMENT
        self._tail = bytes(filled[whole:])
        self._full.put(filled[:whole])

    def finish(self) -> str:
        """Waits until everything is on the disk; returns the sha256 as hexadecimal digits."""
        self._full.put(memoryview(self._tail))
        self._full.put(None)
        self._thread.join()
        if self._problem is not None:
            raise self._problem
        os.fsync(self._file)
        return self._digest.hexdigest()

    def _write_all(self) -> None:
        while (data := self._full.get()) is not None:
            if self._problem is None:
                try:
                    self._write(data)
                except Exception as error:  # whoever appends would wait for ever; it is raised there
                    self._problem = error
            if isinstance(data.obj, mmap.mmap):
                self._free.put(data.obj)

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
    """Reserves the file's room on the disk, so that a lack of it shows before anything is written."""
    try:
        os.posix_fallocate(file, 0, length)
    except AttributeError:
        return  # macOS
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
