"""Build the embedded tiny Qwen3 model of the quickstart and of the tests.

    python scripts/build_tiny_model.py [OUTPUT_DIR]

The toolkit has to show a whole fine-tuning run without a network and in a minute, so it carries a base model of its
own: under one million parameters, brought up from nothing on chats drawn from ``data/tiny-qwen-source/phrases.yaml``.
It greets, adds, counts, knows a few capitals, and says "I do not know that yet." to everything else, which leaves
something for a fine-tuning run to teach. Everything that matters to tooling is as in a real Qwen3 checkpoint: the
architecture, tied embeddings padded beyond the tokenizer, byte-level BPE, added tokens after the vocabulary, ChatML.

The same machine and the same packages give the same bytes: seeds are fixed and one thread does the training, because
the order of floating-point additions depends on the number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

Chat = list[dict[str, str]]
Phrases = dict[str, Any]

DATA = Path(__file__).resolve().parent.parent / "data"
SOURCE = DATA / "tiny-qwen-source"
SEED = 20

QWEN_PRETOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Real Qwen3 checkpoints hold these in this order of kinds: control tokens are special (skipped when decoding), the
# marks of thinking and of tool calls are ordinary text that happens to be one token.
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
BPE_VOCABULARY = 1200
TOKENIZER_CHATS = 6_000
CONTEXT_TOKENS = 2048

BATCH_CHATS = 32
STEPS = 1_300
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 50


def load_phrases() -> Phrases:
    """What the chats are drawn from."""
    return yaml.safe_load((SOURCE / "phrases.yaml").read_text(encoding="utf-8"))


def fill(template: str, slots: dict[str, list[str]], rng: random.Random) -> str:
    """Replace every ``{slot}`` by one of its entries, and the slots in that entry likewise."""
    return re.sub(r"\{(\w+)\}", lambda match: fill(rng.choice(slots[match[1]]), slots, rng), template)


def exchange(question: str, answer: str) -> Chat:
    """One user turn and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sentence_case(text: str) -> str:
    """Only the first letter raised: ``str.capitalize`` would lower the names."""
    return text[:1].upper() + text[1:]


def draw_exchange(phrases: Phrases, rng: random.Random) -> Chat:
    """One question and its answer, or for names the two exchanges that belong together."""
    shares = phrases["shares"]
    kind = rng.choices(list(shares), weights=list(shares.values()))[0]
    games, slots = phrases["games"], phrases["slots"]
    if kind == "unknown":
        question = sentence_case(fill(rng.choice(phrases["unknown"]), slots, rng))
        return exchange(question, phrases["unknown_answer"])
    if kind == "small_talk":
        talk = rng.choice(phrases["small_talk"])
        return exchange(rng.choice(talk["ask"]), talk["say"])
    if kind == "tables":
        table = rng.choice(list(phrases["tables"].values()))
        key, value = rng.choice(list(table["rows"].items()))
        question = sentence_case(rng.choice(table["ask"]).format(key=key))
        return exchange(question, sentence_case(table["say"].format(key=key, value=value)))
    if kind == "sums":
        a, b = rng.randrange(10), rng.randrange(10)
        return exchange(
            rng.choice(games["sums"]["ask"]).format(a=a, b=b), games["sums"]["say"].format(a=a, b=b, c=a + b)
        )
    if kind == "counting":
        start = rng.randrange(1, 9)
        end = rng.randrange(start + 1, 11)
        numbers = ", ".join(str(number) for number in range(start, end + 1))
        question = rng.choice(games["counting"]["ask"]).format(a=start, b=end)
        return exchange(question, games["counting"]["say"].format(numbers=numbers))
    if kind == "repeat":
        text = fill("{word}", slots, rng)
        return exchange(rng.choice(games["repeat"]["ask"]).format(text=text), games["repeat"]["say"].format(text=text))
    if kind == "names":
        game, name = games["names"], rng.choice(slots["first"])
        told = exchange(rng.choice(game["tell"]).format(text=name), game["greet"].format(text=name))
        return told + exchange(rng.choice(game["ask"]), game["say"].format(text=name))
    raise ValueError(f"phrases.yaml: shares: unknown kind {kind!r}")


