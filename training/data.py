# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Image-question samples of the usual layouts, and the collator that makes them a batch with answers as labels.

A sample is a row with one of

- `messages` in chat form, and `images`, or images inside its content (`{"type": "image", "image": "0.png"}`);
- `conversations` as LLaVA's data has them (`from`, `value`, an `<image>` where an image stands) and `image`;
- `question`, `answer` and `image`.

`image` and `images` hold a picture, a path, or a list of them; a sample without any is text alone, and welcome. A
picture or a clip under another name is an error, since nobody would read it. `boxes` (left, top, right, bottom of what
its one image shows, in pixels of the upright picture), where known, is for the log alone.
"""

from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw
from torch.nn import functional as F
from transformers import ProcessorMixin
from transformers.utils import logging

from learnpruner.compare import shown_pixels, token_side

from .pictures import locate, open_picture, read_picture
from .rows import (
    FILE_AND_ROW,
    INSIDE,
    check_images,
    check_row,
    drawn,
    image_values,
    read_messages,
    read_row,
    read_rows,
    told,
)

logger = logging.get_logger(__name__)


def load_samples(
    source: str | Path | Dataset | IterableDataset,
    image_folder: str | Path | None = None,
    share: float = 1.0,
    seed: int = 0,
    strict: bool = False,
    skip_bad_rows: bool = False,
    answers: bool = True,
) -> Dataset | IterableDataset:
    """Reads samples, or a share of them, checks every row, and leaves out those whose images are missing or none.

    Images are opened here, not decoded: one that turns out damaged later is left out by [`PrunerCollator`].

    Args:
        source (`str`, `Path` or a data set): A JSON or JSON Lines file such as LLaVA-665K's, or rows in any of the
            layouts above; a streamed data set stays streamed.
        image_folder (`str` or `Path`, *optional*): Where relative image paths start. Defaults to the file's folder.
        share (`float`): In (0, 1]: how many of the samples, drawn by `seed`, before the others are looked at. Not for
            streamed data.
        seed (`int`): Of the share.
        strict (`bool`): An image that cannot be opened is an error; otherwise its sample is left out, and counted.
        skip_bad_rows (`bool`): A row that is no sample is left out and counted; otherwise it is an error.
        answers (`bool`): Every sample must have an answer to learn.

    Raises:
        `ValueError`: with file and row, where a row is no sample and, if `strict`, an image cannot be opened; where
            the file is not UTF-8 or not JSON, nothing is left, or `share` is out of range.
        `OSError`: where there is no such file.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is in (0, 1], got {share}.")
    streamed = isinstance(source, IterableDataset)
    if streamed and share < 1:
        raise ValueError("share needs to know how many samples there are: use take() on a streamed data set.")
    from_file = isinstance(source, str | Path)
    report = _LeftOut(str(source) if from_file else "the data set", strict, skip_bad_rows, streamed)
    if from_file:
        image_folder = Path(source).parent if image_folder is None else image_folder
        source = _read_file(Path(source), share, seed, answers, report)
    elif share < 1:
        places = drawn(len(source), share, seed)
        source, report.numbers = source.select(places), [place + 1 for place in places]
    for name, feature in (source.features or {}).items():
        if isinstance(feature, ImageFeature):
            # Decoded by the data set, a damaged image would be its error, not a sample to leave out.
            source = source.cast_column(name, ImageFeature(decode=False))

    def is_sample(row: dict, index: int) -> bool:
        number = report.numbers[index] if report.numbers else index + 1
        try:
            if not from_file:
                check_row(row, answers)
        except ValueError as error:
            report.bad(number, error)
            return False
        try:
            for value in image_values(row):
                open_picture(value, image_folder)
        except OSError as error:
            report.unreadable(number, error)
            return False
        return True

    def located(row: dict) -> dict:
        place = {name: locate(row[name], image_folder) for name in ("image", "images") if row.get(name) is not None}
        if isinstance(row.get("messages"), list | tuple):
            place["messages"] = [_located_message(message, image_folder) for message in row["messages"]]
        return {**row, **place}

    found = source.filter(is_sample, with_indices=True, **({} if streamed else {"desc": "Checking samples"}))
    if image_folder is not None:
        found = found.map(located, **({} if streamed else {"desc": "Finding images"}))
    if streamed:
        if next(iter(found), None) is None:
            raise ValueError(f"No sample is left of the stream: {report.why}")
        return found
    report.total = report.total or len(source)
    report.check(len(found))
    if len(found) < report.total:
        logger.warning(f"{report.total - len(found)} of {report.total} samples left out: {report.why}")
    return found


