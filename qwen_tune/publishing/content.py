"""What of an adapter or a model is sent: freed of this machine's paths, and looked through.

What is sent is listed here by name; all else stays. A file that lies in a directory by accident is no part of a model,
and some of what trainers leave there (`training_args.bin`) holds tokens.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from qwen_tune.artifacts.adapter_dir import ADAPTER_FILE
from qwen_tune.artifacts.metadata_files import TOKENIZER_FILES
from qwen_tune.disk import parse_json, sha256
from qwen_tune.errors import ModelError, Problem, first_line
from qwen_tune.model.base import INDEX_FILE, BaseCheckpoint, read_json
from qwen_tune.model.tensor_files import read_metadata, read_spans
from qwen_tune.publishing.leaks import VOCABULARY, look_through
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
    "training_args.bin": "it holds settings of the trainer, tokens among them",
    "optimizer*": "the state of training",
    "scheduler*": "the state of training",
    "rng_state*": "the state of training",
    "trainer_state.json": "the state of training",
    "progress.json": "the state of training",
    "manifest.json": "the state of training",
    "*.bin": "a pickle, which can run any program",
    "*.pt": "a pickle, which can run any program",
    "*.pth": "a pickle, which can run any program",
    "*.ckpt": "a pickle, which can run any program",
    "*.pkl": "a pickle, which can run any program",
    "README.md": "the card is written anew",
    ".*": "hidden",
}
"""Why some names are not sent, for whoever wonders."""


@dataclass
class Content:
    """Files by the names that they get: as they lie there, or with a new text. What is wrong with them, too."""

    files: dict[str, Path | str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        file = self.files[name]
        return file.stat().st_size if isinstance(file, Path) else len(file.encode())

    def add(self, other: Content, folder: str = "") -> None:
        """Puts another's files into a folder."""
        prefix = f"{folder}/" if folder else ""
        self.files |= {f"{prefix}{name}": file for name, file in other.files.items()}
        self.left_out |= {f"{prefix}{name}": why for name, why in other.left_out.items()}
        self.problems += other.problems

    def write(self, folder: Path) -> None:
        """Lays the files out as a directory: links to what is sent as it is, and the new texts."""
        for name, file in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, Path):
                target.symlink_to(file.resolve())
            else:
                target.write_text(file, encoding="utf-8")


def collect(part: Part, base: PublishedBase, secrets: Iterable[str] = ()) -> Content:
    """The files of a part as they are sent, and all that is wrong with them.

    Args:
        part: The adapter or the model.
        base: What it names as its base from now on.
        secrets: Texts that must not be in any file: the token.
    """
    content = Content()
    patterns = (*_SENT[part.kind], *_SENT_OF_ALL, *_recorded(part))
    weights = _weights(part, content)
    for path in sorted(part.folder.iterdir()):
        name = path.name
        reason = _why_not(path)
        if reason is None and name.endswith(".safetensors"):
            reason = None if name in weights else "no part of the model"
        elif reason is None and not any(fnmatchcase(name, pattern) for pattern in patterns):
            reason = "not known as a part of a model"
        if reason:
            content.left_out[name] = reason
        else:
            content.files[name] = _without_local_names(path, base) if name.endswith(".json") else path
    _check_complete(part, content)
    _check_match(part, content)
    known = {str(Path.home()), str(Path.cwd()), str(part.folder.resolve().parent)}
    if part.kind == ADAPTER:
        content.problems += _faults_of_config(part)
    for name, file in content.files.items():
        where = str(part.folder / name)
        content.problems += look_through(name, file, secrets, known, where=where)
        if name in weights:
            said = json.dumps(read_metadata(part.folder / name))
            content.problems += look_through("metadata.json", said, secrets, known, where=f"{where} (its metadata)")
    return content


def _recorded(part: Part) -> tuple[str, ...]:
    """The files that the merge has listed: what a base has beside its weights may have any name."""
    try:
        files = read_json(part.folder / "merge.json")["files"] if part.kind == MERGED else {}
    except (ModelError, KeyError):
        return ()
    return tuple(glob.escape(name) for name in files if isinstance(name, str)) if isinstance(files, dict) else ()


