"""IDX files, the format of MNIST: a file of images and one of labels, plain or gzip.

The format: two zero bytes, a byte for the type of the elements, a byte for the number of axes, the length of each
axis as a big-endian uint32, then the elements in C order, big-endian (Y. LeCun, "The MNIST database").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dbmpi.data.hdf5 import BYTE_SCALE
from dbmpi.data.importers.reading import InputFile, Progress, no_progress
from dbmpi.data.writer import DataWriter, Origin, Shape, Written, check_sample_size, check_writable
from dbmpi.errors import UserError

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@dataclass(frozen=True)
class IdxHeader:
    """What an IDX file declares."""

    kind: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Size of one sample."""
        return math.prod(self.shape[1:]) * self.kind.itemsize


def import_idx(
    images: Path,
    labels: Path,
    out: Path,
    *,
    classes: int | None = None,
    scale: float = BYTE_SCALE,
    force: bool = False,
    progress: Progress = no_progress,
) -> Written:
    """Write a data file from an IDX file of images and one of labels.

    Parameters
    ----------
    images, labels
        The files; images are ``(samples, features ...)``, labels whole numbers ``(samples,)``.
    out
        Data file to write.
    classes
        Number of classes; by default the largest label plus one.
    scale
        Factor on bytes, which stay bytes, when they are used; other elements become float32, unscaled.
    force
        Replace an existing file.
    progress
        Called with the number of samples written so far, and of all.

    Raises
    ------
    UserError
        If a file is not IDX, torn or too long, or the two do not belong together.
    """
    check_writable(out, force, (images, labels))
    with InputFile(images) as image_file, InputFile(labels) as label_file:
        image, label = read_header(image_file), read_header(label_file)
        _check_pair(images, labels, image, label)
        bytes_kept = image.kind == np.uint8
        shape = Shape(image.shape[1:], classes, None, scale if bytes_kept else None)
        with DataWriter(out, shape, Origin("idx", images, labels), force) as writer:
            samples = image.shape[0]
            for start in range(0, samples, writer.block_rows):
                rows = min(writer.block_rows, samples - start)
                pixels = image_file.exactly(rows * image.row_bytes, f"the images {start} to {start + rows - 1}")
                numbers = label_file.exactly(rows * label.row_bytes, f"the labels {start} to {start + rows - 1}")
                writer.append(
                    np.frombuffer(pixels, image.kind)
                    .reshape(rows, *image.shape[1:])
                    .astype("u1" if bytes_kept else "f8"),
                    np.frombuffer(numbers, label.kind).astype(np.int64),
                )
                progress(start + rows, samples)
            # Reading on also makes gzip compare its checksum.
            for file in (image_file, label_file):
                if file.read(1):
                    raise UserError(f"{file.path}: has more bytes than the {file.offset - 1} that its header declares")
    return writer.written


def read_header(file: InputFile) -> IdxHeader:
    """Read and check the header of an IDX file, against the size of the file before anything is allocated."""
    magic = file.exactly(4, "the IDX header")
    if magic[:2] != b"\0\0" or magic[2] not in TYPES or magic[3] == 0:
        raise UserError(
            f"{file.path}: is not an IDX file: starts with the bytes {magic.hex(' ')}; "
            f"expected e.g. 00 00 08 03 for images or 00 00 08 01 for labels"
        )
    lengths = np.frombuffer(file.exactly(4 * magic[3], "the IDX header"), ">u4")
    header = IdxHeader(np.dtype(TYPES[magic[2]]), tuple(int(length) for length in lengths))
    end = file.offset + header.shape[0] * header.row_bytes
    if end > file.most_bytes or (not file.compressed and end != file.file_bytes):
        raise UserError(
            f"{file.path}: its header declares elements of shape {header.shape}, which end at byte {end}, but the file "
            f"{'cannot hold more than' if file.compressed else 'has'} {file.most_bytes} bytes: torn or damaged"
        )
    return header


def _check_pair(images: Path, labels: Path, image: IdxHeader, label: IdxHeader) -> None:
    if len(image.shape) < 2:
        raise UserError(
            f"{images}: holds elements of shape {image.shape}; expected images: did you mix up the two files?"
        )
    if len(label.shape) != 1 or label.kind.kind == "f":
        raise UserError(
            f"{labels}: holds {label.kind.name} elements of shape {label.shape}; expected one whole number a sample"
        )
    if image.shape[0] != label.shape[0]:
        raise UserError(f"{images}: holds {image.shape[0]} images, but {labels} {label.shape[0]} labels")
    check_sample_size(images, image.shape[1:])
