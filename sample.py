"""Pictures and numbers from any of the checkpoints.

    python sample.py                                        # what the policy learned: a picture
    python sample.py --model checkpoints/teacher.pt --steps 20 --solver DPM++ --n 16
    python sample.py --npz images.npz --n 10000             # uint8 (N, 32, 32, 3), for FID tools
    python sample.py --evaluate --model checkpoints/teacher.pt checkpoints/policy.pt --steps 4 10

Each image has its own seed (--seed, --seed + 1, ...): same seed, same start noise for every model,
in any batch, on any device. --evaluate compares on the same noises: reward (likeness to the
teacher's target), Frechet distance to training images in the judge's features, time. Writes
log.jsonl to --out; without --evaluate samples.png and path.png too.
"""
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

# From earlier files:
from ddpm import (GRIDS, SOLVERS, T, baseline_kinds, baseline_solver, linear_alpha_bar,
                  parameter_count, sample, seeded_noise)
from teacher import HELD_OUT, TARGET, draw, noise_and_targets
from student import load_model
from reward import judged, load_reward, rewards, standard_error
from harness.images import save_picture, to_uint8
from harness.runs import BadInput, claim_run, log_line, number, parser_for, run_main

# ==== PICTURES ================================================================================

def draw_path(net, solver, z, alpha_bar, eta, seeds, most=11):
    """At most `most` states from z to the image, evenly chosen: (B, states, 3, H, W)."""
    states = sample(net, z, solver, alpha_bar, eta, seeds, path=True)
    keep = torch.linspace(0, len(states) - 1, min(len(states), most)).round().int().tolist()
    return torch.stack([states[k] for k in keep], 1)


# ==== EVALUATION ==============================================================================

def contenders(path, steps, device):
    """What --evaluate compares of one checkpoint: yields (name, net, solver)."""
    net, content, learned = load_model(path, device)
    name = f"{Path(path).parent.name}/{Path(path).stem}"
    if learned:
        yield f"{name}, learned", net, learned
        return
    for K in steps:
        for kind in baseline_kinds(net, K):
            for grid in GRIDS:
                yield f"{name}, {kind} {grid}", net, baseline_solver(kind, grid, K)
    if content["kind"] == "teacher":
        yield f"{name}, its target", net, TARGET


def evaluate(args, models, reward, judge, teacher, out, device):
    """Print the table, and log it; models: lists of contenders."""
    alpha_bar = linear_alpha_bar(device)
    z, target = noise_and_targets(teacher, args.seed, args.n, device)
    print(f"\n{args.n} noises; reward {args.reward}, 0: the target; Frechet distance to all "
          f"training images by the judge (compare at equal --n)\n{'sampler':40s} {'NFE':>4s} "
          f"{'reward':>17s} {'Frechet':>8s} {'ms':>7s}")
    target = reward.view(target)
    target.features.sum().item()                           # a GPU is waited for before each clock
    for name, net, solver in (contender for model in models for contender in model):
        draw(net, solver, z[:8], alpha_bar)                # what runs first is slow
        start = time.time()
        images = draw(net, solver, z, alpha_bar)
        images.sum().item()
        ms = 1000 * (time.time() - start) / len(z)
        R = rewards(reward, images, target, torch.arange(len(z), device=device))
        row = dict(name=name, nfe=len(solver.leans), reward=R.mean().item(),
                   error=standard_error(R), frechet=judged(images, judge), ms=ms)
        log_line(out / "log.jsonl", **row)
        print("{name:40s} {nfe:4d} {reward:8.4f} ± {error:6.4f} {frechet:8.4f} {ms:7.2f}".format(
            **row), flush=True)


# ==== COMMAND LINE ============================================================================

