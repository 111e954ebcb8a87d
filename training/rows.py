# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Rows of samples: read from files, and checked, so that each fault is told with its file and row before any training.

A row of a JSON list counts from 1; of a JSON Lines file it is the number of its line.
"""

import codecs
import json
import mimetypes
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

LLAVA_IMAGE = "<image>"
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ROLES = ("system", "user", "assistant")
# Where a part of a chat's content may hold its own image.
INSIDE = ("image", "path", "url")
# Of a sample of a file: that file and the number of its row, for what is found out only when it is read whole.
FILE_AND_ROW = "file_and_row"
# What of a row is read, of the layouts the first that it has.
FIELDS = ("images", "messages", "conversations", "question", "answer", "boxes")
READ = ("image", *FIELDS)
# Names under which other data have pictures; what they may have beside them; and what may look like the name of one.
PICTURES = re.compile(r"(img|image|picture|photo)s?(_?(path|file|file_?name|name|url)s?)?", re.IGNORECASE)
CLIPS = ("video", "videos", "audio", "audios")
NAMES = ("id", "source")
# Line breaks, and what else would not stay on the one line of a message.
CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
# No side of a box is further away, and no answer that is a number is likely to be larger.
LARGEST = 10**9
OTHER_ENCODINGS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
# Values in messages: on one line, and short, however long or deep they are.
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 60
KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def drawn(count: int, share: float, seed: int) -> list[int]:
    """Which of so many samples a share is: at least one, in random order; all of them in their order at a share of 1.
    The same as `Dataset.shuffle(seed)` takes."""
    if share == 1:
        return list(range(count))
    return np.random.default_rng(seed).permutation(count)[: max(1, round(share * count))].tolist()


def read_rows(path: Path, share: float, seed: int) -> list[tuple[int, object]]:
    """Rows of a file with their numbers, or a share of them: of JSON Lines the others are not even parsed.

    Raises:
        `OSError`: where there is no such file.
        `ValueError`: where it is not UTF-8, not JSON, or holds no rows.
    """
    if path.is_dir():
        raise OSError(f"{path} is a folder: give a JSON or JSON Lines file in it.")
    if not path.is_file():
        raise OSError(f"There is no file {path}.")
    text = _decode(path)
    if not text.strip():
        raise ValueError(f"{path} is empty: it holds no list of samples.")
    if path.suffix == ".json":
        rows = _parse_list(path, text)
        return [(number + 1, rows[number]) for number in drawn(len(rows), share, seed)]
    # Not splitlines(): JSON may have U+2028 and the like inside a string.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(lines[place][0], _parse_line(path, *lines[place])) for place in drawn(len(lines), share, seed)]


def _decode(path: Path) -> str:
    data = path.read_bytes()
    for mark, name in OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise ValueError(f"{path} is {name} text: save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8."
        ) from error


def _parse_list(path: Path, text: str) -> list:
    try:
        rows = json.loads(text, parse_int=_whole_number)
    except RecursionError as error:
        row = _nested_row(text)
        place = f"{path}, row {row}: this row" if row else f"{path} is not JSON: it"
        raise ValueError(f"{place} is nested too deeply to be read.") from error
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data" and text[: error.pos].rstrip().startswith("{")
        hint = f" It looks like JSON Lines: name it {path.stem}.jsonl." if lines else ""
        raise ValueError(
            f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}.{hint}"
        ) from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds no list of samples, but {_kind(rows)}.")
    if not rows:
        raise ValueError(f"{path} holds no list of samples: its list is empty.")
    return rows


def _nested_row(text: str) -> int | None:
    """Which row of a list is nested too deeply, if it is a list."""
    decoder, row = json.JSONDecoder(parse_int=_whole_number), 0
    begins = re.match(r"\s*\[\s*", text)
    try:
        while begins:
            row += 1
            _, end = decoder.raw_decode(text, begins.end())
            begins = re.compile(r"\s*,\s*").match(text, end)
    except RecursionError:
        return row
    return None


def _whole_number(digits: str) -> int | float:
    """Python reads no number of thousands of digits as a whole one: that is infinity here, which no field may be."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def _parse_line(path: Path, number: int, line: str):
    try:
        return json.loads(line, parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError(f"{path}, row {number}: this line is nested too deeply to be read.") from error
    except json.JSONDecodeError as error:
        hint = " If the file is one JSON list, name it .json." if line.lstrip().startswith("[") else ""
        raise ValueError(
            f"{path}, row {number}: this line is not JSON: {error.msg} in column {error.colno}.{hint}"
        ) from error


def read_row(row, answers: bool = True) -> dict:
    """A row of a file in the one layout that all have: LLaVA-665K has rows without an image, and rows whose image is a
    list; and a chat's content may be text or a list of parts, with images inside.

    Raises:
        `ValueError`: where it is no sample.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object {{...}}, and this one is {_kind(row)}.")
    messages = read_messages(row)
    images = image_values(row)
    for value in images:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"an image is a path, and here it is {_kind(value)}.")
        if "://" in value or value.startswith("data:"):
            raise ValueError(f"an image is a path to a file, got {value[:60]!r}: download it first.")
    check_row(row, answers)
    # Only what is read: other fields may hold what Arrow cannot have in one column.
    read = {**dict.fromkeys(FIELDS), "images": images, "boxes": row.get("boxes")}
    if row.get("messages") is not None:
        contents = [[_bare(part) for part in message["content"]] for message in messages]
        read["messages"] = [{"role": m["role"], "content": content} for m, content in zip(messages, contents)]
    elif row.get("conversations") is not None:
        read["conversations"] = [{name: turn[name] for name in ("from", "value")} for turn in row["conversations"]]
    else:
        read |= {name: row[name] for name in ("question", "answer")}
    return read


def check_row(row: dict, answers: bool = True) -> None:
    """Raises `ValueError` where a row is no sample: its turns, images or boxes are not what they must be, or, if
    `answers`, there is nothing to learn."""
    messages = read_messages(row)
    images = image_values(row)
    check_unread(row, messages)
    check_images(messages, len(images))
    for path in images:
        if isinstance(path, str) and CONTROL.search(_text(path, "the path of an image")):
            raise ValueError(f"the path of an image holds a line break or the like, got {SHORT.repr(path)}.")
    boxes = row.get("boxes")
    if boxes is not None and not (isinstance(boxes, list | tuple) and all(map(_is_box, boxes))):
        raise ValueError(f"a box is left, top, right and bottom in pixels, got {SHORT.repr(boxes)}.")
    if answers and not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no turn is an answer of the assistant, so there is nothing to learn.")


def check_unread(row: dict, messages: list[dict]) -> None:
    """Raises `ValueError` where a picture or a clip would be left out in silence: under a name that is not read."""
    unread = {name: value for name, value in row.items() if name not in (*READ, *NAMES) and _holds(value)}
    for name in unread:
        if name.lower() in CLIPS:
            raise ValueError(f'{name!r} is not read: give pictures, under "image" or "images", or leave the row out.')
    for name, value in {} if image_values(row) else unread.items():
        if PICTURES.fullmatch(name) or any(map(_is_picture, as_list(value))):
            raise ValueError(f'this row\'s picture is under {name!r}, which is not read: name it "image" or "images".')
    for number, message in enumerate(messages, 1):
        text = "".join(part.get("text", "") for part in message["content"])
        for clip in ("video", "audio") if message["role"] == "user" else ():
            # HTML that somebody asks about closes what it opens.
            if f"<{clip}>" in text and f"</{clip}>" not in text:
                raise ValueError(
                    f"turn {number} has a <{clip}>, which is not read: give pictures, each with {LLAVA_IMAGE} in its "
                    "place, or leave the row out."
                )


def _holds(value) -> bool:
    """Whether a column holds anything that a picture or a clip could be."""
    if isinstance(value, str | list | tuple | dict):
        return len(value) > 0
    return value is not None and not isinstance(value, bool | int | float)


def _is_picture(value) -> bool:
    """A picture, as data sets have them, too; or the name of a file of one, or of a clip."""
    if isinstance(value, str):
        kind = mimetypes.guess_type(f"name{Path(value).suffix}")[0] if len(value.split()) == 1 else None
        return kind is not None and kind.startswith(("image/", "video/", "audio/"))
    return isinstance(value, Image.Image) or (isinstance(value, dict) and "bytes" in value)


def check_images(messages: list[dict], count: int) -> None:
    """Raises `ValueError` where a conversation has places for another number of images."""
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places != count:
        raise ValueError(
            f"a sample has {count} images and {places} places for them: {LLAVA_IMAGE} in conversations, "
            '{"type": "image"} in messages.'
        )


def image_values(row: dict) -> list:
    """The images of a sample, as they are given: beside the conversation, or inside a chat's content."""
    beside = as_list(row.get("image")) + as_list(row.get("images"))
    if not isinstance(row.get("messages"), list | tuple):
        return beside
    parts = [part for message in row["messages"] for part in as_parts(message.get("content"))]
    inside = [part[name] for part in parts for name in INSIDE if part.get(name) is not None]
    if inside and beside:
        raise ValueError("images are inside the messages and beside them: give them in one of the two ways.")
    return inside or beside


def _is_box(box) -> bool:
    return isinstance(box, list | tuple) and len(box) == 4 and all(map(_is_short, box))


def _is_short(value) -> bool:
    """A number, neither NaN nor infinite, of a few digits."""
    return type(value) in (int, float) and abs(value) <= LARGEST


def told(row: dict, error: Exception | str) -> str:
    """What is wrong with a sample, behind its file and row where these are known."""
    return f"{row[FILE_AND_ROW]}: {error}" if row.get(FILE_AND_ROW) else str(error)


def as_list(value) -> list:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def as_parts(content) -> list[dict]:
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list | tuple) else []


