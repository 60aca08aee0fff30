"""The tables of trellis codes, a part of the format (SPEC.md, 4): by bits of a symbol, one for each field of the state.

Found by ``residuals/viterbi/train_tables.py``. The errors are squared, of gaussian rows with a scale for each.
"""

TABLES: dict[int, tuple[tuple[int, ...], ...]] = {
    # error 0.28782; a gaussian's standard deviation is 45.04 levels
    1: (
        (38, -27, -27, 15, 31, -40, -15, 6, -22, 35, 2, -8, -46, 46, 8, 4),
        (-13, -2, 23, 5, -22, 5, 11, 12, 21, -9, -26, 21, -9, -3, 2, -16),
        (13, -14, 29, -33, -29, -7, -27, 35, -12, 12, -28, 34, 11, 10, 41, -36),
    ),
    # error 0.07789; a gaussian's standard deviation is 33.71 levels
    2: (
        (-19, 25, -9, 9, -38, 0, 26, -13, 22, 51, -34, -8, 30, 6, -18, -43),
        (19, -13, -13, -1, 3, -3, 11, 1, 9, -8, 1, -13, -3, -1, 18, -7),
        (-27, -32, -16, 37, 19, -16, 7, 19, -6, -2, 6, -50, 29, 13, 30, -11),
    ),
    # error 0.02096; a gaussian's standard deviation is 28.71 levels
    3: (
        (9, 2, 18, 31, 5, -5, -10, -21),
        (-20, 2, 14, -8, 26, 2, -12, -4),
        (-27, 20, 5, -2, -5, 23, -15, 2),
        (21, -36, -12, 1, 7, 34, 2, -17),
    ),
    # error 0.00545; a gaussian's standard deviation is 28.88 levels
    4: (
        (22, 5, -29, -11, 0, 8, -7, 4, -13, 3, 16, 36, 0, -21, -16, 13),
        (-20, -1, 13, 1, -17, 15, -4, -27, 14, 15, 20, -10, 19, -7, -12, 2),
        (4, 2, -7, 30, 57, 25, -11, -28, -43, -24, 11, -14, 16, -3, 37, -51),
    ),
}
