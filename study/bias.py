"""Which baselines leave the policy gradient right? Two landings, everything Gaussian; seconds.

    python study/bias.py           # prints a table, draws study/bias.png

x1 = mu + s e1, x2 = theta x1 + s e2, reward -(x2 - c)^2: the derivatives of its mean by mu (of the
first landing) and by theta (of the later one) are known. Drawn is how much of them is left, on
average, of the mean of advantage times score.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# From the repository:
from harness.images import plot_panels                                        # noqa: E402

MU, THETA, C, S = 0.5, 1.0, 1.0, 1.0
TRUE = -2 * THETA * (THETA * MU - C), -2 * ((THETA * MU - C) * MU + THETA * S ** 2)
GROUPS, GROUPS_DRAWN = (2, 4, 8, 16, 32), 400_000
BASELINES = {                       # name: (pairs are opposite, baseline of R (N, G / 2, 2))
    "independent, mean of the group": (False, lambda R: R.mean((1, 2), keepdim=True)),
    "independent, mean of the others": (False, lambda R: (
        R.sum((1, 2), keepdim=True) - R) / (R[0].numel() - 1)),
    "opposite pairs, mean of the group": (True, lambda R: R.mean((1, 2), keepdim=True)),
    "opposite pairs, mean of the other pairs": (True, lambda R: (
        R.sum((1, 2), keepdim=True) - R.sum(2, keepdim=True)) / (R[0].numel() - 2))}


def left(opposite, baseline, group, generator):
    """Shares (of the first, of the later landing) of the true derivative that the estimate has."""
    e = torch.randn(2, GROUPS_DRAWN // group, group // 2, 2, generator=generator)
    if opposite:
        e[..., 1] = -e[..., 0]
    x1 = MU + S * e[0]
    R = -(THETA * x1 + S * e[1] - C) ** 2
    A = R - baseline(R)
    return [((A * score).mean() / true).item()
            for score, true in zip((e[0] / S, x1 * e[1] / S), TRUE)]


def main():
    generator, lines = torch.Generator().manual_seed(0), ([], [])
    print("% of the gradient that is left: first landing | later landing; of G =", *GROUPS)
    for name, (opposite, baseline) in BASELINES.items():
        groups = [group for group in GROUPS if not name.endswith("pairs") or group > 2]
        found = [left(opposite, baseline, group, generator) for group in groups]
        shares = [[100 * both[i] for both in found] for i in (0, 1)]
        print(f"{name:40s}", " | ".join(" ".join(f"{x:4.0f}" for x in some) for some in shares))
        for panel, some in zip(lines, shares):
            panel.append((name, groups, some, "o-"))
    plot_panels([(f"size of the group, {which} landing", "% of the gradient that is left", panel)
                 for which, panel in zip(("first", "later"), lines)],
                ROOT / "study" / "bias.png", xscale="log", ylim=(-40, 110))


if __name__ == "__main__":
    main()
