"""Data files behind a URL (s3://, gs://, hf://, https:// …), fetched through fsspec and kept in a cache."""

from __future__ import annotations

import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from qwen_tune.cache import cache_folder, key_of
from qwen_tune.disk import make_private_folder, sha256
from qwen_tune.errors import DataError, Problem, first_line
from qwen_tune.rows.files import KNOWN_FILES, is_data_file, is_hidden
from qwen_tune.rows.source_file import SourceFile

# What tells one version of a file from the next; each kind of storage has some of these. A size alone does not.
VERSION_KEYS = (
    *("etag", "ETag", "Content-MD5", "Digest", "blob_id", "sha256"),
    *("mtime", "Last-Modified", "LastModified", "last_modified", "updated"),
)
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "http": "aiohttp"}


def is_url(path: str) -> bool:
    """Whether a recipe's path is an address rather than a local path."""
    return "://" in path


def fetch(address: str) -> list[SourceFile]:
    """Brings the data files of an address here: a file, a folder's files, or those of a glob.

    Raises:
        DataError: It cannot be read, or holds no data files.
    """
    import fsspec

    try:
        storage, root = fsspec.core.url_to_fs(address)
        # In an address that a web server answers, `?` begins a query.
        if any(character in address for character in ("*[" if address.startswith("http") else "*?[")):
            names = [str(name) for name in storage.glob(root)]
        elif not is_data_file(_file_name(root)) and storage.isdir(root):
            found = [str(name) for name in storage.find(root)]
            names = [name for name in found if not is_hidden(name.removeprefix(root))]
        else:
            names = [root]
        names = sorted(name for name in names if is_data_file(_file_name(name)))
        if not names:
            raise DataError(Problem(address, f"no data files there; expected {KNOWN_FILES}", "check the URL"))
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


def _fetch_file(storage: Any, name: str) -> SourceFile:
    address = str(storage.unstrip_protocol(name))
    info = storage.info(name)
    version = {key: str(info[key]) for key in VERSION_KEYS if info.get(key) is not None}
    folder = cache_folder("data")
    path = folder / key_of({"address": address, "size": info.get("size"), "version": version}) / _file_name(name)
    if version and path.exists():
        return SourceFile(path, address)
    make_private_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        fetched = Path(part) / _file_name(name)
        storage.get_file(name, str(fetched))
        if not version:
            # Only its bytes tell this version: the same ones stay in their place, so that no reader sees them change.
            path = folder / key_of({"address": address, "sha256": sha256(fetched)}) / _file_name(name)
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            fetched.replace(path)
    return SourceFile(path, address)


def _file_name(name: str) -> str:
    """The last part of a path or an address, without the query that some servers ask for."""
    return PurePosixPath(name.split("?", 1)[0] if "://" in name else name).name
