"""The adapter's shape on a base: which modules it changes, and how many parameters that is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from qwen_tune.errors import ModelError, Problem
from qwen_tune.families.family import EMBEDDING, HEAD, Family
from qwen_tune.families.known import family_of
from qwen_tune.model.targets import ends_with_any, listed_targets, wanted_modules
from qwen_tune.recipe.schema import LoraSpec

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

EMBEDDINGS = (EMBEDDING, HEAD)

# Starts that take a part of the base into the adapter; what is saved is the difference to that start, as plain LoRA.
CONVERTED_STARTS = ("pissa", "olora")


@dataclass(frozen=True)
class TrainedModules:
    """How many modules of one name are trained, and their trained parameters in total."""

    modules: int
    parameters: int


def target_modules(model: PreTrainedModel, lora: LoraSpec, family: Family) -> list[str]:
    """The names of the linear layers that get an adapter, as PEFT takes them.

    Routers and the towers of multimodal models are left out unless the recipe names them.

    Returns:
        Last parts of names where these mean just the wanted layers, else whole names.

    Raises:
        ModelError: A name that the recipe lists is not a linear layer of the model, or `exclude_modules` leaves none.
    """
    output = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output]
    listed, wanted = listed_targets(lora, family), wanted_modules(linear, lora, family)
    mean_just_these = {full for full in linear if ends_with_any(full, listed)} == wanted
    return sorted(listed) if mean_just_these else sorted(wanted)


def lora_config(
    model: PreTrainedModel, lora: LoraSpec, trained_tokens: Mapping[str, list[int]] | None = None
) -> LoraConfig:
    """PEFT's configuration for the recipe's adapter.

    Args:
        model: The base model.
        lora: The recipe's lora section.
        trained_tokens: Token rows to train where the recipe says nothing of them; see `is_pretrained_only`.

    Raises:
        ModelError: Something that the recipe names is not in the model, or cannot be trained in it.
    """
    from peft import LoraConfig

    targets = target_modules(model, lora, family_of(model.config.to_dict(), "model.base"))
    whole = lora.modules_to_save
    if whole:
        _check_whole_modules(model, whole, targets)
    tokens = _token_rows(model, lora, trained_tokens)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights,
        bias=lora.bias,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        modules_to_save=list(whole) if whole else None,
        trainable_token_indices=tokens or None,
    )


def is_converted(lora: LoraSpec) -> bool:
    """Whether the adapter's start changes the base, so that it is saved as the difference to that start."""
    return isinstance(lora.init_lora_weights, str) and lora.init_lora_weights.startswith(CONVERTED_STARTS)


def trained_modules(model: nn.Module) -> dict[str, TrainedModules]:
    """The trained modules of a model, by the last part of their names."""
    counts: dict[str, tuple[set[str], int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = re.split(r"\.(?:lora_|token_adapter|modules_to_save|base_layer|bias$|weight$)", name)[0]
            modules, parameters = counts.get(module.rsplit(".", 1)[-1], (set(), 0))
            counts[module.rsplit(".", 1)[-1]] = ({*modules, module}, parameters + parameter.numel())
    return {name: TrainedModules(len(modules), parameters) for name, (modules, parameters) in sorted(counts.items())}


def _token_rows(
    model: PreTrainedModel, lora: LoraSpec, automatic: Mapping[str, list[int]] | None
) -> list[int] | dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: each id once, no module without ids."""
    asked = lora.trainable_token_indices
    if asked is None:
        whole = {name.rsplit(".", 1)[-1] for name in lora.modules_to_save or ()}
        return {name: ids for name, ids in (automatic or {}).items() if name not in whole}
    _check_tokens(model, asked)
    if isinstance(asked, list):
        return sorted(set(asked))
    return {name: sorted(set(ids)) for name, ids in asked.items() if ids}


def _check_whole_modules(model: PreTrainedModel, names: Sequence[str], targets: Sequence[str]) -> None:
    modules = dict(model.named_modules())
    for name in names:
        found = {full: module for full, module in modules.items() if ends_with_any(full, [name])}
        what = fix = ""
        if not found:
            what, fix = f"{name} matches no module of the model", "correct it"
        elif name.rsplit(".", 1)[-1] in EMBEDDINGS and model.config.tie_word_embeddings:
            what = f"{name} is tied to the other end of the model; a copy of its own would break the tie"
            fix = "train the tokens that matter with lora.trainable_token_indices"
        elif any(ends_with_any(inner, targets) and inner.startswith(f"{full}.") for full in found for inner in modules):
            what = f"{name} holds layers that get an adapter; they cannot be trained whole as well"
            fix = "name a smaller module, or take these layers out of lora.target_modules"
        elif not all(p.is_floating_point() for module in found.values() for p in module.parameters()):
            what, fix = f"{name} is quantized, and quantized weights cannot be trained", "write quantization: none"
        if what:
            raise ModelError(Problem("lora.modules_to_save", what, fix))


def _check_tokens(model: PreTrainedModel, tokens: Sequence[int] | Mapping[str, Sequence[int]]) -> None:
    ids = [token for part in tokens.values() for token in part] if isinstance(tokens, Mapping) else list(tokens)
    vocabulary = int(model.config.vocab_size)
    if wrong := [token for token in ids if token >= vocabulary]:
        what = f"{wrong[0]} is not a token of this model; ids go from 0 to {vocabulary - 1}"
        raise ModelError(Problem("lora.trainable_token_indices", what, "correct it"))
    ends = EMBEDDINGS[:1] if model.config.tie_word_embeddings else EMBEDDINGS
    if other := [name for name in tokens if name not in ends] if isinstance(tokens, Mapping) else []:
        tied = " (its two ends are tied: one row a token)" if len(ends) == 1 else ""
        what = f"{other[0]} has no token rows of its own; expected {' or '.join(ends)}{tied}"
        raise ModelError(Problem("lora.trainable_token_indices", what, f"write {ends[0]}: [...]"))
