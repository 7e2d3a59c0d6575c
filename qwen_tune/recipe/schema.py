"""The recipe: every key, its type, its default and its meaning.

Recipe
├── name
├── run        RunSpec          the run directory
├── model      ModelSpec        the base checkpoint and how it is loaded
├── data       DataSpec         sources, evaluation, length, loss mask
│   ├── train  [SourceSpec, …]
│   └── eval   EvalSpec, or [SourceSpec, …], or nothing
├── lora       LoraSpec         the adapter, with PEFT's names
├── train      TrainSpec        the optimization, with Transformers' names
├── tracking   TrackingSpec
├── export     ExportSpec
└── hub        HubSpec, or nothing

A field's docstring is its help text. No field accepts `None` unless `None` is its default: a `null` in a recipe means
"use the default". `files.load_recipe` reads a recipe; `rules` checks what spans several keys.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

NAME_PATTERN = r"^\w[\w.-]*$"
REPO_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"
PISSA_PATTERN = r"^pissa_niter_[1-9][0-9]*$"
TEXT_PATTERN = r"\S"

SafeName = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=100)]
Text = Annotated[str, StringConstraints(pattern=TEXT_PATTERN)]
RepoId = Annotated[str, StringConstraints(pattern=REPO_ID_PATTERN)]


def _without_nulls(value: Any) -> Any:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


Unsettable = BeforeValidator(_without_nulls)
"""For mappings with free keys: `null` unsets a key, as everywhere in a recipe."""


def to_name(text: str) -> str:
    """Makes a name from a text: everything but letters, digits, `_` and `.` becomes `-`. May be empty."""
    # Not \w: Python's includes characters such as ¼, NAME_PATTERN's (Rust's \w) does not.
    kept = "".join(letter if letter.isalpha() or letter.isdecimal() or letter in "_." else "-" for letter in text)
    return re.sub(r"-+", "-", kept)[:100].strip("-.")


def default_source_name(path: str) -> str:
    """The stem of a source's file; for a glob or a folder, the last part of the path that contains letters."""
    for part in reversed(re.split(r"[/\\]", path)):
        stem = part
        while ending := re.search(r"\.(jsonl?|ndjson|parquet|arrow|csv|tsv|txt|gz|zst)$", stem[-9:], re.IGNORECASE):
            stem = stem[: -len(ending[0])]
        name = to_name(stem)
        if name and not part.endswith(":"):
            return name
    return "data"


class Section(BaseModel):
    """A mapping of the recipe: no unknown keys, no type conversions, and `null` for the default."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        # Only the whole recipe is validated, so its sections need no validators of their own.
        defer_build=True,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_takes_the_default(cls, value: Any) -> Any:
        # Unknown keys stay, null or not, so that they are refused.
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None or key not in cls.model_fields}


class RunSpec(Section):
    """Where the run's files go."""

    dir: Text | None = None
    """Run directory, relative to the working directory. Default: `runs/<name>`."""


