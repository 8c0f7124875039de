"""Changes to a checkpoint of several files: of what the first one says, of its views, and of the files of shards."""

from __future__ import annotations

import faulthandler
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from parallel import mutations
from parallel.mutations import Random
from unit.checkpoint_files import LAYOUT, VECTORS, values_of, write_sharded

from dbmpi.checkpoint import checksums, compressed, directory, schema
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.errors import UserError
from dbmpi.replica.arrangement import equal

MEMORY = 4 << 30
"""Bytes of addresses; what is read has some hundred."""
SECONDS = 20


def change(path: Path, random: Random) -> str:
    """Change something; return what."""
    kinds: list[Callable[[Path, Random], str]] = [_dataset, _dataset, _forge, _forge, _view, _bytes, _shard]
    with h5py.File(path) as file:
        if schema.SHARDS_COMPRESSION in file:
            kinds += [_chunk, _chunk, _shard]
    kind = kinds[int(random.integers(len(kinds)))]
    return f"{kind.__name__}: {kind(path, random)}"


def _dataset(path: Path, random: Random) -> str:
    place = str(random.choice(mutations.places(path)))
    return f"{place}: {mutations.mutate(path, place, random)}"


def _forge(path: Path, random: Random) -> str:
    """Change what is said of the shards, and its checksum, too."""
    with h5py.File(path) as file:
        found: list[str] = []
        file["shards"].visititems(lambda name, node: found.append(name) if isinstance(node, h5py.Dataset) else None)
    place = f"shards/{random.choice(found)}"
    told = mutations.mutate(path, place, random)
    with h5py.File(path, "r+") as file:
        if isinstance(file.get(place), h5py.Dataset):
            node = file[place]
            sums = checksums.WrittenSums(place, node.dtype, node.shape)
            sums.wrote(0, memoryview(node[()].tobytes()))
            del file[f"checksums/{place}"]
            if sums._known.all():
                file[f"checksums/{place}"] = sums.found
    return f"{place} with its checksum: {told}"


def _view(path: Path, random: Random) -> str:
    """Write one of the views anew, with another part, or one less or more."""
    vector, tensor = VECTORS[random.integers(2)], LAYOUT.tensors[random.integers(3)]
    group = "parameters" if vector == "parameters" else f"state/{vector}"
    with h5py.File(path, "r+") as file:
        node = file[f"{group}/{tensor.name}"]
        old, properties = node.id.get_create_plist(), h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.VIRTUAL)
        count = old.get_virtual_count()
        chosen, what = int(random.integers(count)), int(random.integers(8))
        names = [b"/etc/passwd", b"../x.h5", b".", path.name.encode(), b"other.h5", b"x" * 5000]
        for number in range(count):
            here, there = old.get_virtual_vspace(number), old.get_virtual_srcspace(number)
            name, source = old.get_virtual_filename(number).encode(), old.get_virtual_dsetname(number).encode()
            if number == chosen:
                if what == 0:
                    continue
                if what == 1:
                    name = names[random.integers(len(names))]
                if what == 2:
                    source = [b"/state/accumulator", b"/parameters", b"/x", b"."][random.integers(4)]
                if what == 3:
                    there.select_hyperslab((int(random.integers(3)),), (int(here.get_select_npoints()),))
                if what == 4:
                    there = h5py.h5s.create_simple((int(here.get_select_npoints()),))
                if what == 5:
                    there = h5py.h5s.create_simple((2**40,), (h5py.h5s.UNLIMITED,))
                    there.select_hyperslab((int(random.integers(2**39)),), (int(here.get_select_npoints()),))
                if what == 6:
                    here.select_all()
                    there = h5py.h5s.create_simple((here.get_select_npoints(),))
                if what == 7:
                    properties.set_virtual(here, name, source, there)
            properties.set_virtual(here, name, source, there)
        space, kind = node.id.get_space(), node.id.get_type()
        del file[f"{group}/{tensor.name}"]
        h5py.h5d.create(file[group].id, tensor.name.encode(), kind, space, dcpl=properties)
    return f"{group}/{tensor.name}: {what}"


def _bytes(path: Path, random: Random) -> str:
    data = bytearray(path.read_bytes())
    place, count = int(random.integers(len(data))), int(random.choice([1, 2, 8, 100]))
    new = random.bytes(count) if random.random() < 0.7 else bytes([int(random.choice([0, 255]))]) * count
    data[place : place + count] = new
    path.write_bytes(data[:place] if random.random() < 0.1 else data)
    return f"{count} bytes at {place}"


