"""The commands. Each imports what it needs when it runs, so that `--help` and `validate` answer at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from qwen_tune import __version__
from qwen_tune.errors import QwenTuneError

app = typer.Typer(
    name="qwen-tune",
    help="LoRA fine-tuning for the Qwen model family: one recipe from rows to a model that answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe: train.learning_rate=1e-4"),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run, adapter or model directory.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"qwen-tune {__version__}")
        raise typer.Exit


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe and a sample of its data. Loads no model."""
    from qwen_tune.recipe_file import load_recipe
    from qwen_tune.validation import check_data

    checked = load_recipe(recipe, overrides or ())
    rows = check_data(checked.data)
    print(f"{recipe}: fine. Base {checked.model.base}, {rows}, run directory {checked.run_dir}")


@app.command()
def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many samples to show.")] = 3,
    everything: Annotated[bool, typer.Option("--all", help="Show every sample.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line a sample.")] = False,
) -> None:
    """Show rows as they will train, token by token. Loads the tokenizer only."""
    from qwen_tune.recipe_file import load_recipe

    checked = load_recipe(recipe, overrides or ())

    from rich.console import Console

    from qwen_tune import preview as view
    from qwen_tune.base import load_tokenizer, resolve_base
    from qwen_tune.chatml import ChatTemplate
    from qwen_tune.machine import quiet_libraries
    from qwen_tune.preparation import prepare_data

    quiet_libraries()
    base = resolve_base(checked.model, weights=False, max_length_tokens=checked.data.max_length_tokens)
    tokenizer = load_tokenizer(checked.model, base)
    data = prepare_data(checked.data, ChatTemplate(tokenizer), seed=checked.train.seed)
    shown = data.train.examples if everything else data.train.examples[:rows]
    if as_json:
        for example in shown:
            print(view.as_json(example, tokenizer))
        return
    console = Console()
    view.show(shown, tokenizer, console)
    view.show_totals(data, len(shown), console)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop before weights are loaded; write nothing.")] = False,
) -> None:
    """Train an adapter as a recipe says."""
    from qwen_tune.train import train as run_recipe

    run_recipe(recipe, overrides or (), overwrite=overwrite, dry_run=dry_run)


@app.command()
def merge(
    run: RunPath,
    output: Annotated[Path | None, typer.Option("--output", help="Where the model goes. Default: RUN/merged.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Another base: a directory or a Hub id.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare its logits with base + adapter.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Merge an adapter into its base: a full model that needs no PEFT."""
    from qwen_tune.machine import prepare_process
    from qwen_tune.merge import merge as merge_adapter

    prepare_process()
    target = merge_adapter(run, output=output, base=base, overwrite=overwrite)
    print(f"merged model: {target}")
    if verify:
        from qwen_tune.verification import verify_merged

        print(verify_merged(run, target, base))


@app.command()
def chat(
    run: RunPath,
    prompt: Annotated[str | None, typer.Argument(help="One question; without it a conversation begins.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base's answer beside it.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 512,
) -> None:
    """Ask a run, an adapter or a model."""
    from qwen_tune.chat import chat as hold_chat
    from qwen_tune.machine import prepare_process

    prepare_process()
    hold_chat(run, prompt, system=system, compare=compare, max_new_tokens=max_new_tokens)


def main() -> None:
    """The console script."""
    sys.exit(run_command(app))


def run_command(command: Callable[[], object]) -> int:
    """Runs a command and turns the user's faults into a message.

    Returns:
        The exit code: 0 done, 2 for input that the user has to change, 130 when interrupted. What is our fault leaves
        with its traceback.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        command()
    except QwenTuneError as error:
        print(error, file=sys.stderr)
        return 2
    except SystemExit as done:
        # Typer ends every command so: 0, 2 for a wrong argument, 130 for an interrupt.
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
        if code == 130:
            print("interrupted", file=sys.stderr)
        return code
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
