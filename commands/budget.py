# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
import argparse

from .arguments import positive, ratio

PURPOSE = "what a ratio means for a checkpoint: tokens of one image after each cut"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id or folder; only its configuration is read")
    parser.add_argument("--ratio", type=ratio, nargs="+", help="default: 1/3, 2/9, 1/9 and 1/18")
    parser.add_argument(
        "--tokens", type=positive, help="vision tokens of the image; default: one crop, where it has a size"
    )


def run(model: str, ratio: list[float] | None, tokens: int | None) -> None:
    from learnpruner.accounting import mean_tokens
    from learnpruner.auto import pruned_class
    from learnpruner.cuts_learnpruner import learnpruner_schedule

    config = pruned_class(model).config_class.from_pretrained(model)
    vision = config.vision_config
    if tokens is None and "image_size" not in vision.to_dict():
        raise ValueError(f"{model} takes images of any size: give --tokens, those of yours.")
    tokens = tokens or (vision.image_size // vision.patch_size) ** 2
    depth = config.text_config.num_hidden_layers
    print(f"{model}: {tokens} vision tokens, {depth} decoder layers, second cut before {config.pruner_layer}")
    print(f"{'ratio':>8}{'cut 1':>8}{'cut 2':>8}{'mean':>8}")
    for value in ratio or (1 / 3, 2 / 9, 1 / 9, 1 / 18):
        schedule = learnpruner_schedule(config, value)
        counts = tuple(cut.keep(tokens) for cut in schedule)
        mean = mean_tokens(counts, tuple(cut.layer for cut in schedule), tokens, depth)
        first, last = (counts[0], counts[-1]) if counts else (tokens, tokens)
        print(f"{value:8.4f}{first:8}{last:8}{mean:8.1f}")
