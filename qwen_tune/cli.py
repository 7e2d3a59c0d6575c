"""The commands. Each imports what it needs when it runs, so that `--help` and `validate` answer at once.

Plain argparse: a command line library that validates through pydantic costs every `--help` a tenth of a second.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from qwen_tune import __version__
from qwen_tune.console import ReaderGoneError, can_encode, make_console, prepare_streams, report, show, shown_path
from qwen_tune.disk import path_fault
from qwen_tune.errors import QwenTuneError

ANY_TEXT = "\U0001f642"
"""What only an encoding of all of Unicode can write."""

ABOUT = "LoRA fine-tuning for the Qwen model family: one recipe from examples to a model that answers."


def build_parser() -> argparse.ArgumentParser:
    """Every command with its arguments; each carries the function that runs it."""
    parser = argparse.ArgumentParser(prog="qwen-tune", description=ABOUT, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"qwen-tune {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        added.set_defaults(run=globals()[name])
        return added

    def recipe_command(name: str, about: str) -> argparse.ArgumentParser:
        added = command(name, about)
        added.add_argument("recipe", metavar="RECIPE", type=Path, help="the recipe's YAML file")
        added.add_argument(
            "overrides",
            metavar="KEY=VALUE",
            nargs="*",
            default=[],
            help="changes to the recipe: train.learning_rate=1e-4",
        )
        return added

    recipe_command("validate", "Check a recipe, its files and their first examples. Loads no model.")

    shown = recipe_command("preview", "Show examples as they will train, token by token. Loads the tokenizer only.")
    shown.add_argument(
        "--rows",
        metavar="N",
        type=_positive,
        help="how many samples to show: the first of each source (default: 3, in a page 200)",
    )
    shown.add_argument("--all", action="store_true", help="show every sample")
    form = shown.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON line a sample")
    form.add_argument("--html", metavar="FILE", type=_path, help="write a page to look through, which needs no network")

    recipe_command("prepare", "Tokenize and pack a recipe's examples into the cache, where train finds them.")

    planned = recipe_command("estimate", "Count a recipe's memory and time on each GPU. Loads nothing but config.json.")
    planned.add_argument("--gpu", metavar="NAME", action="append", help="this GPU alone, such as h100-80gb; repeatable")
    planned.add_argument("--json", action="store_true", help="one JSON line a device")

    trained = recipe_command("train", "Train an adapter as a recipe says.")
    trained.add_argument("--overwrite", action="store_true", help="replace the run that is in the run directory")
    trained.add_argument("--dry-run", action="store_true", help="stop before weights are loaded; write nothing")

    merged = command("merge", "Merge an adapter into its base: a full model that needs no PEFT.")
    merged.add_argument(
        "paths",
        metavar="RUN",
        nargs="+",
        type=_path,
        help="a run, an adapter directory, or the Hub id of an adapter; several are merged in their order",
    )
    merged.add_argument("--output", metavar="DIR", type=_path, help="where the model goes (default: RUN/merged)")
    merged.add_argument(
        "--base",
        metavar="BASE",
        type=_name_or_path,
        help="original or dequantized weights of the adapter's own base, or another base: a directory or a Hub id",
    )
    merged.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=_size,
        help="largest weight file: 5GB, 500MB (default: the base's own division)",
    )
    merged.add_argument("--verify", action="store_true", help="compare the model's logits with base + adapter")
    merged.add_argument("--overwrite", action="store_true", help="replace the merged model that is there")

    pushed = command("push", "Upload an adapter or a merged model with a card: private unless asked otherwise.")
    pushed.add_argument("path", metavar="RUN", type=_path, help="a run, an adapter directory or a merged model")
    pushed.add_argument("repo_id", metavar="REPO_ID", help="the repository, as owner/name; made if it is not there")
    pushed.add_argument(
        "--what",
        action="append",
        default=[],
        choices=["adapter", "merged", "export"],
        help="part of a run (default: adapter); given twice, each goes into a folder of its name; export is to come",
    )
    seen = pushed.add_mutually_exclusive_group()
    seen.add_argument("--private", action="store_true", help="for its owner to see (the default)")
    seen.add_argument("--public", action="store_true", help="for everyone to see")
    target = pushed.add_mutually_exclusive_group()
    target.add_argument("--revision", metavar="BRANCH", help="the branch to push to (default: main)")
    target.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    pushed.add_argument("--to", choices=["hub", "modelscope"], default="hub", help="where to (default: hub)")
    pushed.add_argument("--base-id", metavar="ID", help="Hub id of the base, where it was a local directory")
    pushed.add_argument("--license", metavar="ID", help="licence, such as apache-2.0 (default: the base's)")
    pushed.add_argument(
        "--language", metavar="CODE", action="append", default=[], help="language for the card; repeatable"
    )
    pushed.add_argument(
        "--dry-run", action="store_true", help="check everything, list what would be sent, send nothing"
    )

    asked = command("chat", "Ask a run, an adapter or a model.")
    asked.add_argument("path", metavar="RUN", type=_path, help="a run, adapter or model directory")
    asked.add_argument("prompt", metavar="PROMPT", nargs="?", help="one question; without it a conversation begins")
    asked.add_argument("--system", metavar="TEXT", help="a system message")
    asked.add_argument("--compare", action="store_true", help="show the base's answer beside it")
    asked.add_argument(
        "--max-new-tokens", metavar="N", type=_positive, default=512, help="longest answer in tokens (default: 512)"
    )
    return parser


def validate(options: argparse.Namespace) -> None:
    """`qwen-tune validate`."""
    from qwen_tune.data.sources import check_data
    from qwen_tune.recipe.files import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    rows = check_data(recipe.data)
    show(f"{options.recipe}: OK. Base {recipe.model.base}, {rows}, run directory {recipe.run_dir}")


def preview(options: argparse.Namespace) -> None:
    """`qwen-tune preview`."""
    from qwen_tune.console import quiet_libraries
    from qwen_tune.recipe.files import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    quiet_libraries()
    from qwen_tune.data.inputs import load_inputs
    from qwen_tune.preview import page, terminal
    from qwen_tune.preview.audit import audit

    if options.html:
        page.check_target(options.html)
    inputs = load_inputs(recipe)
    samples, tokenizer = inputs.data.train.samples, inputs.tokenizer
    count = len(samples) if options.all else options.rows or (page.SAMPLES if options.html else 3)
    places = terminal.first_of_each_source(samples, count)
    if options.json:
        for place in places:
            print(terminal.as_json(samples[place], tokenizer, escaped=not can_encode(ANY_TEXT)))
        return
    found = audit(inputs.data, recipe.data)
    if options.html:
        page.write(options.html, page.page(recipe, inputs, found, places))
        show(f"{options.html}: {recipe.name}, {len(samples):,} training samples")
        return
    console = make_console()
    terminal.show_samples((samples[place] for place in places), terminal.Spelling(tokenizer), console)
    terminal.show_audit(found, len(places), console)


def prepare(options: argparse.Namespace) -> None:
    """`qwen-tune prepare`."""
    from qwen_tune.console import quiet_libraries
    from qwen_tune.recipe.files import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    quiet_libraries()
    from qwen_tune.data.cache import cache_folder
    from qwen_tune.data.inputs import load_inputs
    from qwen_tune.data.packing import pack, pack_by_source
    from qwen_tune.preview.audit import audit
    from qwen_tune.preview.terminal import show_audit

    data = load_inputs(recipe).data
    packs = pack(data.train.samples, recipe.data)
    pack_by_source(data.evaluation.samples, recipe.data)
    show_audit(audit(data, recipe.data), 0, make_console())
    show(f"{len(packs):,} {'packs' if recipe.data.packing else 'samples'} to train on, in {cache_folder('prepared')}")


def estimate(options: argparse.Namespace) -> None:
    """`qwen-tune estimate`."""
    import json

    from qwen_tune.hardware import find_gpu
    from qwen_tune.model.base import check_unquantized, resolve_base
    from qwen_tune.planner.estimate import estimate as count
    from qwen_tune.planner.estimate import lines
    from qwen_tune.recipe.files import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    gpus = [find_gpu(name) for name in options.gpu] if options.gpu else None
    base = resolve_base(recipe.model, weights=False, max_length_tokens=recipe.data.max_length_tokens)
    check_unquantized(base)
    estimates = count(recipe, base, gpus)
    if options.json:
        for entry in estimates:
            print(json.dumps(entry.facts()))
        return
    show("\n".join(lines(recipe, base, estimates)))


def train(options: argparse.Namespace) -> None:
    """`qwen-tune train`."""
    from qwen_tune.train import train as run_recipe

    run_recipe(options.recipe, options.overrides, overwrite=options.overwrite, dry_run=options.dry_run)


def merge(options: argparse.Namespace) -> None:
    """`qwen-tune merge`."""
    from qwen_tune.distributed.world import prepare_process, wait_passively

    prepare_process() if options.verify else wait_passively()
    from qwen_tune.merging.merge import merge as merge_adapter

    target = merge_adapter(
        *options.paths,
        output=options.output,
        base=options.base,
        overwrite=options.overwrite,
        max_shard_bytes=options.max_shard_size,
    )
    show(f"merged model: {shown_path(target)}")
    if options.verify:
        from qwen_tune.evaluation.verification import verify_merged

        show(str(verify_merged(options.paths, target, options.base)))


def push(options: argparse.Namespace) -> None:
    """`qwen-tune push`."""
    from qwen_tune.publishing.push import push as push_parts
    from qwen_tune.publishing.upload_plan import Options

    how = Options(
        private=False if options.public else True if options.private else None,
        revision=options.revision,
        create_pr=options.create_pr,
        base_id=options.base_id,
        license=options.license,
        languages=tuple(options.language),
    )
    show(push_parts(options.path, options.repo_id, options.what, options=how, to=options.to, dry_run=options.dry_run))


def chat(options: argparse.Namespace) -> None:
    """`qwen-tune chat`."""
    from qwen_tune.distributed.world import prepare_process
    from qwen_tune.evaluation.chat import chat as hold_chat

    prepare_process()
    hold_chat(
        options.path,
        options.prompt,
        system=options.system,
        compare=options.compare,
        max_new_tokens=options.max_new_tokens,
    )


SHOWS_ONLY = (validate, preview, estimate, chat)
"""Commands that end where nobody reads them any more; the others have work to finish."""


def main() -> None:
    """The console script; see `run_command` for the exit code."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Runs a command and turns the user's faults into a message.

    Returns:
        The exit code: 0 done, 2 for input that the user has to change, 130 when interrupted. What is our fault leaves
        with its traceback.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    prepare_streams()
    try:
        options = _parse(arguments)
        prepare_streams(shows_only=options.run in SHOWS_ONLY)
        options.run(options)
        sys.stdout.flush()
    except ReaderGoneError:
        return 0
    except QwenTuneError as error:
        _report_once(error)
        return 2
    except KeyboardInterrupt as stopped:
        _report_once(stopped.args[0] if stopped.args else "interrupted")
        return 130
    except SystemExit as done:  # argparse: 0 after --help, 2 for wrong arguments
        return done.code if isinstance(done.code, int) else 2
    return 0


def _report_once(message: object) -> None:
    """Prints a message that ends the process, once on a machine: its processes would all say the same."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        report(message)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    # argparse takes a list of positionals from one place only; overrides may stand after options as well.
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _name_or_path(text: str) -> str:
    if fault := path_fault(text):
        shown = text if len(text) <= 80 else f"{text[:80]}…"
        raise argparse.ArgumentTypeError(f"got {shown}, which is not a usable path ({fault})")
    return text


def _path(text: str) -> Path:
    return Path(_name_or_path(text))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _size(text: str) -> int:
    """Bytes of 5GB or 500MB: decimal units, as Transformers has them."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in units or not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a size; expected a number with KB, MB or GB, such as 5GB")
    return int(number) * units[unit]


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
