"""Log mel energies: what a speech recogniser sees of a recording."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.fft
import scipy.signal

WINDOW_SECONDS = 0.025
HOP_SECONDS = 0.010
ENERGY_FLOOR = 1e-10
"""Below the rounding of 16-bit samples; keeps digital silence from becoming minus infinity."""
FRAMES_AT_ONCE = 4096


@dataclass(frozen=True)
class LogMel:
    """Log energies of overlapping Hamming windows in filters that are equally wide on the mel scale.

    Parameters
    ----------
    rate
        Samples a second.
    filters
        Energies of a frame.
    """

    rate: int
    filters: int = 40

    @property
    def window(self) -> int:
        """Samples of a frame."""
        return round(WINDOW_SECONDS * self.rate)

    @property
    def hop(self) -> int:
        """Samples from the beginning of a frame to that of the next."""
        return round(HOP_SECONDS * self.rate)

    @property
    def transform(self) -> int:
        """Samples of the Fourier transform: the window, filled with zeros up to a power of two."""
        return 1 << (self.window - 1).bit_length()

    def frames(self, samples: int) -> int:
        """Return how many whole frames so many samples make."""
        return max(0, 1 + (samples - self.window) // self.hop)

    def centres(self, frames: int) -> np.ndarray:
        """Return the seconds at which so many frames have their middle, float64 ``(frames,)``."""
        return (np.arange(frames) * self.hop + self.window / 2) / self.rate

    @cached_property
    def _weights(self) -> np.ndarray:
        return filter_bank(self.rate, self.transform, self.filters)

    def __call__(self, signal: np.ndarray) -> np.ndarray:
        """Return the log energies of a recording.

        Parameters
        ----------
        signal
            float32 ``(samples,)`` in -1 ... 1.

        Returns
        -------
        numpy.ndarray
            float32 ``(frames, filters)``: natural logarithms of the filtered power spectrum.
        """
        frames = self.frames(len(signal))
        energies = np.empty((frames, self.filters), np.float32)
        for start, windows in self._windows(signal, frames):
            power = np.abs(scipy.fft.rfft(windows, self.transform, axis=1)) ** 2
            energies[start : start + len(windows)] = np.log(np.maximum(power @ self._weights.T, ENERGY_FLOOR))
        return energies

    def _windows(self, signal: np.ndarray, frames: int) -> Iterator[tuple[int, np.ndarray]]:
        hamming = scipy.signal.windows.hamming(self.window)
        if not frames:
            return
        views = np.lib.stride_tricks.sliding_window_view(signal, self.window)[:: self.hop]
        for start in range(0, frames, FRAMES_AT_ONCE):
            yield start, views[start : start + FRAMES_AT_ONCE] * hamming


def mel(hertz: np.ndarray | float) -> np.ndarray | float:
    """Return frequencies in `hertz` on the mel scale, ``2595 log10(1 + f / 700)`` (O'Shaughnessy 1987, p. 150)."""
    return 2595.0 * np.log10(1.0 + np.asarray(hertz) / 700.0)


def filter_bank(rate: int, transform: int, filters: int) -> np.ndarray:
    """Return the weights of triangular filters, float64 ``(filters, transform // 2 + 1)``.

    The filters lie between 0 and half the rate.  Their edges ``m_0 ... m_{F+1}`` are equally far apart on the mel
    scale; filter i rises from 0 at ``m_{i-1}`` to 1 at ``m_i`` and falls to 0 at ``m_{i+1}``, linearly in mel (Young
    et al., The HTK Book 3.4, section 5.4; the filters of Davis and Mermelstein 1980).
    """
    bins = np.asarray(mel(np.arange(transform // 2 + 1) * rate / transform))
    edges = np.linspace(0.0, float(mel(rate / 2)), filters + 2)
    width = edges[1]
    weights: np.ndarray = 1.0 - np.abs(bins[None, :] - edges[1:-1, None]) / width
    return weights.clip(0.0)
