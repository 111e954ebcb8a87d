# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What is true of easy-VQA scenes, written a second time."""

import re

from scenes import COLORS, SHAPES

# What the package draws with: matplotlib's colors of these names, but for brown, green and gray.
RED_GREEN_BLUE = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


def answer_by_hand(question, objects):
    """A second reading of each question, from its words alone."""
    words = re.findall(r"\w+", question)
    shapes = [word.removesuffix("s") for word in words if word.removesuffix("s") in SHAPES]
    colors = [word for word in words if word in COLORS]
    fit = [thing for thing in objects if thing.shape in (shapes or SHAPES) and thing.color in (colors or COLORS)]
    if words[0] == "how":
        return str(len(fit))
    if words[0] in ("is", "does"):
        return "yes" if fit else "no"
    assert len(fit) == 1, question
    return fit[0].shape if colors else fit[0].color