def _read_file(path: Path, share: float, seed: int, answers: bool, report: "_LeftOut") -> Dataset:
    rows = []
    for number, row in read_rows(path, share, seed):
        report.total += 1
        try:
            rows.append({**read_row(row, answers), FILE_AND_ROW: report.place(number)})
            report.numbers.append(number)
        except ValueError as error:
            report.bad(number, error)
    report.check(len(rows))
    # What no row has is no column: boxes above all.
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return Dataset.from_list([{name: row[name] for name in names} for row in rows])


class _LeftOut:
    """Rows that are left out, or why none may be. `first` says what was wrong with the first, with file and row."""

    def __init__(self, name: str, strict: bool, skip_bad_rows: bool, streamed: bool):
        self.name, self.strict, self.skip_bad_rows, self.streamed = name, strict, skip_bad_rows, streamed
        self.numbers: list[int] = []  # of the rows, where they are not all
        self.total = self.count = self.bad_rows = 0
        self.first = self.first_bad = ""

    def place(self, number: int) -> str:
        return f"{self.name}, row {number}"

    def _note(self, number: int, reason: Exception) -> str:
        told = f"{self.place(number)}: {reason}"
        self.count += 1
        self.first = self.first or told
        if self.streamed:
            logger.warning(f"{self.count} samples left out so far: {told}")
        return told

    def bad(self, number: int, reason: ValueError) -> None:
        told = self._note(number, reason)
        self.bad_rows += 1
        self.first_bad = self.first_bad or told
        if self.streamed:
            self.check(left=1)

    def unreadable(self, number: int, reason: OSError) -> None:
        told = self._note(number, reason)
        if self.strict:
            raise ValueError(f"{told} (an image cannot be read; strict: false leaves such rows out)") from reason

    @property
    def why(self) -> str:
        # Nothing is known where the data set kept what an earlier call had found.
        return self.first or "an image cannot be read, or the row is no sample"

    def check(self, left: int) -> None:
        """Raises `ValueError` for rows that are no samples, or where none is `left`."""
        if self.bad_rows and not self.skip_bad_rows:
            others = f"{self.bad_rows - 1} more rows are none; " if self.bad_rows > 1 else ""
            raise ValueError(f"{self.first_bad} ({others}skip_bad_rows: true leaves such rows out)")
        if not left:
            raise ValueError(f"No sample is left of {self.total}: {self.why}")


def _located_message(message: dict, folder: str | Path) -> dict:
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [_located_part(part, folder) for part in message["content"]]}


def _located_part(part: dict, folder: str | Path) -> dict:
    return {name: locate(value, folder) if name in INSIDE else value for name, value in part.items()}


def read_images(row: dict, image_folder: str | Path | None = None) -> list[Image.Image]:
    """The images of a sample, read whole: RGB, upright as their EXIF data say, transparency on white.

    Raises:
        `OSError`: where one is missing, or no image, or damaged.
    """
    return [read_picture(value, image_folder) for value in image_values(row)]


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
        read, reason = [], ""
        for row in rows:
            try:
                read.append((row, read_images(row)))
            except OSError as error:
                reason = told(row, error)
                if self.strict:
                    raise ValueError(
                        f"{reason} (an image cannot be read; strict: false leaves such rows out)"
                    ) from error
                self.left_out += 1
                logger.warning(f"{self.left_out} samples left out so far: {reason}")
        if not read:
            raise ValueError(f"Every image of a batch is damaged, the last one: {reason}")
        return read

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """
        Raises:
            `ValueError`: where a row is no sample, its images and placeholders differ in number, `max_length` cuts an
                image, or an image is damaged (all of a batch, or any if `strict`).
        """
        texts, answers, images, front = [], [], [], []
        read = self._read(rows)
        for row, pictures in read:
            try:
                messages = read_messages(row)
                check_images(messages, len(pictures))
                text, spans = self._render(messages)
            except ValueError as error:
                raise ValueError(told(row, error)) from error
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
            cut = (ids[:, self.max_length :] == self.image_token_id).any(1)
            if cut.any():
                row = int(cut.nonzero()[0])
                reason = (
                    f"max_length={self.max_length} cuts image tokens off its {int(mask[row].sum())} tokens: raise it, "
                )
                raise ValueError(told(read[row][0], f"{reason}or use smaller images."))
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