def _weights(part: Part, content: Content) -> set[str]:
    """The names of the weight files, each whole by its own header."""
    try:
        if part.kind == ADAPTER:
            read_spans(part.folder / ADAPTER_FILE)
            return {ADAPTER_FILE}
        model = BaseCheckpoint(id=str(part.folder), revision=None, path=part.folder, is_local=True)
        model.tensors()
        return {file.name for file in model.weight_files()}
    except ModelError as error:
        content.problems += [
            Problem(one.where, one.what, f"{part.kind} is not complete: make it anew") for one in error.problems
        ]
        return set()


def _why_not(path: Path) -> str | None:
    if path.is_dir():
        return "a folder"
    return next((why for pattern, why in _STAYS.items() if fnmatchcase(path.name, pattern)), None)


def _without_local_names(path: Path, base: PublishedBase) -> Path | str:
    """A JSON file with the base's public name in the place of this machine's; the file itself where it has none."""
    if path.name in VOCABULARY or path.name == INDEX_FILE:
        return path
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return path  # told elsewhere, if it matters
    if not isinstance(values, dict):
        return path
    changed = {key: value for key, value in values.items() if key not in ("_name_or_path", "name_or_path")}
    if path.name == "adapter_config.json":
        changed |= {"base_model_name_or_path": base.id, "revision": base.revision}
    if path.name == "merge.json" and isinstance(values.get("base"), dict):
        changed["base"] = {**values["base"], "id": base.id, "revision": base.revision}
    return path if changed == values else json.dumps(changed, indent=2, ensure_ascii=False) + "\n"


def _faults_of_config(part: Part) -> list[Problem]:
    """What of adapter_config.json PEFT could not take."""
    path = part.folder / "adapter_config.json"
    try:
        config = read_json(path)
    except ModelError as error:
        return list(error.problems)
    rank, pattern = config.get("r"), config.get("rank_pattern") or {}
    if not isinstance(rank, int) or not isinstance(pattern, dict):
        return [Problem(str(path), "its rank (r, rank_pattern) is not finite", _anew(part))]
    return []


def _check_complete(part: Part, content: Content) -> None:
    needed = ["config.json"] if part.kind == MERGED else []
    if part.kind == MERGED or part.run is not None:
        needed += ["tokenizer_config.json", "generation_config.json"]
    if part.kind == MERGED and not {"tokenizer.json", "vocab.json"} & content.files.keys():
        needed += ["tokenizer.json"]
    for name in needed:
        if name not in content.files:
            content.problems.append(Problem(str(part.folder), f"{name} is missing: nobody could use it", _anew(part)))


def _check_match(part: Part, content: Content) -> None:
    """Compares a merged model with the adapter of its run."""
    if part.kind != MERGED:
        return
    record = part.folder / "merge.json"
    if not record.is_file():
        if part.run is not None:
            content.problems.append(
                Problem(str(part.folder), "merge.json is missing: the merge was not ended", _anew(part))
            )
        return
    try:
        facts = read_json(record)
        merged = [adapter["sha256"] for adapter in facts["adapters"]]
        changed = _not_as_recorded(part.folder, facts["files"])
    except (ModelError, KeyError, TypeError, AttributeError) as error:
        what = f"it is not what this version writes ({first_line(error)})"
        content.problems.append(Problem(str(record), what, _anew(part)))
        return
    adapter = part.run.adapter / ADAPTER_FILE if part.run else None
    if adapter and adapter.is_file() and sha256(adapter) not in merged:
        what = "this model was merged from another adapter than the run's"
        content.problems.append(Problem(str(part.folder), what, _anew(part)))
    for name in changed:
        what = "it is not the file that the merge wrote (merge.json has another sha256)"
        content.problems.append(Problem(str(part.folder / name), what, _anew(part)))


def _not_as_recorded(folder: Path, files: Mapping[str, str]) -> list[str]:
    """The files that are not what merge.json says. Weights are looked at too: sending them takes longer by far."""
    return [name for name, digest in files.items() if (folder / name).is_file() and sha256(folder / name) != digest]


def _anew(part: Part) -> str:
    if part.kind == ADAPTER:
        return "save the adapter anew"
    return f"run `qwen-tune merge {part.run.path} --overwrite`" if part.run else "merge it anew"
