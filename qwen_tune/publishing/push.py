"""A push from start to end: everything is checked before anything is sent."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qwen_tune.console import print_once, report
from qwen_tune.errors import Problem, PublishError, first_line
from qwen_tune.publishing.card import licence_of
from qwen_tune.publishing.remote import Account, Remote, Repository, create_repository
from qwen_tune.publishing.upload_plan import Options, UploadPlan, add_card, plan_upload, resolve_existing_weights
from qwen_tune.recipe.schema import HubSpec, Recipe

HUB, MODELSCOPE = "hub", "modelscope"


def push(
    path: Path, repo_id: str, kinds: Sequence[str] = (), *, options: Options, to: str = HUB, dry_run: bool = False
) -> str:
    """Uploads parts of a run, or a directory, with a card.

    Args:
        path: A run directory, an adapter directory or a merged model.
        repo_id: The repository, `owner/name`; it is created if it does not exist.
        kinds: `adapter`, `merged`, or both, each in a folder then; empty for what the path holds.
        options: Visibility, branch, names.
        to: `hub` or `modelscope`.
        dry_run: Whether to check everything and send nothing.

    Returns:
        The text to print: the address, or what would be sent.

    Raises:
        PublishError: A file must not be sent, or the other side refuses it or cannot be reached. Files that were sent
            stay there; the same call resumes.
    """
    remote = _remote(to)
    plan = plan_upload(path, repo_id, kinds, options, secrets=[remote.token] if remote.token else [])
    plan.content.check()
    account = remote.account()
    check_repository(plan, account, remote)
    add_card(plan, remote)
    plan.content.check()
    return _describe(plan, account, remote) if dry_run else _send(plan, remote)


def check_repository(plan: UploadPlan, account: Account, remote: Remote) -> None:
    """Finds the repository, and checks rights, branch, visibility and the weights that it has.

    Raises:
        PublishError: One of them does not allow the push.
    """
    repo_id, options = plan.repo_id, plan.options
    if not options.create_pr:  # anyone may open a pull request
        refuse_foreign(repo_id, account)
    found = plan.repository = remote.find(repo_id)
    remote.check_target(found, options.revision, create_pr=options.create_pr)
    if found is None:
        if options.create_pr:
            fix = "push once without --create-pr"
            raise PublishError(Problem(repo_id, "there is no such repository to open a pull request in", fix))
        return
    refuse_public(found, options)
    resolve_existing_weights(plan, remote.files(found, options.revision))


def refuse_foreign(repo_id: str, account: Account) -> None:
    """Raises PublishError if the account cannot write to the repository."""
    owner, name = repo_id.split("/")
    if account.owners is None or {owner, repo_id} & account.owners:
        return
    what = f"{account.name} cannot write under {owner}; the token can write under {', '.join(sorted(account.owners))}"
    raise PublishError(Problem(repo_id, what, f"push to {account.name}/{name}, or use another token"))


def refuse_public(repository: Repository, options: Options) -> None:
    """Raises PublishError if a push would be public and nobody asked for that."""
    if not repository.private and options.private is not False:
        what = "this repository is public, and the push would be public as well"
        fix = "allow it with --public (in a recipe: hub.private=false), or push to another one"
        raise PublishError(Problem(repository.id, what, fix))


def _remote(to: str) -> Remote:
    if to == MODELSCOPE:
        from qwen_tune.publishing.modelscope import ModelScope

        return ModelScope()
    from qwen_tune.publishing.hub import HuggingFace

    return HuggingFace()


def _describe(plan: UploadPlan, account: Account, remote: Remote) -> str:
    """Says in lines what would be sent."""
    content, options, repository = plan.content, plan.options, plan.repository
    sizes = {name: content.size(name) for name in content.files}
    is_private = repository.private if repository else options.private is not False
    state = f"{'private' if is_private else 'public'}, {'exists' if repository else 'will be created'}"
    where = " as a pull request" if options.create_pr else f", branch {options.revision}" if options.revision else ""
    lines = [
        f"{remote.title}: {repository.id if repository else plan.repo_id} ({state}){where}, as {account.name}",
        f"would send {len(sizes)} files, {_size(sum(sizes.values()))}:",
        *(f"  {_size(size):>9}  {name}" for name, size in sorted(sizes.items())),
    ]
    if plan.recipe and plan.recipe.data.system:
        lines.append("recipe and card contain the system message")
    if plan.delete:
        lines += ["would delete, as weights of an earlier push:", *(f"  {name}" for name in plan.delete)]
    if content.left_out:
        lines += ["would not send:", *(f"  {name}: {why}" for name, why in sorted(content.left_out.items()))]
    return "\n".join(lines)


def _send(plan: UploadPlan, remote: Remote) -> str:
    options = plan.options
    private = options.private is not False
    repository = plan.repository or create_repository(remote, plan.repo_id, private=private)
    if options.private is False and repository.private:
        report(f"{repository.id} is private and stays private; {repository.url}/settings makes it public")
    title = f"{' and '.join(plan.folders)} of {plan.name}"
    with tempfile.TemporaryDirectory(prefix="qwen-tune-push-") as folder:
        plan.content.write(Path(folder))
        address = remote.upload(
            repository,
            Path(folder),
            revision=options.revision,
            create_pr=options.create_pr,
            title=f"Upload {title}",
            delete=plan.delete,
        )
    if plan.tag and not options.create_pr:
        try:
            remote.tag(repository, plan.tag, options.revision)
        except PublishError as error:  # the files are there; only the tag is missing
            report(f"warning: the tag {plan.tag} could not be created: {error}")
    deleted = f", {len(plan.delete)} old weight files deleted" if plan.delete else ""
    return f"pushed {title}: {address}{' (private)' if repository.private else ''}{deleted}"


def _size(count: int) -> str:
    """Bytes in decimal units, as the Hub shows them."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def push_after_training(run: Path, spec: HubSpec) -> None:
    """Pushes what the recipe's `hub:` asks for. A failure is only reported, with the command to resume."""
    options = _options(spec)
    for repo_id, kinds in _repositories(spec).items():
        try:
            print_once(push(run, repo_id, kinds, options=options))
        except KeyboardInterrupt:
            print_once(f"the push was interrupted; resume with: {_command(run, repo_id, kinds, options)}")
            raise
        except Exception as error:  # a bug too: hours of training must not end in a traceback
            print_once(f"warning: not pushed to {repo_id}: {first_line(error)}")
            print_once(f"         the run is complete; resume with: {_command(run, repo_id, kinds, options)}")


def push_commands(run: Path, spec: HubSpec) -> list[str]:
    """Returns the command lines that push what the recipe asks for."""
    return [_command(run, repo_id, kinds, _options(spec)) for repo_id, kinds in _repositories(spec).items()]


def check_push(recipe: Recipe) -> list[str]:
    """Returns warnings of what would make the push after training fail; does not wait for a busy server."""
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
                refuse_public(found, options)
                cards.append(remote.read_card(found.id, spec.revision))
    except Exception as error:  # training does not need the Hub
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
    words = ["qwen-tune", "push", str(run), repo_id]
    words += [word for kind in kinds for word in ("--what", kind)]
    words += ["--public"] if options.private is False else []
    named = {"--revision": options.revision, "--base-id": options.base_id, "--license": options.license}
    words += [word for flag, value in named.items() if value for word in (flag, value)]
    words += [word for language in options.languages for word in ("--language", language)]
    return shlex.join(words)
