# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""HAWK's weights of heads (arXiv 2604.07812), measured: what a head of the first decoder layer is worth to answers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

import learnpruner
from learnpruner.compare import load
from learnpruner.hub_cards.records import weights_digest
from learnpruner.training.data import load_samples, read_images, read_messages
from learnpruner.training.metrics import ExactMatch


def calibrate_files(
    model: str,
    data: Sequence[Path],
    output: Path,
    image_folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 16,
    trust_remote_code: bool = False,
) -> str:
    """The `learnpruner calibrate-hawk` command. Bad input is refused before the model is loaded.

    Args:
        data (`Sequence[Path]`): One file for each data set, in a layout that `training/data.py` names. Each sample is
            asked for its last answer.
        output (`Path`): JSON; what is there is replaced when all is measured.
        limit (`int`, *optional*): Samples of each data set: its first.

    Raises:
        `ValueError`: where a file has no questions with answers, or two have one name.
        `OSError`: where a file or the output's folder is missing.
    """
    if not output.parent.is_dir() or output.is_dir():
        raise OSError(f"no such folder for a file: {output}")
    if len({path.name for path in data}) < len(data):
        raise ValueError("Two data sets have one file name: rename one, so that the record tells them apart.")
    sets = {path.name: _questions(path, image_folder, limit) for path in data}
    vlm, processor = load(model, trust_remote_code)
    if processor.chat_template is None:
        raise ValueError("The processor has no chat template: set processor.chat_template to the base model's.")
    record = calibrate(vlm, processor, sets, batch_size, max_new_tokens)
    record = {"model": Path(model).resolve().name if Path(model).is_dir() else model, **record}
    output.write_text(json.dumps(record, indent=1) + "\n")
    return f"{output}: " + " ".join(f"{weight:.4f}" for weight in record["weights"])


def _questions(path: Path, image_folder: Path | None, limit: int | None) -> Dataset:
    samples = load_samples(path, image_folder, answers=False)
    samples = samples.select(range(min(limit or len(samples), len(samples))))
    for number, row in enumerate(samples):
        messages = read_messages(row)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(f"Sample {number} of {path} does not end in an answer to a question.")
    return samples


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    sets: Mapping[str, Dataset],
    batch_size: int = 8,
    max_new_tokens: int = 16,
) -> dict:
    """Asks every question unpruned, greedily, with all heads and without each, and weighs heads by the accuracy lost.

    Accuracy is [`ExactMatch`] with the last answer. With S_j that of data set j and S_{-h,j} without head h,
    d_{h,j} = S_j - S_{-h,j}; from each data set's d its smallest is subtracted, and what is left divided by its sum;
    the weight of h is the mean over the data sets. A data set on which all heads are worth the same weighs them so.

    Args:
        model: A pruned model; its pruner is not run.
        sets: Name -> samples with questions and answers.

    Returns:
        `dict`: `weights`, for each data set its `n`, `accuracy`, that `without_head` and `weights`, and what was run.
    """
    attention = model.model.language_model.layers[0].self_attn
    heads = model.config.text_config.num_attention_heads
    found = {}
    for name, samples in sets.items():
        answers, predictions = [], [[] for _ in range(1 + heads)]
        starts = range(0, len(samples), batch_size)
        with tqdm(total=len(starts) * (1 + heads), desc=name, unit="batch") as bar:
            for start in starts:
                rows = [samples[number] for number in range(start, min(start + batch_size, len(samples)))]
                conversations = [read_messages(row) for row in rows]
                answers += [_text(messages[-1]) for messages in conversations]
                inputs = _prompts(processor, rows, conversations).to(model.device)
                for place, head in enumerate((None, *range(heads))):
                    with without_head(attention, head):
                        tokens = model.generate(
                            **inputs, pruner_ratio=1.0, do_sample=False, max_new_tokens=max_new_tokens
                        )
                    replies = tokens[:, inputs["input_ids"].shape[1] :]
                    predictions[place] += processor.batch_decode(replies, skip_special_tokens=True)
                    bar.update()
        accuracy, *without = (
            ExactMatch().compute(predictions=[text.strip() for text in texts], references=answers)["exact_match"]
            for texts in predictions
        )
        found[name] = {
            "n": len(samples),
            "accuracy": accuracy,
            "without_head": without,
            "weights": normalized([accuracy - value for value in without]),
        }
    return {
        "weights": [sum(values) / len(found) for values in zip(*(one["weights"] for one in found.values()))],
        "datasets": found,
        "max_new_tokens": max_new_tokens,
        "base_sha256": weights_digest(model),
        "versions": {
            "learnpruner": learnpruner.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def normalized(drops: Sequence[float]) -> list[float]:
    """Drops of accuracy, one for each head, as weights from 0 that sum to 1; all the same where the drops are."""
    least = min(drops)
    total = sum(drop - least for drop in drops)
    return [(drop - least) / total if total else 1 / len(drops) for drop in drops]


@contextmanager
def without_head(attention: nn.Module, head: int | None) -> Iterator[None]:
    """In which the attention module runs without the output of a head; `None` takes out none."""

    def silence(module, inputs):
        (states,) = inputs
        states = states.clone()
        states[..., head * attention.head_dim : (head + 1) * attention.head_dim] = 0
        return (states,)

    if head is None:
        yield
        return
    with attention.o_proj.register_forward_pre_hook(silence):
        yield


def _text(message: dict) -> str:
    return "".join(part.get("text", "") for part in message["content"])


def _prompts(processor: ProcessorMixin, rows: list[dict], conversations: list[list[dict]]):
    """The processor's inputs, filled up on the left, of conversations without their last answer."""
    texts = [processor.apply_chat_template(messages[:-1], add_generation_prompt=True) for messages in conversations]
    images = [image for row in rows for image in read_images(row)]
    return processor(text=texts, images=images or None, padding=True, padding_side="left", return_tensors="pt")
