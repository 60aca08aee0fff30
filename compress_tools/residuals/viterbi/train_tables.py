"""Finds the tables of trellis codes: those at least error on gaussian rows. What it prints stands in the format.

python -m compress_tools.residuals.viterbi.train_tables [--search SECONDS | --profiles]

From a random start, in turn: search the symbols of gaussian samples, then solve for all table entries at least squared
error. Where a start ends differs by some percent, so ``--search`` tries many; ``STARTS`` are those that ended best. The
tables are part of the format: they stay as they are, even where this script should find better ones.
"""

import argparse
import time

import numpy as np
import torch
from numpy.typing import NDArray

from compress_tools.format import trellis
from compress_tools.format.trellis import STATE_BITS, field_bits
from compress_tools.residuals.trellis_profiles import Profile
from compress_tools.residuals.viterbi import native
from compress_tools.residuals.viterbi.plain_torch import to_fixed

Floats = NDArray[np.float64]

STARTS = {1: 67, 2: 173, 3: 113, 4: 178}
# Largest level; entries are rounded one by one, so that the sum may be a little more.
LARGEST = 120
ROWS = 32
RIDGE = 1e-3
# A gaussian's standard deviation, in levels: where the tables ended.
DEVIATIONS = {1: 45.04, 2: 33.71, 3: 28.71, 4: 28.88}
# Of a profile: the share of values that are moved to one magnitude, and the magnitudes.
OUTLIERS = 0.02
PROFILE_STEP, PROFILE_STEPS = 8, 32


