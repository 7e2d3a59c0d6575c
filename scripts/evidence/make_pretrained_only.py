"""Makes a pretrained-only checkpoint of a tuned one: its ChatML tokens lose their training, nothing ends at <|im_end|>.

    python scripts/evidence/make_pretrained_only.py TUNED_DIR OUT_DIR

A real base checkpoint differs in all of its weights; this one differs in what matters to the toolkit: the rows of
<|im_start|> and <|im_end|> are noise of the size of the embeddings' mean, and tokenizer and configurations name
<|endoftext|> alone. Used where no base checkpoint is at hand.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

CONTROL = ("<|im_start|>", "<|im_end|>")


def main() -> None:
    """Copies, and changes the copy."""
    tuned, out = Path(sys.argv[1]), Path(sys.argv[2])
    shutil.copytree(tuned, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for name, change in (
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        ("config.json", {"eos_token_id": end_of_text}),
        ("generation_config.json", {"eos_token_id": end_of_text}),
    ):
        path = out / name
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**settings, **change}, indent=2) + "\n", encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                rows = tensors[name]
                for token in CONTROL:
                    noise = torch.randn(rows.shape[1], generator=generator) * rows.float().std() * 0.1
                    rows[tokenizer.convert_tokens_to_ids(token)] = noise.to(rows.dtype)
        save_file(tensors, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
