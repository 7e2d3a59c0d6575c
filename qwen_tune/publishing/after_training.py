"""The push that a recipe asks for: looked ahead to when training begins, and made when it has ended."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from qwen_tune.console import say
from qwen_tune.errors import first_line
from qwen_tune.publishing.card import licence_of
from qwen_tune.publishing.push import push, refuse_foreign, refuse_public
from qwen_tune.publishing.shipment import Options
from qwen_tune.recipe.schema import HubSpec, Recipe


def push_after_training(run: Path, spec: HubSpec) -> None:
    """Pushes what the recipe's `hub:` asks for. What fails is told with the command that goes on: the run is done."""
    options = _options(spec)
    for repo_id, kinds in _repositories(spec).items():
        try:
            say(push(run, repo_id, kinds, options=options))
        except KeyboardInterrupt:
            say(f"the push was interrupted; go on with: {_command(run, repo_id, kinds, options)}")
            raise
        except Exception as error:  # also a bug of ours: hours of training do not end in it
            say(f"warning: not pushed to {repo_id}: {first_line(error)}")
            say(f"         the run is complete; go on with: {_command(run, repo_id, kinds, options)}")


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