def start(bits: int, seed: int) -> Floats:
    """Tables to begin with, of levels with variance 1: ``[fields, entries]``."""
    generator = np.random.default_rng([bits, seed])
    entries = 1 << field_bits(bits)
    quantiles = torch.special.ndtri((torch.arange(entries, dtype=torch.float64) + 0.5) / entries).numpy()
    sizes = generator.uniform((0.4, 0.3, 0.3, 0.2), (1.3, 1.4, 1.5, 1.6))[: STATE_BITS // field_bits(bits)]
    found = np.stack([size * generator.permutation(quantiles) for size in sizes])
    return np.asarray(found / np.sqrt(found.var(1).sum()))


def gaussian(samples: int, seed: int) -> Floats:
    """``[ROWS, samples / ROWS]``."""
    return np.random.default_rng([99, seed]).normal(size=(ROWS, samples // ROWS))


def rounded(tables: Floats, unit: float) -> torch.Tensor:
    """As they are stored: int8, in ``unit`` steps."""
    return torch.from_numpy(np.clip(np.rint(tables * unit), -127, 127).astype(np.int8))


def search(tables: Floats, bits: int, unit: float, x: Floats) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Symbols and levels of rows with variance 1."""
    fixed = to_fixed(torch.from_numpy(x * unit).float())
    symbols, levels = native.search(
        native.load(), fixed, bits, x.shape[1], torch.ones(len(x), 1), rounded(tables, unit)
    )
    return symbols.numpy(), levels.numpy()


def solve(symbols: NDArray[np.uint8], bits: int, x: Floats) -> Floats:
    """The tables at least squared error for given symbols; all but the first have mean zero."""
    width, state = field_bits(bits), np.zeros(len(symbols), dtype=np.int64)
    fields, entries = STATE_BITS // width, 1 << width
    chosen = np.empty((fields, *symbols.shape), dtype=np.int64)
    for t in range(symbols.shape[1]):
        state = (state << bits | symbols[:, t]) & (1 << STATE_BITS) - 1
        for f in range(fields):
            chosen[f, :, t] = (state >> width * f & entries - 1) + entries * f
    chosen, count = chosen.reshape(fields, -1), fields * entries
    pairs = [np.bincount(a * count + b, minlength=count * count) for a in chosen for b in chosen]
    products = np.sum(pairs, 0, dtype=np.float64)
    sums = np.sum([np.bincount(a, x.ravel(), count) for a in chosen], 0)
    tables = np.linalg.solve(products.reshape(count, count) + RIDGE * np.eye(count), sums).reshape(fields, entries)
    tables[0] += tables[1:].mean(1).sum()
    tables[1:] -= tables[1:].mean(1, keepdims=True)
    return np.asarray(tables)


def improve(tables: Floats, bits: int, rounds: int, samples: int, unit: float, noise: float = 0.0) -> Floats:
    """Search and solve in turn; ``noise`` on the tables, which falls to nothing, finds better optima than the next."""
    x = gaussian(samples, bits)
    generator = np.random.default_rng(bits)
    for number in range(rounds):
        shaken = tables + generator.normal(size=tables.shape) * noise * max(0.0, 1 - number / (0.7 * rounds))
        tables = solve(search(shaken, bits, unit, x)[0], bits, x)
    return tables


def error(tables: Floats, bits: int, unit: float, samples: int) -> float:
    """Squared error on samples that were not trained on, with the best scale of each row, relative to their square."""
    x = gaussian(samples, 1000 + bits)
    levels = search(tables, bits, unit, x)[1].astype(np.float64)
    scales = (x * levels).sum(1, keepdims=True) / np.square(levels).sum(1, keepdims=True)
    return float(np.square(x - scales * levels).sum() / np.square(x).sum())


def train(bits: int, seed: int, samples: int = 1 << 17) -> tuple[Floats, float]:
    """From a start to tables and the unit in which their largest level is ``LARGEST``."""
    tables = improve(start(bits, seed), bits, 25, 1 << 14, 30, noise=0.1)
    tables = improve(tables, bits, 40, samples, 30)
    unit = LARGEST / np.abs(tables).max(1).sum()
    return improve(tables, bits, 10, samples, unit), unit


def profile(bits: int, samples: int = 1 << 17) -> Profile:
    """What the format's own tables lose by; ``first_scales`` chooses scales by it."""
    own, deviation = trellis.tables(bits).double().numpy(), DEVIATIONS[bits]
    x = gaussian(samples, 2000 + bits)

    def lost(rows: Floats) -> float:
        levels = search(own / deviation, bits, deviation, rows)[1]
        return float(np.square(levels - rows * deviation).sum())

    alone, chosen = lost(x), np.random.default_rng(bits).random(x.shape) < OUTLIERS
    share = alone / x.size
    steps = (np.arange(PROFILE_STEPS) + 0.5) * PROFILE_STEP
    moved = [np.where(chosen, np.sign(x) * level / deviation, x) for level in steps]
    by_magnitude = [(lost(rows) - share * (~chosen).sum()) / chosen.sum() for rows in moved]
    deviations = np.arange(3, 14) / 10
    weights = np.exp(-np.square(steps / (deviations[:, None] * deviation)) / 2)
    without = (weights * by_magnitude).sum(1) / weights.sum(1)
    corrections = [lost(x * part) / x.size for part in deviations] - without
    lists = [
        tuple(round(float(number), 2) for number in numbers) for numbers in (by_magnitude, deviations, corrections)
    ]
    return Profile(deviation, PROFILE_STEP, *lists)


def best_start(bits: int, seconds: float) -> int:
    """The seed that ends best among those that the time suffices for."""
    found, begun, seed = [], time.monotonic(), 0
    while time.monotonic() - begun < seconds:
        tables = improve(start(bits, seed), bits, 25, 1 << 14, 30, noise=0.1)
        found.append((error(tables, bits, 30, 1 << 16), seed))
        seed += 1
    ends = []
    for _, candidate in sorted(found)[:6]:
        tables, unit = train(bits, candidate)
        ends.append((error(tables, bits, unit, 1 << 20), candidate))
    print(f"{bits} bits: {seed} starts, the best", *(f"{number} ({lost:.5f})" for lost, number in sorted(ends)))
    return min(ends)[1]


def main() -> None:
    """The tables, as they stand in format/trellis_tables.py, and their errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--search", type=float, metavar="SECONDS", help="look for better starts, so long for each width"
    )
    parser.add_argument(
        "--profiles", action="store_true", help="residuals/trellis_profiles.py's, of the tables as they are"
    )
    chosen = parser.parse_args()
    if chosen.profiles:
        print("PROFILES =", {bits: profile(bits) for bits in STARTS})
        return
    seconds = chosen.search
    print("TABLES = {")
    for bits, seed in STARTS.items():
        tables, unit = train(bits, best_start(bits, seconds) if seconds else seed)
        lines = ",\n".join(f"        ({', '.join(map(str, row))})" for row in rounded(tables, unit).tolist())
        print(
            f"    # error {error(tables, bits, unit, 1 << 20):.5f}; a gaussian's standard deviation: {unit:.2f} levels"
        )
        print(f"    {bits}: (\n{lines},\n    ),", flush=True)
    print("}")


if __name__ == "__main__":
    main()
