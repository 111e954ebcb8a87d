# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What a training says at its end: where the pruner is, what each budget costs, and what to do next."""

import shlex
from pathlib import Path

from datasets import Dataset
from peft import PeftModel

from .rows import image_values, read_messages
from .trainer import PrunerTrainer

LONGEST_QUESTION = 200


def where_lines(trainer: PrunerTrainer) -> list[str]:
    output = Path(trainer.args.output_dir)
    size = sum(path.stat().st_size for path in output.glob("*.safetensors")) / 1e6
    what = "The adapters, with the pruner, are" if isinstance(trainer.model, PeftModel) else "The pruner is"
    base = trainer.run_settings()["base"]
    return [f"{what} in {output} ({size:.1f} MB)" + (f", for the base {base}." if base else ", with all weights.")]


def accuracy_lines(accuracy: dict[str, float], data: str | None) -> list[str]:
    """`accuracy` as training.json has it: of each ratio, by its name."""
    if not accuracy:
        why = "give eval_data to measure it" if data is None else f"{data} has no answers"
        return [f"Accuracy was not measured: {why}."]
    unpruned = accuracy["1"]
    lines = ["Accuracy, the share of answers that are right token by token:", f"  unpruned            {unpruned:8.1%}"]
    for ratio, value in accuracy.items():
        if ratio != "1":
            points = 100 * (value - unpruned)
            lines.append(f"  {float(ratio):6.1%} of the tokens{value:8.1%} ({points:+.1f} points)")
    return lines


def next_lines(trainer: PrunerTrainer, rows: Dataset, trust_remote_code: bool) -> list[str]:
    """The next command: a question of `rows` about its picture, where there is one in a file."""
    output, base = trainer.args.output_dir, trainer.run_settings()["base"]
    if isinstance(trainer.model, PeftModel):
        return [
            "Next, open them in Python, and merge them to have one checkpoint:",
            f"  model = LearnPrunerForConditionalGeneration.from_pretrained({str(base)!r}, pruner_trained=True)",
            f"  model = PeftModel.from_pretrained(model, {str(output)!r}).merge_and_unload()",
        ]
    image, question = "picture.jpg", "What is in the picture?"
    for row in rows:
        found = image_values(row)
        if len(found) == 1 and isinstance(found[0], str):
            text = " ".join(part["text"] for part in read_messages(row)[0]["content"] if part["type"] == "text")
            image, question = found[0], text if 0 < len(text) <= LONGEST_QUESTION else question
            break
    command = ["learnpruner", "compare", str(output), "--image", image, "--question", question]
    command += ["--trust-remote-code"] if trust_remote_code else []
    return ["Next, ask it something, pruned and unpruned:", f"  {shlex.join(command)}"]
