"""The small LLaVA of this folder before it is trained: processor, model, and how scenes become its batches."""

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from scenes import COLORS, OBJECTS, SHAPES, SIDE, Scene, covered

PATCH = 8
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# A question follows its image at once, an answer its question after a space, and ends the text.
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>"
    "{% elif message['role'] == 'assistant' %} {{ part['text'] }}</s>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
WORDS = (
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES),
    *COLORS,
    *map(str, range(OBJECTS["hard"][1] + 1)),
    *[
        "?",
        "a",
        "are",
        "color",
        "contain",
        "does",
        "how",
        "image",
        "is",
        "many",
        "of",
        "present",
        "shape",
        "shapes",
        "the",
        "there",
        "what",
        "yes",
        "no",
    ],
)


def build_processor() -> LlavaProcessor:
    """Every word of the questions and answers is a token of its own."""
    names = [*SPECIAL.values(), "<image>", *WORDS]
    backend = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = Sequence([WhitespaceSplit(), Split("?", "isolated")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", additional_special_tokens=["<image>"], **SPECIAL
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """About 5 M parameters, LLaVA-1.5's anatomy: CLIP tower, two-layer projector, Llama."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=SIDE,
            patch_size=PATCH,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            # A text model this narrow stays at chance for long with the library's 0.02.
            initializer_range=0.08,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    model = LlavaForConditionalGeneration(config)
    tower = model.model.vision_tower
    embeddings = next(weight for name, weight in tower.named_parameters() if name.endswith("position_embedding.weight"))
    with torch.no_grad():
        embeddings[1:] = 0.3 * grid_waves(SIDE // PATCH, embeddings.shape[1])
    return model


def grid_waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column `(side * side, width)`: position embeddings that start out smooth can be
    interpolated to smaller scenes from the first step."""
    angles = torch.arange(side).unsqueeze(1) * 30.0 ** (-torch.arange(width // 4) / (width // 4))
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = waves.unsqueeze(1).expand(-1, side, -1), waves.unsqueeze(0).expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)


def patch_classes(scene: Scene) -> np.ndarray:
    """For each patch 0 for ground, else 1 + the class (shape and color) of the object that covers an eighth of it."""
    columns, rows = (side // PATCH for side in scene.image.size)
    pixels, classes = np.asarray(scene.image), np.zeros((rows, columns), dtype=np.int64)
    for source, (left, top, right, bottom) in zip(scene.objects, scene.boxes):
        shape = np.zeros(pixels.shape[:2], dtype=bool)
        shape[top:bottom, left:right] = covered(pixels[top:bottom, left:right], source.ground)
        share = shape.reshape(rows, PATCH, columns, PATCH).mean((1, 3))
        classes[share >= min(1 / 8, share.max())] = (
            1 + SHAPES.index(source.shape) * len(COLORS) + COLORS.index(source.color)
        )
    return classes.reshape(-1)


def patch_middles(scene: Scene) -> np.ndarray:
    """True for each patch that holds the middle of an object's box."""
    columns, rows = (side // PATCH for side in scene.image.size)
    middles = np.zeros((rows, columns), dtype=bool)
    for left, top, right, bottom in scene.boxes:
        middles[(top + bottom) // 2 // PATCH, (left + right) // 2 // PATCH] = True
    return middles.reshape(-1)


def pixels_of(scenes: list[Scene], processor: LlavaProcessor) -> torch.Tensor:
    """`(scenes, 3, side, side)`, as the processor would make them (a scene needs no resizing)."""
    image = processor.image_processor
    values = torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])).float() / 255
    return ((values - torch.tensor(image.image_mean)) / torch.tensor(image.image_std)).permute(0, 3, 1, 2)


def pack_questions(
    asked: list[list[tuple[str, str]]], processor: LlavaProcessor, tokens: int
) -> dict[str, torch.Tensor]:
    """One row for each scene: the image of `tokens` tokens, then its questions with their answers.

    Returns what [`pack_rows`] does, position_ids `(scenes, length)`.
    """
    tokenizer = processor.tokenizer
    prefix = [tokenizer.bos_token_id] + [tokenizer.convert_tokens_to_ids("<image>")] * tokens

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    blocks = [
        [(ids(question), [*ids(answer), tokenizer.eos_token_id]) for question, answer in questions]
        for questions in asked
    ]
    return pack_rows(prefix, list(range(len(prefix))), blocks, tokenizer.pad_token_id)


def pack_rows(
    prefix: list[int], places: list[int], asked: list[list[tuple[list[int], list[int]]]], pad: int
) -> dict[str, torch.Tensor]:
    """One row for each scene: a prefix, then questions with their replies side by side, each as if it stood alone.

    Args:
        prefix (`list[int]`): Token ids of what stands before the questions, the image among them.
        places (`list[int]`): Their positions, the highest last.
        asked: For each scene, token ids of questions and of their replies.

    Returns input_ids, position_ids, labels `(scenes, length)` and a 4D mask `(scenes, 1, length, length)`, in which a
    question sees the prefix and itself.
    """
    rows = []
    for questions in asked:
        ids, positions, labels, block = list(prefix), list(places), [-100] * len(prefix), [0] * len(prefix)
        for number, (words, reply) in enumerate(questions, 1):
            ids += words + reply
            labels += [-100] * len(words) + reply
            positions += range(places[-1] + 1, places[-1] + 1 + len(words) + len(reply))
            block += [number] * (len(words) + len(reply))
        rows.append((ids, positions, labels, block))
    length = max(len(ids) for ids, *_ in rows)
    fill = (pad, 0, -100, -1)
    ids, positions, labels, block = (
        torch.tensor([row[part] + [fill[part]] * (length - len(row[part])) for row in rows]) for part in range(4)
    )
    sees = (block.unsqueeze(2) == block.unsqueeze(1)) | (block.unsqueeze(1) == 0)
    mask = sees & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min).unsqueeze(1)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "attention_mask": mask}


class PatchHeads(nn.Module):
    """What a tower is trained to tell of each patch: its shape, its color, and whether it is an object's middle.

    Shape and color have a head each: one direction for all that is round, whatever its color, is what a text model
    can read soon. A head for their 24 pairs leaves it a table to learn by heart.
    """

    def __init__(self, width: int):
        super().__init__()
        self.shape = nn.Linear(width, 1 + len(SHAPES))
        self.color = nn.Linear(width, 1 + len(COLORS))
        self.middle = nn.Linear(width, 1)

    def forward(self, patches, classes, middles) -> tuple[torch.Tensor, float]:
        """Loss, and the share of foreground patches whose shape and color are both right.

        Args:
            patches (`torch.FloatTensor` of shape `(scenes, patches, width)`): Their features.
            classes (`torch.LongTensor` of shape `(scenes, patches)`): Of [`patch_classes`].
            middles (`torch.BoolTensor` of shape `(scenes, patches)`): Of [`patch_middles`].
        """
        front = classes > 0
        right, loss = front, 0.0
        shapes, colors = (classes - 1) // len(COLORS) + 1, (classes - 1) % len(COLORS) + 1
        for head, target in ((self.shape, shapes), (self.color, colors)):
            logits, target = head(patches), target * front
            weight = torch.ones(logits.shape[-1])
            weight[0] = 0.1  # most patches are ground
            loss = loss + F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight=weight)
            right = right & (logits.argmax(-1) == target)
        middle = self.middle(patches).squeeze(-1)
        loss = loss + F.binary_cross_entropy_with_logits(middle, middles.float(), pos_weight=torch.tensor(10.0))
        return loss, (right.sum() / front.sum()).item()


class VisionHeads(PatchHeads):
    """The same, and off [CLS] in that layer and in the last, the classes of the scene."""

    def __init__(self, width: int):
        super().__init__(width)
        self.scene = nn.ModuleList(nn.Linear(width, 1 + len(SHAPES) * len(COLORS)) for _ in range(2))

    def forward(self, layer, pooled, classes, middles) -> tuple[torch.Tensor, float]:
        """As [`PatchHeads`].

        Args:
            layer (`torch.FloatTensor` of shape `(scenes, 1 + patches, width)`): Hidden states that LLaVA reads.
            pooled (`torch.FloatTensor` of shape `(scenes, width)`): [CLS] after the last layer.
        """
        loss, right = super().forward(layer[:, 1:], classes, middles)
        there = F.one_hot(classes, self.scene[0].out_features).amax(1).float()
        for head, token in zip(self.scene, (layer[:, 0], pooled)):
            loss = loss + 0.5 * F.binary_cross_entropy_with_logits(head(token), there)
        return loss, right
