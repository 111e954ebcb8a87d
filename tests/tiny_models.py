"""Tiny random models of every family, and inputs built by hand: no network, no processor, no files."""

import copy
import functools
from collections import Counter
from itertools import product
from unittest import mock

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from learnpruner import (
    LearnPrunerLlavaForConditionalGeneration,
    LearnPrunerLlavaNextForConditionalGeneration,
    LearnPrunerQwen2_5_VLForConditionalGeneration,
    LearnPrunerQwen2VLForConditionalGeneration,
)

LLAVA, QWEN = ("llava", "llava_next"), ("qwen2_vl", "qwen2_5_vl")
FAMILIES = LLAVA + QWEN
STOCK = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
}
PRUNED = {
    "llava": LearnPrunerLlavaForConditionalGeneration,
    "llava_next": LearnPrunerLlavaNextForConditionalGeneration,
    "qwen2_vl": LearnPrunerQwen2VLForConditionalGeneration,
    "qwen2_5_vl": LearnPrunerQwen2_5_VLForConditionalGeneration,
}
TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
# Families and the text models they come with.
TEXT_MODELS = [(family, text) for family in LLAVA for text in TEXT_CONFIGS] + [(family, None) for family in QWEN]
IMAGE, VIDEO, PAD, VOCAB, SIDE, PATCH, LAYERS = 120, 121, 0, 128, 32, 8, 4
# A random model may answer with a placeholder, which stock models refuse as part of a prompt, or with padding, which
# `generate` would mask there.
NO_PLACEHOLDERS = {"suppress_tokens": [PAD, IMAGE, VIDEO]}
PATCHES = (SIDE // PATCH) ** 2
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def tiny_config(family="llava", text="llama", **text_fields):
    shared = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        # Wide enough that attention is far from uniform and greedy tokens differ.
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
        **text_fields,
    }
    if family in QWEN:
        return tiny_qwen_config(family, shared)
    text_config = TEXT_CONFIGS[text](**shared)
    if text == "mistral" and "sliding_window" not in text_fields:
        text_config.sliding_window = None
    vision_config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        initializer_range=0.3,
    )
    shared = {"text_config": text_config, "vision_config": vision_config, "image_token_index": IMAGE}
    if family == "llava":
        return LlavaConfig(**shared, image_seq_length=PATCHES)
    return LlavaNextConfig(**shared, image_grid_pinpoints=PINPOINTS, image_seq_length=PATCHES)


