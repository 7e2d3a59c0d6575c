"""What goes into one repository: the parts, the card, and what an earlier push left there."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_tune.artifacts.adapter_dir import ADAPTER_FILE
from qwen_tune.disk import parse_json
from qwen_tune.errors import Problem, PublishError, first_line
from qwen_tune.publishing.card import (
    Description,
    Licence,
    compose,
    front_matter_of,
    kept_text,
    languages_of,
    licence_of,
)
from qwen_tune.publishing.content import Content, collect
from qwen_tune.publishing.curve import CURVE, draw_losses
from qwen_tune.publishing.leaks import look_through
from qwen_tune.publishing.parts import ADAPTER, MERGED, Part, PublishedBase, find_part, published_base
from qwen_tune.publishing.public_recipe import public_recipe, read_recipe
from qwen_tune.publishing.remote import Repository
from qwen_tune.recipe.schema import REPO_ID_PATTERN, Recipe, to_name

_MODEL_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Options:
    """What a push is reported; None where nothing is said."""

    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    base_id: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()


@dataclass
class UploadPlan:
    """All that goes into one repository."""

    repo_id: str
    parts: Sequence[Part]
    base: PublishedBase
    content: Content
    recipe: Recipe | None = None
    repository: Repository | None = None
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    delete: Sequence[str] = ()
    """Weights of an earlier push, which would be loaded beside the new ones."""

    @property
    def name(self) -> str:
        """What the card and the commit call it."""
        return str(self.recipe.name) if self.recipe else self.repo_id.split("/")[1]

    @property
    def facts(self) -> Mapping[str, Any]:
        """The run's record; empty where there is none."""
        return self.parts[0].facts

    @property
    def folders(self) -> dict[str, str]:
        """Where each kind lies: at the root if it is alone."""
        return {part.kind: "" if len(self.parts) == 1 else part.kind for part in self.parts}

    @property
    def tag(self) -> str | None:
        """A name for the commit of this run; None without a run."""
        fingerprint = self.facts.get("fingerprint")
        name = re.sub(r"\.{2,}|\.lock$", "-", to_name(self.name)) or "run"
        return f"{name}-{fingerprint[:12]}" if isinstance(fingerprint, str) else None


def prepare(path: Path, repo_id: str, kinds: Sequence[str], options: Options, secrets: Collection[str]) -> UploadPlan:
    """Finds and looks through what lies on the disk; asks nobody.

    Raises:
        PublishError: There is nothing that can be pushed.
    """
    for name, flag in ((repo_id, "the repository"), (options.base_id, "--base-id")):
        if name is not None and not re.match(REPO_ID_PATTERN, name):
            what = f"this is no name for {flag}; expected owner/name"
            raise PublishError(Problem(name, what, "write it like me/coder-lora"))
    parts = [find_part(path, kind) for kind in dict.fromkeys(kinds)] or [find_part(path)]
    base = published_base(parts[0], options.base_id)
    run = parts[0].run
    plan = UploadPlan(repo_id, parts, base, Content(), read_recipe(run) if run else None)
    for part in parts:
        plan.content.add(collect(part, base, secrets), plan.folders[part.kind])
    if run and plan.recipe is None:
        plan.content.left_out["recipe.yaml"] = "this version cannot read it; the card does without"
    return plan


