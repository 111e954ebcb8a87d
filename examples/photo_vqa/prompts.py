# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What the photo model reads: the format of its prompts, its processor, and many questions packed behind one image.

A conversation is

    <|im_start|>user
    {576 placeholders}
    Question: How many cows are there?
    Answer: two<|im_end|>
    Question: ...

An answer is one token, with its leading space, and `<|im_end|>`, at which `generate` stops.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerBase

from tower import CONFIG, MEAN, STD

IMAGE, END = "<image>", "<|im_end|>"
START = "<|im_start|>user\n"
SIDE = 336
TOKENS = (SIDE // CONFIG["patch_size"]) ** 2
CHAT_TEMPLATE = (
    START + "{% for message in messages %}"
    "{% set parts = message['content'] %}"
    "{% if parts is string %}{% set parts = [{'type': 'text', 'text': parts}] %}{% endif %}"
    "{% for part in parts %}"
    "{% if part['type'] == 'image' %}<image>"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + part['text'] + '<|im_end|>' }}"
    "{% else %}{{ '\\nQuestion: ' + part['text'] + '\\nAnswer:' }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """The processor of the photo model. It needs no torchvision.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Has the tokens `<image>`, `<|im_start|>` and `<|im_end|>`.
    """
    edges = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=edges, image_mean=MEAN, image_std=STD)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=CONFIG["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


@dataclass
class Chunk:
    """Rows of a packed sequence and what they attend: the first rows, and those of the chunk that the mask allows.

    Attributes:
        first, last (`int`): The rows `first` to `last - 1`.
        seen (`int`): They attend the rows before `seen`.
        mask (`torch.BoolTensor` of shape `(last - first, last - first)`): True where a row attends a row of its chunk.
    """

    first: int
    last: int
    seen: int
    mask: torch.Tensor


@dataclass
class Packed:
    """One image and questions about it, as one sequence: `START`, the image, the questions.

    Attributes:
        ids (`torch.LongTensor` of shape `(text rows,)`): Tokens after the image.
        positions (`torch.LongTensor` of shape `(rows,)`): Positions of all rows.
        chunks (`list[Chunk]`): Cover all rows, in order.
        rows (`torch.LongTensor` of shape `(2 * questions,)`): Rows that predict the answers, then those that predict
            the ends.
        targets (`torch.LongTensor` of shape `(2 * questions,)`): The tokens that they should predict.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    chunks: list[Chunk]
    rows: torch.Tensor
    targets: torch.Tensor


class Packer:
    """Turns questions into sequences.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): That of [`build_processor`].
        tokens (`int`): Vision tokens of an image.
        chunk (`int`): Rows that are attended at once: more take more memory and attend more in vain.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: int = TOKENS, chunk: int = 160):
        self.tokenizer, self.tokens, self.chunk = tokenizer, tokens, chunk
        self.start = self._ids(START)
        self.end = self.word(END)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def word(self, text: str) -> int:
        """The only token of a text.

        Raises:
            `ValueError`: where it has several.
        """
        ids = self._ids(text)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is not one token of this tokenizer.")
        return ids[0]

    def pack(self, asked: list[tuple[str, str]], apart: bool) -> Packed:
        """One sequence of pairs of question and answer.

        Args:
            apart (`bool`): Each question attends the image and itself, at the positions that it would have alone.
                Otherwise they are the turns of one conversation.
        """
        prefix = len(self.start) + self.tokens
        ids, positions, blocks, rows, ends, answers = [], list(range(prefix)), [], [], [], []
        for question, answer in asked:
            first, word = prefix + len(ids), self.word(f" {answer}")
            turn = [*self._ids(f"\nQuestion: {question}\nAnswer:"), word]
            rows.append(first + len(turn) - 2)
            ends.append(first + len(turn) - 1)
            answers.append(word)
            if not apart:
                turn.append(self.end)
            ids += turn
            start = prefix if apart else first
            positions += range(start, start + len(turn))
            blocks.append((first, first + len(turn)))
        return Packed(
            torch.tensor(ids),
            torch.tensor(positions),
            self._causal(0, prefix) + (self._apart(prefix, blocks) if apart else self._causal(prefix, len(positions))),
            torch.tensor(rows + ends),
            torch.tensor(answers + [self.end] * len(answers)),
        )

    def _causal(self, start: int, stop: int) -> list[Chunk]:
        """Each row attends itself and all before it."""
        pieces = -(-(stop - start) // self.chunk)
        edges = [start + (stop - start) * piece // pieces for piece in range(pieces + 1)]
        return [Chunk(a, b, a, torch.ones(b - a, b - a, dtype=torch.bool).tril()) for a, b in pairwise(edges)]

    def _apart(self, prefix: int, blocks: list[tuple[int, int]]) -> list[Chunk]:
        """Each row attends the prefix, and itself and those before it in its block."""
        chunks, waiting = [], []
        for number, (first, last) in enumerate(blocks, 1):
            waiting += [number] * (last - first)
            if number == len(blocks) or len(waiting) + blocks[number][1] - blocks[number][0] > self.chunk:
                block = torch.tensor(waiting)
                mask = (block[:, None] == block[None]).tril()
                chunks.append(Chunk(last - len(waiting), last, prefix, mask))
                waiting = []
        return chunks