def parse_args(argv=None):
    """Command line of sample.py."""
    p = parser_for(__doc__, "python sample.py --model checkpoints/teacher.pt --steps 20 --eta 1",
                   trains=False)
    a = p.add_argument
    a("--model", nargs="+", default=["checkpoints/policy.pt"], help="teacher, student or policy")
    a("--steps", type=number(int, 1, T), nargs="+",
      help="evaluations per image of a teacher or a student (default: 4); a policy has its own")
    a("--solver", choices=SOLVERS, help="baseline solver of a teacher or a student (default: DDIM)")
    a("--grid", choices=GRIDS, help="its times (default: quadratic)")
    a("--eta", type=number(float, 0, 1), default=0.0, help="0 DDIM .. 1 DDPM")
    a("--n", type=number(int, 1), help="number of images (default: 64; with --evaluate 256)")
    a("--npz", type=os.path.expanduser, help="also write the images to this .npz")
    a("--evaluate", action="store_true", help="the table over all baseline solvers, no pictures")
    a("--reward", default="feature+perceptual", help="with --evaluate, as in rl_distill.py")
    a("--teacher", default="checkpoints/teacher.pt", help="with --evaluate: who sets the target")
    a("--encoders", default="checkpoints", help="with --evaluate: folder of coach.pt and judge.pt")
    p.set_defaults(seed=HELD_OUT)
    args = p.parse_args(argv)
    args.n = args.n or (256 if args.evaluate else 64)
    if args.evaluate and (args.npz or args.eta or args.solver or args.grid or args.n < 8):
        p.error("--evaluate takes all solvers and grids, --eta 0, no --npz, and --n of at least 8")
    if not args.evaluate and max(len(args.model), len(args.steps or [4])) > 1:
        p.error("several --model or --steps go with --evaluate")
    if args.eta > 0 and args.solver in SOLVERS[1:]:
        p.error("--eta above 0 goes with --solver DDIM: the others lean on a path without noise")
    return args


def main(argv=None):
    args = parse_args(argv)
    device, began = args.device, time.time()
    if args.evaluate:
        models = [list(contenders(path, args.steps or [4], device)) for path in args.model]
        reward, judge = load_reward(args.reward, args.encoders, device)
        teacher, *_ = load_model(args.teacher, device, "teacher")
        out = claim_run(args, "sample")
        evaluate(args, models, reward, judge, teacher, out, device)
        print(f"{(time.time() - began) / 60:.1f} min\nwrote {out}/log.jsonl")
        return
    net, content, solver = load_model(args.model[0], device)
    if solver and (args.steps or args.solver or args.grid or args.eta):
        raise BadInput("--steps, --solver, --grid, --eta need a teacher or a student: a policy has "
                       "learned its own jumps")
    kind, grid = args.solver or "DDIM", args.grid or "quadratic"
    if kind != "DDIM" and not net.estimates_image:
        raise BadInput(f"a student's estimates are no images to lean on, as {kind} does; give DDIM")
    how = "its own jumps" if solver else f"{kind} on the {grid} grid"
    solver = solver or baseline_solver(kind, grid, (args.steps or [4])[0])
    beside = f"{Path(args.npz or '.').parent}/."
    if args.npz and (Path(args.npz).exists() or not os.access(beside, os.W_OK)):
        raise BadInput(f"{args.npz} exists, or cannot be written there; give another name")
    out = claim_run(args, "sample")
    print(f"{content['kind']} {parameter_count(net) / 1e6:.2f} M "
          f"parameters | {len(solver.leans)} evaluations an image, {how}")
    seeds, side = range(args.seed, args.seed + args.n), net.config["image_size"]
    z, alpha_bar = seeded_noise(seeds, (3, side, side), device=device), linear_alpha_bar(device)
    images = draw(net, solver, z, alpha_bar, args.eta, seeds).cpu()
    save_picture(out / "samples.png", images[:256], math.ceil(math.sqrt(min(args.n, 256))))
    path = draw_path(net, solver, z[:8], alpha_bar, args.eta, seeds[:8])
    save_picture(out / "path.png", path.flatten(0, 1), columns=path.shape[1])
    if args.npz:
        with open(args.npz, "xb") as file:
            np.savez(file, to_uint8(images).permute(0, 2, 3, 1).numpy())
    log_line(out / "log.jsonl", n=args.n, seconds=time.time() - began)
    print(f"{args.n} images in {time.time() - began:.1f} s\nwrote {out}/samples.png, path.png, "
          "log.jsonl" + (f", {args.npz}" if args.npz else ""))


if __name__ == "__main__":
    run_main(main)
