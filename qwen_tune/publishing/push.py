"""A push from start to end: everything is looked at before anything is sent."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_tune.errors import Problem, PublishError, first_line
from qwen_tune.machine import say
from qwen_tune.publishing.card import CURVE, Description, Licence, compose, kept_text, languages_of, licence_of
from qwen_tune.publishing.content import Content, collect
from qwen_tune.publishing.curve import draw_losses
from qwen_tune.publishing.leaks import look_through
from qwen_tune.publishing.parts import ADAPTER, MERGED, Part, PublishedBase, find_part, published_base
from qwen_tune.publishing.public_recipe import data_sets, public_recipe, read_recipe
from qwen_tune.publishing.remote import Account, Remote, Repository
from qwen_tune.recipe.schema import REPO_ID_PATTERN, HubSpec, Recipe

HUB, MODELSCOPE = "hub", "modelscope"


@dataclass(frozen=True)
class Options:
    """What a push is told; None where nothing is said."""

    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    base_id: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()


@dataclass
class Shipment:
    """All that goes into one repository."""

    repo_id: str
    parts: Sequence[Part]
    base: PublishedBase
    content: Content
    recipe: Recipe | None = None
    repository: Repository | None = None
    pictures: Mapping[str, bytes] = field(default_factory=dict)

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


def push(
    path: Path,
    repositories: Mapping[str, Sequence[str | None]],
    options: Options,
    *,
    to: str = HUB,
    dry_run: bool = False,
) -> list[str]:
    """Uploads parts of a run, or a directory, with a card.

    Args:
        path: A run directory, an adapter directory or a merged model.
        repositories: The kinds of parts for each repository, `adapter` or `merged`; None for what the path holds.
        options: Visibility, branch, names.
        to: `hub` or `modelscope`.
        dry_run: Only check, and say what would be sent.

    Returns:
        What to print: where each repository is, or what would be sent.

    Raises:
        PublishError: Something may not be sent, the other side does not take it, or cannot be reached. What was sent
            before stays there; the same call goes on.
    """
    remote = _remote(to)
    shipments = [_prepare(path, repo_id, kinds, options, remote) for repo_id, kinds in repositories.items()]
    _refuse([problem for shipment in shipments for problem in shipment.content.problems])
    account = remote.account()
    for shipment in shipments:
        _check_repository(shipment, account, options, remote)
    for shipment in shipments:
        _describe(shipment, options, remote)
    _refuse([problem for shipment in shipments for problem in shipment.content.problems])
    if dry_run:
        return [_plan(shipment, account, options, remote) for shipment in shipments]
    return [_send(shipment, options, remote) for shipment in shipments]


def push_after_training(run: Path, spec: HubSpec) -> None:
    """Pushes what the recipe's `hub:` asks for. What fails is told with the command that goes on: the run is done."""
    repositories, options = _of_recipe(spec)
    for repo_id, kinds in repositories.items():
        try:
            for line in push(run, {repo_id: kinds}, options):
                say(line)
        except Exception as error:  # also a bug of ours: hours of training do not end in it
            say(f"warning: not pushed to {repo_id}: {first_line(error)}")
            say(f"         the run is complete; go on with: {_command(run, repo_id, kinds, options)}")


def check_push(spec: HubSpec) -> list[str]:
    """What would keep a push from succeeding when training has ended, as far as it shows now."""
    try:
        account = _remote(HUB).account()
        return [str(problem) for repo_id in _of_recipe(spec)[0] for problem in _not_theirs(repo_id, account)]
    except PublishError as error:
        return [f"the push after training would fail: {problem}" for problem in error.problems]


def _of_recipe(spec: HubSpec) -> tuple[dict[str, list[str | None]], Options]:
    repositories: dict[str, list[str | None]] = {}
    for kind in spec.push:
        repositories.setdefault(spec.repo_ids.get(kind, spec.repo_id), []).append(kind)
    options = Options(
        private=spec.private,
        revision=spec.revision,
        base_id=spec.base_id,
        license=spec.license,
        languages=tuple(spec.languages),
    )
    return repositories, options


def _command(run: Path, repo_id: str, kinds: Sequence[str | None], options: Options) -> str:
    """The command line of a push."""
    words = ["qwen-tune", "push", str(run), repo_id]
    words += [word for kind in kinds if kind for word in ("--what", kind)]
    words += ["--public"] if options.private is False else []
    named = {"--revision": options.revision, "--base-id": options.base_id, "--license": options.license}
    words += [word for flag, value in named.items() if value for word in (flag, value)]
    words += [word for language in options.languages for word in ("--language", language)]
    return shlex.join(words)


def _remote(to: str) -> Remote:
    if to == MODELSCOPE:
        from qwen_tune.publishing.modelscope import ModelScope

        return ModelScope()
    from qwen_tune.publishing.hub import HuggingFace

    return HuggingFace()


def _refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise PublishError(problems)


def _prepare(path: Path, repo_id: str, kinds: Sequence[str | None], options: Options, remote: Remote) -> Shipment:
    """Finds and looks through what lies on the disk; asks nobody."""
    for name, flag in ((repo_id, "the repository"), (options.base_id, "--base-id")):
        if name is not None and not re.match(REPO_ID_PATTERN, name):
            raise PublishError(
                Problem(name, f"this is no name for {flag}; expected owner/name", "write it like me/coder-lora")
            )
    parts = [find_part(path, kind) for kind in kinds]
    base = published_base(parts[0], options.base_id)
    recipe = read_recipe(parts[0].run) if parts[0].run else None
    shipment = Shipment(repo_id, parts, base, Content(), recipe)
    for part in parts:
        shipment.content.add(collect(part, base, _secrets(remote)), shipment.folders[part.kind])
    return shipment