class ModelSpec(Section):
    """The base checkpoint and how it is loaded."""

    base: Text
    """Base checkpoint: a folder if it starts with `.`, `/` or `~` or exists, else a Hub id like `Qwen/Qwen3-0.6B`."""

    revision: Text | None = None
    """Hub branch, tag or commit of the base. Default: `main`; its commit is recorded."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number type of the base's weights. `auto`: bfloat16 on a GPU that supports it, and on a CPU with bfloat16
    products if the checkpoint is stored in 16 bits; else float32."""

    quantization: Literal["none", "int8", "nf4"] = "none"
    """How the base is held in memory: unquantized, 8-bit integers, or 4-bit NormalFloat (QLoRA)."""

    attention: Literal["auto", "eager", "sdpa", "varlen", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention implementation; `auto` chooses the fastest one on this machine."""

    kernels: Literal["auto", "off"] = "auto"
    """`auto`: decoder layers with their own backward pass, which need less than half of the memory, if they compute the
    same; `off`: those of Transformers and PEFT."""

    chat_template: Text | None = None
    """Path of a `.jinja` chat template. Default: the checkpoint's own."""


class SourceSpec(Section):
    """One source of examples: a file, a glob, a folder or a Hub data set."""

    path: Text
    """File, glob, folder or Hub data set id, relative to the working directory."""

    name: SafeName = Field(default_factory=lambda fields: default_source_name(fields.get("path", "")))
    """Name in reports and metrics (`eval_<name>_loss`). Default: the file's stem."""

    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "query_response", "text", "tokenized"
    ] = "auto"
    """Format of the examples; `auto` detects it from the first one. `text` and `tokenized` examples have no turns."""

    columns: Annotated[dict[str, Text], Unsettable] = Field(default_factory=dict)
    """Column names: the expected name, then the name in the data, as in `messages: chat`."""

    tools: Text | None = None
    """Path of a JSON file of tools, for examples without tools of their own."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Passes over this source per epoch; 0.5 draws half of its examples, by the seed. Excludes `rows`."""

    rows: Annotated[int, Field(ge=1)] | None = None
    """Examples to draw from this source per epoch. Excludes `weight`."""

    subset: Text | None = None
    """Configuration of a Hub data set."""

    split: Text | None = None
    """Split of a Hub data set, such as `train`."""

    revision: Text | None = None
    """Branch, tag or commit of a Hub data set."""


class EvalSpec(Section):
    """Evaluation on examples held out of the training sources."""

    fraction: Annotated[float, Field(gt=0, lt=1)]
    """Fraction of the training examples to hold out, drawn by the seed; between 0 and 1."""


def _eval_kind(value: Any) -> str | None:
    if isinstance(value, (dict, EvalSpec)):
        return "held_out"
    return "sources" if isinstance(value, list) else None


Evaluation = Annotated[
    Annotated[EvalSpec, Tag("held_out")] | Annotated[list[SourceSpec], Field(min_length=1), Tag("sources")],
    Discriminator(_eval_kind),
]


