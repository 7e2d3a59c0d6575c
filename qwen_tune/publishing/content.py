"""The files of an adapter or a model that are sent: without this machine's paths, and checked.

Files are sent by name; all others stay. A file may be in the directory by accident, and some files of trainers
(`training_args.bin`) hold tokens.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from qwen_tune.artifacts.adapter_dir import ADAPTER_FILE
from qwen_tune.artifacts.metadata_files import TOKENIZER_FILES
from qwen_tune.disk import parse_json, read_json, sha256
from qwen_tune.errors import ModelError, Problem, PublishError, first_line
from qwen_tune.model.base import INDEX_FILE, BaseCheckpoint
from qwen_tune.model.tensor_files import read_metadata, read_spans
from qwen_tune.publishing.leaks import VOCABULARY, find_leaks
from qwen_tune.publishing.parts import ADAPTER, MERGED, Part, PublishedBase

_SENT = {
    ADAPTER: (ADAPTER_FILE, "adapter_config.json", "generation_config.json", "preprocessor_config.json"),
    MERGED: (
        "config.json",
        "generation_config.json",
        "merge.json",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        INDEX_FILE,
    ),
}
_SENT_OF_ALL = (*TOKENIZER_FILES, "*.jinja", "LICENSE*", "NOTICE*")

_STAYS = {
    ("training_args.bin",): "it holds settings of the trainer, which can include tokens",
    ("optimizer*", "scheduler*", "rng_state*", "trainer_state.json", "progress.json", "manifest.json"): (
        "the state of training"
    ),
    ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"): "a pickle, which can run any program",
    ("README.md",): "a new card is written",
    (".*",): "hidden",
}
"""Why some files are never sent."""


@dataclass
class Content:
    """The files of a push by their names in the repository: paths on the disk, or new content."""

    files: dict[str, Path | bytes] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def size(self, name: str) -> int:
        """Returns the size of a file in bytes."""
        file = self.files[name]
        return file.stat().st_size if isinstance(file, Path) else len(file)

    def add(self, other: Content, folder: str = "") -> None:
        """Adds other files below a folder."""
        prefix = f"{folder}/" if folder else ""
        self.files |= {f"{prefix}{name}": file for name, file in other.files.items()}
        self.left_out |= {f"{prefix}{name}": why for name, why in other.left_out.items()}
        self.problems += other.problems

    def write(self, folder: Path) -> None:
        """Lays the files out as a directory, with links to those that are on the disk."""
        for name, file in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, Path):
                target.symlink_to(file.resolve())
            else:
                target.write_bytes(file)

    def check(self) -> None:
        """Raises PublishError with all problems, if there are any."""
        if self.problems:
            raise PublishError(self.problems)


def collect(part: Part, base: PublishedBase, secrets: Iterable[str] = ()) -> Content:
    """Collects the files of a part as they are sent, and everything that is wrong with them.

    Args:
        part: The adapter or the model.
        base: The public name of its base.
        secrets: Texts that must not be in any file, such as the token.
    """
    content = Content()
    recorded, mismatches = _compare_with_record(part)
    # Those of a base may have any name.
    patterns = (*_SENT[part.kind], *_SENT_OF_ALL, *map(glob.escape, recorded))
    weights = _weights(part, content)
    for path in sorted(part.folder.iterdir()):
        name = path.name
        reason = _why_not(path)
        if reason is None and name.endswith(".safetensors"):
            reason = None if name in weights else "not a part of the model"
        elif reason is None and not any(fnmatchcase(name, pattern) for pattern in patterns):
            reason = "not known as a part of a model"
        if reason:
            content.left_out[name] = reason
        else:
            content.files[name] = _without_local_names(path, base) if name.endswith(".json") else path
    _check_complete(part, content)
    content.problems += mismatches
    known = {str(Path.home()), str(Path.cwd()), str(part.folder.resolve().parent)}
    if part.kind == ADAPTER:
        content.problems += _config_problems(part)
    for name, file in content.files.items():
        where = str(part.folder / name)
        content.problems += find_leaks(name, file, secrets, known, where=where)
        if name in weights:
            metadata = json.dumps(read_metadata(part.folder / name))
            content.problems += find_leaks("metadata.json", metadata, secrets, known, where=f"{where} (its metadata)")
    return content


def _weights(part: Part, content: Content) -> set[str]:
    """Returns the names of the weight files, each of which has the length that its header says."""
    try:
        if part.kind == ADAPTER:
            read_spans(part.folder / ADAPTER_FILE)
            return {ADAPTER_FILE}
        model = BaseCheckpoint(id=str(part.folder), revision=None, path=part.folder, is_local=True)
        model.tensors()
        return {file.name for file in model.weight_files()}
    except ModelError as error:
        content.problems += [
            Problem(one.where, one.what, f"{part.kind} is not complete: {_write_again(part)}") for one in error.problems
        ]
        return set()


def _why_not(path: Path) -> str | None:
    if path.is_dir():
        return "a folder"
    for patterns, reason in _STAYS.items():
        if any(fnmatchcase(path.name, pattern) for pattern in patterns):
            return reason
    return None


def _without_local_names(path: Path, base: PublishedBase) -> Path | bytes:
    """Returns a JSON file with the base's public name instead of a local one, or its path if it has no local name."""
    if path.name in VOCABULARY or path.name == INDEX_FILE:
        return path
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return path  # reported elsewhere if it matters
    if not isinstance(values, dict):
        return path
    changed = {key: value for key, value in values.items() if key not in ("_name_or_path", "name_or_path")}
    if path.name == "adapter_config.json":
        changed |= {"base_model_name_or_path": base.id, "revision": base.revision}
    if path.name == "merge.json" and isinstance(values.get("base"), dict):
        changed["base"] = {**values["base"], "id": base.id, "revision": base.revision}
    return path if changed == values else f"{json.dumps(changed, indent=2, ensure_ascii=False)}\n".encode()


