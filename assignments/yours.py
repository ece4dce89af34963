"""Exercise 8: a baseline that is right for pairs; nothing in the repository calls it yet."""

# Two landings on a line: x1 = mu + s1 e1, x2 = theta x1 + s2 e2, where e1, e2 are standard normal.
# The reward is R = -(x2 - c)^2. theta learns; it acts in the second landing alone. Partners of a
# pair have opposite noise in both landings: -e1, -e2.


def score(x1, x2, theta, s2):
    """Derivative by theta of the log density of x2 given x1. x1, x2: (B,); returns (B,)."""
    raise NotImplementedError("exercise 8: score, see its docstring")


def expected(theta, mu, s1, s2, c, group):
    """The pair (first, second) of expectations over e1, e2, in closed form: nothing is drawn. First:
    of advantage times score, where the advantage is R less the mean R of its group, itself and its
    partner included, of group / 2 pairs with noise of their own. Second: of R times score. All but
    `group` are tensors of shape (); so are the two."""
    raise NotImplementedError("exercise 8: expected, see its docstring")


def paired_advantages(reward, group):
    """Advantages (M * group,) of rewards (M * group,), whose members of a group stand side by side,
    members 2i and 2i + 1 being an opposite pair. Each reward less a baseline of its group, with
    which the expectation of advantage times score is that of R times score in every landing: a mean
    of as many rewards as can be, all of the same weight. Nothing is scaled. ValueError: half a
    pair, or a group that leaves no reward for such a baseline."""
    raise NotImplementedError("exercise 8: paired_advantages, see its docstring")
