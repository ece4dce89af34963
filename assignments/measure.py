"""Exercise 10: predict a number, then measure it. On the bundled weights, a minute or two each.

    python assignments/measure.py cosine                    # of 37 numbers; --gains none: of 4
    python assignments/measure.py search --gains none       # policy gradient and cross-entropy
    python assignments/measure.py gains                     # which gains move

cosine: how well the estimated gradient points, by number of rollouts. No true gradient is needed:
two estimates of the same size that share nothing but the truth have a cosine, on average, of about
the square of that with the truth. search: the loop of rl_distill.py and the cross-entropy method
(De Boer et al. 2005: draw 16, fit mean and std to the best 4), at equal evaluations. gains: rms of
each block's, over jumps, of what a policy.pt has learned (--policy).
"""
import argparse
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# From the repository:
import rl_distill                                                              # noqa: E402
from ddpm import linear_alpha_bar, sample, solver_of                            # noqa: E402
from harness.runs import autocast, pick_device, run_main                       # noqa: E402
from reward import best_baselines, closed, deploy, rewards                     # noqa: E402
from rl_distill import JumpPolicy, exploration, load_inputs, load_model          # noqa: E402
from teacher import HELD_OUT, noise_and_targets                                # noqa: E402

REPEATS, GENERATIONS = {16: 48, 64: 16, 256: 6}, 8      # {rollouts: pairs of estimates}


def scored(net, u, z, target, rows, reward):
    """Rewards (B,) of actions u (B, K, 2 + n) for the noises z[rows]."""
    with autocast(z.device):
        images = sample(net, z[rows], solver_of(u), linear_alpha_bar(z.device)).clamp(-1, 1)
    return rewards(reward, images, target, rows)


def gradient(net, policy, std, z, target, reward, rollouts, generator):
    """The policy gradient's estimate (K, 2 + n), in units of the std, from pairs of opposite u."""
    rows = torch.randint(len(z), (rollouts // 2,), generator=generator).repeat_interleave(2)
    u = policy.draw(rollouts, std, generator)
    R = scored(net, u, z, target, rows, reward).reshape(-1, 2)
    A = (R - R.mean(1, keepdim=True)).reshape(-1, 1, 1)
    return (A * (u - policy.mean().detach()) / std).mean(0)


def cosine(net, policy, std, z, target, reward, generator):
    """Print the cosine with the true gradient against the number of rollouts."""
    print(f"{int(policy.mask.sum())} numbers, cosine of the estimate with the true gradient")
    for rollouts, repeats in REPEATS.items():
        pairs = [[gradient(net, policy, std, z, target, reward, rollouts, generator).flatten()
                  for _ in range(2)] for _ in range(repeats)]
        found = torch.stack([torch.cosine_similarity(a, b, dim=0) for a, b in pairs])
        error = (found.std() / repeats ** 0.5).item()
        root = found.mean().clamp(min=0).sqrt().item()
        print(f"{rollouts:5d} rollouts: {root:.2f} ± {error / (2 * max(root, error ** 0.5)):.2f}",
              flush=True)


def cross_entropy(net, policy, std, z, target, reward, generator, generations):
    """The mean (K, 2 + n) of the last generation."""
    mean, unit = policy.mean().detach(), std.expand_as(policy.mean())
    spread = unit
    for _ in range(generations):
        rows = torch.randperm(len(z), generator=generator)[:16]
        us = mean + policy.mask * spread * torch.randn(16, *mean.shape, generator=generator)
        values = torch.stack([scored(net, u.expand(16, -1, -1), z, target, rows, reward).mean()
                              for u in us])
        best = us[values.topk(4).indices]
        mean, spread = best.mean(0), torch.maximum(best.std(0), 0.2 * unit)
    return mean


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", choices=["cosine", "search", "gains"])
    p.add_argument("--gains", choices=["none", "block"], default="block", help="4 or 37 numbers")
    p.add_argument("--policy", default="checkpoints/policy.pt", help="whose gains are shown")
    p.add_argument("--seed", type=int, default=0, help="of chance; held-out noises are fixed")
    given = p.parse_args(argv)
    if given.what == "gains":
        _, _, solver = load_model(given.policy, "cpu", "policy")
        rms = torch.tensor(solver.gains).square().mean(0).sqrt()
        for block, value in enumerate(rms.tolist()):
            print(f"block {block + 1:2d}  {value:.3f}  " + "#" * round(100 * value))
        return
    updates = GENERATIONS * 16 * 16 // 32
    args = rl_distill.parse_args(["--init", "teacher", "--gains", given.gains, "--seed",
                                  str(given.seed), "--updates", str(updates)])
    device = pick_device("cpu")
    teacher, ((_, net, _, _),), reward, _ = load_inputs(args, device)
    (z, target), (fresh, aim) = ((z, reward.view(y)) for z, y in (
        noise_and_targets(teacher, first, 64, device) for first in (0, HELD_OUT)))
    alpha_bar, generator = linear_alpha_bar(), torch.Generator().manual_seed(given.seed)
    start = next(iter(best_baselines(net, 3, z, target, reward, alpha_bar).values()))[1]
    n, std, _ = exploration(net, args)
    policy = JumpPolicy(start, n)
    if given.what == "cosine":
        return cosine(net, policy, std, z, target, reward, generator)
    before = deploy(net, start, fresh, aim, reward, alpha_bar)[1]
    found = {"cross-entropy": solver_of(cross_entropy(
        net, policy, std, z, target, reward, generator, GENERATIONS))}
    with tempfile.TemporaryDirectory() as folder:
        found["policy gradient"], _ = rl_distill.train(
            net, start, (z, target), (fresh[:8], aim.rows(slice(8))), reward, args, Path(folder))
    for name, solver in found.items():
        share, error = closed(deploy(net, solver, fresh, aim, reward, alpha_bar)[1], before)
        print(f"{name:16s} {int(policy.mask.sum())} numbers, {updates * 32 * 3:,} evaluations: "
              f"closed {share:.0%} ± {error:.0%} of what the baseline leaves")


if __name__ == "__main__":
    run_main(main)
