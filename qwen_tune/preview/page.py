"""The preview as one self-contained page of HTML: the audit, and samples to browse token by token.

The page's parts are beside this module. Text of examples is embedded as JSON and shown as text, never as HTML.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_tune import __version__
from qwen_tune.errors import Problem, QwenTuneError, first_line
from qwen_tune.preview.terminal import Spelling

if TYPE_CHECKING:
    from qwen_tune.data.inputs import Inputs
    from qwen_tune.preview.audit import Audit
    from qwen_tune.recipe.schema import Recipe

SAMPLES = 200  # unless the command says otherwise
TOKENS_OF_A_SAMPLE = 2_000
TOKENS_OF_A_PAGE = 1_000_000  # about 30 MB

# In a script element these could end it, or start a comment that hides its end.
ESCAPES = str.maketrans({char: f"\\u{ord(char):04x}" for char in "<>&"})

SUPERVISED, CONTROL = 1, 2


def check_target(file: Path) -> None:
    """Checks that a page can be written, before any work is done.

    Raises:
        QwenTuneError: The file is a folder, or its folder does not exist.
    """
    if file.is_dir():
        raise QwenTuneError(Problem(str(file), "this is a folder; expected a file name", "add preview.html"))
    if not file.parent.is_dir():
        what = f"the folder {file.parent} does not exist"
        raise QwenTuneError(Problem(str(file), what, f"mkdir -p {file.parent}, or choose another folder"))


def write(file: Path, text: str) -> None:
    """Writes a page; a reader sees the old one or the new one, never a part.

    Raises:
        QwenTuneError: The file cannot be written.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        # File names in the page may not be valid Unicode.
        part.write_text(text, encoding="utf-8", errors="replace")
        part.replace(file)
    except OSError as error:
        raise QwenTuneError(Problem(str(file), f"the page cannot be written: {first_line(error)}")) from error
    finally:
        part.unlink(missing_ok=True)


def page(recipe: Recipe, inputs: Inputs, audit: Audit, places: Sequence[int]) -> str:
    """The page as HTML.

    Args:
        recipe: Its name and the settings of the loss mask are shown.
        inputs: The checkpoint, its tokenizer, and the prepared data.
        audit: What became of the examples.
        places: The training samples to show, at most TOKENS_OF_A_PAGE tokens of them.
    """
    facts = {
        "recipe": recipe.name,
        "base": inputs.base.id,
        "revision": inputs.base.revision,
        "template": hashlib.sha256(str(inputs.tokenizer.chat_template).encode()).hexdigest(),
        "version": __version__,
        "settings": {
            "loss_on": recipe.data.loss_on,
            "thinking": recipe.data.thinking,
            "overlong": recipe.data.overlong,
        },
        "audit": audit.as_dict(),
        "samples": _samples(inputs, places),
        "of": len(inputs.data.train.samples),
        "tokens_of_a_sample": TOKENS_OF_A_SAMPLE,
    }
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":")).translate(ESCAPES)
    parts = {"style": _part("css"), "script": _part("js"), "data": text}
    before, *rest = _part("html").split("{{")
    return before + "".join(parts[name] + after for name, _, after in (piece.partition("}}") for piece in rest))


def _part(kind: str) -> str:
    return Path(__file__).with_suffix(f".{kind}").read_text(encoding="utf-8")


def _samples(inputs: Inputs, places: Sequence[int]) -> list[dict[str, Any]]:
    """Samples for the page: a piece is its text, its flags (1 supervised, 2 control) and its ids, in one flat list."""
    spelling = Spelling(inputs.tokenizer)
    samples: list[dict[str, Any]] = []
    room = TOKENS_OF_A_PAGE
    for place in places:
        example = inputs.data.train.samples[place]
        shown = min(len(example.input_ids), TOKENS_OF_A_SAMPLE)
        room -= shown
        if room < 0 and samples:
            break
        pieces = spelling.pieces(example.input_ids[:shown], example.labels[:shown])
        samples.append(
            {
                "at": example.source,
                "source": example.source_name,
                "tokens": len(example.input_ids),
                "supervised": example.supervised,
                "cut": bool(example.truncated),
                "pieces": [[p.text, SUPERVISED * p.supervised + CONTROL * p.control, *p.ids] for p in pieces],
            }
        )
    return samples
