"""What a checkpoint file holds and where: format version 3.

::

    /                          attributes format = "dbmpi-checkpoint", format_version = 3
    /parameters/<tensor>       float32 or float64, in the tensor's shape, e.g. /parameters/dense1/weights
    /state/<vector>/<tensor>   state of the update rule, cut like the parameters, e.g. /state/accumulator/dense1/weights
    /objective_state/<name>    what an objective of the user's own has beside its parameters, each of its own type
    /run/...                   description of the run and what it has done
    /data/...                  position in the stream of batches
    /meaning/...               what the samples stood for, where that was noted (dbmpi/checkpoint/meaning.py)
    /shards/...                where the arrays are, in a checkpoint of several files: then they are views
    /checksums/<path>          of every dataset above but the views, see dbmpi.checkpoint.checksums; version 1 had none

Everything under ``/run`` and ``/data`` is a fixed-length UTF-8 string, a float64 scalar, an int64 scalar or an int64
list; under ``/meaning`` there are lists of float64 numbers and of texts, too.
What is read has no variable-length types, references, filters or links, so that reading it can run no code
and the size of everything is known before memory is taken for it.  What :mod:`dbmpi.checkpoint.annotations` adds for
other programs is never read.

Nothing here imports NumPy, h5py or MPI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import dbmpi
from dbmpi.checkpoint.meaning import Meaning

FORMAT = "dbmpi-checkpoint"
SHARD_FORMAT = "dbmpi-checkpoint-shard"
"""Of the file of one shard."""
FORMAT_VERSION = 3
WITH_CHECKSUMS = 2
"""The first version in which everything has a checksum."""

PARAMETERS = "parameters"
"""Name of the vector that every checkpoint holds, and of its group."""
TENSORS = "run/tensors"
"""Names of the tensors in the order of the flat vector: HDF5 lists the members of a group by name."""
OBJECTIVE_STATE = "objective_state"
"""Group of the arrays that an objective of a user's own has beside its parameters."""
OBJECTIVE_STATE_NAMES = "run/objective_state"
"""Their names, where there are any."""
LIBRARIES = "run/libraries"
"""Group with one string, the version, for every library."""

SHARDS = "shards"
"""Group that only a checkpoint of several files has."""
SHARDS_ID, SHARDS_FILES, SHARDS_VECTORS = "shards/id", "shards/files", "shards/vectors"
"""The hexadecimal digits in the names of the files; these names; the names of the vectors, the parameters first."""
SHARDS_SIZES, SHARDS_ELEMENTS = "shards/sizes", "shards/elements"
"""Of each file in bytes, and of each of its vectors."""
SHARDS_DTYPE, SHARDS_SHAPES = "shards/dtype", "shards/shapes"
"""Of the arrays, as NumPy writes it; number of axes and lengths of each tensor, one row each."""
SHARDS_OFFSETS, SHARDS_BOXES = "shards/offsets", "shards/boxes"
"""Where in each file each vector begins; the table of :mod:`dbmpi.checkpoint.shard_boxes`."""
SHARDS_COMPRESSION = "shards/compression"
"""How the vectors are compressed; missing where they are not."""

MEANING = "meaning"
"""Group with a dataset for each field of :class:`dbmpi.checkpoint.meaning.Meaning` that is not empty."""

OPTIONAL_TEXTS = {
    "method": "run/method",
    "host": "run/host",
    "user": "run/user",
    "data_name": "data/name",
}
"""Fields that are stored as `TEXTS` are, where they are not empty."""

TEXTS = {
    "configuration": "run/configuration",
    "created": "run/created",
}
"""Fields of :class:`CheckpointInfo` that are stored as a string, and where."""

INTEGERS = {
    "step": "run/step",
    "samples": "run/samples",
    "classes": "run/classes",
    "shards": "run/topology/shards",
    "replicas": "run/topology/replicas",
    "partitions": "run/topology/partitions",
    "frontier": "data/frontier",
    "total": "data/total",
}
"""Fields that are stored as an int64 scalar, and where."""

OPTIONAL_INTEGERS = {
    "begun": "run/begun",
    "warm_samples": "run/warm_samples",
    "data_samples": "data/samples",
    "test_step": "run/test/step",
    "best_step": "run/test/best/step",
    "best_waited": "run/test/best/waited",
}
"""Fields that are stored as `INTEGERS` are, where they are not 0."""

OPTIONAL_NUMBERS = {
    "seconds": "run/seconds",
    "loss": "run/loss",
    "accuracy": "run/accuracy",
    "test_loss": "run/test/loss",
    "test_accuracy": "run/test/accuracy",
    "best_value": "run/test/best/value",
    "best_counted": "run/test/best/counted",
}
"""Fields that are stored as a float64 scalar, where they are not None."""

