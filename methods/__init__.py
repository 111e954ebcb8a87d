# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Published pruning methods on the rails of the core: one file each, and one registry."""

from .base import Method, Place
from .baselines import OracleBoxes, Pool, Random, Uniform
from .cls_attention import ClsAttention
from .composed import Composed
from .dart import DART
from .divprune import DivPrune
from .downsample import Downsample
from .fastv import FastV
from .hawk import Hawk
from .learnpruner import LearnedStage, LearnPruner, TextStage
from .pyramiddrop import PyramidDrop
from .sparsevlm import SparseVLM
from .transprune import TransPrune
from .visionzip import VisionZip
from .vispruner import VisPruner


class Registry(dict):
    """Name -> class of a method."""

    def __missing__(self, name):
        raise KeyError(f"{name!r} is no method. Known are: {', '.join(sorted(self))}.")


METHODS = Registry(
    random=Random,
    uniform=Uniform,
    downsample=Downsample,
    pool=Pool,
    oracle_boxes=OracleBoxes,
    cls_attention=ClsAttention,
    visionzip=VisionZip,
    divprune=DivPrune,
    vispruner=VisPruner,
    hawk=Hawk,
    fastv=FastV,
    pyramiddrop=PyramidDrop,
    sparsevlm=SparseVLM,
    dart=DART,
    transprune=TransPrune,
    learnpruner=LearnPruner,
    stage_1=LearnedStage,
    stage_2=TextStage,
    composed=Composed,
)

__all__ = ["METHODS", "Method", "Place", *(cls.__name__ for cls in METHODS.values())]
