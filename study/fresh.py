"""The headline once more, on noises on which nothing was trained, tuned or chosen.

    python study/fresh.py --steps 2 3 --seeds 0      # fresh.jsonl, which run.py --report reads

Hours: plays what is not under runs/study/ yet; rows that are there are not made again. Every
sampler is measured on the same 1,000 fresh noises: by the reward; by the *likeness*, which is the
same reward with the judge in the coach's place; by Fréchet distance in the judge's features; and by
that of patches of pixels, which no encoder sees, to patches of other noises' targets. All
differences are paired with the first of NAMES, noise by noise.
"""
import argparse

import torch
import torch.nn.functional as F

import arms                                     # puts the repository on the path
import report
import run
# From the repository:
from harness.images import plot_strips
from harness.runs import log_line, number, pick_device, run_main
from reward import Reward, closed, encode, frechet_distance, moments, rewards, standard_error
from student import load_model
from teacher import HELD_OUT, draw, noise_and_targets

FIRST, N, RESAMPLED = HELD_OUT + 2 * 10 ** 6, 1000, 200     # first seed; noises; bootstrap samples
NAMES = ["regression, weights, equal cost", "regression, weights", "cloning",
         "policy gradient, weights", "policy gradient, weights, after regression",
         "pathwise, weights", "pathwise, weights, equal cost", "pathwise, weights, last jump",
         "pathwise, weights, after regression", "policy gradient, times, leans, gains",
         "best baseline", "target"]
SHOWN = "target", NAMES[0], "policy gradient, weights", "policy gradient, weights, after regression"


def made(name, K, seed, z, target, world):
    """(images (N, 3, H, W) of a sampler, its cost in thousand evaluations); None: no such arm."""
    if name == "target":
        return target, 0
    if name == "best baseline":
        return draw(world.teacher, world.start("teacher", K, "best")[1], z, world.alpha_bar), 0
    for arm in arms.arms():
        if (arm.name, arm.init, arm.steps) == (name, "teacher", K):
            net, content, solver = load_model(run.play(arm, seed, world), world.device)
            return draw(net, solver, z, world.alpha_bar), report.cost(content["study"])


def patches(images):
    """8 x 8 pixels, all that start at multiples of 4: (N, 3, 32, 32) -> (N, 49, 192)."""
    return F.unfold(images.cpu(), 8, stride=4).transpose(1, 2)


def distances(features, reference):
    """Fréchet distance of features (N, P, C) to moments, followed by those of RESAMPLED bootstrap
    samples of the N, the same ones for every sampler: (1 + RESAMPLED,)."""
    generator, n = torch.Generator().manual_seed(0), len(features)
    drawn = [torch.randint(n, (n,), generator=generator) for _ in range(RESAMPLED)]
    return torch.tensor([frechet_distance(*moments(features[index].flatten(0, 1)), *reference)
                         for index in [torch.arange(n), *drawn]])


def measured(images, views, world):
    """Of one sampler: reward, likeness and mse (N,), both distances() ('patches': of the first half
    to the targets of the other). views: {name: (Reward, its View of the targets)}."""
    (judge, reference), target = world.judge, views["reward"][1].images
    half, each = len(images) // 2, torch.arange(len(images), device=images.device)
    return dict(mse=(images - target).square().mean((1, 2, 3)),
                frechet=distances(encode(judge, images)[:, None], reference),
                patches=distances(patches(images[:half]),
                                  moments(patches(target[half:]).flatten(0, 1))),
                **{name: rewards(reward, images, seen, each)
                   for name, (reward, seen) in views.items()})


def row(key, cost, found, start, against):
    """Plain values of a sampler; key: name, K, seed; start, against: measured() of the best
    baseline, and of what it is compared with."""
    values = dict(zip(("name", "steps", "seed"), key), cost=cost, mse=found["mse"].mean().item())
    for kind in ("frechet", "patches"):
        values[kind], values[f"{kind}_error"] = found[kind][0].item(), found[kind][1:].std().item()
        more = (found[kind] - against[kind])[1:]
        values[f"more_{kind}"], values[f"more_{kind}_error"] = more.mean().item(), more.std().item()
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
    judge = Reward("feature+perceptual", world.judge[0], world.reward.scales)
    views = {name: (reward, reward.view(target)) for name, reward in (
        ("reward", world.reward), ("likeness", judge))}
    rows = report.fresh_rows()
    done = {(row["name"], row["steps"], row["seed"]) for row in rows}
    for K in args.steps:
        start = measured(made("best baseline", K, 0, z, target, world)[0], views, world)
        for seed in args.seeds:
            against, images = None, {}
            for name in NAMES:
                if against and (name, K, seed) in done:
                    continue
                if found := made(name, K, seed, z, target, world):
                    images[name], cost = found
                    found = measured(images[name], views, world)
                    against = against or found                  # the first of NAMES that is there
                    if (name, K, seed) not in done:
                        rows.append(row((name, K, seed), cost, found, start, against))
                        print(report.fresh_table(rows[-1:])[-1], flush=True)
                        log_line(report.FRESH, **rows[-1])
            if K == 3 and set(SHOWN) <= set(images):            # all of one K and seed
                plot_strips([(name, images[name]) for name in SHOWN], 12,
                            report.FIGURE.with_name("study_images.png"))


if __name__ == "__main__":
    run_main(main)
