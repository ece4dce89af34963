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
from ddpm import GRIDS, dpm_leans, linear_alpha_bar, make_grid, power_grid     # noqa: E402
from reward import judged                                                      # noqa: E402
from rl_distill import (HELD_OUT, JumpPolicy, deployed, load_inputs,           # noqa: E402
                        load_policy, noise_and_targets, parse_args, standard_error)

TRAINING, POWERS, LEANS = 48, (1.5, 1.75, 2.0), (0.5, 0.6, 0.7, 0.8)


def two_numbers(steps, power, lean):
    """Times T (1 - k / steps)^power, the same lean at every jump but the first."""
    return JumpPolicy((power_grid(steps, power), [0.0] + [lean] * (steps - 1)))


def main():
    device, alpha_bar = torch.device("cpu"), linear_alpha_bar()
    teacher, _, reward, judge = load_inputs(parse_args([]), device)
    some = noise_and_targets(teacher, 0, TRAINING, device)
    held = noise_and_targets(teacher, HELD_OUT, 256, device)

    def play(policy, steps, noises):
        return deployed([teacher] * steps, policy, *noises, reward, alpha_bar)

    def line(name, row):
        print(f"{name:38s} {row['reward'].mean():8.4f} ± {standard_error(row['reward']):.4f}   "
              f"Fréchet {judged(row['images'], *judge)['frechet']:.3f}", flush=True)

    for steps in (3, 4, 6, 8):
        for grid in GRIDS:
            times = make_grid(grid, steps)
            line(f"K = {steps}, DPM++ to t = 1, {grid}",
                 play(JumpPolicy((times, dpm_leans(times, end=1))), steps, held))
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