def tiny_qwen_config(family, text_config):
    """A token is PATCH pixels wide, as in the others, hence 2 x 2 patches of half of that."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text_config = {"use_sliding_window": False, **text_config, "rope_parameters": rope}
    vision_config = {
        "depth": 3,
        "num_heads": 3,
        "patch_size": PATCH // 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": 0.3,
    }
    if family == "qwen2_vl":
        vision_config |= {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}
    else:
        # Windows of 2 x 2 tokens, and one layer that sees the whole image.
        vision_config |= {"hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 48}
        vision_config |= {"window_size": 2 * PATCH, "fullatt_block_indexes": [1]}
    config = {"qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig}[family]
    return config(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=122,
        vision_end_token_id=123,
    )


def tiny_pair(family="llava", text="llama", attention="sdpa", dtype=torch.float32, seed=0, config=None, **fields):
    """A stock model and a pruned one with the same weights, both in eval mode.

    Both are new in every call. The weights of a seed are drawn once per process: most tests begin here, and drawing
    took longer than what they test. The generator is left as the drawing leaves it.
    """
    fields = {"pruner_ratio": 0.4, "pruner_trained": True, **fields}
    if config is None:
        drawn, weights, generator = _drawn(family, text, seed, fields.get("pruner_hidden_size"))
        stock = copy.deepcopy(drawn)
        # Its own weights would be overwritten.
        with mock.patch.object(PreTrainedModel, "init_weights"):
            pruned = _pruned(family, stock, **fields)
        pruned.model.pruner.load_state_dict(weights)
        torch.set_rng_state(generator)
    else:
        stock, pruned = _draw(family, config, seed, **fields)
    stock, pruned = stock.to(dtype), pruned.to(dtype)
    for model in (stock, pruned):
        model.set_attn_implementation(attention)
        model.generation_config.pad_token_id = PAD
    return stock, pruned


def _draw(family, config, seed, **fields):
    torch.manual_seed(seed)
    stock = STOCK[family](config).eval()
    pruned = _pruned(family, stock, **fields)
    torch.manual_seed(seed + 1)  # whatever the constructors drew
    for module in (pruned.model.pruner.hidden, pruned.model.pruner.output):
        torch.nn.init.normal_(module.weight, std=0.5)
    return stock, pruned


def _pruned(family, stock, **fields):
    """The pruned model of a stock model's weights; those of its pruner are its own."""
    pruned = PRUNED[family](PRUNED[family].config_class.from_base_config(stock.config, **fields)).eval()
    report = pruned.load_state_dict(stock.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert {name.split(".")[1] for name in report.missing_keys} == {"pruner"}
    return pruned


@functools.cache
def _drawn(family, text, seed, width):
    """A stock model that is never run, the weights of a pruner of this width, and the generator's state behind them."""
    fields = {} if width is None else {"pruner_hidden_size": width}
    stock, pruned = _draw(family, tiny_config(family, text), seed, **fields)
    return stock, pruned.model.pruner.state_dict(), torch.get_rng_state()


def covering(cases, *axes):
    """Few of the product of `cases` and `axes`: each case at least once, and each value of an axis at least once with
    each value of another axis and with each value that stands in a case.

    Args:
        cases: Tuples of equal length, all of which are needed.
        axes: Lists of values, of which each case takes one.

    Returns:
        A list of tuples, a case and a value of each axis.
    """
    width = len(cases[0])

    def pairs(row):
        return {
            (one, repr(row[one]), other, repr(row[other]))
            for one in range(len(row))
            for other in range(max(one + 1, width), len(row))
        }

    rows, used = [], Counter()
    left = set().union(*(pairs((*case, *values)) for case in cases for values in product(*axes)))
    queue = list(cases)
    while queue or left:
        best = max(
            ((*case, *values) for case in (queue[:1] or cases) for values in product(*axes)),
            # Of equal ones, that whose values were taken least.
            key=lambda row: (len(pairs(row) & left), -sum(used[pair] for pair in pairs(row))),
        )
        queue = queue[1:]
        left -= pairs(best)
        used.update(pairs(best))
        rows.append(best)
    return rows


def image_tokens(family, *size):
    """Placeholders of one image (height, width), or video (groups of frames, height, width), computed from the
    published layout rather than by the model."""
    if family == "llava":
        return PATCHES
    if family in QWEN:
        *groups, height, width = size
        return (groups[0] if groups else 1) * (height // PATCH) * (width // PATCH)
    height, width = size
    grid = SIDE // PATCH
    rows, columns = get_anyres_image_grid_shape((height, width), PINPOINTS, SIDE)
    unpadded = unpad_image(torch.zeros(1, rows * grid, columns * grid), (height, width))
    return PATCHES + unpadded.shape[1] * (unpadded.shape[2] + 1)


def tokens_of(family, size):
    """Crop and patch of each token of an image of a LLaVA; `None` for a newline."""
    tokens = [(0, patch) for patch in range(PATCHES)]
    if family == "llava":
        return tokens
    grid = SIDE // PATCH
    rows, columns = get_anyres_image_grid_shape(size, PINPOINTS, SIDE)
    places = torch.arange(rows * columns * PATCHES).view(rows, columns, grid, grid).transpose(1, 2)
    for line in unpad_image(places.reshape(1, rows * grid, columns * grid), size)[0].tolist():
        tokens += [(1 + place // PATCHES, place % PATCHES) for place in line] + [None]
    return tokens


def build_inputs(family, samples, seed=0, side="left", dtype=torch.float32):
    """Model inputs for samples given as lists: an int is that many text tokens, a pair an image (height, width), three
    numbers a video (groups of frames, height, width).

    Returns a dict with input_ids, attention_mask and, where there are images or videos, what the family takes them in.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, pixels, videos = [], [], []
    for sample in samples:
        ids = [1]
        for part in sample:
            if isinstance(part, int):
                ids += torch.randint(5, 100, (part,), generator=generator).tolist()
                continue
            ids += [IMAGE if len(part) == 2 else VIDEO] * image_tokens(family, *part)
            (pixels if len(part) == 2 else videos).append((part, _pixels(family, part, generator)))
        rows.append(ids)
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        place = slice(longest - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family in QWEN:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        for parts, values, grid in (
            (pixels, "pixel_values", "image_grid_thw"),
            (videos, "pixel_values_videos", "video_grid_thw"),
        ):
            if parts:
                inputs[values] = torch.cat([value for _, value in parts]).to(dtype)
                inputs[grid] = torch.tensor([_grid(part) for part, _ in parts])
        if family == "qwen2_5_vl" and videos:
            # None of them 1, the default.
            inputs["second_per_grid_ts"] = torch.arange(len(videos)) + 0.5
    elif pixels and family == "llava":
        inputs["pixel_values"] = torch.cat([value for _, value in pixels]).to(dtype)
    elif pixels:
        crops = [value for _, value in pixels]
        most = max(map(len, crops))
        padded = [torch.cat([crop, crop.new_zeros(most - len(crop), *crop.shape[1:])]) for crop in crops]
        inputs["pixel_values"] = torch.stack(padded).to(dtype)
        inputs["image_sizes"] = torch.tensor([part for part, _ in pixels])
    return inputs


def _grid(part):
    *groups, height, width = part
    return [groups[0] if groups else 1, 2 * height // PATCH, 2 * width // PATCH]


def _pixels(family, part, generator):
    if family in QWEN:
        groups, rows, columns = _grid(part)
        # Channels, two frames, and the pixels of a patch.
        return torch.randn(groups * rows * columns, 3 * 2 * (PATCH // 2) ** 2, generator=generator)
    crops = 1
    if family == "llava_next":
        height, width = get_anyres_image_grid_shape(part, PINPOINTS, SIDE)
        crops = 1 + height * width
    return torch.randn(crops, 3, SIDE, SIDE, generator=generator)


def samples_of(kind, family):
    """Named batches; LLaVA's images are all of one size, the others' differ."""
    small, wide, tall = {
        "llava": ((SIDE, SIDE),) * 3,
        "llava_next": ((30, 60), (60, 40), (64, 64)),
    }.get(family, ((32, 32), (24, 48), (56, 32)))
    video = (3, 24, 32)
    return {
        "one": [[3, small, 6]],
        "padded": [[3, small, 6], [1, wide, 11]],
        "two_images": [[2, small, 3, tall, 5]],
        "mixed": [[3, small, 6], [2, wide, 2, tall, 4], [9]],
        "image_last": [[5, small]],
        "image_first": [[small, 7]],
        "video": [[3, video, 6], [2, (2, 32, 32), 9]],
        "image_and_video": [[2, small, 1, video, 3, wide, 4], [1, (2, 24, 24), 2, tall, 5], [7]],
    }[kind]


def with_videos(batches):
    """Each family with each batch; those that see videos with batches of them too."""
    return [*product(LLAVA, batches), *product(QWEN, (*batches, "video", "image_and_video"))]


def tiny_processor(family):
    """A processor of the family over a vocabulary of 128 words, with the PIL image processor."""
    words = {"<pad>": PAD, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": IMAGE}
    words.update({f"w{i}": i for i in range(VOCAB) if i not in words.values()})
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    shared = {"tokenizer": tokenizer, "patch_size": PATCH, "vision_feature_select_strategy": "default"}
    if family == "llava":
        images = CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
        return LlavaProcessor(image_processor=images, num_additional_image_tokens=1, **shared)
    images = LlavaNextImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextProcessor(image_processor=images, num_additional_image_tokens=1, **shared)


LAYOUT = {"llava_next": "image_sizes", "qwen2_vl": "image_grid_thw", "qwen2_5_vl": "image_grid_thw"}
VIDEO_LAYOUT = ("video_grid_thw", "second_per_grid_ts")
TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")


def pixels_of(family, inputs, images=slice(None), videos=slice(None)):
    """Of the inputs, the pixels of some images and videos, and what lays them out."""
    chosen = {}
    for some, name, layouts in (
        (images, "pixel_values", (LAYOUT.get(family),)),
        (videos, "pixel_values_videos", VIDEO_LAYOUT),
    ):
        pixels = inputs.get(name, torch.empty(0))
        if family in QWEN and len(pixels):
            pixels = pixels.split(inputs[layouts[0]].prod(1).tolist())
        if len(pixels[some]):
            chosen[name] = torch.cat(pixels[some]) if family in QWEN else pixels[some]
            chosen |= {layout: inputs[layout][some] for layout in layouts if layout in inputs}
    return chosen


def cat_pixels(family, parts):
    """What [`pixels_of`] returned for several images, as one."""
    if family == "llava_next":
        most = max(part["pixel_values"].shape[1] for part in parts)
        pad = [(0, 0) * 3 + (0, most - part["pixel_values"].shape[1]) for part in parts]
        parts = [{**part, "pixel_values": F.pad(part["pixel_values"], by)} for part, by in zip(parts, pad)]
    names = {name: None for part in parts for name in part}
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


def row_alone(family, inputs, samples, row):
    """One row of a batch without its padding, with its own images and videos; and the columns it had."""
    valid = inputs["attention_mask"][row].bool()
    counts = [[sum(isinstance(part, tuple) and len(part) == kind for part in s) for s in samples] for kind in (2, 3)]
    images, videos = (slice(sum(count[:row]), sum(count[: row + 1])) for count in counts)
    text = {name: inputs[name][row : row + 1, valid] for name in TEXT_INPUTS if name in inputs}
    return {**text, **pixels_of(family, inputs, images, videos)}, valid


def with_answer(inputs, sequences):
    """The inputs of a prompt with its answer behind it; or of a single prompt with several answers."""
    repeats, new = len(sequences) // len(inputs["input_ids"]), sequences.shape[1] - inputs["input_ids"].shape[1]
    assert repeats == 1 or len(inputs["input_ids"]) == 1
    whole = {name: value.repeat(repeats, *(1,) * (value.dim() - 1)) for name, value in inputs.items()}
    for name in set(TEXT_INPUTS) & set(whole):
        whole[name] = F.pad(whole[name], (0, new), value=name == "attention_mask")
    return {**whole, "input_ids": sequences}


def positions(family, model, inputs, new=0):
    """Of the unpruned prompt, and of `new` tokens behind it, as the stock class has them in generate."""
    where = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if family in QWEN:
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", *VIDEO_LAYOUT, "attention_mask")
        where, _ = model.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})
    return torch.cat([where, where[..., -1:] + torch.arange(1, new + 1)], dim=-1)


def vision_tower(model):
    """The encoder, which stock models build first."""
    return next(model.model.children())


def labelled(family, samples, seed=0, answer=4):
    """[`build_inputs`], padded on the right, with the last `answer` tokens as labels."""
    inputs = build_inputs(family, samples, seed=seed, side="right")
    labels = inputs["input_ids"].clone()
    labels[:, :-answer] = -100
    return {**inputs, "labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}


def image_states(outputs):
    """What the projector made of a LLaVA's images, as the output of any release has it: `(tokens, hidden)`."""
    if "image_outputs" in outputs:
        return torch.cat(list(outputs.image_outputs.pooler_output))
    return outputs.image_hidden_states.flatten(0, -2)


def with_checkpointing(model, reentrant):
    """The model, its layers' activations recomputed in the backward pass."""
    name = "activation_checkpointing_enable"  # up to 5.22 the other
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": reentrant})
    return model
