"""Data files behind a URL (s3://, gs://, hf://, https:// …), fetched through fsspec and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qwen_tune.errors import DataError, Problem, first_line

# What tells one version of a file from the next; each kind of storage has some of these.
VERSION_KEYS = ("size", "etag", "ETag", "mtime", "LastModified", "last_modified", "updated", "blob_id", "sha256")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "http": "aiohttp"}


@dataclass(frozen=True)
class RemoteFile:
    """A file's address and where its bytes lie now."""

    address: str
    path: Path


def is_url(path: str) -> bool:
    """Whether a recipe's path is an address rather than a local path."""
    return "://" in path


def fetch(address: str, suffixes: tuple[str, ...]) -> list[RemoteFile]:
    """Brings the data files of an address here: a file, a folder's files, or those of a glob.

    Args:
        address: The URL.
        suffixes: What a data file's name may end in.

    Raises:
        DataError: It cannot be read, or holds no data files.
    """
    import fsspec

    try:
        storage, root = fsspec.core.url_to_fs(address)
        if any(character in address for character in "*?["):
            names = [str(name) for name in storage.glob(root)]
        elif PurePosixPath(root).suffix not in suffixes and storage.isdir(root):
            names = [str(name) for name in storage.find(root)]
        else:
            names = [root]
        names = sorted(name for name in names if PurePosixPath(name).suffix in suffixes)
        if not names:
            raise DataError(Problem(address, f"no data files there; expected {', '.join(suffixes)}", "check the URL"))
        return [_fetch_file(storage, name) for name in names]
    except ImportError as error:
        package = PACKAGES.get(address.split("://", 1)[0].rstrip("s"), "the package for it")
        what = f"this kind of address needs a package more ({first_line(error)})"
        raise DataError(Problem(address, what, f"pip install {package}")) from error
    except DataError:
        raise
    except Exception as error:  # every storage has exceptions of its own
        what = f"cannot be read: {first_line(error)}"
        raise DataError(Problem(address, what, "check the URL and your access to it")) from error


def _fetch_file(storage: Any, name: str) -> RemoteFile:
    address = str(storage.unstrip_protocol(name))
    info = storage.info(name)
    version = [address, {key: str(info[key]) for key in VERSION_KEYS if info.get(key) is not None}]
    digest = hashlib.sha256(json.dumps(version, sort_keys=True).encode()).hexdigest()
    path = _cache() / digest / PurePosixPath(name).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{os.getpid()}.part")
        storage.get_file(name, str(temporary))
        temporary.replace(path)
    return RemoteFile(address, path)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen-tune" / "data"