class DataSpec(Section):
    """The examples, and how they become token ids and labels."""

    train: Annotated[list[SourceSpec], Field(min_length=1)]
    """Sources to train on, at least one."""

    eval: Evaluation | None = None
    """Evaluation data: `{fraction: 0.02}` of the training examples, or a list of sources. Default: no evaluation."""

    max_length_tokens: Annotated[int, Field(ge=8)] = 4096
    """Longest sample, and the length of a pack, in tokens."""

    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What happens to samples above `max_length_tokens`; they are counted either way."""

    packing: bool = True
    """Pack several samples into one sequence of `max_length_tokens`, each attending only to itself."""

    loss_on: Literal["assistant", "last_turn", "all"] = "assistant"
    """Supervised tokens: every assistant turn, the last assistant turn, or all of the text."""

    thinking: Literal["auto", "off", "require"] = "auto"
    """Reasoning in assistant turns: as in each example, refused in every example, or required in every turn."""

    system: Text | None = None
    """System message for examples without one. Default: that of the chat template."""

    special_tokens_in_text: Literal["reject", "neutralize"] = "reject"
    """What happens to examples whose text contains a control token: an error, or its characters as plain text."""

    deduplicate: bool | Literal["near"] = False
    """Drop training examples that repeat an earlier one; `near` also drops those that almost repeat one."""

    streaming: bool = False
    """A source's `rows` are its first ones, and nothing after them is read or downloaded: for data too large to draw
    from. Default: `rows` are drawn from the whole source, by the seed."""


class LoraSpec(Section):
    """The adapter. Names and meanings are those of PEFT's `LoraConfig`."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank of the adapter's matrices."""

    lora_alpha: Annotated[int, Field(ge=1)] = 32
    """Scale of the adapter: its output is multiplied by `lora_alpha / r`."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the adapter's inputs that is zeroed while training."""

    target_modules: (
        Literal["all-linear", "attention", "mlp", "all-linear+embeddings"] | Annotated[list[Text], Field(min_length=1)]
    ) = "all-linear"
    """Layers that get an adapter: one of four words, or a list of module names such as `[q_proj, v_proj]`."""

    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(r)` instead."""

    use_dora: bool = False
    """Learn magnitude and direction separately (DoRA)."""

    init_lora_weights: (
        bool
        | Literal["gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica"]
        | Annotated[str, StringConstraints(pattern=PISSA_PATTERN)]
    ) = True
    """Initialization: `true` for PEFT's default (no change to the base), or one of its other methods."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""

    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1)]], Unsettable] = Field(default_factory=dict)
    """Ranks for single layers: module name or regular expression, then rank."""

    alpha_pattern: Annotated[dict[str, Annotated[int, Field(ge=1)]], Unsettable] = Field(default_factory=dict)
    """Alphas for single layers: module name or regular expression, then alpha."""

    exclude_modules: list[Text] | None = None
    """Module names without an adapter although `target_modules` matches them."""

    modules_to_save: list[Text] | None = None
    """Modules that are trained and saved whole, beside the adapter."""

    trainable_token_indices: list[Annotated[int, Field(ge=0)]] | dict[str, list[Annotated[int, Field(ge=0)]]] | None = (
        None
    )
    """Token ids whose embeddings are trained, or such a list for each embedding module. Default: none; for a
    pretrained-only checkpoint, ChatML's two control tokens, unless this is `[]`."""

    target_parameters: list[Text] | None = None
    """Parameter names that get an adapter without being a linear layer, such as the experts of an MoE."""


class TrainSpec(Section):
    """The optimization. Names are those of Transformers and TRL, except for the batch."""

    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training data. Excludes `max_steps`."""

    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps in all. Excludes `num_train_epochs`."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Highest learning rate, reached after the warm-up."""

    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "cosine"
    """How the learning rate falls; further settings go to `trainer_args.lr_scheduler_kwargs`."""

    warmup_steps: Annotated[float, Field(ge=0)] | Annotated[int, Field(ge=0)] = 0.03
    """Steps over which the learning rate rises; below 1, a fraction of all steps."""

    global_batch_size: Annotated[int, Field(ge=1)] = 16
    """Sequences per optimizer step over all processes: packs when packing, else samples. Accumulation is derived."""

    per_device_train_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Sequences per forward pass of one process; `auto` takes what fits in memory."""

    num_processes: Annotated[int, Field(ge=1)] | None = None
    """Processes that the run must have; any other number is an error. Default: as started."""

    gradient_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What is recomputed in the backward pass to save memory: whole decoder layers (`full`), or gate and up projection
    of fused ones (`selective`: most of the memory for a third of the work)."""

    torch_compile: bool = False
    """Compile each decoder layer and pad every micro-batch to one shape: fewer kernel launches for small micro-batches
    on a GPU, at the cost of a minute at the start. Needs packing and `model.kernels: auto`."""

    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_32bit",
        "lion_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
        "ademamix",
        "ademamix_8bit",
        "paged_ademamix_32bit",
        "paged_ademamix_8bit",
        "adafactor",
        "adagrad",
        "rmsprop",
        "sgd",
    ] = "adamw_torch_fused"
    """Optimizer; those of Transformers that need no further package."""

    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+: ratio of the learning rate of the `B` matrices to that of the others. Default: one rate for all."""

    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Weight decay per step, in units of the learning rate."""

    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""

    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """Strength of NEFTune's noise on embeddings, scaled by each sample's length. Default: none."""

    logging_steps: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps between two lines of metrics."""

    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between two evaluations. Default: none while training."""

    eval_prompts: list[Text] = Field(default_factory=list)
    """Prompts to answer at every evaluation, to show progress; the answers go to the run's answers.jsonl."""

    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Evaluations without a lower loss after which training ends. Needs `eval_steps`. Default: never."""

    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """How much lower, in nats/token, the evaluation loss must be to count as lower for early stopping."""

    save_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between two checkpoints. Default: none while training."""

    save_total_limit: Annotated[int, Field(ge=1)] = 3
    """Checkpoints to keep."""

    load_best_model_at_end: bool = False
    """End with the checkpoint with the lowest evaluation loss. Needs `eval_steps` and `save_steps`."""

    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Hours after the start of the process at which a run saves and ends with exit code 130; the same command resumes
    it, for as long again."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """Seed of the adapter's initialization, the order of examples and dropout."""

    resume: Literal["auto", "never"] | Text = "auto"
    """In a used run directory: resume from the newest whole checkpoint, refuse, or resume from a checkpoint's path."""

    allow_drift: list[Text] = Field(default_factory=list)
    """What may have changed when a run is resumed: keys or sections of the recipe, and `base.weights_fingerprint`,
    `tokenizer_sha256`, `template_sha256`, `data_fingerprint`, `world_size`, `versions` (or one of them, such as
    `versions.torch`). Default: nothing that affects the result."""

    on_bad_step: Literal["stop", "skip"] = "stop"
    """What happens at a step whose loss or gradient is not finite, or whose loss is above twice that of guessing (the
    logarithm of the vocabulary's size): the run ends, naming the step's examples, or the step has no effect. Ten such
    steps in a row end it either way."""

    trainer_args: Annotated[dict[str, Any], Unsettable] = Field(default_factory=dict)
    """Further fields of TRL's `SFTConfig`; `qwen_tune/recipe/trainer_args.yaml` lists the accepted ones."""


class TrackingSpec(Section):
    """Where metrics go besides metrics.jsonl."""

    report_to: list[Literal["wandb", "tensorboard", "trackio", "mlflow"]] = Field(default_factory=list)
    """Trackers that get the metrics."""

    project: Text | None = None
    """Project at the tracker. Default: `qwen-tune`."""


class ExportSpec(Section):
    """What to make of the adapter after training."""

    merge: bool = False
    """Merge base and adapter into one full model."""

    formats: list[Literal["gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q4_k_m", "gguf-lora", "ollama", "onnx-int4"]] = (
        Field(default_factory=list)
    )
    """Deployable files to write."""


class HubSpec(Section):
    """What is pushed, and where to."""

    repo_id: RepoId
    """Repository, as `owner/name`."""

    private: bool = True
    """Whether a new repository is private."""

    push: Annotated[list[Literal["adapter", "merged", "export"]], Field(min_length=1)] = Field(default=["adapter"])
    """What is pushed. Several parts in one repository each get a folder of their name."""

    repo_ids: dict[Literal["adapter", "merged", "export"], RepoId] = Field(default_factory=dict)
    """Separate repositories for some parts: `{merged: owner/name}`."""

    revision: Text | None = None
    """Branch to push to. Default: `main`."""

    base_id: RepoId | None = None
    """Hub id of the base, if `model.base` is a folder."""

    license: Text | None = None
    """Licence of what is pushed, as the Hub spells it. Default: the base's."""

    languages: list[Text] = Field(default_factory=list)
    """Languages for the card: `[en, zh]`. Default: the base's."""


class Recipe(Section):
    """One fine-tuning job."""

    name: SafeName
    """Name of the job and of its run directory: letters, digits, `-`, `_` and `.`. Default: the recipe file's stem."""

    run: RunSpec = Field(default_factory=RunSpec)
    """Where the run's files go."""

    model: ModelSpec
    """The base checkpoint and how it is loaded."""

    data: DataSpec
    """The examples, and how they become token ids and labels."""

    lora: LoraSpec = Field(default_factory=LoraSpec)
    """The adapter."""

    train: TrainSpec = Field(default_factory=TrainSpec)
    """The optimization."""

    tracking: TrackingSpec = Field(default_factory=TrackingSpec)
    """Where metrics go besides metrics.jsonl."""

    export: ExportSpec = Field(default_factory=ExportSpec)
    """What to make of the adapter after training."""

    hub: HubSpec | None = None
    """What is pushed after training, and where to. Default: nothing is pushed."""

    @property
    def run_dir(self) -> Path:
        """The run directory, relative to the working directory unless the recipe says otherwise."""
        return Path(self.run.dir).expanduser() if self.run.dir else Path("runs") / self.name
