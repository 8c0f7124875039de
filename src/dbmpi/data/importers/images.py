"""A folder of images for each class, read by Pillow."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dbmpi.data.importers.parts import parts
from dbmpi.data.importers.reading import Progress, no_progress
from dbmpi.data.labels import some
from dbmpi.data.source import Source
from dbmpi.data.writer import LARGEST_SAMPLE_BYTES, DataWriter, Origin, Shape, Written, check_writable
from dbmpi.errors import UserError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Of Pillow, which has others that start programs."""
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MOST_PIXELS = 1 << 27
_AT_ONCE, _BLOCK_BYTES = 64, 64 << 20
"""Most images, and bytes of them, that are decoded before some are written."""
_THREADS = 2


@dataclass(frozen=True)
class _Look:
    """What all images become."""

    rows: int
    columns: int
    mode: str
    """Of Pillow: L is grey, RGB, or I;16 for grey of 16 bits."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.rows, self.columns) if self.mode == "RGB" else (self.rows, self.columns)


def import_images(
    folder: Path,
    out: Path,
    *,
    size: tuple[int, int] | None = None,
    color: str | None = None,
    like: Path | None = None,
    per_file: int | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> list[Written]:
    """Write a data file from a folder that has a folder of images for each class.

    Classes are numbered in the order of the names of their folders, which are recorded in the attribute `labels`.
    Grey images become bytes ``(rows, columns)``, those of 16 bits uint16, and others bytes ``(3, rows, columns)``.

    Parameters
    ----------
    folder
        With a folder for each class; images may lie in further folders within.
    out
        Data file to write; with `per_file`, its name has a ``{}`` for the number of the file.
    size
        Rows and columns to which every image is cut in its middle and scaled; by default all must have one size.
    color
        ``grey`` or ``rgb``; by default as the first image is.
    like
        An earlier data file, whose classes, size and colors are used.
    per_file
        Samples of each file.  One that a run before has completed is not written again.
    force
        Replace existing files.
    progress
        Called with the number of images that have been read, and of all.

    Raises
    ------
    UserError
        If there are no images, one cannot be read or has another size, or Pillow is not installed.
    """
    pillow = _pillow()
    found = _images(folder)
    labels: Sequence[Any] = sorted({label for label, _ in found})
    look = None
    if like is not None:
        labels, look = _like(like, labels)
    if look is None:
        look = _look(pillow, found[0][1], size, color)
    codes = {label: code for code, label in enumerate(labels)}
    class_of = {path: codes[label] for label, path in found}
    shape = Shape(look.shape, len(labels), None, 1 / 65535 if look.mode == "I;16" else 1 / 255, _kind(look))
    written, done = [], 0
    for part in parts(out, [path for _, path in found], per_file, (look, [*labels])):
        if part.is_there and not force:
            done += len(part.sources)
            progress(done, len(found))
            continue
        check_writable(part.out, force, (folder,))
        with DataWriter(part.out, shape, Origin("images", folder, folder), force) as writer:
            writer.annotate(part.attributes)
            for paths, pixels in _decoded(pillow, part.sources, look, size is not None or like is not None):
                classes = np.array([class_of[path] for path in paths], np.int32)
                writer.append(pixels, classes, lambda row, paths=paths: str(paths[row]))  # type: ignore[misc]
                done += len(paths)
                progress(done, len(found))
            writer.number_labels(labels, np.arange(len(labels), dtype=np.int32))
        written.append(writer.written)
    return written


def _pillow() -> ModuleType:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise UserError("images are read by Pillow, which is not installed: pip install pillow") from None
    return PIL


def _images(folder: Path) -> list[tuple[str, Path]]:
    """Return the label and the path of each image, in order."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; expected one with a folder of images for each class")
    found = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for root, folders, names in os.walk(inner):
            folders.sort()
            found += [(inner.name, Path(root, name)) for name in sorted(names) if Path(name).suffix.lower() in SUFFIXES]
    if not found:
        raise UserError(
            f"{folder}: holds no images in folders of its own; expected e.g. {folder / 'cats' / 'one.png'} and "
            f"{folder / 'dogs' / 'two.png'}"
        )
    return found


