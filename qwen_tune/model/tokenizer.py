"""Base checkpoints: pretrained on text alone, with a chat template but no notion of where a turn ends.

Their embeddings of `<|im_start|>` and `<|im_end|>` were never trained. LoRA leaves embeddings as they are, so an
adapter on such a checkpoint would never learn to stop. The rows of these two tokens are therefore trained beside it,
and `<|im_end|>` becomes the end of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwen_tune.chatml.template import END_OF_TURN
from qwen_tune.disk import UnreadableError, read_json, read_text_file
from qwen_tune.errors import ModelError, Problem, first_line
from qwen_tune.families.family import EMBEDDING, HEAD
from qwen_tune.families.shape import is_tied
from qwen_tune.model.base import BaseCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen_tune.recipe.schema import ModelSpec

START_OF_TURN = "<|im_start|>"
END_OF_TEXT = "<|endoftext|>"
CONTROL_TOKENS = (START_OF_TURN, END_OF_TURN)


def is_pretrained_only(base: BaseCheckpoint, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether nothing in the checkpoint's files ends an answer at `<|im_end|>`: neither tokenizer nor configurations.

    Qwen's Instruct checkpoints name it in all three, their base checkpoints in none. Both have the chat template, and
    names tell little (Qwen3-8B is tuned, Qwen2.5-7B is not), so neither decides.

    Args:
        base: The checkpoint.
        tokenizer: Its tokenizer, for the token's id; its own end of text may have been changed since.
    """
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    ends: set[Any] = set()
    for settings in (base.config, _json_if_there(base, "generation_config.json")):
        named = settings.get("eos_token_id")
        ends.update(named if isinstance(named, list) else [named])
    eos = _json_if_there(base, "tokenizer_config.json").get("eos_token")
    return end not in ends and (eos.get("content") if isinstance(eos, dict) else eos) != END_OF_TURN


def _json_if_there(base: BaseCheckpoint, name: str) -> Mapping[str, Any]:
    return read_json(base.path / name) if (base.path / name).exists() else {}


def end_turns(base: BaseCheckpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes `<|im_end|>` the tokenizer's end of text, as in a tuned checkpoint.

    Raises:
        ModelError: The tokenizer has no such token, or no chat template.
    """
    missing = [token for token in CONTROL_TOKENS if len(tokenizer.encode(token, add_special_tokens=False)) != 1]
    if missing:
        raise ModelError(Problem(base.id, f"its tokenizer does not know {', '.join(missing)}: is this a Qwen model?"))
    if not tokenizer.chat_template:
        raise ModelError(
            Problem(
                base.id,
                "this base checkpoint has no chat template, so nothing says how conversations are written",
                "give one in model.chat_template, such as the file of its Instruct checkpoint",
            )
        )
    tokenizer.eos_token = END_OF_TURN


def trained_tokens(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices` for a base checkpoint.

    Tied embeddings have one row a token. Untied ones have two, and an output row that stays as it is would never
    propose the end of a turn.
    """
    ids = sorted(int(tokenizer.convert_tokens_to_ids(token)) for token in CONTROL_TOKENS)
    modules = [EMBEDDING] if is_tied(config) else [EMBEDDING, HEAD]
    return dict.fromkeys(modules, ids)


PROBE = "Grüße, 世界! x = 12345\n"  # what a byte-level tokenizer gives back unchanged


def load_tokenizer(model: ModelSpec, base: BaseCheckpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with the recipe's chat template where it gives one and turns that end the text.

    Raises:
        ModelError: The tokenizer cannot be read, is not a ChatML tokenizer, or would lose the ends of turns.
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
