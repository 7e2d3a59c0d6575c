"""The checkpoint's tokenizer, refused where a model trained with it would lose text or never stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen_tune.chatml.template import END_OF_TURN
from qwen_tune.errors import ModelError, Problem, first_line
from qwen_tune.model.base import BaseCheckpoint
from qwen_tune.model.untuned import end_turns
from qwen_tune.paths import UnreadableError, read_text_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen_tune.recipe.schema import ModelSpec

PROBE = "Grüße, 世界! x = 12345\n"  # what a byte-level tokenizer gives back unchanged


def load_tokenizer(model: ModelSpec, base: BaseCheckpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with the recipe's chat template where it gives one and turns that end the text.

    Raises:
        ModelError: The tokenizer cannot be read, is no ChatML tokenizer, or would lose the ends of turns.
    """
    from transformers import AutoTokenizer

    if not (base.path / "tokenizer.json").exists() and not (base.path / "vocab.json").exists():
        # Transformers would make up a tokenizer of two tokens and say nothing.
        raise ModelError(Problem(base.id, "there is no tokenizer.json; expected the checkpoint's own"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare exceptions for files it cannot read
        raise ModelError(Problem(base.id, f"the tokenizer cannot be loaded: {first_line(error)}")) from error
    vocabulary = int(base.config.get("vocab_size", 0))
    if len(tokenizer) > vocabulary or tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False)) != PROBE:
        raise ModelError(
            Problem(
                base.id,
                f"its tokenizer of {len(tokenizer):,} tokens loses text, or is not this model's of {vocabulary:,}",
                "download the checkpoint's own tokenizer files",
            )
        )
    if model.chat_template is not None:
        tokenizer.chat_template = _read_template(model.chat_template)
    if tokenizer.eos_token != END_OF_TURN:
        # Of a base checkpoint, or of a tuned one whose files disagree: what ends an answer is the end of a turn.
        end_turns(base, tokenizer)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        raise ModelError(
            Problem(
                base.id,
                f"its padding token is {tokenizer.pad_token}, the end of turns as well; models trained so never stop",
                "set pad_token to <|endoftext|> in its tokenizer_config.json",
            )
        )
    return tokenizer


def _read_template(path: str) -> str:
    try:
        return read_text_file(path)
    except UnreadableError as error:
        raise ModelError(
            Problem(path, f"the chat template cannot be read: {error}", "check model.chat_template")
        ) from None
