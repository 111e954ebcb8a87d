"""The small Qwen2-VL of this folder before it is trained: processor, model, and how scenes become its batches."""

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from transformers import (
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from processing_tiny_qwen2_vl import TinyQwen2VLProcessor
from scenes import Scene
from tiny_llava import WORDS, pack_rows

# A token is 2 x 2 patches: 8 x 8 pixels, as the small LLaVA's, so that a scene of 192 x 192 has 576 of them too.
PATCH, MERGE = 4, 2
TOKEN = PATCH * MERGE
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Qwen2-VL's, without its system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_processor() -> TinyQwen2VLProcessor:
    """Every word of the questions and answers is a token of its own."""
    names = [*SPECIAL, "<|unknown|>", "system", "user", "assistant", *WORDS]
    backend = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<|unknown|>"))
    backend.pre_tokenizer = Sequence([WhitespaceSplit(), Split("?", "isolated")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=list(SPECIAL),
    )
    pixels = {"shortest_edge": 4 * TOKEN**2, "longest_edge": 4096 * TOKEN**2}
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, size=pixels)
    return TinyQwen2VLProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)


def build_model(processor: TinyQwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    """About 5 M parameters, Qwen2-VL's anatomy: tower with rotary positions, merger of 2 x 2 patches, M-RoPE."""
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        vision_config={
            "depth": 4,
            "embed_dim": 128,
            "hidden_size": 192,
            "num_heads": 4,
            "mlp_ratio": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            # A model this narrow stays at chance for long with the library's 0.02.
            "initializer_range": 0.08,
        },
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 8, 8]},
            "pad_token_id": processor.tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": processor.tokenizer.eos_token_id,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return Qwen2VLForConditionalGeneration(config)


def start_from_llava(
    model: Qwen2VLForConditionalGeneration, processor: TinyQwen2VLProcessor, llava: LlavaForConditionalGeneration, words
) -> None:
    """Gives the text model the small LLaVA's weights: Qwen2's layers are Llama's with biases, which begin at zero.

    Args:
        words ([`PreTrainedTokenizerFast`]): The small LLaVA's tokenizer; words that both know keep their embeddings.
    """
    stock = llava.model.language_model.state_dict()
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if name in stock and stock[name].shape == parameter.shape:
                parameter.copy_(stock[name])
            elif name.endswith(".bias"):
                parameter.zero_()
        pairs = [(model.get_input_embeddings(), llava.get_input_embeddings()), (model.lm_head, llava.lm_head)]
        known = words.get_vocab()
        same = {"<|im_end|>": words.eos_token, "<|im_start|>": words.bos_token}
        for word, number in processor.tokenizer.get_vocab().items():
            before = known.get(same.get(word, word))
            for mine, theirs in pairs if before is not None else ():
                mine.weight[number] = theirs.weight[before]


def pixels_of(scenes: list[Scene], processor: TinyQwen2VLProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of all scenes `(patches, 3 * 2 * 4 * 4)` and grids `(scenes, 3)`, as the processor would make them (a
    scene needs no resizing)."""
    image = processor.image_processor
    mean, std = torch.tensor(image.image_mean), torch.tensor(image.image_std)
    patches, grids = [], []
    for scene in scenes:
        values = (torch.from_numpy(np.array(scene.image)).float() / 255 - mean) / std
        rows, columns = (size // TOKEN for size in values.shape[:2])
        blocks = values.view(rows, MERGE, PATCH, columns, MERGE, PATCH, 3).permute(0, 3, 1, 4, 6, 2, 5)
        # A still image is a video of one frame, shown twice.
        frames = blocks.unsqueeze(5).expand(-1, -1, -1, -1, -1, 2, -1, -1)
        patches.append(frames.reshape(rows * columns * MERGE**2, -1))
        grids.append([1, rows * MERGE, columns * MERGE])
    return torch.cat(patches), torch.tensor(grids)


def pack_questions(
    asked: list[list[tuple[str, str]]], processor: TinyQwen2VLProcessor, grid: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """One row for each scene: the image of `grid` (rows, columns) tokens, then its questions with their answers.

    Returns what [`pack_rows`] does, position_ids `(3, scenes, length)`: frame, row and column, which for text are one.
    """
    tokenizer, (rows, columns) = processor.tokenizer, grid

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    before, after = ids("<|im_start|> user <|vision_start|>"), ids("<|vision_end|>")
    prefix = before + [processor.image_token_id] * (rows * columns) + after
    first = len(before)
    places = [*range(first), *[first] * (rows * columns), first + max(rows, columns)]
    blocks = [
        [
            (ids(f"{question} <|im_end|> <|im_start|> assistant"), ids(f"{answer} <|im_end|>"))
            for question, answer in one
        ]
        for one in asked
    ]
    batch = pack_rows(prefix, places, blocks, tokenizer.pad_token_id)
    positions = batch["position_ids"].repeat(3, 1, 1)
    image = torch.arange(rows * columns)
    for axis, places in ((1, image // columns), (2, image % columns)):
        positions[axis, :, first : first + rows * columns] = first + places
    return {**batch, "position_ids": positions}
