"""How parameters lie in a GPU's memory."""

# Columns of U: loads stay wide and asynchronous whatever the rank.
RANK_MULTIPLE = 64
