"""What a call costs by arithmetic: rows in each layer, bytes of the cache, floating point operations.

Operations are those of matrix products, two for each multiplication and addition, with attention over all pairs of
rows, as torch.utils.flop_counter counts it. Norms, activations, rotary embeddings and softmax are left out.

    linear layer                rows * 2 * inputs * outputs
    attention                   2 products * 2 * heads * head_dim * queries * keys
    Llama or Qwen2 layer        linear: q and o hidden x (heads * head_dim), k and v hidden x (kv_heads * head_dim),
                                three hidden x intermediate; attention as above: grouped queries (GQA) save projections
                                and cache, not products
    head                        2 * hidden * vocabulary, for the last row of each sample
    CLIP layer                  linear: four d x d, two d x intermediate; attention over the patches and [CLS]
    Qwen2.5-VL encoder layer    linear: four d x d, three d x intermediate; attention inside windows, in the layers of
                                `fullatt_block_indexes` over the image (Qwen2-VL: two d x intermediate, all layers over
                                the image)
    pruner                      linear: d x h, h x 2 for each token; similarity of all tokens to those chosen by score,
                                and to each that diversity adds; products of the text rows' queries with the keys of
                                the layer before the second cut
"""

from itertools import pairwise

import torch
from transformers import PreTrainedConfig

from learnpruner.cuts_learnpruner import Cut, LearnedScore


def after_cuts(schedule: tuple[Cut, ...], tokens: int) -> list[int]:
    """Vision tokens of one image that survive each cut."""
    return [min(tokens, max(1, cut.keep(tokens))) for cut in schedule]


def decoder_spans(schedule: tuple[Cut, ...], tokens: int, text: int, depth: int) -> list[tuple[int, int]]:
    """Runs of decoder layers that see equally many rows: for each, its layers and its rows of one sample."""
    bounds = (0, *(cut.layer for cut in schedule), depth)
    runs = zip(pairwise(bounds), (tokens, *after_cuts(schedule, tokens)))
    return [(end - start, count + text) for (start, end), count in runs if end > start]


def kv_bytes(config: PreTrainedConfig, spans: list[tuple[int, int]], batch: int, dtype: torch.dtype) -> int:
    """Keys and values of a prompt: 2 * kv_heads * head_dim * bytes of a number * rows of all layers."""
    _, kv_heads, head_dim = _heads(config.text_config)
    return 2 * kv_heads * head_dim * dtype.itemsize * batch * sum(layers * rows for layers, rows in spans)


def decoder_flops(
    config: PreTrainedConfig, spans: list[tuple[int, int]], batch: int, queries: int | None = None
) -> int:
    """All decoder layers.

    Args:
        spans: As in [`decoder_spans`]; their rows are keys.
        queries (`int`, *optional*): Rows that are run: 1 in decoding. Defaults to all.
    """
    text = config.text_config
    heads, kv_heads, head_dim = _heads(text)
    weights = 2 * text.hidden_size * head_dim * (heads + kv_heads) + 3 * text.hidden_size * text.intermediate_size
    return batch * sum(
        layers * (2 * weights * (queries or rows) + 4 * heads * head_dim * (queries or rows) * rows)
        for layers, rows in spans
    )


def head_flops(config: PreTrainedConfig, batch: int) -> int:
    return batch * 2 * config.text_config.hidden_size * config.text_config.vocab_size


def vision_flops(config: PreTrainedConfig, pixel_shape: tuple[int, ...], grids: list[list[int]] | None) -> int:
    """Tower and projector, of all images of a call.

    Args:
        pixel_shape: Of `pixel_values`.
        grids: Rows of `image_grid_thw`, for the families that have it.
    """
    if grids is not None:
        return _qwen_vision_flops(config.vision_config, grids, config.text_config.hidden_size)
    vision, hidden = config.vision_config, config.text_config.hidden_size
    width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    crops = pixel_shape[0] if len(pixel_shape) == 4 else pixel_shape[0] * pixel_shape[1]
    embedding = patches * 2 * vision.num_channels * vision.patch_size**2 * width
    rows = patches + 1
    layer = rows * 2 * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * width * rows**2
    features = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    projector = patches * 2 * (features * width * hidden + hidden**2)
    return crops * (embedding + vision.num_hidden_layers * layer + projector)


def _qwen_vision_flops(vision: PreTrainedConfig, grids: list[list[int]], hidden: int) -> int:
    windowed = vision.model_type.startswith("qwen2_5")
    width = vision.hidden_size if windowed else vision.embed_dim
    inner = 3 * vision.intermediate_size if windowed else 2 * int(width * vision.mlp_ratio)
    merge, total = vision.spatial_merge_size, 0
    for frames, rows, columns in grids:
        patches = frames * rows * columns
        total += patches * 2 * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * width
        total += vision.depth * patches * 2 * (4 * width**2 + inner * width)
        # A frame's patches see each other.
        whole = frames * (rows * columns) ** 2
        pairs = vision.depth * whole
        if windowed:
            side = vision.window_size // vision.patch_size
            full = len(vision.fullatt_block_indexes)
            windows = sum(h**2 for h in _parts(rows, side)) * sum(w**2 for w in _parts(columns, side))
            pairs = full * whole + (vision.depth - full) * frames * windows
        total += 4 * width * pairs
        merged = width * merge**2
        total += patches // merge**2 * 2 * (merged**2 + merged * hidden)
    return total


def _parts(length: int, side: int) -> list[int]:
    return [min(side, length - start) for start in range(0, length, side)]


def pruner_flops(config: PreTrainedConfig, schedule: tuple[Cut, ...], width: int, tokens: int, text: int, batch: int):
    """Scores and selection of both cuts of LearnPruner.

    Args:
        width (`int`): Of the features that the pruner reads.
    """
    total, counts = 0, after_cuts(schedule, tokens)
    heads, _, head_dim = _heads(config.text_config)
    for cut, rows in zip(schedule, (tokens, *counts)):
        if isinstance(cut.score, LearnedScore):
            total += tokens * 2 * (width * config.pruner_hidden_size + 2 * config.pruner_hidden_size)
            by_diversity = min(counts[0] - 1, round(cut.score.diversity * counts[0]))
            # With no token to add, nothing is compared; else to all, in one product or one by one.
            total += tokens * 2 * width * counts[0] if by_diversity else 0
        else:
            queries = text if cut.score.query == "all" else 1
            total += 2 * heads * head_dim * queries * (rows + text)
    return batch * total


def _heads(text: PreTrainedConfig) -> tuple[int, int, int]:
    """Heads, heads of keys and values, and the width of each."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_attention_heads, text.num_key_value_heads, head_dim
