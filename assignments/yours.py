"""Exercise 8: a baseline that is right for pairs; nothing in the repository calls it yet."""

# Two landings on a line: x1 = mu + s1 e1, x2 = theta x1 + s2 e2, where e1, e2 are standard normal.
# The reward is R = -(x2 - c)^2. theta learns; it acts in the second landing alone. Partners of a
# pair have opposite noise in both landings: -e1, -e2.


def score(x1, x2, theta, s2):
    """Derivative by theta of the log density of x2 given x1. x1, x2: (B,); returns (B,)."""
    raise NotImplementedError("exercise 8: score, see its docstring")


def expected(theta, mu, s1, s2, c, group):
    """Two expectations over e1, e2, as numbers: of advantage times score, where the advantage is R
    less the mean of a group of group / 2 pairs that holds it; and of R times score, which is the
    derivative of E[R] by theta."""
    raise NotImplementedError("exercise 8: expected, see its docstring")


def other_pairs(reward, group):
    """Advantages (M * group,) of rewards (M * group,), whose members of a group stand side by side,
    members 2i and 2i + 1 being an opposite pair: each reward less a baseline, the plain mean of all
    rewards of its group but its own and its partner's. Nothing is scaled. ValueError: a group that
    is one pair alone, or holds half a pair."""
    raise NotImplementedError("exercise 8: other_pairs, see its docstring")
