# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Image-question samples of the usual layouts, and the collator that makes them a batch with answers as labels.

A sample is a row with one of

- `messages` in chat form and `images`;
- `conversations` as LLaVA's data has them (`from`, `value`, an `<image>` where an image stands) and `image`;
- `question`, `answer` and `image`.

`image` and `images` hold a picture, a path, or a list of them; a sample without any is text alone, and welcome. `boxes`
(left, top, right, bottom of what its one image shows, in pixels of the file), where known, is for the log alone.
"""

import io
import json
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw
from torch.nn import functional as F
from transformers import ProcessorMixin
from transformers.utils import logging

from learnpruner.compare import shown_pixels, token_side

logger = logging.get_logger(__name__)

LLAVA_IMAGE = "<image>"
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def load_samples(
    source: str | Path | Dataset | IterableDataset,
    image_folder: str | Path | None = None,
    share: float = 1.0,
    seed: int = 0,
    strict: bool = False,
) -> Dataset | IterableDataset:
    """Reads samples, takes a share of them, and leaves out those whose images are missing or none.

    Images are opened here, not decoded: one that turns out damaged later is left out by [`PrunerCollator`].

    Args:
        source (`str`, `Path` or a data set): A JSON or JSON Lines file such as LLaVA-665K's, or rows in any of the
            layouts above; a streamed data set stays streamed.
        image_folder (`str` or `Path`, *optional*): Where relative image paths start. Defaults to the file's folder.
        share (`float`): In (0, 1]: how many of the samples, drawn by `seed`. Not for streamed data.
        seed (`int`): Of the share.
        strict (`bool`): An image that cannot be opened is an error; otherwise its sample is left out, and counted.

    Raises:
        `ValueError`: where nothing is left, a row has no known layout, `share` is out of range, or, if `strict`, an
            image cannot be opened.
        `OSError`: where there is no such file.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is in (0, 1], got {share}.")
    if isinstance(source, str | Path):
        path = Path(source)
        image_folder = path.parent if image_folder is None else image_folder
        source = Dataset.from_list(_read_rows(path))
    streamed = isinstance(source, IterableDataset)
    if share < 1:
        if streamed:
            raise ValueError("share needs to know how many samples there are: use take() on a streamed data set.")
        source = source.shuffle(seed=seed).select(range(max(1, round(share * len(source)))))
    for name, feature in (source.features or {}).items():
        if isinstance(feature, ImageFeature):
            # Decoded by the data set, a damaged image would be its error, not a sample to leave out.
            source = source.cast_column(name, ImageFeature(decode=False))
    left_out = 0

    def readable(row: dict) -> bool:
        nonlocal left_out
        try:
            for value in _image_values(row):
                _open(value, image_folder)
        except OSError as error:
            if strict:
                raise ValueError(f"An image cannot be read: {error}. Mend it, or leave such samples out.") from error
            left_out += 1
            if streamed:
                logger.warning(f"{left_out} samples left out so far: {error}")
            return False
        return True

    def located(row: dict) -> dict:
        place = {name: _locate(row[name], image_folder) for name in ("image", "images") if row.get(name) is not None}
        return {**row, **place}

    found = source.filter(readable)
    if image_folder is not None:
        found = found.map(located)
    if streamed:
        if next(iter(found), None) is None:
            raise ValueError("No sample is left of the stream: none has images that can be read.")
        return found
    if len(found) == 0:
        raise ValueError(f"No sample is left of {len(source)}: none has images that can be read.")
    if len(found) < len(source):
        logger.warning(f"{len(source) - len(found)} of {len(source)} samples left out: an image cannot be read.")
    return found


def _read_rows(path: Path) -> list[dict]:
    text = path.read_text()
    try:
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no list of samples.")
    names = ("images", "messages", "conversations", "question", "answer", "boxes")
    for number, row in enumerate(rows):
        try:
            messages = read_messages(row)
        except ValueError as error:
            raise ValueError(f"Sample {number} of {path}: {error}") from error
        # One layout for all rows: LLaVA-665K has rows without an image, and rows whose image is a list; and a chat's
        # content may be text or a list of parts.
        row["images"] = _as_list(row.pop("image", None)) + _as_list(row.get("images"))
        if row.get("messages") is not None:
            row["messages"] = messages
    return [{name: row[name] for name in names if name in row} for row in rows]


def _as_list(value) -> list:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _locate(value, folder):
    if isinstance(value, list):
        return [_locate(one, folder) for one in value]
    return str(Path(folder) / value) if isinstance(value, str) and folder is not None else value


