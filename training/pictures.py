# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Pictures of samples: found, opened, upright as their camera was held, and opaque."""

import io
from pathlib import Path

from PIL import Image

from learnpruner.compare import as_rgb

# What Pillow's readers raise, PNG's the second, the last at pictures too large to be meant.
UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)


def locate(value, folder: str | Path | None):
    """A path, or a list of them, from `folder`; what is no path as it is."""
    if isinstance(value, list):
        return [locate(one, folder) for one in value]
    return str(Path(folder) / value) if isinstance(value, str) and folder is not None else value


def open_picture(value, folder: str | Path | None = None) -> Image.Image:
    """A picture, a path, or a data set's dict of bytes and path; of a file the header is read.

    Raises:
        `OSError`: where there is none, or Pillow cannot read it, with the path that was tried.
    """
    if isinstance(value, dict):
        value = io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]
    if isinstance(value, Image.Image):
        return value
    name = "the picture in the data set" if isinstance(value, io.BytesIO) else locate(value, folder)
    if isinstance(name, str) and isinstance(value, str) and not Path(name).is_file():
        if Path(value).is_absolute():
            raise OSError(f"there is no image file {name}")
        where = Path.cwd() if folder is None else Path(folder).absolute()
        raise OSError(
            f"there is no image file {name}: {value!r} was looked for in {where}; image_folder says where such paths "
            "start"
        )
    try:
        return Image.open(value if isinstance(value, io.BytesIO) else name)
    except UNREADABLE as error:
        raise OSError(f"{name} is not an image that Pillow can read ({error})") from error


def read_picture(value, folder: str | Path | None = None) -> Image.Image:
    """A picture read whole, in RGB: turned as its EXIF data say, transparency on white. Raises `OSError`."""
    picture = open_picture(value, folder)
    try:
        return as_rgb(picture)
    except UNREADABLE as error:
        name = locate(value, folder) if isinstance(value, str) else "a picture"
        raise OSError(f"{name} is damaged ({error})") from error
