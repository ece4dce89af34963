"""The headline once more, on noises that no row, choice or claim was made on.

    python study/fresh.py --steps 2 3 --seeds 0      # study/fresh.jsonl, study/fresh.md; hours

Plays what is not under runs/study/ yet; rows that are there are not made again. Every sampler is measured on the same 1,000 fresh noises:
by the reward, by how like the *judge* finds an image to the target of its noise, and by the Fréchet
distance. All differences are paired with regression, noise by noise.
"""
import argparse
from unittest import mock

import torch

import arms                                     # puts the repository on the path
import run
# From the repository:
from harness.runs import ROOT, log_line, number, pick_device, read_log, run_main, write_whole
from reward import (closed, deploy, encode, frechet_distance, moments, perceptual_reward,
                    standard_error, view_of)
from student import load_model
from teacher import HELD_OUT, noise_and_targets

FIRST, N, RESAMPLED = HELD_OUT + 2 * 10 ** 6, 1000, 200     # first seed; noises; bootstrap samples
NAMES = ["regression, weights", "regression, weights, calls too", "cloning",
         "policy gradient, weights", "policy gradient, weights, after regression",
         "pathwise, weights", "pathwise, weights, after regression",
         "policy gradient, times, leans, gains"]


@torch.no_grad()
def likeness(judge, images, target, batch=250):
    """(N,), at most 0: perceptual_reward() in the judge's feature maps."""
    return torch.cat([perceptual_reward(view_of(judge, a), view_of(judge, b))
                      for a, b in zip(images.split(batch), target.split(batch))])


def bootstrap(features, reference):
    """Fréchet distance of some of the rows (N, C), drawn with replacement, RESAMPLED times; the
    same rows for every sampler. A tensor (RESAMPLED,)."""
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([frechet_distance(*moments(features[torch.randint(
        len(features), (len(features),), generator=generator)]), *reference)
        for _ in range(RESAMPLED)])


def measured(net, solver, z, target, world):
    """Of one sampler: reward, likeness (N,), squared error (N,), features (N, C)."""
    images, reward = deploy(net, solver, z, target, world.reward, world.alpha_bar)
    return dict(reward=reward, likeness=likeness(world.judge[0], images, target.images),
                mse=(images - target.images).square().mean((1, 2, 3)),
                features=encode(world.judge[0], images))


def row(arm, seed, found, start, against, reference):
    """Plain values of a sampler; start, against: measured() of the best baseline, of regression."""
    mine, theirs = (bootstrap(x["features"], reference) for x in (found, against))
    values = dict(name=arm.name, steps=arm.steps, seed=seed, mse=found["mse"].mean().item(),
                  frechet=frechet_distance(*moments(found["features"]), *reference),
                  frechet_error=mine.std().item(), more_frechet=(mine - theirs).mean().item(),
                  more_frechet_error=(mine - theirs).std().item())
    for kind in ("reward", "likeness"):
        values[kind], values[f"{kind}_error"] = closed(found[kind], start[kind])
        more = (found[kind] - against[kind]) / -start[kind].mean()
        values[f"more_{kind}"] = more.mean().item()
        values[f"more_{kind}_error"] = standard_error(more)
    return values


def table(rows):
    """Lines of markdown."""
    def cell(values, kind, scale=100, form=".0f"):
        return f"{scale * values[kind]:{form}} ± {scale * values[kind + '_error']:{form}}"
    return ["| K | seed | sampler | closed, % | by the judge's likeness, % | Fréchet | squared "
            "error | more than regression: closed | likeness | Fréchet |", "|---|" + "---|" * 9,
            *("| {steps} | {seed} | {name} | ".format(**r) + " | ".join((
                cell(r, "reward"), cell(r, "likeness"), cell(r, "frechet", 1, ".2f"),
                f"{r['mse']:.4f}", cell(r, "more_reward", form=".1f"),
                cell(r, "more_likeness", form=".1f"), cell(r, "more_frechet", 1, ".2f"))) + " |"
              for r in rows)]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=number(int, 1, 8), nargs="+", default=[2, 3])
    p.add_argument("--seeds", type=number(int, 0, 10 ** 6), nargs="+", default=[0])
    p.add_argument("--device", default="auto", help="auto, cuda or cpu")
    args = p.parse_args(argv)
    with mock.patch.object(run, "N", 8):                        # its own held-out noises: unused
        world = run.World(pick_device(args.device))
    z, target = noise_and_targets(world.teacher, FIRST, N, world.device)
    target, path = world.reward.view(target), ROOT / "study" / "fresh.jsonl"
    rows = read_log(path) if path.exists() else []
    reference = world.judge[1]["mean"], world.judge[1]["covariance"]
    for K in args.steps:
        _, best = world.start("teacher", K, "best")
        start = measured(world.teacher, best, z, target, world)
        for seed in args.seeds:
            against = None
            for name in NAMES:
                arm = next((a for a in arms.arms() if (a.name, a.init, a.steps) == (
                    name, "teacher", K)), None)
                done = any((r["name"], r["steps"], r["seed"]) == (name, K, seed) for r in rows)
                if arm is None or done and against:
                    continue
                net, _, solver = load_model(run.play(arm, seed, world), world.device)
                found = measured(net, solver, z, target, world)
                against = against or found                          # regression comes first
                if not done:
                    rows.append(row(arm, seed, found, start, against, reference))
                    print(table(rows)[-1], flush=True)
                    log_line(path, **rows[-1])
    write_whole(ROOT / "study" / "fresh.md", "\n".join(table(sorted(
        rows, key=lambda r: (r["steps"], r["seed"]))) + [""]).encode())


if __name__ == "__main__":
    run_main(main)
