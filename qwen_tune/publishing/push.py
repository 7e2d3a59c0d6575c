"""A push from start to end: everything is looked at before anything is sent."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from qwen_tune.console import tell
from qwen_tune.errors import Problem, PublishError
from qwen_tune.publishing.remote import Account, Remote
from qwen_tune.publishing.shipment import Options, Shipment, describe, prepare, settle_beside

HUB, MODELSCOPE = "hub", "modelscope"


def push(
    path: Path, repo_id: str, kinds: Sequence[str] = (), *, options: Options, to: str = HUB, dry_run: bool = False
) -> str:
    """Uploads parts of a run, or a directory, with a card.

    Args:
        path: A run directory, an adapter directory or a merged model.
        repo_id: The repository, `owner/name`; made if it is not there.
        kinds: `adapter` or `merged`, or both, each in a folder then; nothing for what the path holds.
        options: Visibility, branch, names.
        to: `hub` or `modelscope`.
        dry_run: Only check, and say what would be sent.

    Returns:
        What to print: where it is, or what would be sent.

    Raises:
        PublishError: Something may not be sent, the other side does not take it, or cannot be reached. What was sent
            before stays there; the same call goes on.
    """
    remote = _remote(to)
    secrets = [remote.token] if remote.token else []
    shipment = prepare(path, repo_id, kinds, options, secrets)
    _refuse(shipment.content.problems)
    account = remote.account()
    check_repository(shipment, account, options, remote)
    describe(
        shipment,
        options,
        secrets,
        base_card=remote.read_card(shipment.base.id),
        card=remote.read_card(shipment.repository.id, options.revision) if shipment.repository else None,
        site=remote.site,
    )
    _refuse(shipment.content.problems)
    return _plan(shipment, account, options, remote) if dry_run else _send(shipment, options, remote)


def check_repository(shipment: Shipment, account: Account, options: Options, remote: Remote) -> None:
    """Whether the account may write there, it is as visible as was asked for, and what lies there leaves room.

    Raises:
        PublishError: It is not so.
    """
    repo_id = shipment.repo_id
    if not options.create_pr:  # others may propose something, too
        refuse_foreign(repo_id, account)
    found = shipment.repository = remote.find(repo_id)
    remote.check_target(found, options.revision, create_pr=options.create_pr)
    if found is None:
        if options.create_pr:
            fix = "push once without --create-pr"
            raise PublishError(Problem(repo_id, "there is no such repository to open a pull request in", fix))
        return
    refuse_public(found.id, is_private=found.private, options=options)
    settle_beside(shipment, remote.files(found, options.revision))


def refuse_foreign(repo_id: str, account: Account) -> None:
    """Raises PublishError where the account may not write."""
    owner, name = repo_id.split("/")
    if account.owners is None or {owner, repo_id} & account.owners:
        return
    what = f"{account.name} may not write under {owner}; the token may write under {', '.join(sorted(account.owners))}"
    raise PublishError(Problem(repo_id, what, f"push to {account.name}/{name}, or use another token"))


def refuse_public(repo_id: str, *, is_private: bool, options: Options) -> None:
    """Raises PublishError where something would be published that nobody said should be."""
    if not is_private and options.private is not False:
        what = "this repository is public, and what is pushed would be, too"
        fix = "say so with --public (in a recipe: hub.private=false), or push to another one"
        raise PublishError(Problem(repo_id, what, fix))


def _remote(to: str) -> Remote:
    if to == MODELSCOPE:
        from qwen_tune.publishing.modelscope import ModelScope

        return ModelScope()
    from qwen_tune.publishing.hub import HuggingFace

    return HuggingFace()


def _refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise PublishError(problems)


def _plan(shipment: Shipment, account: Account, options: Options, remote: Remote) -> str:
    """What would be sent, in lines."""
    content, there = shipment.content, shipment.repository
    sizes = {name: content.size(name) for name in content.files} | {
        name: len(data) for name, data in shipment.pictures.items()
    }
    is_private = there.private if there else options.private is not False
    state = f"{'private' if is_private else 'public'}, {'exists' if there else 'will be made'}"
    where = " as a pull request" if options.create_pr else f", branch {options.revision}" if options.revision else ""
    lines = [
        f"{remote.title}: {there.id if there else shipment.repo_id} ({state}){where}, as {account.name}",
        f"would send {len(sizes)} files, {_size(sum(sizes.values()))}:",
        *(f"  {_size(size):>9}  {name}" for name, size in sorted(sizes.items())),
    ]
    if shipment.recipe and shipment.recipe.data.system:
        lines.append("recipe and card hold the system message")
    if shipment.delete:
        lines += ["would delete, as weights of an earlier push:", *(f"  {name}" for name in shipment.delete)]
    if content.left_out:
        lines += ["would not send:", *(f"  {name}: {why}" for name, why in sorted(content.left_out.items()))]
    return "\n".join(lines)


def _send(shipment: Shipment, options: Options, remote: Remote) -> str:
    repository = shipment.repository or remote.create(shipment.repo_id, private=options.private is not False)
    if options.private is False and repository.private:
        tell(f"{repository.id} is private and stays so; {repository.url}/settings makes it public")
    title = f"{' and '.join(shipment.folders)} of {shipment.name}"
    with tempfile.TemporaryDirectory(prefix="qwen-tune-push-") as temporary:
        folder = Path(temporary)
        shipment.content.write(folder)
        for file, data in shipment.pictures.items():
            (folder / file).write_bytes(data)
        address = remote.upload(
            repository,
            folder,
            revision=options.revision,
            create_pr=options.create_pr,
            title=f"Upload {title}",
            delete=shipment.delete,
        )
    if shipment.tag and not options.create_pr:
        try:
            remote.tag(repository, shipment.tag, options.revision)
        except PublishError as error:  # all is there; only its name is missing
            tell(f"warning: the tag {shipment.tag} could not be made: {error}")
    deleted = f", {len(shipment.delete)} old weight files deleted" if shipment.delete else ""
    return f"pushed {title}: {address}{' (private)' if repository.private else ''}{deleted}"


def _size(count: int) -> str:
    """Bytes in decimal units, as hubs show them."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
