"""What goes into one repository: the files of the parts, the card, and which weights of an earlier push are deleted."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from qwen_tune.artifacts.adapter_dir import ADAPTER_FILE
from qwen_tune.disk import read_json
from qwen_tune.errors import Problem, PublishError, RecipeError, first_line
from qwen_tune.publishing.card import CardInputs, Licence, compose, kept_text, languages_of, licence_of, split_card
from qwen_tune.publishing.content import Content, collect
from qwen_tune.publishing.curve import CURVE, draw_losses
from qwen_tune.publishing.leaks import find_leaks, public_recipe
from qwen_tune.publishing.parts import ADAPTER, MERGED, Part, PublishedBase, find_part, published_base
from qwen_tune.publishing.remote import Remote, Repository
from qwen_tune.recipe.files import load_recipe
from qwen_tune.recipe.schema import REPO_ID_PATTERN, Recipe, to_name

_MODEL_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Options:
    """The settings of a push; None is a setting that nobody chose."""

    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    base_id: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()


@dataclass
class UploadPlan:
    """Everything that goes into one repository, and everything that is wrong with it."""

    repo_id: str
    options: Options
    secrets: Sequence[str]
    """Texts that must not be in any file."""

    parts: Sequence[Part]
    base: PublishedBase
    content: Content
    recipe: Recipe | None = None
    repository: Repository | None = None
    """None until it exists."""

    delete: Sequence[str] = ()
    """Weights of an earlier push that would be loaded together with the new ones."""

    @property
    def name(self) -> str:
        """The name in the card and in the commit message."""
        return str(self.recipe.name) if self.recipe else self.repo_id.split("/")[1]

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.parts[0].facts

    @property
    def folders(self) -> dict[str, str]:
        """The folder of each kind in the repository: the root if there is only one."""
        return {part.kind: "" if len(self.parts) == 1 else part.kind for part in self.parts}

    @property
    def tag(self) -> str | None:
        """The tag of this run's commit; None without a run."""
        fingerprint = self.facts.get("fingerprint")
        name = re.sub(r"\.{2,}|\.lock$", "-", to_name(self.name)) or "run"
        return f"{name}-{fingerprint[:12]}" if isinstance(fingerprint, str) else None


def plan_upload(path: Path, repo_id: str, kinds: Sequence[str], options: Options, secrets: Sequence[str]) -> UploadPlan:
    """Collects and checks the files on the disk, without the network.

    Raises:
        PublishError: There is nothing that can be pushed.
    """
    for name, of in ((repo_id, "the repository"), (options.base_id, "--base-id")):
        if name is not None and not re.match(REPO_ID_PATTERN, name):
            what = f"this is not a name for {of}; expected owner/name"
            raise PublishError(Problem(name, what, "write it like me/coder-lora"))
    parts = [find_part(path, kind) for kind in dict.fromkeys(kinds)] or [find_part(path)]
    base = published_base(parts[0], options.base_id)
    plan = UploadPlan(repo_id, options, secrets, parts, base, Content())
    for part in parts:
        plan.content.add(collect(part, base, secrets), plan.folders[part.kind])
    if run := parts[0].run:
        try:
            plan.recipe = load_recipe(run.recipe)
        except RecipeError:
            plan.content.left_out["recipe.yaml"] = "this version cannot read it; the card has no recipe"
    return plan


