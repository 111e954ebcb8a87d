"""The stock processors of Qwen2-VL and Qwen2.5-VL in front of the pruned models. They need torchvision: elsewhere these
tests are skipped, and the rest of the suite builds its inputs by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from learnpruner.compat_learnpruner import CACHE

from tiny_models import IMAGE, PAD, PATCH, QWEN, VIDEO, VOCAB, tiny_pair

pytest.importorskip("torchvision")
pytestmark = pytest.mark.core

SPECIAL = {
    "<|endoftext|>": PAD,
    "<|image_pad|>": IMAGE,
    "<|video_pad|>": VIDEO,
    "<|vision_start|>": 122,
    "<|vision_end|>": 123,
}
ONE_IMAGE, ONE_VIDEO = (f"<|vision_start|>{pad}<|vision_end|>" for pad in ("<|image_pad|>", "<|video_pad|>"))
# No more pixels than a picture has already, so that nothing is resized but to whole tokens.
SIZE = {"shortest_edge": 4 * PATCH**2, "longest_edge": 256 * PATCH**2}
LAYOUT = {"patch_size": PATCH // 2, "merge_size": 2, "temporal_patch_size": 2, "size": SIZE}


def stock_processor(family):
    # Named here, since a transformers without torchvision has stand-ins that fail when they are built.
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    words = {**SPECIAL, "<unk>": 3}
    words |= {f"w{number}": number for number in range(VOCAB) if number not in words.values()}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        additional_special_tokens=[name for name in SPECIAL if name != "<|endoftext|>"],
        padding_side="left",
    )
    kind = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}[family]
    return kind(
        image_processor=Qwen2VLImageProcessor(**LAYOUT),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**LAYOUT, do_sample_frames=False, cap_pixels_per_frame=False),
    )


def picture(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def processed(family):
    """Two images of different sizes and a video of six frames, in two rows."""
    inputs = stock_processor(family)(
        images=[Image.fromarray(picture(32, 48, 0)), Image.fromarray(picture(24, 32, 1))],
        videos=[np.stack([picture(24, 32, seed) for seed in range(6)])],
        text=[f"w7 {ONE_IMAGE} w8 w9 {ONE_VIDEO} w10", f"{ONE_IMAGE} w11 w12"],
        padding=True,
        return_tensors="pt",
    )
    inputs.pop("video_metadata", None)
    return dict(inputs)


@pytest.mark.parametrize("family", QWEN)
def test_what_the_processor_returns(family):
    inputs = processed(family)
    wanted = {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    wanted |= {"pixel_values_videos", "video_grid_thw"}
    assert wanted <= set(inputs)
    assert ("second_per_grid_ts" in inputs) == (family == "qwen2_5_vl")
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 12], [1, 6, 8]]
    assert inputs["video_grid_thw"].tolist() == [[3, 6, 8]]
    for token, counts in ((IMAGE, [24, 12]), (VIDEO, [36, 0])):
        assert (inputs["input_ids"] == token).sum(1).tolist() == counts
    kinds = (inputs["input_ids"] == IMAGE).int() + 2 * (inputs["input_ids"] == VIDEO).int()
    assert torch.equal(torch.as_tensor(inputs["mm_token_type_ids"]).int(), kinds)


@pytest.mark.parametrize("family", QWEN)
def test_the_pruned_model_answers_from_what_the_processor_returns(family):
    """With every key of it, in forward and in generate; at a ratio of 1 as the stock class does."""
    stock, pruned = tiny_pair(family)
    inputs = processed(family)
    outputs = pruned(**inputs)
    vision = torch.isin(inputs["input_ids"], torch.tensor([IMAGE, VIDEO]))
    for kept in outputs.kept_mask:
        assert ((kept & vision).sum(1) > 0).all()
        assert ((kept & vision).sum(1) < vision.sum(1)).all()
    arguments = {**inputs, "max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
    generated = pruned.generate(**arguments, return_dict_in_generate=True)
    for cut in range(2):
        assert torch.equal(generated[CACHE].kept_mask[cut], outputs.kept_mask[cut])
    assert torch.equal(pruned(**inputs, pruner_ratio=1.0).logits, stock(**inputs).logits)
    assert torch.equal(pruned.generate(**arguments, pruner_ratio=1.0), stock.generate(**arguments))