TEST = "run/test"
"""Group of the last evaluation on held-out samples."""
TEST_METRICS = "run/test/metrics"
"""Group with a float64 number for each metric of the held-out samples, where there are any."""

INTEGER_LISTS = {
    "shard_versions": "run/shard_versions",
    "input_shape": "run/input_shape",
    "holes": "data/holes",
    "done": "data/done",
}
"""Fields that are stored as a one-dimensional int64 array, and where."""


def now() -> str:
    """Return the time as ISO 8601 text in UTC, to the microsecond: as text it sorts like the time."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def library_versions(mpi_library: str = "") -> dict[str, str]:
    """Return the versions of what the numbers of a run depend on.

    Parameters
    ----------
    mpi_library : str
        What ``MPI.Get_library_version()`` says; it is not asked for here, because that would start MPI.
    """
    versions = {"dbmpi": dbmpi.__version__}
    for library in ("numpy", "h5py", "numba", "mpi4py"):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "not installed"
    if mpi_library:
        # Some MPIs add lines about their build, and one pads the text with NULs.
        versions["mpi"] = mpi_library.strip("\0 \n").splitlines()[0]
    return versions


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """All of a checkpoint but its arrays."""

    configuration: str
    """Effective description of the run, defaults included, as JSON text (:meth:`dbmpi.config.Run.to_json`)."""
    step: int
    """Steps of all clients together."""
    samples: int
    """Samples that these steps have learned from."""
    shard_versions: tuple[int, ...]
    """Applied pushes, per shard of the run that wrote the file."""
    shards: int
    """Topology of the run that wrote the file; a run of any other may resume from it."""
    replicas: int
    partitions: int
    input_shape: tuple[int, ...]
    """Shape of one sample, without the batch."""
    classes: int
    """Number of classes, or 0 where the targets are values."""
    frontier: int
    """All batches of the stream before this one have been learned, except `holes`."""
    total: int
    """Batches in the stream."""
    holes: tuple[int, ...] = ()
    """Batches before the frontier that have not been learned."""
    done: tuple[int, ...] = ()
    """Batches learned, per replica of the run that wrote the file."""
    begun: int = 0
    """Version at which the state of the update rule was begun."""
    warm_samples: int = 0
    """Samples of the warmstart, where its loss has said when it ended; 0 if it has not."""
    seconds: float | None = None
    """For which the run has trained, over all sessions."""
    loss: float | None = None
    """Mean loss of the samples that were learned from last."""
    accuracy: float | None = None
    """Fraction of these that were classified rightly; None where that says nothing."""
    test_step: int = 0
    """Step at which the held-out samples were evaluated last; 0 if they never were."""
    test_loss: float | None = None
    """Mean loss of the held-out samples then."""
    test_accuracy: float | None = None
    """Fraction of these that were classified rightly."""
    test_metrics: Mapping[str, float] = field(default_factory=dict)
    """Mean of each metric of an objective of the user's own then, as far as its name can stand in a file."""
    best_step: int = 0
    """Step of the best evaluation so far, by the run's metric."""
    best_value: float | None = None
    """The metric then; None where nothing was evaluated."""
    best_counted: float | None = None
    """The last value that was better by as much as counts for the run's patience."""
    best_waited: int = 0
    """Evaluations since that one."""
    data_name: str = ""
    """Name of the training data, without directories."""
    data_samples: int = 0
    """Number of samples in the training data."""
    host: str = ""
    """Host of the process that wrote the file."""
    user: str = ""
    """Name of the user of that process."""
    method: str = ""
    """State of a batch method as JSON text (:class:`dbmpi.sandblaster.state.MethodState`); empty after Downpour."""
    meaning: Meaning | None = None
    """What the samples stood for; None in files of earlier versions."""
    libraries: Mapping[str, str] = field(default_factory=library_versions)
    """Versions by library; ``hdf5`` is added by the writer."""
    created: str = field(default_factory=now)
    """When the state was taken: ISO 8601 in UTC."""


def group_of(vector: str) -> str:
    """Return the group that holds a vector: ``parameters``, or ``state/<vector>`` for state of the rule."""
    return PARAMETERS if vector == PARAMETERS else f"state/{vector}"


def shard_sums(shard: int, vector: int) -> str:
    """Return where the checksums of the vector number `vector` of a shard are, in a checkpoint of several files."""
    return f"shards/sums/{shard}/{vector}"