def draw_chats(phrases: Phrases, seed: int) -> Iterator[Chat]:
    """An endless stream of chats of one to three exchanges, a third of them with a system turn."""
    rng = random.Random(seed)
    while True:
        chat: Chat = []
        if rng.random() < 0.3:
            chat.append({"role": "system", "content": fill(rng.choice(phrases["systems"]), phrases["slots"], rng)})
        for _ in range(rng.choices([1, 2, 3], weights=[7, 2, 1])[0]):
            chat += draw_exchange(phrases, rng)
        yield chat


def take(chats: Iterator[Chat], count: int) -> list[Chat]:
    """The next `count` chats."""
    return [next(chats) for _ in range(count)]


def build_tokenizer(phrases: Phrases) -> Qwen2Tokenizer:
    """Train byte-level BPE as Qwen does it: NFC, Qwen's split, every byte in the vocabulary, added tokens last."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PRETOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chats = take(draw_chats(phrases, SEED), TOKENIZER_CHATS)
    bpe.train_from_iterator((turn["content"] for chat in chats for turn in chat), trainer)

    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        unk_token=None,
        model_max_length=CONTEXT_TOKENS,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = (SOURCE / "chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


def build_config(tokenizer: Qwen2Tokenizer) -> Qwen3Config:
    """A dense Qwen3 of about 0.95 million parameters."""
    return Qwen3Config(
        # Always some rows more than tokens, as in the released checkpoints: code that takes one for the other fails.
        vocab_size=64 * (len(tokenizer) // 64 + 1),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        # The usual 0.02 suits wide models: from there, one this narrow had hardly trained to copy a name.
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def build_generation_config(tokenizer: Qwen2Tokenizer) -> GenerationConfig:
    """Greedy answers that end with the turn."""
    return GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )


def draw_batches(phrases: Phrases, tokenizer: Qwen2Tokenizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless `(input_ids, attention_mask)`, both (BATCH_CHATS, longest chat), of chats of about the same length."""
    # Not the tokenizer's seed: its chats would all come first.
    chats = draw_chats(phrases, SEED + 1)
    rng = random.Random(SEED)
    while True:
        pool = tokenizer.apply_chat_template(take(chats, 32 * BATCH_CHATS), tokenize=False)
        rows = sorted(tokenizer(pool)["input_ids"], key=len)
        batches = [rows[start : start + BATCH_CHATS] for start in range(0, len(rows), BATCH_CHATS)]
        rng.shuffle(batches)
        for batch in batches:
            padded = tokenizer.pad({"input_ids": batch}, return_tensors="pt")
            yield padded["input_ids"], padded["attention_mask"]


def learning_rate_factor(step: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)))


def pretrain(model: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, phrases: Phrases) -> None:
    """Train in place on every token of the chats, the questions too: that is what gives their words a meaning."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    batches = draw_batches(phrases, tokenizer)
    started = time.monotonic()
    model.train()
    for step in range(1, STEPS + 1):
        input_ids, attention_mask = next(batches)
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}/{STEPS}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


def build(output: Path) -> None:
    """Write the whole model directory."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    phrases = load_phrases()
    tokenizer = build_tokenizer(phrases)
    model = Qwen3ForCausalLM(build_config(tokenizer))
    pretrain(model, tokenizer, phrases)
    model.generation_config = build_generation_config(tokenizer)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    size_bytes = sum(path.stat().st_size for path in output.iterdir())
    print(f"{output}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens, {size_bytes / 1e6:.2f} MB")


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description="Build the embedded tiny Qwen3 model.")
    parser.add_argument("output", type=Path, nargs="?", default=DATA / "tiny-qwen", help="the directory to write")
    build(parser.parse_args().output)


if __name__ == "__main__":
    main()