def _config_problems(part: Part) -> list[Problem]:
    """Finds what PEFT would refuse in adapter_config.json."""
    path = part.folder / "adapter_config.json"
    try:
        config = read_json(path)
    except ModelError as error:
        return list(error.problems)
    rank, pattern = config.get("r"), config.get("rank_pattern") or {}
    if not isinstance(rank, int) or not isinstance(pattern, dict):
        return [Problem(str(path), "its rank (r, rank_pattern) is not a number", _write_again(part))]
    return []


def _check_complete(part: Part, content: Content) -> None:
    needed = ["config.json"] if part.kind == MERGED else []
    if part.kind == MERGED or part.run is not None:
        needed += ["tokenizer_config.json", "generation_config.json"]
    if part.kind == MERGED and not {"tokenizer.json", "vocab.json"} & content.files.keys():
        needed += ["tokenizer.json"]
    for name in needed:
        if name not in content.files:
            what = f"{name} is missing: nobody could use the model without it"
            content.problems.append(Problem(str(part.folder), what, _write_again(part)))


def _compare_with_record(part: Part) -> tuple[list[str], list[Problem]]:
    """Compares a merged model with merge.json and with the adapter of its run.

    Returns:
        The names of the files that merge.json lists, and what does not match.
    """
    record = part.folder / "merge.json"
    if part.kind != MERGED or not (record.is_file() or part.run):
        return [], []
    if not record.is_file():
        what = "merge.json is missing: the merge did not finish"
        return [], [Problem(str(part.folder), what, _write_again(part))]
    try:
        facts = read_json(record)
        merged = [adapter["sha256"] for adapter in facts["adapters"]]
        # Weights too: sending them takes far longer than hashing them.
        paths = {part.folder / name: digest for name, digest in facts["files"].items()}
        changed = [path for path, digest in paths.items() if path.is_file() and sha256(path) != digest]
    except (ModelError, KeyError, TypeError, AttributeError) as error:
        what = f"it is not what this version writes ({first_line(error)})"
        return [], [Problem(str(record), what, _write_again(part))]
    problems = []
    adapter = part.run.adapter / ADAPTER_FILE if part.run else None
    if adapter and adapter.is_file() and sha256(adapter) not in merged:
        what = "this model was not merged from the run's adapter"
        problems.append(Problem(str(part.folder), what, _write_again(part)))
    what = "it is not the file that the merge wrote (merge.json has another sha256)"
    problems += [Problem(str(path), what, _write_again(part)) for path in changed]
    return list(facts["files"]), problems


def _write_again(part: Part) -> str:
    if part.kind == ADAPTER:
        return "save the adapter again"
    return f"run `qwen-tune merge {part.run.path} --overwrite`" if part.run else "merge again"
