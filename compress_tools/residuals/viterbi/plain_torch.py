"""The Viterbi search by torch, on any device: what the C++ one is compared with.

Rows bite their tails: what lies before the first column is what the last ones hold. A search over the columns around
that seam, free at both ends, says what lies there; the search of the row begins and ends with it.

Whole numbers throughout. x is rounded to ``1 / 2**FRACTION_BITS`` of a level and clamped to ``MOST``, so an error of
one column is at most ``(MOST + 127)**2``, that of all columns in a state ``12 / bits`` times as much, and costs, which
also carry a symbol of ``bits`` bits, stay below ``UNREACHABLE`` in every width: histories that no row can have lose.
"""

import torch
from torch import Tensor

from compress_tools.format.trellis import STATE_BITS, field_bits, state_levels, tables

FRACTION_BITS = 5
MOST = 255
UNREACHABLE = 1 << 29
MOST_REWEIGHTED = float(1 << 28)
# Where single columns have ratios: the most that a cost may lie over the least one in the next column's units, and what
# only histories that no row can have lie over it: an error of one column, 2 * 2**26, fits between.
MOST_OVER = float(1 << 27)
HOPELESS = 1 << 28
# Columns on either side of a row's seam that decide what lies there.
REACH = 64
# Costs held at a time.
_CHUNK_COSTS = {"cpu": 1 << 20, "cuda": 1 << 27}


def to_fixed(rows: Tensor) -> Tensor:
    """Rows in units of a level, fp32, to the whole numbers that the search takes: int16."""
    return (rows.clamp(-MOST, MOST) * (1 << FRACTION_BITS)).round_().to(torch.int16)


def torch_search(x: Tensor, bits: int, width: int, ratios: Tensor) -> tuple[Tensor, Tensor]:
    """See ``best_symbols``, on the rows' device; ``width``: columns of a group, or 0."""
    histories = 1 << STATE_BITS - bits
    step = max(1, _CHUNK_COSTS[x.device.type] // (histories << bits))
    found = [_search(x[i : i + step], bits, width, ratios[i : i + step]) for i in range(0, len(x), step)]
    symbols, levels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return symbols, levels


class _Histories:
    """Costs of histories, column by column, and the oldest symbols by which the best came.

    A history is a state without its oldest symbol, which is chosen as soon as it is the oldest. Costs carry it in their
    lowest bits, so that the least cost says where it came from.
    """

    def __init__(self, x: Tensor, bits: int, width: int, ratios: Tensor, cost: Tensor) -> None:
        self._x, self._bits, self._width, self._ratios = x, bits, width, ratios
        size = self._size = 1 << bits
        levels = state_levels(bits).to(x.device).int()
        oldest = torch.arange(size, dtype=torch.int32, device=x.device)[:, None]
        # [newest, oldest, middle]; a state is (oldest, middle, newest).
        self._squares = ((levels.square() << FRACTION_BITS) * size).view(size, -1, size).permute(2, 0, 1) + oldest
        self._before, self._after = (part.to(x.device) for part in _fields(bits))
        self.cost = cost
        self.kept: list[Tensor] = []

    def advance(self, t: int) -> None:
        """Through one column."""
        size, cost, count = self._size, self.cost, self.cost.shape[1]
        if self.kept and not self._width:
            cost = self._of_next_column(self._ratios[:, t, None])
        elif self.kept and t % self._width == 0:
            ratio = self._ratios[:, t // self._width, None]
            scaled = (cost.float() * ratio).clamp_(-MOST_REWEIGHTED, MOST_REWEIGHTED).round_().int() & -size
            cost = torch.where(ratio == 1, cost, scaled)
        times = self._x[:, t, None].int() * (-2 * size)
        found = ((cost + times * self._before).view(-1, 1, size, count >> self._bits) + self._squares).amin(2)
        found = found.transpose(1, 2).reshape(-1, count)
        self.kept.append((found & size - 1).to(torch.uint8))
        cost = (found & -size) + times * self._after
        self.cost = cost - cost[:, :1].clone()

    def _of_next_column(self, ratio: Tensor) -> Tensor:
        """Costs in units of the next column.

        Ratios of single columns may multiply up: costs are taken over the least one and bounded, so that a history far
        from the best stays far from it, and one that no row can have lies above all others.
        """
        over = self.cost - self.cost.amin(1, keepdim=True)
        scaled = (over.float() * ratio).clamp_(max=MOST_OVER).round_().int() & -self._size
        return torch.where(over >= HOPELESS, UNREACHABLE, scaled)

    def state(self, step: int, history: Tensor) -> Tensor:
        """Of a column, counted as it was advanced through, by the history after it: int64 ``[I]``."""
        oldest = self.kept[step].gather(1, history[:, None])[:, 0].long()
        return oldest << STATE_BITS - self._bits | history


def _search(x: Tensor, bits: int, width: int, ratios: Tensor) -> tuple[Tensor, Tensor]:
    size, columns = 1 << bits, x.shape[1]
    ends = _seam(x, bits, width, ratios)
    cost = torch.full((len(x), 1 << STATE_BITS - bits), UNREACHABLE, dtype=torch.int32, device=x.device)
    row = _Histories(x, bits, width, ratios, cost.scatter_(1, ends[:, None], 0))
    for t in range(columns):
        row.advance(t)
    history = ends
    states = torch.empty(x.shape, dtype=torch.int64, device=x.device)
    for t in range(columns - 1, -1, -1):
        states[:, t] = row.state(t, history)
        history = states[:, t] >> bits
    return (states & size - 1).to(torch.uint8), state_levels(bits).to(x.device)[states]


def _seam(x: Tensor, bits: int, width: int, ratios: Tensor) -> Tensor:
    """What lies before the first column and in the last ones: the best of a search around them, int64 ``[I]``."""
    columns = x.shape[1]
    reach = min(REACH, (columns + 1) // 2)
    cost = torch.zeros(len(x), 1 << STATE_BITS - bits, dtype=torch.int32, device=x.device)
    around = _Histories(x, bits, width, ratios, cost)
    for step in range(2 * reach):
        around.advance((columns - reach + step) % columns)
    history = around.cost.argmin(1)
    for step in range(2 * reach - 1, reach - 1, -1):
        history = around.state(step, history) >> bits
    # A row shorter than a history is in it more than once.
    symbols = [history >> age % columns * bits & (1 << bits) - 1 for age in range(STATE_BITS // bits - 1)]
    return torch.stack([symbol << age * bits for age, symbol in enumerate(symbols)]).sum(0)


def _fields(bits: int) -> tuple[Tensor, Tensor]:
    """What is added to a history's level before a column's choice (the oldest field), and after it (all others)."""
    width, own = field_bits(bits), tables(bits).int()
    histories = torch.arange(1 << STATE_BITS - bits)
    before = own[-1][histories >> STATE_BITS - bits - width]
    after = sum((own[f][histories >> width * f & (1 << width) - 1] for f in range(len(own) - 1)), torch.tensor(0))
    return before, after
