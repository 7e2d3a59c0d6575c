"""A push from start to end: everything is looked at before anything is sent."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qwen_tune.console import print_once, report
from qwen_tune.errors import Problem, PublishError, first_line
from qwen_tune.publishing.card import licence_of
from qwen_tune.publishing.remote import Account, Remote
from qwen_tune.publishing.upload_plan import Options, UploadPlan, describe, prepare, resolve_existing_weights
from qwen_tune.recipe.schema import HubSpec, Recipe

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
    plan = prepare(path, repo_id, kinds, options, secrets)
    _refuse(plan.content.problems)
    account = remote.account()
    check_repository(plan, account, options, remote)
    describe(
        plan,
        options,
        secrets,
        base_card=remote.read_card(plan.base.id),
        card=remote.read_card(plan.repository.id, options.revision) if plan.repository else None,
        site=remote.site,
    )
    _refuse(plan.content.problems)
    return _plan(plan, account, options, remote) if dry_run else _send(plan, options, remote)


def check_repository(plan: UploadPlan, account: Account, options: Options, remote: Remote) -> None:
    """Whether the account may write there, it is as visible as was asked for, and what lies there leaves room.

    Raises:
        PublishError: It is not so.
    """
    repo_id = plan.repo_id
    if not options.create_pr:  # others may propose something, too
        refuse_foreign(repo_id, account)
    found = plan.repository = remote.find(repo_id)
    remote.check_target(found, options.revision, create_pr=options.create_pr)
    if found is None:
        if options.create_pr:
            fix = "push once without --create-pr"
            raise PublishError(Problem(repo_id, "there is no such repository to open a pull request in", fix))
        return
    refuse_public(found.id, is_private=found.private, options=options)
    resolve_existing_weights(plan, remote.files(found, options.revision))


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


def _plan(plan: UploadPlan, account: Account, options: Options, remote: Remote) -> str:
    """What would be sent, in lines."""
    content, there = plan.content, plan.repository
    sizes = {name: content.size(name) for name in content.files} | {
        name: len(data) for name, data in plan.pictures.items()
    }
    is_private = there.private if there else options.private is not False
    state = f"{'private' if is_private else 'public'}, {'exists' if there else 'will be made'}"
    where = " as a pull request" if options.create_pr else f", branch {options.revision}" if options.revision else ""
    lines = [
        f"{remote.title}: {there.id if there else plan.repo_id} ({state}){where}, as {account.name}",
        f"would send {len(sizes)} files, {_size(sum(sizes.values()))}:",
        *(f"  {_size(size):>9}  {name}" for name, size in sorted(sizes.items())),
    ]
    if plan.recipe and plan.recipe.data.system:
        lines.append("recipe and card hold the system message")
    if plan.delete:
        lines += ["would delete, as weights of an earlier push:", *(f"  {name}" for name in plan.delete)]
    if content.left_out:
        lines += ["would not send:", *(f"  {name}: {why}" for name, why in sorted(content.left_out.items()))]
    return "\n".join(lines)


def _send(plan: UploadPlan, options: Options, remote: Remote) -> str:
    repository = plan.repository or remote.create(plan.repo_id, private=options.private is not False)
    if options.private is False and repository.private:
        report(f"{repository.id} is private and stays so; {repository.url}/settings makes it public")
    title = f"{' and '.join(plan.folders)} of {plan.name}"
    with tempfile.TemporaryDirectory(prefix="qwen-tune-push-") as temporary:
        folder = Path(temporary)
        plan.content.write(folder)
        for file, data in plan.pictures.items():
            (folder / file).write_bytes(data)
        address = remote.upload(
            repository,
            folder,
            revision=options.revision,
            create_pr=options.create_pr,
            title=f"Upload {title}",
            delete=plan.delete,
        )
    if plan.tag and not options.create_pr:
        try:
            remote.tag(repository, plan.tag, options.revision)
        except PublishError as error:  # all is there; only its name is missing
            report(f"warning: the tag {plan.tag} could not be made: {error}")
    deleted = f", {len(plan.delete)} old weight files deleted" if plan.delete else ""
    return f"pushed {title}: {address}{' (private)' if repository.private else ''}{deleted}"


def _size(count: int) -> str:
    """Bytes in decimal units, as hubs show them."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def push_after_training(run: Path, spec: HubSpec) -> None:
    """Pushes what the recipe's `hub:` asks for. What fails is reported with the command to resume: the run is done."""
    options = _options(spec)
    for repo_id, kinds in _repositories(spec).items():
        try:
            print_once(push(run, repo_id, kinds, options=options))
        except KeyboardInterrupt:
            print_once(f"the push was interrupted; resume with: {_command(run, repo_id, kinds, options)}")
            raise
        except Exception as error:  # also a bug of ours: hours of training do not end in it
            print_once(f"warning: not pushed to {repo_id}: {first_line(error)}")
            print_once(f"         the run is complete; resume with: {_command(run, repo_id, kinds, options)}")


def push_commands(run: Path, spec: HubSpec) -> list[str]:
    """The command lines that push what the recipe asks for."""
    return [_command(run, repo_id, kinds, _options(spec)) for repo_id, kinds in _repositories(spec).items()]


def check_push(recipe: Recipe) -> list[str]:
    """What would keep the push after training from succeeding, as far as it shows now; nobody waits for it long."""
    spec = recipe.hub
    if spec is None:
        return []
    from qwen_tune.publishing.hub import HuggingFace

    remote, options = HuggingFace(patient=False), _options(spec)
    try:
        account = remote.account()
        cards = [remote.read_card(spec.base_id or recipe.model.base)]
        for repo_id in _repositories(spec):
            refuse_foreign(repo_id, account)
            if found := remote.find(repo_id):
                refuse_public(found.id, is_private=found.private, options=options)
                cards.append(remote.read_card(found.id, spec.revision))
    except Exception as error:  # whatever it is, training does not need it
        return [f"the push after training would fail: {first_line(error)}"]
    finally:
        remote.close()
    if spec.license is None and not any(licence_of(card) for card in cards):
        return ["the push after training would fail: the base's card names no licence. Fix: set hub.license"]
    return []


def _repositories(spec: HubSpec) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for kind in dict.fromkeys(spec.push):
        found.setdefault(spec.repo_ids.get(kind, spec.repo_id), []).append(kind)
    return found


def _options(spec: HubSpec) -> Options:
    return Options(
        private=spec.private,
        revision=spec.revision,
        base_id=spec.base_id,
        license=spec.license,
        languages=tuple(spec.languages),
    )


def _command(run: Path, repo_id: str, kinds: Sequence[str], options: Options) -> str:
    """The command line of a push."""
    words = ["qwen-tune", "push", str(run), repo_id]
    words += [word for kind in kinds for word in ("--what", kind)]
    words += ["--public"] if options.private is False else []
    named = {"--revision": options.revision, "--base-id": options.base_id, "--license": options.license}
    words += [word for flag, value in named.items() if value for word in (flag, value)]
    words += [word for language in options.languages for word in ("--language", language)]
    return shlex.join(words)