def _shard(path: Path, random: Random) -> str:
    files = sorted(directory.shard_files(path))
    file = files[int(random.integers(len(files)))]
    what = int(random.integers(6))
    if what == 0:
        file.unlink()
    elif what == 1:
        os.truncate(file, int(random.integers(2 * file.stat().st_size)))
    elif what == 2:
        other = files[int(random.integers(len(files)))]
        shutil.copyfile(other, file) if other != file else file.unlink()
    elif what == 3:
        file.rename(file.with_suffix(".x"))
        file.symlink_to(file.with_suffix(".x").name)
    else:
        return f"{file.name}: {_bytes(file, random)}"
    return f"{file.name}: {what}"


def _chunk(path: Path, random: Random) -> str:
    """Change one compressed vector of a shard, or what is said of how it is packed."""
    files = sorted(directory.shard_files(path))
    file, name = files[int(random.integers(len(files)))], ["parameters", "state/accumulator"][random.integers(2)]
    what = int(random.integers(6))
    with h5py.File(file, "r+") as opened:
        node = opened[name]
        size, info = node.size, node.id.get_chunk_info(0)
        frame = bytearray(node.id.read_direct_chunk((0,))[1])
        mask = 0
        if what == 0:  # a byte of the head, which says how large the contents are
            frame[4 + random.integers(min(14, len(frame) - 4))] = random.integers(256)
        if what == 1:
            frame = frame[: random.integers(1, len(frame))]
        if what == 2:  # the head of a frame of up to 2^62 bytes, in blocks of one repeated byte
            declared = int(random.integers(2**62))
            frame = bytearray(b"\x28\xb5\x2f\xfd\xe0" + declared.to_bytes(8, "little") + b"\x02\x00\x10a" * 1000)
        if what == 3:
            mask = int(random.integers(1, 4))
        if what < 4:
            node.id.write_direct_chunk((0,), bytes(frame), mask)
            return f"{file.name}, {name}: {what}, {info.size} bytes"
        del opened[name]
        filters: dict[str, object] = [
            {"chunks": (max(1, size // 2),), "shuffle": True, "compression": 32015},
            {"chunks": (2**20,), "maxshape": (None,), "shuffle": True, "compression": 32015},
            {"compression": "gzip"},
            {"fletcher32": True, "compression": 32015},
        ][random.integers(4)]
        opened.create_dataset(name, (size,), "f4", **filters)
        if what == 4:
            opened[name][: size // 2] = 1
    return f"{file.name}, {name}: {filters}"


def outcome(path: Path) -> str:
    """Read all of it; return the sentence by which it is refused, or say whether what is read was written."""
    expected = values_of(LAYOUT)
    try:
        with Checkpoint.open(path) as checkpoint:
            checkpoint.verify()
            if checkpoint.layout != LAYOUT or set(checkpoint.vectors) != set(VECTORS):
                return "another layout"
            for vector in VECTORS:
                out = np.empty(LAYOUT.size)
                checkpoint.read(vector, 0, out)
                if not np.array_equal(out, expected[vector]):
                    return f"another {vector}"
    except UserError as error:
        return f"refused: {error}" if str(path) in str(error) and len(str(error)) > 20 else f"not named: {error}"
    return "as written"


def main(place: Path, count: int, seed: int, compression: str = "none") -> None:
    """Change a checkpoint `count` times; end with an error where a change does harm."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.fsync = lambda _: None  # type: ignore[assignment]
    if compression == compressed.NAME:
        compressed.require()
    random, refused = np.random.default_rng(seed), 0
    whole = write_sharded(place / "whole", equal(LAYOUT, 3), compression=compression)
    for number in range(count):
        shutil.rmtree(place / "run", ignore_errors=True)
        shutil.copytree(whole.parent, place / "run", symlinks=True)
        told = change(place / "run" / whole.name, random)
        signal.alarm(SECONDS)
        print(f"{number}: {told}", file=sys.stderr, flush=True)
        found = outcome(place / "run" / whole.name)
        signal.alarm(0)
        if not found.startswith(("refused", "as written")):
            raise AssertionError(f"change {number}: {told}: {found}")
        refused += found != "as written"
    print(refused)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
