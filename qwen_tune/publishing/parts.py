"""What can be pushed: an adapter or a merged model, found by the path of a run or by its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_tune.artifacts.adapter_dir import suggest_adapter
from qwen_tune.disk import read_json
from qwen_tune.errors import Problem, PublishError
from qwen_tune.recipe.schema import REPO_ID_PATTERN
from qwen_tune.runs.directory import FINISHED, RunDir

ADAPTER, MERGED, EXPORT = "adapter", "merged", "export"


@dataclass(frozen=True)
class Part:
    """An adapter or a merged model on the disk, with its run if it is in one."""

    kind: str
    folder: Path
    run: RunDir | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """The run's record; empty without a run."""
        return self.run.facts if self.run else {}


@dataclass(frozen=True)
class PublishedBase:
    """The base by its public name."""

    id: str
    revision: str | None = None


def find_part(path: Path, kind: str | None = None) -> Part:
    """Finds the adapter or the merged model that a path names.

    Args:
        path: A run directory, an adapter directory or a merged model.
        kind: `adapter` or `merged`; None means the adapter of a run, or whatever the directory is.

    Raises:
        PublishError: There is no such part, or the run has not finished.
        RunError: The run's record cannot be read.
    """
    if kind == EXPORT:
        what = "exported formats cannot be pushed yet; expected adapter or merged"
        raise PublishError(Problem(str(path), what, "upload them with `hf upload`"))
    path = path.expanduser()
    path = path.resolve() if path.name in ("", "..") else path  # `.` has no name
    for candidate in (path, path.absolute().parent):
        if not (candidate / "run.json").is_file():
            continue
        if candidate != path and path.name not in (ADAPTER, MERGED):
            break  # a checkpoint, or a log
        run = RunDir.open(candidate)
        if candidate != path and kind not in (None, path.name):
            fix = "give the run's directory, or leave out --what"
            raise PublishError(Problem(str(path), f"this is the run's {path.name}/, not its {kind}/", fix))
        kind = kind or (ADAPTER if candidate == path else path.name)
        folder = candidate / kind
        if run.facts.get("state") != FINISHED:
            what = f"the run has not finished (its state is {run.facts.get('state')})"
            raise PublishError(Problem(str(candidate), what, "finish it first: the same `qwen-tune train` resumes it"))
        if not folder.is_dir():
            fix = f"run `qwen-tune merge {candidate}` first" if kind == MERGED else suggest_adapter(candidate)
            raise PublishError(Problem(str(candidate), f"the run has no {kind}/", fix))
        return Part(kind, folder, run)
    is_adapter = (path / "adapter_config.json").is_file()
    found = ADAPTER if is_adapter else MERGED if (path / "config.json").is_file() else None
    if (path / "trainer_state.json").is_file() and is_adapter:
        what = "a checkpoint of a run cannot be pushed; expected a run, an adapter or a merged model"
        raise PublishError(Problem(str(path), what, "give the run's directory"))
    if found is None:
        what = "expected a run directory, or one with adapter_config.json or config.json" + (
            "" if path.is_dir() else "; there is no such directory"
        )
        raise PublishError(Problem(str(path), what, "check the path"))
    if kind and kind != found:
        what = f"expected {kind}, but the directory looks like {found}"
        raise PublishError(Problem(str(path), what, "leave out --what"))
    return Part(found, path)


def published_base(part: Part, base_id: str | None = None) -> PublishedBase:
    """Returns the Hub id of a part's base.

    Raises:
        PublishError: The base was local, and `base_id` does not name it.
    """
    recorded = _recorded_base(part)
    if base_id is not None:
        return PublishedBase(base_id, recorded.revision if recorded and recorded.id == base_id else None)
    if recorded is None:
        what = "its base is a local directory, which nobody else has"
        fix = "name the base with --base-id, such as --base-id Qwen/Qwen2.5-Coder-7B-Instruct"
        raise PublishError(Problem(str(part.folder), what, fix))
    return recorded


def _recorded_base(part: Part) -> PublishedBase | None:
    named: Any = part.facts.get("base")
    if named is None and (part.folder / "merge.json").is_file():
        named = read_json(part.folder / "merge.json").get("base")
    if named is None and part.kind == ADAPTER:
        config = read_json(part.folder / "adapter_config.json")
        named = {"id": config.get("base_model_name_or_path"), "revision": config.get("revision")}
    if not isinstance(named, Mapping) or not isinstance(named.get("id"), str):
        return None
    # A base from the Hub has a commit; a folder can have a name of the same form.
    is_local = named.get("revision") is None and (part.run is not None or Path(named["id"]).exists())
    if is_local or not re.match(REPO_ID_PATTERN, named["id"]):
        return None
    return PublishedBase(named["id"], named.get("revision"))