def _like(path: Path, labels: Sequence[str]) -> tuple[Sequence[Any], _Look | None]:
    """Return the classes and the look of another data file."""
    with Source.open(path, LARGEST_SAMPLE_BYTES >> 20) as source:
        shape, known = source.input_shape, source.labels
        kind = source._stored_inputs[0].kind
    unknown = [label for label in labels if label not in (known or ())]
    if known is None or unknown or not (len(shape) == 2 or (len(shape) == 3 and shape[0] == 3)):
        what = f"knows no class {unknown[0]!r}: {some(known)}" if known and unknown else "was not made from images"
        raise UserError(f"{path}: {what}; expected the file of the training images, with all their classes")
    mode = "RGB" if len(shape) == 3 else "I;16" if kind == np.uint16 else "L"
    return known, _Look(shape[-2], shape[-1], mode)


def _look(pillow: ModuleType, first: Path, size: tuple[int, int] | None, color: str | None) -> _Look:
    with _open(pillow, first) as image:
        turned = pillow.ImageOps.exif_transpose(image)
        columns, rows = turned.size
        grey = image.mode in ("1", "L", "LA") or image.mode.startswith(("I", "F"))
        mode = "I;16" if image.mode.startswith("I;16") else "L" if grey else "RGB"
    if color is not None:
        mode = "RGB" if color == "rgb" else mode if mode == "I;16" else "L"
    rows, columns = size or (rows, columns)
    return _Look(rows, columns, mode)


def _open(pillow: ModuleType, path: Path) -> Any:
    """Open an image, whose pixels are not read yet."""
    try:
        image = pillow.Image.open(path, formats=FORMATS)
    except (OSError, ValueError, SyntaxError, pillow.Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image: {_reason(error)}; remove or replace it") from None
    if image.size[0] * image.size[1] > MOST_PIXELS:
        raise UserError(f"{path}: has {image.size[0]} x {image.size[1]} pixels; expected at most {MOST_PIXELS:,}")
    return image


def _pixels(pillow: ModuleType, path: Path, look: _Look, scaled: bool) -> np.ndarray:
    with _open(pillow, path) as opened:
        try:
            image = pillow.ImageOps.exif_transpose(opened)
            if look.mode == "I;16":
                if not image.mode.startswith("I"):
                    raise UserError(
                        f"{path}: is an image of 8 bits ({image.mode}), but the first has 16; store all alike"
                    )
                image = image.convert("I")
            elif image.mode.startswith(("I", "F")):
                raise UserError(f"{path}: is an image of more than 8 bits ({image.mode}); expected 8, as the first has")
            else:
                image = image.convert(look.mode)
            if image.size != (look.columns, look.rows):
                if not scaled:
                    raise UserError(
                        f"{path}: has {image.size[1]} x {image.size[0]} pixels, but the first image {look.rows} x "
                        f"{look.columns}; say --size {look.rows}x{look.columns} to cut and scale all to one size"
                    )
                image = pillow.ImageOps.fit(image, (look.columns, look.rows), pillow.Image.Resampling.BILINEAR)
            pixels = np.array(image)
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: is torn or damaged: {_reason(error)}; remove or replace it") from None
    if look.mode == "I;16":
        pixels = np.clip(pixels, 0, 65535).astype(np.uint16)
    if look.mode == "RGB":
        pixels = np.moveaxis(pixels, -1, 0)
    return pixels


def _decoded(
    pillow: ModuleType, paths: Sequence[Path], look: _Look, scaled: bool
) -> Iterator[tuple[list[Path], np.ndarray]]:
    """Yield images in blocks; several threads decode, as Pillow leaves Python's lock alone meanwhile."""
    todo, sample_bytes = iter(paths), 2 * math.prod(look.shape)
    at_once = max(1, min(_AT_ONCE, _BLOCK_BYTES // sample_bytes))
    with ThreadPoolExecutor(_THREADS, "images") as pool:
        while block := list(islice(todo, at_once)):
            yield block, np.stack(list(pool.map(lambda path: _pixels(pillow, path, look, scaled), block)))


def _kind(look: _Look) -> str:
    return "uint16" if look.mode == "I;16" else "uint8"


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
