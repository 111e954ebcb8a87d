# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""A pruner that is told where the asked objects are: what the bench could give to a module that learns it.

    python examples/photo_vqa/label_pruner.py --base CHECKPOINT --features FEATURES/train --output FOLDER

A control, no method: it learns from labels of patches, which nobody has for real photographs.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaProcessor

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.methods.baselines import box_scores
from learnpruner_commands.arguments import Parser, positive

from features import LAYER, Features
from photo_scenes import GRID, PATCH

# So many patches of a scene are labelled: those that known boxes would keep.
LABELLED = 32
SCENES, EPOCHS, BATCH, LEARNING_RATE = 900, 8, 8, 1e-3


def labels_of(features: Features, number: int) -> torch.Tensor:
    """Which patches known boxes of all asked objects would keep, `(patches,)` float32: each object's from its middle
    outwards, objects in turn. More of a large object would be of no use."""
    middles = PATCH * (torch.arange(GRID) + 0.5)
    y, x = (part.flatten() for part in torch.meshgrid(middles, middles, indexing="ij"))
    scores = box_scores(x, y, [thing.box for thing in features.scene(number).objects if thing.asked])
    return torch.zeros(GRID**2).index_fill(0, scores.topk(LABELLED).indices, 1.0)


def fit(model, features: Features, scenes: int, epochs: int, seed: int) -> list[float]:
    """Trains the model's pruner by binary cross-entropy, batches of eight scenes. Returns each epoch's mean loss."""
    torch.manual_seed(seed)
    layer, pruner = model.get_encoder("image").encoder.layer[LAYER], model.model.pruner.train()
    with torch.no_grad():
        seen = [layer(features.layer(number).float()[None])[0, 1:] for number in tqdm(range(scenes), desc="features")]
    labels = [labels_of(features, number) for number in range(scenes)]
    optimizer = torch.optim.AdamW(pruner.parameters(), LEARNING_RATE)
    steps = epochs * -(-scenes // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in tqdm(range(epochs), desc="pruner"):
        total = 0.0
        for chosen in torch.randperm(scenes).split(BATCH):
            patches, true = (torch.stack([rows[number] for number in chosen]) for rows in (seen, labels))
            loss = F.binary_cross_entropy_with_logits(pruner(patches), true)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        losses.append(total / scenes)
    return losses


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="A pruner trained on labels of patches.")
    parser.add_argument("--base", type=Path, required=True, help="output of build.py")
    parser.add_argument("--features", type=Path, required=True, help='of the set "train"')
    parser.add_argument("--scenes", type=positive, default=SCENES)
    parser.add_argument("--epochs", type=positive, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    arguments = parser.parse_args(argv)
    try:
        features = Features(arguments.features, arguments.scenes)
        torch.manual_seed(arguments.seed)  # of the module's first weights, too
        model = LearnPrunerForConditionalGeneration.from_pretrained(arguments.base)
        begun = time.perf_counter()
        losses = fit(model, features, arguments.scenes, arguments.epochs, arguments.seed)
        model.config.pruner_trained = True
        model.eval().train_pruner_only()
        model.save_pretrained(arguments.output)
        LlavaProcessor.from_pretrained(arguments.base).save_pretrained(arguments.output)
    except (OSError, ValueError) as error:
        print(f"label_pruner: {error}", file=sys.stderr)
        return 2
    about = {"seed": arguments.seed, "scenes": arguments.scenes, "epochs": arguments.epochs, "loss": losses}
    about["metrics"] = {"seconds": round(time.perf_counter() - begun, 1)}
    (arguments.output / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
