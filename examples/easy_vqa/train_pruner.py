"""Trains a pruner for the small LLaVA of this folder, for every budget at once, on questions about train scenes.

    python examples/easy_vqa/train_pruner.py --output runs/pruner [--steps 400] [--seed 0]

The base stays as it is, and the checkpoint holds the pruner alone. A killed run goes on with the same command.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from transformers.trainer_utils import get_last_checkpoint

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.cli import Parser, positive
from learnpruner.compare import load_processor
from learnpruner.training import PrunerCollator, PrunerTrainer, PrunerTrainingArguments

from scenes import OBJECTS, scene_dataset

BASE = Path(__file__).parent / "tiny-llava"


def train_questions(scenes: int, seed: int) -> Dataset:
    """Scenes of both levels, one question each."""
    half = -(-scenes // 2)
    parts = [scene_dataset("train", half, level=level, seed=seed, per_scene=1) for level in OBJECTS]
    return concatenate_datasets(parts)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=positive, default=400)
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        if not arguments.base.is_dir():
            raise ValueError(f"no such folder: {arguments.base}")
        if arguments.output.resolve() == arguments.base.resolve():
            raise ValueError(f"{arguments.output} holds the base, which the pruner would replace")
        processor = load_processor(str(arguments.base))
        torch.manual_seed(arguments.seed)
        model = LearnPrunerForConditionalGeneration.from_pretrained(arguments.base)
        data = train_questions(arguments.steps * arguments.batch_size, arguments.seed)
        settings = PrunerTrainingArguments(
            output_dir=str(arguments.output / "checkpoints"),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, arguments.steps // 10),
            logging_steps=20,
            save_steps=100,
            save_total_limit=1,
            remove_unused_columns=False,
            report_to=[],
            seed=arguments.seed,
        )
        trainer = PrunerTrainer(model, settings, PrunerCollator(processor), data)
        start = time.perf_counter()
        started = Path(settings.output_dir).is_dir() and get_last_checkpoint(settings.output_dir) is not None
        trainer.train(resume_from_checkpoint=started)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"train_pruner: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    # Beside its base, so that both open wherever the two folders are moved together.
    model.config.base_model_name_or_path = f"./{os.path.relpath(arguments.base, arguments.output)}"
    model.eval().save_pretrained(arguments.output)
    log = {
        "seconds_of_the_last_start": round(time.perf_counter() - start, 1),
        "threads": arguments.threads,
        "parameters": sum(parameter.numel() for parameter in model.model.pruner.parameters()),
        "seed": arguments.seed,
        "log": trainer.state.log_history,
    }
    (arguments.output / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
