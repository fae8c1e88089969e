"""What matching finds: norms that can be replaced, and norms that cannot, with the reason."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from .terms import Value

__all__ = ["Match", "NormKind", "NormSite", "Refusal"]


class NormKind(str, enum.Enum):
    """What a site computes, or why a normalization was refused."""

    LAYER_NORM = "layer_norm"
    RMS_NORM = "rms_norm"
    DYT = "dyt"
    DERF = "derf"
    BATCH_NORM = "batch_norm"
    GROUP_NORM = "group_norm"
    INSTANCE_NORM = "instance_norm"
    OTHER = "other"

    @property
    def lossless(self) -> bool:
        """Whether the graph already holds the element-wise function itself."""
        return self in (NormKind.DYT, NormKind.DERF)


@dataclass(frozen=True)
class NormSite:
    """One call of a normalization layer, or of a DyT that the model already holds.

    name: module path; a second call of the same module ends in "#2".
    channels: length of the normalized axis (for DyT: of the last axis), None when not static.
    axes: the normalized axes, counted from the end; eps: added to the mean of squares.
    affine: which of "gamma", "beta" the site applies: it may multiply by gamma or divide, and add
    beta or subtract it, before gamma or behind; consumers: operators that read it.
    parallel_residual: another site normalizes the same value.
    tied_to: the site of the module's first call, None for that itself; both share their values.
    folds: which of "gamma", "beta" all readers can take up in their weights, exactly; of a DyT
    those that it has, of a norm both. unfolded: why not the others, in one sentence.
    """

    name: str
    kind: NormKind
    channels: int | None
    axes: tuple[int, ...]
    eps: float
    affine: tuple[str, ...]
    dtype: str | None
    consumers: tuple[str, ...]
    parallel_residual: bool
    tied_to: str | None
    input: Value = field(repr=False, compare=False)
    output: Value = field(repr=False, compare=False)
    alpha: Value | None = field(default=None, repr=False, compare=False)
    shift: Value | None = field(default=None, repr=False, compare=False)
    gamma: Value | None = field(default=None, repr=False, compare=False)
    beta: Value | None = field(default=None, repr=False, compare=False)
    folds: tuple[str, ...] = ()
    unfolded: str = ""

    @property
    def known(self) -> tuple[Value, ...]:
        """What a walk over the graph has to know at the site, besides its input: nothing."""
        return ()

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of a gamma for this site: that of its own, else one value a channel."""
        own = next((v.shape for v in (self.gamma, self.beta) if v is not None and v.shape), None)
        if own is not None and None not in own:
            return tuple(size for size in own if size is not None)
        if self.channels is None:
            return (1,)
        return (self.channels, *(1 for _ in range(self.axes[0] + 1, 0)))

    def to_dict(self) -> dict[str, Any]:
        """The site as plain JSON data, without its place in the graph."""
        return {
            "name": self.name,
            "kind": self.kind.value,
            "channels": self.channels,
            "axes": list(self.axes),
            "eps": self.eps,
            "affine": list(self.affine),
            "dtype": self.dtype,
            "consumers": list(self.consumers),
            "parallel_residual": self.parallel_residual,
            "tied_to": self.tied_to,
            "folds": list(self.folds),
            "unfolded": self.unfolded,
        }


@dataclass(frozen=True)
class Refusal:
    """A normalization that DyT cannot stand for, and the reason in one sentence."""

    name: str
    kind: NormKind
    reason: str

    def to_dict(self) -> dict[str, str]:
        """The refusal as plain JSON data."""
        return {"name": self.name, "kind": self.kind.value, "reason": self.reason}


@dataclass(frozen=True)
class Match:
    """Every normalization of a model, in execution order."""

    model: str
    sites: tuple[NormSite, ...]
    refusals: tuple[Refusal, ...]

    def to_dict(self) -> dict[str, Any]:
        """The match as plain JSON data, the form of `dyt-compile inspect --json`."""
        return {
            "model": self.model,
            "sites": [site.to_dict() for site in self.sites],
            "refusals": [refusal.to_dict() for refusal in self.refusals],
        }
