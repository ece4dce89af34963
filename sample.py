"""Pictures and numbers from any of the checkpoints.

    python sample.py                                        # the bundled student: a picture grid
    python sample.py --model checkpoints/teacher.pt --steps 20 --n 16
    python sample.py --npz images.npz --n 10000             # uint8 (N, 32, 32, 3), for FID tools
    python sample.py --evaluate --model checkpoints/teacher.pt checkpoints/student.pt --steps 2 4

Each image has its own seed (--seed, --seed + 1, ...): same seed, same start noise for teacher
and student, in any batch, on any device. --evaluate compares on held-out noise: reward (likeness to
the teacher's 50 steps), Frechet distance to training images, precision/recall/density/coverage in
the judge's features, time. Writes samples.png, path.png or frontier.png, and log.jsonl, to --out.
"""
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

# From earlier files:
from ddpm import (GRIDS, T, BadInput, chunk_size, claim_folder, linear_alpha_bar, load_checkpoint,
                  load_teacher, log_line, make_grid, number, output_folder, parameter_count,
                  parser_for, pick_device, pyplot, run_main, save_figure, seeded_noise,
                  strictly_decreasing, to_uint8)
from teacher import TEACHER_STEPS, device_name, save_picture
from student import HELD_OUT, deploy, load_student, student_from_teacher
from reward import Reward, encode, frechet_distance, load_encoder, moments, precision_recall
from rl_distill import deployed, noise_and_targets, standard_error

# ==============================================================================================
# MODELS: a teacher is sampled through the student's functions, as a student that never learned
# ==============================================================================================


def load_model(path, device):
    """Teacher or student from a checkpoint. Returns (net, policy or None, checkpoint)."""
    content = load_checkpoint(path, ("teacher", "student"))
    if content["kind"] == "student":
        return load_student(path, device)
    teacher, content = load_teacher(path, device)
    return student_from_teacher(teacher).to(device).eval(), None, content


def policy_hint(path, policy, content, steps):
    """Say so where a step policy stays unused because it was trained for other numbers of steps."""
    if policy is not None and content.get("steps") not in steps:
        print(f"{path}: its step policy belongs to --steps {content.get('steps')} and is not used")


def pick_grid(name, policy, content, steps):
    """'policy' -> None (the step policy decides), others -> a fixed grid; 'auto': policy if any."""
    if name == "auto":
        name = "policy" if policy is not None and content.get("steps") == steps else "uniform"
    if name == "policy" and policy is None:
        raise BadInput("this checkpoint has no step policy; choose another --grid")
    return name, None if name == "policy" else make_grid(name, steps)


def generate(net, policy, seeds, steps, grid, eta, may_stop, alpha_bar, device):
    """Images of the given seeds, in batches: (len(seeds), 3, H, W) in [-1, 1], on the CPU, and
    all states on the way of the first 8: (8, steps + 1, 3, H, W)."""
    seeds, side, size = list(seeds), net.config["image_size"], chunk_size(device)
    images = []
    for i in tqdm(range(0, len(seeds), size), desc="sampling", disable=len(seeds) <= size):
        part = seeds[i:i + size]
        z = seeded_noise(part, (3, side, side), device=device)
        out, _, states = deploy(net, z, steps, alpha_bar, policy, grid, may_stop, eta, part)
        images.append(out.cpu())
        if i == 0:
            path = states[:8].cpu()
    return torch.cat(images), path


def check_new(npz, png_dir):
    """BadInput where --npz or --png-dir would overwrite something."""
    if npz and Path(npz).exists():
        raise BadInput(f"--npz {npz} exists already; give another name")
    if png_dir and Path(png_dir).exists() and (not Path(png_dir).is_dir()
                                               or any(Path(png_dir).iterdir())):
        raise BadInput(f"--png-dir {png_dir} is not an empty folder; give another name")


