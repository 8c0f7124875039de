"""Filters that the chunks of a dataset pass through, and what to do where one is not installed."""

from __future__ import annotations

import importlib

import h5py

from dbmpi.data.hdf5 import Dataset

_NAMES = {
    4: "SZIP",
    305: "LZO",
    307: "bzip2",
    32000: "LZF",
    32001: "Blosc",
    32004: "LZ4",
    32008: "Bitshuffle",
    32013: "ZFP",
    32015: "Zstandard",
    32017: "SZ",
    32018: "FCIDECOMP",
    32024: "SZ3",
    32026: "Blosc2",
    32028: "Sperr",
}
"""From the list of registered filters of the HDF Group."""


def check_filters(dataset: Dataset) -> None:
    """Raise UserError where a filter is missing without which the values of a `dataset` cannot be read.

    The package hdf5plugin is imported where it is installed and needed: it brings most filters there are.
    """
    with dataset.damage():
        properties = dataset.values.id.get_create_plist()
        used = [properties.get_filter(index) for index in range(properties.get_nfilters())]
    missing = [filter_ for filter_ in used if not h5py.h5z.filter_avail(filter_[0])]
    if missing and _import_plugins():
        missing = [filter_ for filter_ in missing if not h5py.h5z.filter_avail(filter_[0])]
    if missing:
        number, label = missing[0][0], bytes(missing[0][3]).decode("ascii", "replace")
        known = _NAMES.get(number) or label[:40].strip() or "a filter"
        raise dataset.error(
            f"is compressed with {known} (HDF5 filter {number}), which is not installed; 'pip install hdf5plugin' "
            f"brings it if it is a common one, or rewrite the file where it can be read, e.g. "
            f"'h5repack -f GZIP=4 in.h5 out.h5'"
        )


def _import_plugins() -> bool:
    try:
        importlib.import_module("hdf5plugin")
    except Exception:  # whatever a broken installation raises: the filter is then named as missing
        return False
    return True
