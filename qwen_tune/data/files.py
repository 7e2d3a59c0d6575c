"""Data files: found on the disk or at a URL (fetched through fsspec and cached), and read by their format."""

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
DATA_SET_NOTES = ("dataset_info.json", "dataset_infos.json")  # what `datasets` writes beside examples
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
KNOWN_FILES = f"{', '.join(READERS)}, each also with .gz or .zst after it"


def is_data_file(name: str) -> bool:
    """Whether a file of this name is one that `read_records` knows."""
    return data_suffix(name) in READERS


def names_hub_data_set(path: str) -> bool:
    """Whether a recipe's path names nothing local and has the form of a Hub data set, `owner/name`."""
    local = Path(path).expanduser()
    if "://" in path or local.exists() or any(character in path for character in GLOB_CHARACTERS):
        return False
    looks_local = path.startswith((".", "/", "~")) or is_data_file(path)
    return not looks_local and len(Path(path).parts) == 2


def find_files(path: str) -> list[Path] | None:
    """The data files that a recipe's path means: a file, a folder's files that are not hidden, or a glob's.

    Returns:
        The files in order of their names; None when the path names a Hub data set.

    Raises:
        DataError: The path names a local thing that is not there or holds no data.
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
            raise DataError(Problem(path, "no file matches this pattern", "check it: `**` goes into folders"))
        return [_known_file(file) for file in files]
    raise DataError(Problem(path, "the data file is not there", _nearest(local)))


def read_records(file: SourceFile) -> Iterator[Record | Problem]:
    """The examples of one file, and a problem for each example that cannot be read; a problem that ends the file comes
    last.

    Of a range of lines nothing is asked that only a whole file can answer: see `in_ranges`.
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
            yield Problem(
                reached, "the file is empty; expected at least one example", "add examples, or leave the file out"
            )
    except UnpackError as error:
        yield Problem(reached, f"after this line {error}", "copy or pack the file again")
    except OSError as error:
        yield Problem(file.name, f"the file cannot be read: {error.strerror or error}", "check it and its permissions")


def in_ranges(file: SourceFile, size: int) -> list[SourceFile]:
    """A file in ranges of lines, of about `size` bytes each, that together have the examples and problems of the whole.

    Returns:
        The file itself if it cannot be divided: it is not plain JSONL, or it does not begin with an example, which may
        say something of the whole file.

    Raises:
        OSError: The file cannot be read.
    """
    parts = READERS[data_suffix(file.path.name)] is read_jsonl and file.compression is None
    if not parts or file.path.stat().st_size <= size or not isinstance(next(read_records(file), None), Record):
        return [file]
    return split_lines(file, size)


def _unreadable(file: SourceFile) -> Problem | None:
    """What the first bytes tell of a file that is not what its name says."""
    if not file.is_readable:
        what = f"the file is {file.compression}-compressed; expected gzip, zstd or none"
        return Problem(file.name, what, "unpack it")
    with file.open() as stream:
        head = stream.read(8)
    suffix = data_suffix(file.path.name)
    for magic, meant in TABLE_MAGIC.items():
        if head.startswith(magic) and suffix != meant:
            return Problem(file.name, f"the content is a {meant} file; the name ends in {suffix}", f"name it {meant}")
    is_utf16 = head.startswith(UTF16_MARKS) or (b"\0" in head[:4] and head.strip(b"\0"))
    if is_utf16 and suffix not in TABLE_MAGIC.values():
        return Problem(f"{file.name}:1", "the file is UTF-16; expected UTF-8", "save it as UTF-8")
    return None


def is_hidden(path: str) -> bool:
    """Whether a part of a path, relative to the folder that a recipe names, is hidden (a notebook's checkpoints)."""
    return any(part.startswith(".") for part in path.split("/"))


def _files_below(folder: Path) -> list[Path]:
    """A folder's data files in order of their names, then those of the data sets that `save_to_disk` wrote there."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if is_data_file(file.name) and not is_hidden(file.relative_to(folder).as_posix()) and file.is_file()
    )
    if splits := next((file for file in files if file.name == "dataset_dict.json"), None):
        names = ", ".join(sorted(str(state.parent) for state in splits.parent.glob("*/state.json"))) or "no folder"
        what = f"the folder holds a data set of several splits ({names}); expected one split"
        raise DataError(Problem(str(splits.parent), what, "give the folder of the split"))
    # Beside its examples such a folder keeps what `map` and `filter` once made of them: only its state tells them
    # apart.
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
        what = f"it does not name the data set's files ({type(error).__name__}); expected what save_to_disk writes"
        raise DataError(Problem(str(state), what, "save the data set again")) from None
    for file in files:
        if not file.is_file():
            raise DataError(Problem(str(state), f"it names {file.name}, which is not there", "copy the whole folder"))
    return files


def _known_file(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            Problem(str(path), "it is not a regular file; expected a data file", "write the examples to a file")
        )
    if is_data_file(path.name):
        return path
    raise DataError(Problem(str(path), f"the file type is not known; expected {KNOWN_FILES}", "rename or convert it"))


def _nearest(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    if near := difflib.get_close_matches(path.name, names, n=1):
        return f"did you mean {folder / near[0]}?"
    return "paths are relative to the directory in which the command runs"


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