def write_npz(path, images):
    """uint8 (N, H, W, 3) under the name arr_0, as FID tools read; never over another file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        np.savez(file, to_uint8(images).permute(0, 2, 3, 1).numpy())


def write_pngs(folder, images, first_seed):
    """One PNG per image, named by its seed."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        save_picture(Path(folder) / f"{first_seed + i:010d}.png", image[None], 1, scale=1, gap=0)


# ==============================================================================================
# EVALUATION
# ==============================================================================================

@torch.no_grad()
def search_grid(net, z, target, reward, steps, tries, alpha_bar, seed=0):
    """Gradient-free baseline: random search around the best grid so far, on *training* noise.

    Starts from the best hand grid; each try moves all inner times by Gaussian steps that shrink
    from 12 to 3 percent of T and keeps what scores higher. Returns the grid.
    """
    def score(grid):
        result = deployed(net, None, z, target, reward, steps, alpha_bar, grid)
        return result["reward"].mean().item()
    rng = np.random.default_rng(seed)
    best_score, best = max((score(g), g) for g in (make_grid(name, steps) for name in GRIDS))
    for i in range(tries if steps > 1 else 0):
        width = T * 0.12 * 0.25 ** (i / tries)
        inner = sorted((np.array(best[1:-1]) + rng.normal(0, width, steps - 1))
                       .round().clip(1, T - 1).astype(int), reverse=True)
        grid = strictly_decreasing([T, *map(int, inner), 0])
        if (new := score(grid)) > best_score:
            best_score, best = new, grid
    return best


def judged(result, judge, judge_file):
    """One table row: what deployed() returned, as means, with the judge's metrics."""
    features, n = encode(judge, result["images"]), len(result["images"])
    return dict(nfe=result["nfe"].mean().item(), reward=result["reward"].mean().item(),
                reward_error=standard_error(result["reward"]), ms=1000 * result["seconds"] / n,
                frechet=frechet_distance(*moments(features), judge_file["mean"],
                                         judge_file["covariance"]),
                **precision_recall(judge_file["features"].float(), features),
                **{name: value.mean().item() for name, value in result["raw"].items()})


def evaluate(args, out, device):
    """The table and frontier.png for all of --model at all of --steps. Returns the rows."""
    alpha_bar = linear_alpha_bar(device)
    teacher, _ = load_teacher(args.teacher, device)
    coach, coach_file = load_encoder(args.coach, "coach", device)
    judge, judge_file = load_encoder(args.judge, "judge", device)
    models = [(f"{Path(m).parent.name}/{Path(m).stem}", *load_model(m, device)) for m in args.model]
    reward = Reward(args.reward, coach, coach_file["scales"])
    claim_folder(out)
    z, target = noise_and_targets(teacher, HELD_OUT, args.n, alpha_bar, device, "held-out targets")
    if args.search:
        train_set = noise_and_targets(teacher, 0, 64, alpha_bar, device, "search targets")
    print(f"\n{args.n} held-out noises; reward {args.reward}, 0: the teacher's {TEACHER_STEPS} "
          f"steps; in the judge's features: Frechet distance to all training images, precision, "
          f"recall, density, coverage to {len(judge_file['features'])} (compare at equal --n)")
    print(f"{'model':26s} {'grid':14s} {'NFE':>5s} {'reward':>17s} {'Frechet':>8s} {'prec':>6s} "
          f"{'recall':>6s} {'dens':>6s} {'cover':>6s} {'ms':>7s}")
    rows = []
    for name, net, policy, content in models:
        policy_hint(name, policy, content, args.steps)
        deploy(net, z[:8], 1, alpha_bar, grid=[T, 0])                          # warm up the clock
        todo, second = [], None
        if content["kind"] == "teacher":                       # same weights, second-order jumps
            second = student_from_teacher(net, order=2).to(device).eval()
        for steps in args.steps:
            todo += [(grid, net, steps, make_grid(grid, steps)) for grid in GRIDS]
            if second:
                todo += [(f"{grid}, 2nd", second, steps, make_grid(grid, steps)) for grid in GRIDS]
            if args.search and steps > 1:
                todo.append(("searched", net, steps, search_grid(net, *train_set, reward, steps,
                                                            args.search, alpha_bar)))
            if policy is not None and steps == content.get("steps"):
                todo.append(("learned", net, steps, None))
        if second:
            todo.append(("uniform", net, TEACHER_STEPS, make_grid("uniform", TEACHER_STEPS)))
        for grid_name, sampler, steps, grid in todo:
            result = deployed(sampler, policy, z, target, reward, steps, alpha_bar, grid,
                              may_stop=grid is None and content.get("may_stop", False))
            rows.append(dict(model=name, grid=grid_name, steps=steps,
                             **judged(result, judge, judge_file), provenance=content["provenance"]))
            log_line(out, **rows[-1])
            print("{model:26s} {grid:14s} {nfe:5.2f} {reward:8.4f} ± {reward_error:6.4f} "
                  "{frechet:8.4f} {precision:6.3f} {recall:6.3f} {density:6.3f} {coverage:6.3f} "
                  "{ms:7.2f}".format(**rows[-1]), flush=True)
    spread_over_seeds(rows)
    plot_frontier(rows, out / "frontier.png")
    return rows


