# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""How well the tower's features alone name an object: what the photo model could know of stamps that it never saw.

    python examples/photo_vqa/probe.py --features FEATURES/train --on FEATURES/b --output FILE.json

A linear classifier of asked objects by merged word, on the mean of the patches that the object covers by half, of the
hidden state that the photo model reads. Objects that cover no patch by half are left out.
"""

import json
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from learnpruner_commands.arguments import Parser, positive

from features import LAYER, Features
from packages import find
from stamps import MERGED
from tower import load_tower

COVERED = 0.5
SCENES, STEPS, DECAY = 900, 60, 1e-3


@torch.no_grad()
def objects(layer, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean features `(objects, width)` float32 and words `(objects,)` int64 of the asked objects.

    Args:
        layer: Gives hidden state 9 `(1, 1 + patches, width)` for hidden state 8.
    """
    means, words = [], []
    for number in tqdm(range(len(features)), desc="objects", mininterval=10):
        patches = layer(features.layer(number).float()[None])[0, 1:]
        scene = features.scene(number)
        for thing, cover in zip(scene.objects, torch.from_numpy(scene.coverage).flatten(1) >= COVERED):
            if thing.asked and cover.any():
                means.append(patches[cover].mean(0))
                words.append(MERGED.index(thing.merged))
    return torch.stack(means), torch.tensor(words)


def fit(means: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Linear]:
    """Mean and deviation of the features, and the classifier of what is standardised by them."""
    mean, deviation = means.mean(0), means.std(0)
    inputs = (means - mean) / deviation
    torch.manual_seed(0)
    linear = torch.nn.Linear(means.shape[1], len(MERGED))
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(linear(inputs), words) + DECAY * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return mean, deviation, linear


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="A linear classifier of objects, from the tower's features.")
    parser.add_argument(
        "--packages", type=Path, help="folder of packages.py; otherwise PHOTO_VQA_PACKAGES or the system"
    )
    parser.add_argument("--features", type=Path, required=True, help='of the set "train"')
    parser.add_argument("--scenes", type=positive, default=SCENES, help="to train on")
    parser.add_argument("--on", type=Path, required=True, help="features of the set to measure on")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    arguments = parser.parse_args(argv)
    try:
        layer = load_tower(find(arguments.packages).tower).encoder.layer[LAYER]
        mean, deviation, linear = fit(*objects(layer, Features(arguments.features, arguments.scenes)))
        measured = Features(arguments.on)
        means, words = objects(layer, measured)
        right = (linear((means - mean) / deviation).argmax(1) == words).float()
    except (ImportError, OSError, ValueError) as error:
        print(f"probe: {error}", file=sys.stderr)
        return 2
    found = {word: right[words == number] for number, word in enumerate(MERGED)}
    by_word = {word: hits.mean().item() for word, hits in found.items() if len(hits)}
    about = {"fold": measured.made_of["fold"], "set": measured.made_of["set"], "scenes": arguments.scenes}
    about |= {"objects": len(words), "accuracy": right.mean().item(), "by_word": by_word}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(about, indent=1) + "\n")
    print(f"{about['accuracy']:.3f} of {len(words)} objects")
    return 0


if __name__ == "__main__":
    sys.exit(main())