def _image_values(row: dict) -> list:
    return _as_list(row.get("image")) + _as_list(row.get("images"))


def _open(value, folder: str | Path | None) -> Image.Image:
    """A picture, a path, or a data set's dict of bytes and path; its header is read. Raises `OSError`."""
    if isinstance(value, dict):
        value = io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]
    if isinstance(value, Image.Image):
        return value
    try:
        return Image.open(_locate(value, folder))
    except SyntaxError as error:  # Pillow's PNG reader
        raise OSError(str(error)) from error


def read_images(row: dict, image_folder: str | Path | None = None) -> list[Image.Image]:
    """The images of a sample, read whole.

    Raises:
        `OSError`: where one is missing, or no image, or damaged.
    """
    images = []
    for value in _image_values(row):
        try:
            images.append(_open(value, image_folder).convert("RGB"))
        except SyntaxError as error:  # Pillow's PNG reader
            raise OSError(str(error)) from error
    return images


def read_messages(row: dict) -> list[dict]:
    """The conversation of a sample in chat form: `role`, and `content` as a list of image and text parts.

    Raises:
        `ValueError`: where the row has none of the known layouts.
    """
    if row.get("messages") is not None:
        return [{**message, "content": _parts(message["content"])} for message in row["messages"]]
    if row.get("conversations") is not None:
        unknown = {turn["from"] for turn in row["conversations"]} - set(LLAVA_ROLES)
        if unknown:
            raise ValueError(
                f"A turn of a conversation is from one of {sorted(LLAVA_ROLES)}, not from {sorted(unknown)}."
            )
        return [{"role": LLAVA_ROLES[turn["from"]], "content": _split(turn["value"])} for turn in row["conversations"]]
    if row.get("question") is not None and row.get("answer") is not None:
        images = [{"type": "image"}] * (len(_as_list(row.get("image"))) + len(_as_list(row.get("images"))))
        return [
            {"role": "user", "content": [*images, {"type": "text", "text": row["question"]}]},
            {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
        ]
    raise ValueError(f"A sample has messages, conversations, or question and answer; this one has {sorted(row)}.")


def _parts(content) -> list[dict]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    # A data set fills up parts that lack a field with None.
    return [{name: value for name, value in part.items() if value is not None} for part in content]


def _split(text: str) -> list[dict]:
    parts = []
    for number, piece in enumerate(text.split(LLAVA_IMAGE)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


class PrunerCollator:
    """Makes rows a batch: the processor's chat template, every key that it returns, and labels on answers alone.

    An answer's labels are its own tokens and the end of its turn: what the template writes there, or else the
    tokenizer's end of sequence, which is added. Rows are filled up on the right. Nothing is cut off silently: where
    `max_length` would cut an image token it is an error, and where it cuts text, text is what is lost.

    Args:
        processor ([`ProcessorMixin`]): The base model's, with a chat template.
        max_length (`int`, *optional*): Tokens of the longest row.
        foreground (`bool`, defaults to `False`): Adds `foreground`, which [`PrunerTrainer`] takes out again: True for
            image tokens in a box. Of samples with one image, on models of one crop an image (LLaVA-1.5, Qwen);
            elsewhere none is marked, with a warning.
        strict (`bool`, defaults to `False`): A damaged image is an error; otherwise its sample is left out, and
            counted in a warning.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int | None = None,
        foreground: bool = False,
        strict: bool = False,
    ):
        if processor.chat_template is None:
            raise ValueError("The processor has no chat template: set processor.chat_template to the base model's.")
        self.processor, self.max_length, self.foreground, self.strict = processor, max_length, foreground, strict
        self.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        self.left_out = 0

    def _read(self, rows: list[dict]) -> list[tuple[dict, list[Image.Image]]]:
        """Rows with their images; those with a damaged one are left out."""
        read = []
        for row in rows:
            try:
                read.append((row, read_images(row)))
            except OSError as error:
                if self.strict:
                    raise ValueError(
                        f"An image cannot be read: {error}. Mend it, or leave such samples out."
                    ) from error
                self.left_out += 1
                logger.warning(f"{self.left_out} samples left out so far: {error}")
        if not read:
            raise ValueError("Every image of a batch is damaged: check the files.")
        return read

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """
        Raises:
            `ValueError`: where a row's images and placeholders differ in number, `max_length` cuts an image, or an
                image is damaged (all of a batch, or any if `strict`).
        """
        texts, answers, images, front = [], [], [], []
        for row, pictures in self._read(rows):
            messages = read_messages(row)
            places = sum(part["type"] == "image" for message in messages for part in message["content"])
            if places != len(pictures):
                raise ValueError(f"A sample has {len(pictures)} images and {places} places for them: {messages}")
            text, spans = self._render(messages)
            texts.append(text)
            answers.append(spans)
            images += pictures
            front.append(self._patches_in_boxes(row.get("boxes"), pictures))
        batch = self.processor(
            text=texts, images=images or None, padding=True, padding_side="right", return_tensors="pt"
        )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = torch.full_like(ids, -100)
        for number, (text, spans) in enumerate(zip(texts, answers)):
            self._label(text, spans, ids[number], labels[number])
        if self.foreground:
            batch["foreground"] = self._mark(front, ids)
        length = ids.shape[1]
        if self.max_length is not None and length > self.max_length:
            if (ids[:, self.max_length :] == self.image_token_id).any():
                raise ValueError(
                    f"max_length={self.max_length} cuts image tokens off a row of {length}: raise it, or use smaller "
                    "images."
                )
            batch = {
                name: value[:, : self.max_length] if value.shape[:2] == mask.shape else value
                for name, value in batch.items()
            }
            labels = labels[:, : self.max_length]
        return {**batch, "labels": labels}

    def _patches_in_boxes(self, boxes: list | None, pictures: list[Image.Image]) -> torch.Tensor | None:
        """Patches that are at least half in a box, row by row, bool: the boxes go through the processor as a picture
        of their own, so that its crops and sizes are theirs."""
        if not self.foreground or not boxes or len(pictures) != 1:
            return None
        drawn = Image.new("RGB", pictures[0].size)
        for left, top, right, bottom in boxes:
            if right > left and bottom > top:
                ImageDraw.Draw(drawn).rectangle((left, top, right - 1, bottom - 1), fill="white")
        inside = shown_pixels(self.processor, self.processor.image_processor(images=drawn, return_tensors="pt"))[..., 0]
        return (F.avg_pool2d(inside.unsqueeze(0), token_side(self.processor)) >= 0.5).flatten()

    def _mark(self, front: list[torch.Tensor | None], ids: torch.Tensor) -> torch.Tensor:
        """`(batch, sequence)` bool."""
        marked = torch.zeros_like(ids, dtype=torch.bool)
        for row, tokens, patches in zip(marked, ids == self.image_token_id, front):
            if patches is None:
                continue
            if tokens.sum() == len(patches):
                row.masked_scatter_(tokens, patches)
            else:
                logger.warning_once("Boxes are not followed on this model: an image has more tokens than one crop.")
        return marked

    def _render(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where its answers stand in it, in characters."""
        text = self.processor.apply_chat_template(messages)
        written, spans, place = "", [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.processor.apply_chat_template(messages[:number], add_generation_prompt=True)
            after = self.processor.apply_chat_template(messages[: number + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    "The chat template renders a conversation's beginning otherwise than on its own, so that its "
                    "answers cannot be found."
                )
            turn = after[len(before) :]
            if not turn.strip():
                raise ValueError("The chat template leaves out the assistant's turns: there is no answer to learn.")
            first, last = len(after) - len(turn.lstrip()), len(before) + len(turn.rstrip())
            written += text[place:first]
            start = len(written)
            written += text[first:last]
            if turn.strip() == "".join(part.get("text", "") for part in message["content"]).strip():
                # Templates such as LLaVA-1.5's write nothing at the end of a turn.
                written += self.processor.tokenizer.eos_token
            spans.append((start, len(written)))
            place = last
        return written + text[place:], spans

    def _label(self, text: str, spans: list[tuple[int, int]], ids: torch.Tensor, labels: torch.Tensor) -> None:
        """Labels the tokens that reach into a span. The processor has made many of each image token."""
        # apply_chat_template has written the special tokens.
        tokens = self.processor.tokenizer(text, return_offsets_mapping=True)
        place, known = 0, ids.tolist()
        for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"]):
            if token == self.image_token_id:
                while place < len(known) and known[place] == token:
                    place += 1
                continue
            if place >= len(known) or known[place] != token:
                raise ValueError("The processor's tokens are not those of its text: its answers cannot be found.")
            if any(start < last and end > first for first, last in spans):
                labels[place] = token
            place += 1
