"""Two stronger opponents by hand, found by a review; not arms of run.py yet.

    python study/stronger.py            # about six minutes on two CPU cores; prints, writes nothing

1. DPM-Solver++(2M) whose last lean aims at t = 1, where lambda is finite, in place of 0: no number
   is chosen. 2. Two numbers, a grid T (1 - k / K)^p and one lean c for every jump after the first,
   the best of twelve (p, c) on 48 training noises (2,304 evaluations at K = 4). Both are then
   measured once on the 256 held-out noises of rl_distill.py.
"""
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# From the repository:
from ddpm import (GRIDS, T, half_log_snr, linear_alpha_bar, make_grid,         # noqa: E402
                  strictly_decreasing)
from reward import judged                                                      # noqa: E402
from rl_distill import (HELD_OUT, JumpPolicy, deployed, load_inputs,           # noqa: E402
                        load_policy, noise_and_targets, parse_args, standard_error)

TRAINING, POWERS, LEANS = 48, (1.5, 1.75, 2.0), (0.5, 0.6, 0.7, 0.8)


def ended(grid, levels):
    """DPM-Solver++(2M) on a grid, its last jump aimed at t = 1; levels: lambda of 0 .. T."""
    leans = [((levels[max(then, 1)] - levels[now]) / (2 * (levels[now] - levels[last]))).item()
             for last, now, then in zip(grid, grid[1:], grid[2:])]
    return JumpPolicy((grid, [0.0, *leans]))


def two_numbers(steps, power, lean):
    """Times T (1 - k / steps)^power, the same lean at every jump but the first."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    grid = strictly_decreasing([round(v) for v in (T * u ** power).tolist()])
    return JumpPolicy((grid, [0.0] + [lean] * (steps - 1)))


def main():
    device, alpha_bar = torch.device("cpu"), linear_alpha_bar()
    teacher, _, reward, judge = load_inputs(parse_args([]), device)
    some = noise_and_targets(teacher, 0, TRAINING, device)
    held = noise_and_targets(teacher, HELD_OUT, 256, device)
    levels = half_log_snr(alpha_bar)

    def play(policy, steps, noises):
        return deployed([teacher] * steps, policy, *noises, reward, alpha_bar)

    def line(name, row):
        print(f"{name:38s} {row['reward'].mean():8.4f} ± {standard_error(row['reward']):.4f}   "
              f"Fréchet {judged(row['images'], *judge)['frechet']:.3f}", flush=True)

    for steps in (3, 4, 6, 8):
        for grid in GRIDS:
            line(f"K = {steps}, DPM++ to t = 1, {grid}",
                 play(ended(make_grid(grid, steps), levels), steps, held))
        power, lean = max(itertools.product(POWERS, LEANS), key=lambda pair: play(
            two_numbers(steps, *pair), steps, some)["reward"].mean())
        row = play(two_numbers(steps, power, lean), steps, held)
        line(f"K = {steps}, p = {power}, c = {lean}", row)
        if steps == 4:
            nets, policy, _ = load_policy("checkpoints/policy.pt")
            learned = deployed(nets, policy, *held, reward, alpha_bar)
            line("K = 4, policy.pt", learned)
            more = learned["reward"] - row["reward"]
            print(f"policy.pt over two numbers, paired: {more.mean():.4f} ± "
                  f"{standard_error(more):.4f}")


if __name__ == "__main__":
    main()
