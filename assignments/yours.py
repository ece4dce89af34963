"""Exercise 8: a baseline that is right for pairs; nothing in the repository calls it yet."""


def other_pairs(reward, group):
    """Advantages (M * group,) of rewards (M * group,), whose members of a group stand side by side,
    members 2i and 2i + 1 being an opposite pair: from each goes a baseline that knows neither its
    own reward nor its partner's, and to which all others of its group, and no other group, count
    alike. It is not scaled. ValueError: a group that is one pair alone, or holds half a pair."""
    raise NotImplementedError("exercise 8: see the docstring")
