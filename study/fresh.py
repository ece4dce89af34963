"""The headline once more, on noises that no row, choice or claim was made on.

    python study/fresh.py --steps 2 3 --seeds 0      # fresh.jsonl, which run.py --report reads

Hours: plays what is not under runs/study/ yet; rows that are there are not made again. Every
sampler is measured on the same 1,000 fresh noises: by the reward, by how like the *judge* finds an
image to the target of its noise, and by the Fréchet distance. All differences are paired with
regression, noise by noise.
"""
import argparse

import torch

import arms                                     # puts the repository on the path
import report
import run
# From the repository:
from harness.runs import log_line, number, pick_device, read_log, run_main
from reward import (Reward, closed, encode, frechet_distance, moments, rewards,
                    standard_error)
from student import load_model
from teacher import HELD_OUT, draw, noise_and_targets

FIRST, N, RESAMPLED = HELD_OUT + 2 * 10 ** 6, 1000, 200     # first seed; noises; bootstrap samples
NAMES = ["regression, weights", "regression, weights, equal cost", "cloning",
         "policy gradient, weights", "policy gradient, weights, after regression",
         "pathwise, weights", "pathwise, weights, last jump", "pathwise, weights, after regression",
         "policy gradient, times, leans, gains"]


def bootstrap(features, reference):
    """Fréchet distance of some of the rows (N, C), drawn with replacement, RESAMPLED times; the
    same rows for every sampler. A tensor (RESAMPLED,)."""
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([frechet_distance(*moments(features[torch.randint(
        len(features), (len(features),), generator=generator)]), *reference)
        for _ in range(RESAMPLED)])


def measured(net, solver, z, views, world):
    """Of one sampler: reward, likeness and mse (N,), frechet, and its bootstrap (RESAMPLED,).
    views: {name: (Reward, its View of the targets)}."""
    images, (judge, reference) = draw(net, solver, z, world.alpha_bar), world.judge
    features = encode(judge, images)
    each = torch.arange(len(z), device=z.device)
    return dict(mse=(images - views["reward"][1].images).square().mean((1, 2, 3)),
                frechet=frechet_distance(*moments(features), *reference),
                bootstrap=bootstrap(features, reference),
                **{name: rewards(reward, images, target, each)
                   for name, (reward, target) in views.items()})


def row(arm, seed, found, start, against):
    """Plain values of a sampler; start, against: measured() of the best baseline, of regression."""
    more = found["bootstrap"] - against["bootstrap"]
    values = dict(name=arm.name, steps=arm.steps, seed=seed, mse=found["mse"].mean().item(),
                  frechet=found["frechet"], frechet_error=found["bootstrap"].std().item(),
                  more_frechet=more.mean().item(), more_frechet_error=more.std().item())
    for kind in ("reward", "likeness"):
        values[kind], values[f"{kind}_error"] = closed(found[kind], start[kind])
        more = (found[kind] - against[kind]) / -start[kind].mean()
        values[f"more_{kind}"] = more.mean().item()
        values[f"more_{kind}_error"] = standard_error(more)
    return values


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=number(int, 1, 8), nargs="+", default=[2, 3])
    p.add_argument("--seeds", type=number(int, 0, 10 ** 6), nargs="+", default=[0])
    p.add_argument("--device", default="auto", help="auto, cuda or cpu")
    args = p.parse_args(argv)
    world = run.World(pick_device(args.device), 8)              # its held-out noises: unused
    z, target = noise_and_targets(world.teacher, FIRST, N, world.device)
    judge = Reward("perceptual", world.judge[0], dict(perceptual=1.0))
    views = dict(reward=(world.reward, world.reward.view(target)),
                 likeness=(judge, judge.view(target)))
    rows = read_log(report.FRESH) if report.FRESH.exists() else []
    for K in args.steps:
        _, best = world.start("teacher", K, "best")
        start = measured(world.teacher, best, z, views, world)
        for seed in args.seeds:
            against = None
            for name in NAMES:
                arm = next((a for a in arms.arms() if (a.name, a.init, a.steps) == (
                    name, "teacher", K)), None)
                done = any((r["name"], r["steps"], r["seed"]) == (name, K, seed) for r in rows)
                if arm is None or done and against:
                    continue
                net, _, solver = load_model(run.play(arm, seed, world), world.device)
                found = measured(net, solver, z, views, world)
                against = against or found                          # regression comes first
                if not done:
                    rows.append(row(arm, seed, found, start, against))
                    print(report.fresh_table(rows)[-1], flush=True)
                    log_line(report.FRESH, **rows[-1])


if __name__ == "__main__":
    run_main(main)