def describe(
    plan: UploadPlan,
    options: Options,
    secrets: Collection[str],
    *,
    base_card: str | None,
    card: str | None,
    site: str,
) -> None:
    """Adds card, recipe and picture.

    Args:
        plan: What is pushed.
        options: What the push was reported.
        secrets: Texts that must be in no file.
        base_card: The base's card.
        card: The card that lies in the repository.
        site: `hub` or `modelscope`.

    Raises:
        PublishError: The licence is not known, or the run's record cannot be read.
    """
    run, recipe = plan.parts[0].run, plan.recipe
    licence = _licence(options.license, card, base_card)
    if licence is None:
        what = f"the licence of {plan.base.id} is not known: its card could not be read, or names none"
        fix = "say which it is with --license, such as --license apache-2.0"
        raise PublishError(Problem(plan.repo_id, what, fix))
    known = plan.facts.get("data_sets")
    data_sets = [str(each) for each in known] if isinstance(known, list) else []
    text = public_recipe(recipe, plan.base, data_sets) if recipe else ""
    try:
        picture = draw_losses(run.metrics) if run else None
        about = Description(
            title=plan.name,
            repo_id=plan.repository.id if plan.repository else plan.repo_id,
            places=plan.folders,
            base=plan.base,
            licence=licence,
            facts=plan.facts,
            adapter=_json_of(plan, ADAPTER, "adapter_config.json"),
            merge=_json_of(plan, MERGED, "merge.json"),
            recipe=text,
            data_sets=tuple(data_sets),
            languages=options.languages or languages_of(base_card),
            files=frozenset(plan.content.files),
            curve=CURVE if picture else "",
            site=site,
        )
        kept, values = kept_text(card), front_matter_of(card)
        ours, whole = compose(about, keep=values), compose(about, kept, values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # The record is the user's file, and may be of another version or edited.
        what = f"the record of the run is not as this version writes it ({type(error).__name__}: {first_line(error)})"
        raise PublishError(Problem(str(plan.parts[0].folder.parent), what, "push it with that version")) from error
    added = Content({"README.md": whole, **({"recipe.yaml": text} if text else {})})
    # What its owner wrote on the card is out already, and may speak of anybody's folders.
    machine = {str(Path.home()), str(Path.cwd())}
    added.problems += look_through("README.md", ours, secrets, machine, where="the card", guess=False)
    added.problems += look_through("README.md", kept, secrets, where="your text on the card", guess=False)
    plan.content.add(added)
    plan.pictures = {CURVE: picture} if picture else {}


def resolve_existing_weights(plan: UploadPlan, there: Collection[str]) -> None:
    """Decides what becomes of the weights that lie in the repository, folder by folder.

    Raises:
        PublishError: An adapter and a full model would lie in one folder; Transformers would load both.
    """
    ours = plan.content.files
    delete: list[str] = []
    for kind, folder in plan.folders.items():
        beside = {name.rpartition("/")[2] for name in there if name.rpartition("/")[0] == folder}
        place = f"{folder}/" if folder else "its root"
        if not folder and any(name.startswith(f"{kind}/") and name.endswith(".safetensors") for name in there):
            what = f"an earlier push put this part into {kind}/; at the root there would be another one"
            fix = "push both parts (--what adapter --what merged), or give this one a repository of its own"
            raise PublishError(Problem(plan.repo_id, what, fix))
        if kind == ADAPTER and "config.json" in beside:
            what = f"it holds a full model in {place}, where the adapter is to be; Transformers would load both"
            raise PublishError(Problem(plan.repo_id, what, "give the adapter a repository of its own"))
        if kind == MERGED and {"adapter_config.json", ADAPTER_FILE} & beside:
            what = f"it holds an adapter in {place}, where the full model is to be; Transformers would load both"
            raise PublishError(Problem(plan.repo_id, what, "give the model a repository of its own"))
        if kind == MERGED:
            names = [f"{folder}/{name}".lstrip("/") for name in beside if _MODEL_WEIGHTS.fullmatch(name)]
            delete += [name for name in names if name not in ours]
    plan.delete = sorted(delete)


def _licence(asked: str | None, card: str | None, base_card: str | None) -> Licence | None:
    """The one that was asked for, that on the card there, or the base's; with name and link where a card has them."""
    found = [licence for licence in (licence_of(card), licence_of(base_card)) if licence]
    if asked is None:
        return found[0] if found else None
    return next((licence for licence in found if licence.id == asked), Licence(asked))


def _json_of(plan: UploadPlan, kind: str, name: str) -> dict[str, Any]:
    """A part's JSON file as it is sent; of a merged model alone the adapter's settings are those in its run."""
    folder = plan.folders.get(kind)
    file = plan.content.files.get(f"{folder}/{name}".lstrip("/")) if folder is not None else None
    if file is None and kind == ADAPTER and plan.parts[0].run:
        file = plan.parts[0].run.adapter / name
    if file is None or (isinstance(file, Path) and not file.is_file()):
        return {}
    values = parse_json(file if isinstance(file, str) else file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise TypeError(f"{name} is no JSON object")
    return values
