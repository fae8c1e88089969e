"""CPU seconds and memory of one site's fits, diagonal and full, by its number of channels.

Rows are made up; each width runs in a process of its own, whose peak of resident memory is told
less what it had after its imports. Usage: python benchmarks/full_fit.py --channels 1024 2048 4096
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dyt_compile.fits import ROWS, RowSample
from dyt_compile.ridge import ROWS_PER_CHANNEL, FullFit, fit_full
from dyt_compile.sitefits import SiteSums, fit_site

Array = npt.NDArray[np.float32]
PART = 1024
"""Rows of a batch."""


def rows(channels: int, count: int) -> Iterator[tuple[Array, Array]]:
    """Inputs with channels of unlike size that mix with their neighbours, and their LayerNorm."""
    random = np.random.default_rng(0)
    sizes = np.exp(random.normal(size=channels)).astype(np.float32)
    for _ in range(count // PART):
        x = random.standard_normal((PART, channels), np.float32)
        x = (x + 0.5 * np.roll(x, 1, axis=1)) * sizes
        centred = x - x.mean(axis=1, keepdims=True)
        yield x, centred / centred.std(axis=1, keepdims=True)


def measure(channels: int, count: int) -> tuple[float, float, float, float, float, int]:
    """CPU seconds of sampling, of the diagonal and of the full fit, their errors, peak in bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [time.process_time()]
    sample = RowSample(0, max(ROWS, ROWS_PER_CHANNEL * channels))
    for x, y in rows(channels, count):
        sample.add(x, y)
    times.append(time.process_time())
    diagonal = fit_site(SiteSums("", sample, (channels,), centred=True))
    times.append(time.process_time())
    full = fit_full(*sample.rows(), lambda: rows(channels, count))
    times.append(time.process_time())
    if diagonal.fit_error is None or not isinstance(full, FullFit):
        raise RuntimeError("the rows have no fit")
    peak_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    sampling, first, second = np.diff(times)
    return sampling, first, second, diagonal.fit_error, full.error, peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--rows-per-channel", type=int, default=16, help="rows of the data")
    options = parser.parse_args()
    print("channels    rows  sample s  diagonal s  full s  errors         peak GB  bytes / C^2")
    for channels in options.channels:
        count = options.rows_per_channel * channels
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            *seconds, diagonal, full, peak_bytes = pool.apply(measure, (channels, count))
        print(
            f"{channels:8}{count:8}{seconds[0]:10.1f}{seconds[1]:12.1f}{seconds[2]:8.1f}  "
            f"{diagonal:.4f} {full:.4f}{peak_bytes / 1e9:9.2f}{peak_bytes / channels**2:13.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
