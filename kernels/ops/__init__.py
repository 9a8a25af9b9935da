"""Op contracts: the math, checks, cost and eager function of each op."""