def read_messages(row: dict) -> list[dict]:
    """The conversation of a sample in chat form: `role`, and `content` as a list of image and text parts.

    Raises:
        `ValueError`: where the row has none of the known layouts, or a turn is not what it must be.
    """
    if row.get("messages") is not None:
        messages = [_message(message) for message in _turns(row["messages"], "messages")]
    elif row.get("conversations") is not None:
        messages = [_llava_turn(turn) for turn in _turns(row["conversations"], "conversations")]
    elif row.get("question") is not None and row.get("answer") is not None:
        images = [{"type": "image"}] * len(image_values(row))
        question, answer = (_plain(_text(row[name], f"the {name}"), f"the {name}") for name in ("question", "answer"))
        messages = [
            {"role": "user", "content": [*images, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    else:
        given = sorted(name for name, value in row.items() if value is not None)
        raise ValueError(f"a sample has messages, conversations, or question and answer; this one has {given}.")
    _check_order(messages)
    return messages


def _turns(turns, name: str) -> Iterable[dict]:
    if not isinstance(turns, list | tuple) or not turns:
        raise ValueError(f"{name} is a list of turns, and here it is {_kind(turns)}.")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} of {name} is an object {{...}}, and here it is {_kind(turn)}.")
        yield turn


def _message(message: dict) -> dict:
    if message.get("role") not in ROLES:
        raise ValueError(f"the role of a message is one of {list(ROLES)}, got {SHORT.repr(message.get('role'))}.")
    content = message.get("content")
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    elif isinstance(content, list | tuple):
        parts = content
    else:
        raise ValueError(f"the content of a message is text or a list of parts, and here it is {_kind(content)}.")
    return {**message, "content": [_part(part) for part in parts]}


def _part(part) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "image"):
        raise ValueError(
            'a part of a message is {"type": "text", "text": ...} or {"type": "image"}, got ' + f"{SHORT.repr(part)}."
        )
    if kind == "text":
        _plain(_text(part.get("text"), "the text of a message"), "the text of a message")
    # A data set fills up parts that lack a field with None.
    return {name: value for name, value in part.items() if value is not None}


def _bare(part: dict) -> dict:
    return {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]}