def add_card(plan: UploadPlan, remote: Remote) -> None:
    """Adds the card, the recipe and the loss curve.

    Raises:
        PublishError: The licence is not known, or the run's record cannot be read.
    """
    run = plan.parts[0].run
    base_card = remote.read_card(plan.base.id)
    card = remote.read_card(plan.repository.id, plan.options.revision) if plan.repository else None
    licence = _licence(plan.options.license, card, base_card)
    if licence is None:
        what = f"the licence of {plan.base.id} is not known: its card could not be read, or names none"
        fix = "name it with --license, such as --license apache-2.0"
        raise PublishError(Problem(plan.repo_id, what, fix))
    recorded = plan.facts.get("data_sets")
    data_sets = [str(each) for each in recorded] if isinstance(recorded, list) else []
    recipe = public_recipe(plan.recipe, plan.base, data_sets) if plan.recipe else ""
    kept, (front_matter, _) = kept_text(card), split_card(card)
    folders = {part.kind: part.folder for part in plan.parts}
    try:
        curve = draw_losses(run.metrics) if run else None
        inputs = CardInputs(
            title=plan.name,
            repo_id=plan.repository.id if plan.repository else plan.repo_id,
            folders=plan.folders,
            base=plan.base,
            licence=licence,
            facts=plan.facts,
            # A merged model alone has the adapter's settings from its run.
            adapter=_read(folders.get(ADAPTER) or (run.adapter if run else None), "adapter_config.json"),
            merge=_read(folders.get(MERGED), "merge.json"),
            recipe=recipe,
            data_sets=tuple(data_sets),
            languages=plan.options.languages or languages_of(base_card) or languages_of(card),
            files=frozenset(plan.content.files),
            curve=CURVE if curve else "",
            site=remote.site,
        )
        ours, whole = compose(inputs, keep=front_matter), compose(inputs, kept, front_matter)
    except (KeyError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        # The record is the user's file; it may be edited, or written by another version.
        what = f"the record of the run is not as this version writes it ({type(error).__name__}: {first_line(error)})"
        raise PublishError(Problem(str(plan.parts[0].folder.parent), what, "push it with that version")) from error
    content = plan.content
    added = {"README.md": whole.encode(), "recipe.yaml": recipe.encode(), CURVE: curve}
    content.files |= {name: data for name, data in added.items() if data}
    # The owner's text is public already, and may name folders of anybody.
    machine = {str(Path.home()), str(Path.cwd())}
    content.problems += find_leaks("README.md", ours, plan.secrets, machine, where="the card", guess=False)
    content.problems += find_leaks("README.md", kept, plan.secrets, where="your text on the card", guess=False)


def resolve_existing_weights(plan: UploadPlan, existing: Collection[str]) -> None:
    """Decides for each folder whether the weights in the repository are deleted.

    Raises:
        PublishError: An adapter and a full model would be in one folder; Transformers would load both.
    """
    ours = plan.content.files
    delete: list[str] = []
    for kind, folder in plan.folders.items():
        names = {name.rpartition("/")[2] for name in existing if name.rpartition("/")[0] == folder}
        place = f"{folder}/" if folder else "its root"
        if not folder and any(name.startswith(f"{kind}/") and name.endswith(".safetensors") for name in existing):
            what = f"an earlier push put this part into {kind}/; there would be another one at the root"
            fix = "push both parts (--what adapter --what merged), or give this one a repository of its own"
            raise PublishError(Problem(plan.repo_id, what, fix))
        if kind == ADAPTER and "config.json" in names:
            what = f"it holds a full model in {place}, where the adapter would go; Transformers would load both"
            raise PublishError(Problem(plan.repo_id, what, "give the adapter a repository of its own"))
        if kind == MERGED and {"adapter_config.json", ADAPTER_FILE} & names:
            what = f"it holds an adapter in {place}, where the full model would go; Transformers would load both"
            raise PublishError(Problem(plan.repo_id, what, "give the model a repository of its own"))
        if kind == MERGED:
            weights = {f"{folder}/{name}".lstrip("/") for name in names if _MODEL_WEIGHTS.fullmatch(name)}
            delete += weights - ours.keys()
    plan.delete = sorted(delete)


def _licence(asked: str | None, card: str | None, base_card: str | None) -> Licence | None:
    """Returns the licence that was asked for, else the card's, else the base's, with name and link from a card."""
    found = [licence for licence in (licence_of(card), licence_of(base_card)) if licence]
    if asked is None:
        return found[0] if found else None
    return next((licence for licence in found if licence.id == asked), Licence(asked))


def _read(folder: Path | None, name: str) -> Mapping[str, Any]:
    return read_json(folder / name) if folder and (folder / name).is_file() else {}
