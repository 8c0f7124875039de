"""The ``[checkpoint]`` section of a run's description."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dbmpi.config.values import Count, NotNegative, Section


class CheckpointSection(Section):
    """When to write the state of the run, and whether to resume from it."""

    every_seconds: NotNegative = 600.0
    """Time between two checkpoints; 0 writes only the last one."""
    keep: Count = 2
    """Newest checkpoints to keep, beside the best one by `monitor.metric`, the test loss; others are deleted after a
    newer one is complete."""
    best: Literal["next", "at_once"] = "next"
    """When the best evaluation so far is followed by a checkpoint: the ``next`` one that is due, or another one
    ``at_once``, whose parameters are hardly any further."""
    layout: Literal["shards", "single"] = "shards"
    """``shards``: each shard writes a file of its own, and a small one shows them whole; with one shard a plain file.
    ``single``: a plain file in any case, which takes longer."""
    compression: Literal["none", "zstd"] = "none"
    """``zstd``: each shard compresses its file, which needs the package hdf5plugin, as does every reader."""
    retry_seconds: NotNegative = 300.0
    """How long writing the last checkpoint of a run is retried when the disk fails."""
    resume: Literal["auto", "never"] = "never"
    """``auto``: resume from the latest checkpoint of the run directory, if there is one."""

    @model_validator(mode="after")
    def _files_fit(self) -> CheckpointSection:
        if self.compression != "none" and self.layout == "single":
            raise ValueError(
                f"compression = {self.compression!r} is for the files of shards: set layout = 'shards', or compression "
                "= 'none'"
            )
        return self
