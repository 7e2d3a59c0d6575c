"""Data files: found on disk or at a URL (fetched through fsspec and cached), and read by their format."""

from __future__ import annotations

import difflib
import glob
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from qwen_tune.data.cache import cache_folder
from qwen_tune.data.json_files import read_json, read_jsonl
from qwen_tune.data.source_file import Record, SourceFile, UnpackError, data_suffix, split_lines
from qwen_tune.data.tables import read_arrow, read_csv, read_parquet
from qwen_tune.disk import key_of, make_private_folder, parse_json, sha256
from qwen_tune.errors import DataError, Problem, first_line

GLOB_CHARACTERS = "*?["
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
DATA_SET_NOTES = ("dataset_info.json", "dataset_infos.json")  # written by `datasets` beside the data
TABLE_MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}

READERS: dict[str, Callable[[SourceFile], Iterator[Record | Problem]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
KNOWN_FILES = f"{', '.join(READERS)}, each optionally followed by .gz or .zst"


def is_data_file(name: str) -> bool:
    """Whether `read_records` can read a file of this name."""
    return data_suffix(name) in READERS


def names_hub_data_set(path: str) -> bool:
    """Whether a recipe's path has the form of a Hub data set, `owner/name`, and does not exist locally."""
    local = Path(path).expanduser()
    if "://" in path or local.exists() or any(character in path for character in GLOB_CHARACTERS):
        return False
    looks_local = path.startswith((".", "/", "~")) or is_data_file(path)
    return not looks_local and len(Path(path).parts) == 2


def find_files(path: str) -> list[Path] | None:
    """The data files of a recipe's path: a file, the files of a folder that are not hidden, or those of a glob.

    Returns:
        The files in order of their names; None if the path names a Hub data set.

    Raises:
        DataError: There is no such file, or the folder holds no data files.
    """
    if names_hub_data_set(path):
        return None
    local = Path(path).expanduser()
    if local.is_dir():
        files = _files_below(local)
        if not files:
            raise DataError(Problem(path, f"the folder holds no data files; expected {KNOWN_FILES}", "check the path"))
        return files
    if local.exists():
        return [_known_file(local)]
    if any(character in path for character in GLOB_CHARACTERS):
        files = sorted(Path(name) for name in glob.glob(str(local), recursive=True) if Path(name).is_file())
        if not files:
            raise DataError(
                Problem(path, "no file matches this pattern", "check it; `**` matches folders at any depth")
            )
        return [_known_file(file) for file in files]
    raise DataError(Problem(path, "the data file does not exist", _nearest(local)))


def read_records(file: SourceFile) -> Iterator[Record | Problem]:
    """Yields the records of one file, and a problem for each that cannot be read.

    Of a range of lines (see `in_ranges`) only the lines are checked, not what concerns the whole file.
    """
    reached = f"{file.name}:1"
    try:
        if file.lines is None and (problem := _unreadable(file)):
            yield problem
            return
        empty = file.lines is None
        for item in READERS[data_suffix(file.path.name)](file):
            empty = False
            reached = item.source if isinstance(item, Record) else item.where
            yield item
        if empty:
            what = "the file is empty; expected at least one example"
            yield Problem(reached, what, "add examples, or leave the file out")
    except UnpackError as error:
        yield Problem(reached, f"after this line {error}", "copy or compress the file again")
    except OSError as error:
        yield Problem(file.name, f"the file cannot be read: {error.strerror or error}", "check it and its permissions")


def in_ranges(file: SourceFile, size: int) -> list[SourceFile]:
    """Divides a file into ranges of lines, of about `size` bytes each.

    Returns:
        The ranges, or the file itself if it cannot be divided: it is not uncompressed JSONL, or its first line is not
        an example, which may concern the whole file.

    Raises:
        OSError: The file cannot be read.
    """
    is_divisible = READERS[data_suffix(file.path.name)] is read_jsonl and file.compression is None
    if not is_divisible or file.path.stat().st_size <= size or not isinstance(next(read_records(file), None), Record):
        return [file]
    return split_lines(file, size)


def _unreadable(file: SourceFile) -> Problem | None:
    """The problem of a file whose first bytes show that it is not what its name says."""
    if not file.is_readable:
        what = f"the file is {file.compression}-compressed; expected gzip, zstd or none"
        return Problem(file.name, what, "decompress it")
    with file.open() as stream:
        head = stream.read(8)
    suffix = data_suffix(file.path.name)
    for magic, meant in TABLE_MAGIC.items():
        if head.startswith(magic) and suffix != meant:
            return Problem(
                file.name, f"the content is a {meant} file; the name ends in {suffix}", f"rename it to {meant}"
            )
    is_utf16 = head.startswith(UTF16_MARKS) or (b"\0" in head[:4] and head.strip(b"\0"))
    if is_utf16 and suffix not in TABLE_MAGIC.values():
        return Problem(f"{file.name}:1", "the file is UTF-16; expected UTF-8", "save it as UTF-8")
    return None


def is_hidden(path: str) -> bool:
    """Whether any part of a path, relative to the recipe's folder, is hidden (as a notebook's checkpoints are)."""
    return any(part.startswith(".") for part in path.split("/"))


def _files_below(folder: Path) -> list[Path]:
    """A folder's data files in order of their names, then those of data sets that `save_to_disk` wrote into it."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if is_data_file(file.name) and not is_hidden(file.relative_to(folder).as_posix()) and file.is_file()
    )
    if splits := next((file for file in files if file.name == "dataset_dict.json"), None):
        names = ", ".join(sorted(str(state.parent) for state in splits.parent.glob("*/state.json"))) or "no folder"
        what = f"the folder holds a data set of several splits ({names}); expected one split"
        raise DataError(Problem(str(splits.parent), what, "write the path of one split's folder"))
    # Such a folder also keeps results of `map` and `filter`: only state.json names the files of the data set.
    saved = [
        file.parent for file in files if file.name == "state.json" and (file.parent / "dataset_info.json").is_file()
    ]
    plain = [file for file in files if file.parent not in saved and file.name not in DATA_SET_NOTES]
    return plain + [file for kept in saved for file in _saved_files(kept)]


def _saved_files(folder: Path) -> list[Path]:
    state = folder / "state.json"
    try:
        files = [folder / entry["filename"] for entry in parse_json(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"it does not list the data set's files ({type(error).__name__}); expected the file of save_to_disk"
        raise DataError(Problem(str(state), what, "save the data set again")) from None
    for file in files:
        if not file.is_file():
            raise DataError(Problem(str(state), f"it lists {file.name}, which does not exist", "copy the whole folder"))
    return files


def _known_file(path: Path) -> Path:
    if not path.is_file():
        raise DataError(Problem(str(path), "not a regular file; expected a data file", "write the examples to a file"))
    if is_data_file(path.name):
        return path
    raise DataError(Problem(str(path), f"unknown file type; expected {KNOWN_FILES}", "rename or convert it"))


def _nearest(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    if near := difflib.get_close_matches(path.name, names, n=1):
        return f"did you mean {folder / near[0]}?"
    return "paths are relative to the directory in which the command runs"


# What changes with a file's content; each kind of storage has some of these. The size alone is not enough.
VERSION_KEYS = (
    *("etag", "ETag", "Content-MD5", "Digest", "blob_id", "sha256"),
    *("mtime", "Last-Modified", "LastModified", "last_modified", "updated"),
)
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "http": "aiohttp"}


def is_url(path: str) -> bool:
    """Whether a recipe's path is an address rather than a local path."""
    return "://" in path


def fetch(address: str) -> list[SourceFile]:
    """Fetches the data files of an address: a file, the files of a folder, or those of a glob.

    Raises:
        DataError: The address cannot be read, or has no data files.
    """
    import fsspec

    try:
        storage, root = fsspec.core.url_to_fs(address)
        # In a web address `?` begins a query.
        if any(character in address for character in ("*[" if address.startswith("http") else "*?[")):
            names = [str(name) for name in storage.glob(root)]
        elif not is_data_file(_file_name(root)) and storage.isdir(root):
            found = [str(name) for name in storage.find(root)]
            names = [name for name in found if not is_hidden(name.removeprefix(root))]
        else:
            names = [root]
        names = sorted(name for name in names if is_data_file(_file_name(name)))
        if not names:
            raise DataError(Problem(address, f"no data files found; expected {KNOWN_FILES}", "check the URL"))
        return [_fetch_file(storage, name) for name in names]
    except ImportError as error:
        package = PACKAGES.get(address.split("://", 1)[0].rstrip("s"), "the package for it")
        what = f"a package for this kind of address is missing ({first_line(error)})"
        raise DataError(Problem(address, what, f"pip install {package}")) from error
    except DataError:
        raise
    except Exception as error:  # every storage has its own exceptions
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
            # Identified by its bytes. An equal file stays in place, so that no reader sees it change.
            path = folder / key_of({"address": address, "sha256": sha256(fetched)}) / _file_name(name)
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            fetched.replace(path)
    return SourceFile(path, address)


def _file_name(name: str) -> str:
    """The last part of a path or an address, without the query that some servers ask for."""
    return PurePosixPath(name.split("?", 1)[0] if "://" in name else name).name