def _llava_turn(turn: dict) -> dict:
    if turn.get("from") not in list(LLAVA_ROLES):
        raise ValueError(
            f"a turn of a conversation is from one of {sorted(LLAVA_ROLES)}, not from {SHORT.repr(turn.get('from'))}."
        )
    return {"role": LLAVA_ROLES[turn["from"]], "content": _split(_text(turn.get("value"), "the value of a turn"))}


def _split(text: str) -> list[dict]:
    parts = []
    for number, piece in enumerate(text.split(LLAVA_IMAGE)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def _check_order(messages: list[dict]) -> None:
    before = None
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            if before != "user":
                raise ValueError(f"turn {number} is an answer of the assistant that follows no question of the user.")
            if not "".join(part.get("text", "") for part in message["content"]).strip():
                raise ValueError(f"turn {number} is an empty answer.")
            if any(part["type"] == "image" for part in message["content"]):
                raise ValueError(
                    f"turn {number} is an answer of the assistant that holds an image: images are in turns of the user."
                )
        before = message["role"]


def _text(value, what: str) -> str:
    if not isinstance(value, str):
        hint = f': write it as text, "{value}"' if _is_short(value) else ""
        raise ValueError(f"{what} is {_kind(value)}, not text{hint}.")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{what} holds half of a character (a lone surrogate such as \\ud83d).")
    return value


def _plain(text: str, what: str) -> str:
    if LLAVA_IMAGE in text:
        raise ValueError(
            f"{what} holds {LLAVA_IMAGE}, which only conversations may: images of a question come first by "
            'themselves, and in messages an image is a part {"type": "image"}.'
        )
    return text


def _kind(value) -> str:
    if value is None:
        return "missing or null"
    if isinstance(value, str | list | dict) and not value:
        return "empty"
    return KINDS.get(type(value), "text" if isinstance(value, str) else f"a {type(value).__name__}")
