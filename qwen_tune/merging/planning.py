"""What an adapter does to each tensor of its base, worked out from names, shapes and settings alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qwen_tune.artifacts.adapter_dir import AdapterDir
from qwen_tune.errors import MergeError, Problem
from qwen_tune.families.family import EXPERT_PARTS
from qwen_tune.merging.adapter_settings import AdapterSettings
from qwen_tune.merging.steps import (
    HEAD,
    BiasShift,
    ExpertLowRank,
    LowRank,
    MergePlan,
    Replacement,
    Step,
    TokenRows,
    embedding_of,
)
from qwen_tune.model.tensor_files import TensorSpan, is_transposed, same_bytes

PREFIX = "base_model.model."

_LORA_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?|token_adapter\.trainable_tokens_delta)"
)

_FLOATS = ("F64", "F32", "F16", "BF16")
_LAYERS = re.compile(r"(.*?\.\d+\.).*")


def plan_merge(
    adapters: Sequence[tuple[AdapterDir, Mapping[str, TensorSpan]]], tensors: Mapping[str, TensorSpan], *, is_tied: bool
) -> MergePlan:
    """Works out the steps.

    Args:
        adapters: Adapters in the order in which they are merged, with their tensors.
        tensors: The base's tensors.
        is_tied: Whether the base's output matrix is its embedding.

    Raises:
        MergeError: An adapter is of a kind that has no merge, or does not fit the base.
    """
    planned: dict[str, list[Step]] = {}
    for adapter, stored in adapters:
        for name, steps in _Planner(adapter, tensors, stored).plan().items():
            before = planned.setdefault(name, [])
            for step in steps:
                _check_order(adapter, name, before, step)
                before.append(step)
    untied = False
    embedding = embedding_of(tensors)
    if is_tied and embedding and HEAD not in tensors:
        keeps = all(adapter.config.get("ensure_weight_tying") for adapter, _ in adapters)
        steps, head = planned.get(embedding, []), planned.pop(HEAD, [])
        # Rows of tokens are trained for both at once; so is all else where the adapter says that it keeps the tie.
        one_end = not (steps and head) and (keeps or (all(isinstance(step, TokenRows) for step in steps) and not head))
        if one_end or (len(steps) == len(head) and all(map(_same_for_both_ends, steps, head))):
            planned[embedding] = steps or head
        else:
            untied = True
            planned[HEAD] = [*(step for step in steps if isinstance(step, TokenRows)), *head]
    return MergePlan(
        {name: tuple(steps) for name, steps in planned.items() if steps},
        untied,
        consumed=sum(len(stored) for _, stored in adapters),
    )


@dataclass
class _Planner:
    adapter: AdapterDir
    tensors: Mapping[str, TensorSpan]
    stored: Mapping[str, TensorSpan]
    steps: dict[str, list[Step]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.settings = AdapterSettings(self.adapter)

    def plan(self) -> dict[str, list[Step]]:
        parts: dict[str, dict[str, TensorSpan]] = {}
        for key, span in self.stored.items():
            if span.dtype not in _FLOATS:
                what = f"{key} is stored as {span.dtype}; expected one of {', '.join(_FLOATS)}"
                raise self._problem(what, "save the adapter in its own type")
        # What is replaced is replaced before anything is added to it.
        for key, span in self.stored.items():
            name = key.removeprefix(PREFIX)
            if found := _LORA_PART.fullmatch(name):
                parts.setdefault(found["module"], {})[found["part"].removesuffix(".weight")] = span
            else:
                self._whole(key, name.replace(".base_layer.", ".").replace(".modules_to_save.", "."), span)
        for module, found_parts in parts.items():
            self._module(module, found_parts)
        self._check_complete()
        return self.steps

    def _check_complete(self) -> None:
        """Looks for modules that the settings name and the file has not: PEFT would leave them as the base has them.

        Only among the layers that the adapter knows: a base may have others (vision towers, MTP heads).
        """
        merged = {
            name
            for name, steps in self.steps.items()
            if any(isinstance(step, LowRank | ExpertLowRank) for step in steps)
        }
        known = {_container(name) for name in merged} - {None}
        missing = [
            name
            for name, span in self.tensors.items()
            if name not in merged
            and len(span.shape) > 1
            and _container(name) in known
            # A list of modules does not mean experts: Transformers holds these as parameters.
            and ".experts." not in name
            and self.settings.is_target(name)
        ]
        if missing:
            what = f"it has no matrices for {_listed(missing)}, which adapter_config.json names"
            raise self._problem(what, "save the adapter again: it is not whole")

    def _whole(self, key: str, name: str, span: TensorSpan) -> None:
        target = self._target(name, key)
        if self.tensors[target].shape != span.shape:
            raise self._misfit(key, f"{_by(span.shape)}; the base's {target} is {_by(self.tensors[target].shape)}")
        # PEFT saves embeddings beside matrices for them, or when asked to: mostly they are the base's.
        if not same_bytes(span, self.tensors[target]):
            self._add(name, Replacement(span))

    def _module(self, module: str, parts: Mapping[str, TensorSpan]) -> None:
        if values := parts.get("token_adapter.trainable_tokens_delta"):
            self._token_rows(module, values)
            parts = {name: span for name, span in parts.items() if span is not values}
            if not parts:
                return
        a, b = parts.get("lora_A", parts.get("lora_embedding_A")), parts.get("lora_B", parts.get("lora_embedding_B"))
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
            what = f"{module} has {' and '.join(sorted(parts))}; expected a matrix A and a matrix B"
            raise self._problem(what, "save the adapter again: it is not whole")
        if self._holds_experts(module):
            self._experts(module, a, b)
            return
        rank = a.shape[0]
        is_parameter = self.settings.targets_parameter(f"{module}.weight")
        scaling = self.settings.scaling(f"{module}.weight" if is_parameter else module, rank)
        is_embedding = "lora_embedding_A" in parts
        rows, columns = (a.shape[1], b.shape[0]) if is_embedding else (b.shape[0], a.shape[1])
        target = self._target(f"{module}.weight", f"{module}.lora_A")
        if self.tensors[target].shape != (rows, columns) or b.shape[1] != rank:
            shapes = f"of {_by(a.shape)} and {_by(b.shape)}; the base's {target} is {_by(self.tensors[target].shape)}"
            raise self._misfit(f"{module}.lora_A and lora_B", shapes)
        magnitude = parts.get("lora_magnitude_vector")
        if self.settings.use_dora != (magnitude is not None):
            what = f"{module} has {'a' if magnitude else 'no'} magnitude (DoRA), and adapter_config.json says otherwise"
            raise self._problem(what, "save the adapter again: it is not whole")
        if magnitude and magnitude.shape != ((columns,) if is_embedding else (rows,)):
            raise self._misfit(f"{module}.lora_magnitude_vector", f"of {_by(magnitude.shape)}")
        step = LowRank(a, b, scaling, magnitude, is_embedding, rounds_first=is_parameter)
        self._add(f"{module}.weight", step)
        if bias := parts.get("lora_B.bias"):
            shifted = self._target(f"{module}.bias", f"{module}.lora_B.bias")
            if self.tensors[shifted].shape != bias.shape:
                raise self._misfit(f"{module}.lora_B.bias", f"of {_by(bias.shape)}")
            self._add(f"{module}.bias", BiasShift(bias, scaling))

    def _token_rows(self, module: str, values: TensorSpan) -> None:
        given = self.settings.tokens(module, values.shape[0])
        target = self._target(f"{module}.weight", module)
        if values.shape[1:] != self.tensors[target].shape[1:]:
            raise self._misfit(f"{module}'s trained token rows", f"of {_by(values.shape)}")
        if len(set(given)) < len(given) or not all(0 <= token < self.tensors[target].shape[0] for token in given):
            raise self._problem(f"{module}: the trained tokens are not tokens of the base", "give the right base")
        self._add(f"{module}.weight", TokenRows(tuple(given), values))

    def _holds_experts(self, module: str) -> bool:
        return bool(self.settings.target_parameters) and module.replace(".base_layer", "").endswith("experts")

    def _experts(self, module: str, a: TensorSpan, b: TensorSpan) -> None:
        depth = module.count(".base_layer")
        module = module.replace(".base_layer", "")
        named = [part for part in EXPERT_PARTS if self.settings.targets_parameter(f"{module}.{part}")]
        if depth >= len(named):
            raise self._misfit(f"{module}.lora_A", "which belongs to none of target_parameters")
        parameter = named[-1 - depth]
        fused = f"{module}.{parameter}"
        places = dict(self._expert_tensors(module, parameter))
        if fused in self.tensors:
            shape = self.tensors[fused].shape
            places = {fused: (None, 0)}
        elif places:
            experts = 1 + max(expert or 0 for expert, _ in places.values())
            inner = [self.tensors[name].shape for name, (expert, _) in places.items() if expert == 0]
            shape = (experts, sum(rows for rows, _ in inner), inner[0][1])
        else:
            raise self._misfit(fused, "which the base does not have")
        rank, rest = divmod(a.shape[0], shape[0])
        if rest or a.shape[1] != shape[2] or b.shape != (shape[1], a.shape[0]):
            raise self._misfit(fused, f"of {_by(a.shape)} and {_by(b.shape)}; the base's is {_by(shape)}")
        scaling = self.settings.scaling(fused, rank)
        for name, (expert, first) in places.items():
            self._add(name, ExpertLowRank(a, b, scaling, shape[0], expert, first))

    def _expert_tensors(self, module: str, parameter: str) -> Iterator[tuple[str, tuple[int | None, int]]]:
        """The tensors of a checkpoint that keeps experts apart: expert, and first row in the fused parameter."""
        expert = 0
        while True:
            first = 0
            for part in EXPERT_PARTS[parameter]:
                name = f"{module}.{expert}.{part}.weight"
                if name not in self.tensors:
                    return
                yield name, (expert, first)
                first += self.tensors[name].shape[0]
            expert += 1

    def _target(self, name: str, key: str) -> str:
        """The base's tensor of a name; of a tied output matrix, the embedding's."""
        if name in self.tensors:
            return name
        if name == HEAD and (embedding := embedding_of(self.tensors)):
            return embedding
        raise self._misfit(key, "which the base does not have")

    def _add(self, name: str, step: Step) -> None:
        self.steps.setdefault(name, []).append(step)

    def _misfit(self, key: str, what: str) -> MergeError:
        return self._problem(
            f"the adapter does not fit the base {self.adapter.base.id}: it has {key}, {what}",
            "give the base that it was trained on with --base",
        )

    def _problem(self, what: str, fix: str) -> MergeError:
        return MergeError(Problem(str(self.adapter.path), what, fix))


def _same_for_both_ends(embedding: Step, head: Step) -> bool:
    """Whether two steps do the same to an embedding and to an output matrix tied to it.

    What ties them in training may come apart: PEFT's float32 matrices on a bfloat16 base do.
    """
    if isinstance(embedding, LowRank) and isinstance(head, LowRank) and embedding.is_embedding:
        plain = embedding.magnitude is None and head.magnitude is None and embedding.scaling == head.scaling
        return plain and is_transposed(embedding.b, head.a) and is_transposed(embedding.a, head.b)
    if isinstance(embedding, Replacement) and isinstance(head, Replacement):
        return same_bytes(embedding.values, head.values)
    if isinstance(embedding, TokenRows) and isinstance(head, TokenRows):
        return embedding.indices == head.indices and same_bytes(embedding.values, head.values)
    return False


def _check_order(adapter: AdapterDir, name: str, before: list[Step], step: Step) -> None:
    """Refuses what would undo an adapter that was merged before it."""
    clash = isinstance(step, Replacement) and any(not isinstance(earlier, Replacement) for earlier in before)
    twice = isinstance(step, Replacement) and any(isinstance(earlier, Replacement) for earlier in before)
    tokens = {token for earlier in before if isinstance(earlier, TokenRows) for token in earlier.indices}
    overlap = isinstance(step, TokenRows) and tokens.intersection(step.indices)
    if clash or twice or overlap:
        what = f"it replaces {name}, or rows of it, which an adapter before it has changed"
        raise MergeError(Problem(str(adapter.path), what, "merge one of them"))


def _container(name: str) -> str | None:
    """The stack of layers that a tensor belongs to: `model.layers.*.`; None outside of any."""
    found = _LAYERS.fullmatch(name)
    return re.sub(r"\d+", "*", found[1]) if found else None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
