"""What the trainer computes, on random models small enough to compute it again the slow way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from qwen_tune.chatml.template import IGNORED
from qwen_tune.errors import RecipeError, TrainingError
from qwen_tune.train import train
from qwen_tune.training.batches import BatchShape, PackCollator
from qwen_tune.training.loss import add_supervised_loss

# TRL 1.16 and PEFT 0.21 use names that Transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def random_model(model_type: str, attention: str):
    torch.manual_seed(0)
    experts = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}
    kinds = {"qwen2": (Qwen2Config, {}), "qwen3": (Qwen3Config, {}), "qwen3_moe": (Qwen3MoeConfig, experts)}
    kind, more = kinds[model_type]
    config = kind(**SHAPE, **more, head_dim=8, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def random_sample(length: int, seed: int) -> tuple[list[int], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 300, (length,), generator=generator).tolist()
    labels = [IGNORED if index == 0 or index % 3 == 0 else token for index, token in enumerate(ids)]
    return ids, labels


@pytest.mark.parametrize("shape", [None, BatchShape(tokens=100, samples=8, longest=40)], ids=["as it is", "filled"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe"])
def test_every_token_of_a_pack_costs_what_it_costs_alone(model_type, attention, shape):
    model = random_model(model_type, attention)
    samples = [random_sample(length, seed) for seed, length in enumerate([17, 1, 40, 9])]
    pack = {
        "input_ids": [token for ids, _ in samples for token in ids],
        "labels": [label for _, labels in samples for label in labels],
        "lengths": [len(ids) for ids, _ in samples],
    }
    batch = PackCollator(shape)([pack])
    model.requires_grad_(False)
    add_supervised_loss(model)
    with torch.no_grad():
        alone = []
        for ids, labels in samples:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            wanted = torch.tensor([*labels[1:], IGNORED])
            losses = cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="none")
            alone.append(losses[wanted != IGNORED])
        inputs = {key: value for key, value in batch.items() if key not in ("labelled", "targets")}
        logits = model(**inputs, use_cache=False).logits[0]
        packed = cross_entropy(logits[batch["labelled"]], batch["targets"], reduction="none")
        total = model(**batch)
    expected = torch.cat(alone)
    assert (packed - expected).abs().max() < 1e-5
    assert total.item() == pytest.approx(expected.sum().item(), rel=1e-6)
    assert packed.max() > 1  # the samples are not so easy that contamination would not show


def test_noise_is_for_training_alone():
    model, noisy = random_model("qwen2", "sdpa"), random_model("qwen2", "sdpa")
    add_supervised_loss(model)
    add_supervised_loss(noisy, neftune_noise_alpha=5.0)
    ids, labels = random_sample(30, 1)
    batch = PackCollator()([{"input_ids": ids, "labels": labels, "lengths": [30]}])
    plain = model(**batch).item()
    assert noisy(**batch).item() == plain
    noisy.train()
    first, second = (noisy(**batch).item() for _ in range(2))
    assert len({plain, first, second}) == 3


def run(workspace: Path, monkeypatch, *overrides: str) -> Path:
    monkeypatch.chdir(workspace)
    train("recipe.yaml", overrides)
    name = next(text.removeprefix("run.dir=") for text in overrides if text.startswith("run.dir="))
    return workspace / name


def weights(run_dir: Path) -> torch.Tensor:
    tensors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_accumulation_changes_nothing(workspace, monkeypatch):
    # SGD: Adam would turn rounding into differences of its own.
    same = ("train.optim=sgd", "train.learning_rate=0.1", "train.global_batch_size=4", "data.packing=false")
    whole = run(workspace, monkeypatch, *same, "train.per_device_train_batch_size=4", "run.dir=whole")
    parts = run(workspace, monkeypatch, *same, "train.per_device_train_batch_size=1", "run.dir=parts")
    moved = (weights(whole) - weights(run(workspace, monkeypatch, *same, "train.max_steps=1", "run.dir=short"))).abs()
    assert moved.max() > 1e-4
    assert (weights(whole) - weights(parts)).abs().max() < 1e-6


def test_layers_that_are_computed_again_change_no_bit(workspace, monkeypatch):
    once = run(workspace, monkeypatch, "run.dir=once", "train.gradient_checkpointing=none")
    selective = run(workspace, monkeypatch, "run.dir=selective", "train.gradient_checkpointing=selective")
    assert torch.equal(weights(once), weights(selective))
    for reason, override in (("the adapter has dropout", "lora.lora_dropout=0.1"), ("is off", "model.kernels=off")):
        with pytest.raises(RecipeError, match=f"got selective, which computes .*{reason}.* Fix: write full"):
            run(workspace, monkeypatch, "run.dir=no", "train.gradient_checkpointing=selective", override)
        assert not (workspace / "no").exists()
    with pytest.raises(RecipeError, match=r"got true, which compiles fused layers.*dropout.* Fix: write false"):
        run(workspace, monkeypatch, "run.dir=no", "train.torch_compile=true", "lora.lora_dropout=0.1")
    assert not (workspace / "no").exists()


def test_the_same_recipe_gives_the_same_weights_and_a_seed_other_ones(workspace, monkeypatch):
    one = run(workspace, monkeypatch, "run.dir=one")
    again = run(workspace, monkeypatch, "run.dir=again")
    other = run(workspace, monkeypatch, "train.seed=7", "run.dir=other")
    assert torch.equal(weights(one), weights(again))
    assert not torch.equal(weights(one), weights(other))


def test_evaluation_loss_is_the_mean_over_tokens(workspace, monkeypatch):
    path = run(workspace, monkeypatch, "run.dir=run", "train.learning_rate=1e-12")
    facts = json.loads((path / "run.json").read_text())
    # With a learning rate of nothing, the loss of base + adapter can be computed from the files alone.
    from qwen_tune.chatml.template import ChatTemplate
    from qwen_tune.data.preparation import prepare_data
    from qwen_tune.model.base import BaseCheckpoint
    from qwen_tune.model.tokenizer import load_tokenizer
    from qwen_tune.recipe.files import load_recipe

    recipe = load_recipe(path / "recipe.yaml")
    base = BaseCheckpoint(id="tiny", revision=None, path=Path("tiny-qwen").resolve(), is_local=True)
    template = ChatTemplate(load_tokenizer(recipe.model, base))
    examples = prepare_data(recipe.data, template, seed=recipe.train.seed).evaluation.samples
    model = AutoModelForCausalLM.from_pretrained(base.path).eval()
    losses = []
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0, :-1]
        wanted = torch.tensor(example.labels[1:])
        losses.append(cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="none")[wanted != IGNORED])
    expected = torch.cat(losses).mean().item()
    assert facts["losses"]["eval_before"] == pytest.approx(expected, rel=1e-5)
    assert facts["losses"]["eval_after"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(workspace, monkeypatch):
    shutil.copytree(workspace / "tiny-qwen", workspace / "broken")
    weights_file = workspace / "broken" / "model.safetensors"
    tensors = load_file(weights_file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, weights_file, metadata={"format": "pt"})
    with pytest.raises(
        TrainingError, match=r"\./broken: the loss on the held-out examples is not finite before anything"
    ):
        run(workspace, monkeypatch, "run.dir=run", "model.base=./broken")
    refusal = "step 1: the loss and the gradient norm are not finite; its examples are "
    with pytest.raises(TrainingError, match=refusal):
        run(workspace, monkeypatch, "run.dir=run2", "model.base=./broken", "data.eval=null")
    facts = json.loads((workspace / "run2" / "run.json").read_text())
    assert (facts["state"], facts["exit"]) == ("failed", 2)


@pytest.mark.parametrize(
    "arguments",
    [
        "{lr_scheduler_kwargs: {nonsense: 1}}",
        "{dataloader_persistent_workers: true}",
        "{dataloader_num_workers: -1}",
    ],
)
def test_trainer_args_that_do_not_suit_are_reported_before_anything_is_written(workspace, monkeypatch, arguments):
    with pytest.raises(RecipeError, match=r"train\.trainer_args: the trainer refuses them: .*change or remove them"):
        run(workspace, monkeypatch, "run.dir=run", f"train.trainer_args={arguments}")
    assert not (workspace / "run").exists()


def test_an_optimizer_or_rate_that_does_not_suit_is_reported_too(workspace, monkeypatch):
    with pytest.raises(RecipeError, match="train: the trainer refuses optimizer or learning rate"):
        run(workspace, monkeypatch, "run.dir=run", "train.lr_scheduler_type=polynomial", "train.learning_rate=1e-8")
    assert not (workspace / "run").exists()


def test_the_last_step_is_logged_though_it_is_none_of_logging_steps(workspace, monkeypatch):
    path = run(workspace, monkeypatch, "run.dir=run", "train.logging_steps=10")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3]