def spread_over_seeds(rows):
    """Checkpoints whose settings differ in the seed alone: mean ± std of figures."""
    groups = {}
    for row in rows:
        origin = row["provenance"]
        same = {k: v for k, v in origin.get("settings", {}).items() if k != "seed"}
        key = (origin.get("script"), str(sorted(same.items())), row["grid"], row["steps"])
        groups.setdefault(key, []).append(row)
    for (script, _, grid, steps), group in groups.items():
        seeds = {row["provenance"].get("settings", {}).get("seed") for row in group}
        if len(group) == len(seeds) > 1:
            cells = []
            for name in ("reward", "frechet", "precision", "recall"):
                values = torch.tensor([row[name] for row in group])
                cells.append(f"{name} {values.mean():.4f} ± {values.std():.4f}")
            print(f"{script}, {len(group)} seeds, {grid}, {steps} steps: " + ", ".join(cells))


def plot_frontier(rows, path):
    """Frechet distance and reward against NFE: a marker per model, a colour per grid."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4))
    models, grids = ([*dict.fromkeys(r[k] for r in rows)] for k in ("model", "grid"))
    for model, grid in dict.fromkeys((r["model"], r["grid"]) for r in rows):
        line = sorted((r["nfe"], r["frechet"], r["reward"]) for r in rows
                      if (r["model"], r["grid"]) == (model, grid))
        for axis, column in zip(axes, (1, 2)):
            axis.plot([p[0] for p in line], [p[column] for p in line], alpha=0.8,
                      marker="osD^vP*X"[models.index(model) % 8], color=f"C{grids.index(grid)}",
                      label=f"{model}, {grid}")
    save_frontier(figure, axes, sorted({round(r["nfe"]) for r in rows}), path)


def save_frontier(figure, axes, ticks, path):
    """Label the two panels of a frontier, legend beside them, and write it."""
    for axis, label in zip(axes, ("Fréchet distance, judge features",
                                  "reward (likeness to the teacher)")):
        axis.set(xlabel="network evaluations", ylabel=label, xscale="log")
        axis.set_xticks(ticks, [str(k) for k in ticks])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save_figure(figure, path)


# ==============================================================================================
# COMMAND LINE
# ==============================================================================================

def parse_args(argv=None):
    """Command line of sample.py."""
    p = parser_for(__doc__, "python sample.py --model checkpoints/teacher.pt --steps 20 --eta 1")
    a = p.add_argument
    a("--model", nargs="+", default=["checkpoints/rl_student.pt"],
      help="teacher's or student's file")
    a("--steps", type=number(int, 1, T), nargs="+", default=[4],
      help="network evaluations per image")
    a("--grid", choices=["auto", "policy", *GRIDS], default="auto",
      help="times of the steps; auto: the model's own policy where it was trained for --steps")
    a("--eta", type=number(float, 0, 1), default=0.0, help="0 DDIM .. 1 DDPM, with a fixed grid")
    a("--n", type=number(int, 1), help="number of images (default: 64; 512 with --evaluate)")
    a("--seed", type=number(int, 0, 4 * 10 ** 9), default=HELD_OUT,
      help="seed of the first image, then + 1; from this default on none was trained on")
    a("--npz", help="also write the images to this .npz")
    a("--png-dir", help="also write the images as PNGs into this folder")
    a("--out", help="folder of the result (default: next free runs/sample)")
    a("--device", default="auto", help="auto, cuda, mps or cpu")
    a("--smoke", action="store_true", help="few images, seconds; numbers mean nothing")
    a = p.add_argument_group("with --evaluate").add_argument
    a("--evaluate", action="store_true", help="the table instead of pictures")
    a("--reward", default="feature+perceptual", help="as in rl_distill.py")
    a("--search", type=number(int, 0), default=0, help="tries of a random grid search, 30..300")
    a("--teacher", default="checkpoints/teacher.pt", help="whose images are the targets")
    a("--coach", default="checkpoints/coach.pt", help="encoder of the rewards")
    a("--judge", default="checkpoints/judge.pt", help="encoder of the metrics")
    args = p.parse_args(argv)
    args.n = 8 if args.smoke else args.n or (512 if args.evaluate else 64)
    if args.evaluate and args.n < 8:
        p.error("--evaluate needs --n of at least 8")
    if args.evaluate and (args.npz or args.png_dir or args.eta or args.grid != "auto"):
        p.error("--evaluate writes no images and chooses grids itself: leave out --npz, --png-dir, "
                "--eta and --grid")
    if not args.evaluate and (len(args.model) > 1 or len(args.steps) > 1 or args.search):
        p.error("--search and several --model or --steps go with --evaluate")
    return args


def main(argv=None):
    args = parse_args(argv)
    device, began = pick_device(args.device), time.time()
    if args.evaluate:
        out = output_folder(args.out, "sample")
        print("config:", vars(args))
        evaluate(args, out, device)
        print(f"{(time.time() - began) / 60:.1f} min\nwrote {out}/frontier.png, log.jsonl")
        return
    check_new(args.npz, args.png_dir)
    (net, policy, content), steps = load_model(args.model[0], device), args.steps[0]
    if args.grid == "auto":
        policy_hint(args.model[0], policy, content, args.steps)
    wish = "uniform" if args.grid == "auto" and args.eta > 0 else args.grid
    name, grid = pick_grid(wish, policy, content, steps)
    if args.eta > 0 and grid is None:
        raise BadInput("--eta above 0 needs a fixed --grid (uniform, ...): policies act at eta 0")
    out = output_folder(args.out, "sample")
    claim_folder(out)
    print("config:", vars(args))
    print(f"device {device_name(device)} | {content['kind']} {parameter_count(net) / 1e6:.2f} M "
          f"parameters | {name} grid, {steps} evaluations an image | {content['provenance']}")
    seeds = range(args.seed, args.seed + args.n)
    images, path = generate(net, policy, seeds, steps, grid, args.eta,
                            grid is None and content.get("may_stop", False),
                            linear_alpha_bar(device), device)
    save_picture(out / "samples.png", images[:256], math.ceil(math.sqrt(min(args.n, 256))))
    shown = path[:, torch.linspace(0, steps, min(steps + 1, 11)).round().long()]
    save_picture(out / "path.png", shown.flatten(0, 1), columns=shown.shape[1])
    log_line(out, config=vars(args), seconds=time.time() - began)
    if args.npz:
        write_npz(args.npz, images)
    if args.png_dir:
        write_pngs(args.png_dir, images, args.seed)
    print(f"{args.n} images in {time.time() - began:.1f} s\nwrote {out}/samples.png, path.png, "
          "log.jsonl" + "".join(f", {p}" for p in (args.npz, args.png_dir) if p))


if __name__ == "__main__":
    run_main(main, "--n")