def _secrets(remote: Remote) -> list[str]:
    return [remote.token] if remote.token else []


def _check_repository(shipment: Shipment, account: Account, options: Options, remote: Remote) -> None:
    """Whether the account may write there, and whether it is as visible as was asked for."""
    repo_id = shipment.repo_id
    _refuse(_not_theirs(repo_id, account))
    found = remote.find(repo_id)
    if found is None:
        if options.create_pr:
            fix = "push once without --create-pr"
            raise PublishError(Problem(repo_id, "there is no such repository to open a pull request in", fix))
        return
    if not found.private and options.private is not False:
        what = "this repository is public, and what is pushed would be, too"
        raise PublishError(
            Problem(found.id, what, "say so with --public (in a recipe: hub.private=false), or push to another one")
        )
    shipment.repository = found


def _not_theirs(repo_id: str, account: Account) -> list[Problem]:
    owner, name = repo_id.split("/")
    if account.owners is None or {owner, repo_id} & account.owners:
        return []
    what = f"{account.name} may not write under {owner}; the token may write under {', '.join(sorted(account.owners))}"
    return [Problem(repo_id, what, f"push to {account.name}/{name}, or use another token")]


def _describe(shipment: Shipment, options: Options, remote: Remote) -> None:
    """Adds card, recipe and picture."""
    run, recipe = shipment.parts[0].run, shipment.recipe
    base_card = remote.read_card(shipment.base.id)
    theirs = remote.read_card(shipment.repository.id, options.revision) if shipment.repository else None
    licence = Licence(options.license) if options.license else licence_of(base_card) or licence_of(theirs)
    if licence is None:
        what = f"the licence of {shipment.base.id} is not known: its card could not be read, or names none"
        raise PublishError(
            Problem(shipment.repo_id, what, "say which it is with --license, such as --license apache-2.0")
        )
    text = public_recipe(recipe, shipment.base) if recipe else ""
    picture = draw_losses(run.metrics) if run else None
    about = Description(
        title=shipment.name,
        repo_id=shipment.repository.id if shipment.repository else shipment.repo_id,
        places=shipment.folders,
        base=shipment.base,
        licence=licence,
        facts=shipment.facts,
        adapter=_json_of(shipment, ADAPTER, "adapter_config.json"),
        merge=_json_of(shipment, MERGED, "merge.json"),
        recipe=text,
        data_sets=tuple(data_sets(recipe)) if recipe else (),
        languages=options.languages or languages_of(base_card),
        has_curve=picture is not None,
        is_on_modelscope=remote.title == "ModelScope",
    )
    card = Content({"README.md": compose(about, kept_text(theirs))})
    if text:
        card.files["recipe.yaml"] = text
    for name, file in card.files.items():
        card.problems += look_through(name, file, _secrets(remote), {str(Path.home())}, where=name)
    shipment.content.add(card)
    shipment.pictures = {CURVE: picture} if picture else {}


def _json_of(shipment: Shipment, kind: str, name: str) -> dict[str, Any]:
    """A part's JSON file as it is sent; of a merged model alone the adapter's settings are those in its run."""
    folder = shipment.folders.get(kind)
    file = shipment.content.files.get(f"{folder}/{name}" if folder else name) if folder is not None else None
    if file is None and kind == ADAPTER and shipment.parts[0].run:
        file = shipment.parts[0].run.adapter / name
    if file is None or (isinstance(file, Path) and not file.is_file()):
        return {}
    values = json.loads(file if isinstance(file, str) else file.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}


def _plan(shipment: Shipment, account: Account, options: Options, remote: Remote) -> str:
    """What would be sent, in lines."""
    content = shipment.content
    sizes = {name: content.size(name) for name in content.files} | {
        name: len(data) for name, data in shipment.pictures.items()
    }
    there = shipment.repository
    visible = "private" if (there.private if there else options.private is not False) else "public"
    state = f"{visible}, exists" if there else f"{visible}, will be made"
    where = " as a pull request" if options.create_pr else f", branch {options.revision}" if options.revision else ""
    lines = [
        f"{remote.title}: {there.id if there else shipment.repo_id} ({state}){where}, as {account.name}",
        f"would send {len(sizes)} files, {_size(sum(sizes.values()))}:",
        *(f"  {_size(size):>9}  {name}" for name, size in sorted(sizes.items())),
    ]
    if content.left_out:
        lines += ["would not send:", *(f"  {name}: {why}" for name, why in sorted(content.left_out.items()))]
    return "\n".join(lines)


def _send(shipment: Shipment, options: Options, remote: Remote) -> str:
    repository = shipment.repository or remote.create(shipment.repo_id, private=options.private is not False)
    title = f"{' and '.join(shipment.folders)} of {shipment.name}"
    with tempfile.TemporaryDirectory(prefix="qwen-tune-push-") as temporary:
        folder = Path(temporary)
        shipment.content.write(folder)
        for file, data in shipment.pictures.items():
            (folder / file).write_bytes(data)
        address = remote.upload(
            repository, folder, revision=options.revision, create_pr=options.create_pr, title=f"Upload {title}"
        )
    fingerprint = shipment.facts.get("fingerprint")
    if fingerprint and not options.create_pr:
        remote.tag(repository, f"{shipment.name}-{fingerprint[:12]}", options.revision)
    return f"pushed {title}: {address}{' (private)' if repository.private else ''}"


def _size(count: int) -> str:
    """Bytes in decimal units, as hubs show them."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
