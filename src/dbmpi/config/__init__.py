"""The description of a run: what a configuration file may say, its defaults, and what each setting means.

A run is described by frozen, validated objects.  They are read from TOML with :func:`load`, changed with
``--set section.key=value``, built directly from Python, and written whole, defaults included, into every
checkpoint.  Nothing here imports MPI or NumPy.
"""

from dbmpi.config.checkpoint import CheckpointSection
from dbmpi.config.data import DataSection
from dbmpi.config.layers import (
    LAYERS,
    AnyLayer,
    BuiltInLayer,
    Convolution,
    Dense,
    Dropout,
    Local,
    Normalisation,
    OwnLayer,
    Pooling,
)
from dbmpi.config.local import LocalSection
from dbmpi.config.messages import explain
from dbmpi.config.monitor import MonitorSection
from dbmpi.config.network import NetworkSection, ObjectiveSection
from dbmpi.config.optimizer import OptimizerSection
from dbmpi.config.reading import load
from dbmpi.config.sections import (
    PlacedLayer,
    PlacementSection,
    Run,
    RunSection,
    SandblasterSection,
    TopologySection,
)
from dbmpi.config.server import ServerSection
from dbmpi.config.simulation import SimulationSection, TimesSection
from dbmpi.config.values import Section

__all__ = [
    "LAYERS",
    "AnyLayer",
    "BuiltInLayer",
    "CheckpointSection",
    "Convolution",
    "DataSection",
    "Dense",
    "Dropout",
    "Local",
    "LocalSection",
    "MonitorSection",
    "NetworkSection",
    "Normalisation",
    "ObjectiveSection",
    "OptimizerSection",
    "OwnLayer",
    "PlacedLayer",
    "PlacementSection",
    "Pooling",
    "Run",
    "RunSection",
    "SandblasterSection",
    "Section",
    "ServerSection",
    "SimulationSection",
    "TimesSection",
    "TopologySection",
    "explain",
    "load",
]
