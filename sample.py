"""Pictures and numbers from any of the checkpoints.

    python sample.py                                        # the bundled student: a picture grid
    python sample.py --model checkpoints/teacher.pt --steps 20 --n 16
    python sample.py --npz images.npz --n 10000             # uint8 (N, 32, 32, 3), for FID tools
    python sample.py --evaluate --model checkpoints/teacher.pt checkpoints/rl_student.pt --steps 2 4

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
from ddpm import (T, BadInput, linear_alpha_bar, load_checkpoint, load_teacher, log_line, make_grid,
                  number, output_folder, parameter_count, parser_for, pick_device, pyplot, run_main,
                  save_figure, seeded_noise, strictly_decreasing, to_uint8, wait_for)
from teacher import device_name, save_picture
from student import HELD_OUT, TEACHER_STEPS, deploy, jump, load_student, student_from_teacher
from reward import Reward, encode, frechet_distance, load_encoder, moments, precision_recall
from rl_distill import noise_and_targets, standard_error

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


def pick_grid(name, policy, content, steps):
    """'policy' -> None (the step policy decides), others -> a fixed grid; 'auto': policy if any."""
    if name == "auto":
        name = "policy" if policy is not None and content.get("steps") == steps else "uniform"
    if name == "policy" and policy is None:
        raise BadInput("this checkpoint has no step policy; choose --grid uniform or quadratic")
    return name, None if name == "policy" else make_grid(name, steps)


@torch.no_grad()
def stochastic(net, x_T, grid, alpha_bar, eta, seeds):
    """Sampling with noise on a fixed grid (eta 1: DDPM's ancestral sampling), per-image seeds."""
    x = x_T
    for k, (now, then) in enumerate(zip(grid, grid[1:]), start=1):
        t, t_next = (torch.full((len(x),), s, device=x.device) for s in (now, then))
        mean, sigma, _ = jump(net, x, t, t_next, alpha_bar, eta)
        noise = seeded_noise(seeds, x.shape[1:], stream=k, device=x.device)
        x = mean + sigma[:, None, None, None] * noise               # sigma is 0 where t_next = 0
    return x.clamp(-1, 1)


def generate(net, policy, seeds, steps, grid, eta, may_stop, alpha_bar, device):
    """Images of the given seeds, in batches: (len(seeds), 3, H, W) in [-1, 1], on the CPU."""
    seeds, side, batch = list(seeds), net.config["image_size"], 64 if device.type == "cpu" else 1024
    images = []
    for i in tqdm(range(0, len(seeds), batch), desc="sampling", disable=len(seeds) <= batch):
        part = seeds[i:i + batch]
        z = seeded_noise(part, (3, side, side), device=device)
        if eta > 0:
            images.append(stochastic(net, z, grid, alpha_bar, eta, part).cpu())
        else:
            images.append(deploy(net, z, steps, alpha_bar, policy, grid, may_stop)[0].cpu())
    return torch.cat(images)


@torch.no_grad()
def denoising_path(net, policy, x_T, steps, grid, alpha_bar):
    """All states on the way from noise to image: (B, steps + 1, 3, H, W)."""
    states, x, t = [x_T], x_T, torch.full((len(x_T),), T, device=x_T.device)
    features = torch.zeros(len(x), net.features, device=x.device)
    _, times = deploy(net, x_T, steps, alpha_bar, policy, grid)
    for k in range(steps):
        x, _, features = jump(net, x, times[:, k], times[:, k + 1], alpha_bar)
        states.append(x)
    return torch.stack(states, 1)


def write_npz(path, images):
    """uint8 (N, H, W, 3) under the name arr_0, as usual FID tools read; never over another file."""
    path = Path(path)
    if path.exists():
        raise BadInput(f"--npz {path} exists already; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, to_uint8(images).permute(0, 2, 3, 1).numpy())


def write_pngs(folder, images, first_seed):
    """One 32x32 PNG per image, named by its seed; into a new or empty folder."""
    from PIL import Image
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"--png-dir {folder} is not an empty folder; give another name")
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{first_seed + i:08d}.png")


# ==============================================================================================
# EVALUATION
# ==============================================================================================

@torch.no_grad()
def search_grid(net, z, target, reward, steps, tries, alpha_bar, seed=0):
    """Gradient-free baseline: random search around the best grid so far, on *training* noise.

    Starts from the better hand grid; each try moves all inner times by Gaussian steps that shrink
    from 12 to 3 percent of T and keeps what scores higher. Returns the grid.
    """
    def score(grid):
        return torch.cat([reward(deploy(net, x, steps, alpha_bar, grid=grid)[0], y)[0]
                          for x, y in zip(z.split(64), target.split(64))]).mean().item()
    rng = np.random.default_rng(seed)
    best_score, best = max((score(g), g) for g in (make_grid("uniform", steps),
                                                   make_grid("quadratic", steps)))
    for i in range(tries if steps > 1 else 0):
        width = T * 0.12 * 0.25 ** (i / tries)
        inner = sorted((np.array(best[1:-1]) + rng.normal(0, width, steps - 1))
                       .round().clip(1, T - 1).astype(int), reverse=True)
        grid = strictly_decreasing([T, *map(int, inner), 0])
        if grid[0] == T and (new := score(grid)) > best_score:
            best_score, best = new, grid
    return best


@torch.no_grad()
def evaluate_one(net, policy, steps, grid, may_stop, z, target, reward, judge, judge_file,
                 alpha_bar, device):
    """One table row: reward and terms with standard errors, judge metrics, ms per image, NFE."""
    wait_for(device)
    start, images, nfe = time.time(), [], []
    for x in z.split(64 if device.type == "cpu" else 1024):
        out, times = deploy(net, x, steps, alpha_bar, policy, grid, may_stop)
        images.append(out)
        nfe.append((times[:, :-1] > 0).sum(1))
    wait_for(device)
    seconds, images = time.time() - start, torch.cat(images)
    score, raw = reward(images, target)
    features = encode(judge, images).cpu()
    row = dict(nfe=torch.cat(nfe).float().mean().item(), reward=score.mean().item(),
               reward_error=standard_error(score), frechet=frechet_distance(
                   *moments(features), judge_file["mean"], judge_file["covariance"]),
               ms=1000 * seconds / len(z), **{k: v.mean().item() for k, v in raw.items()})
    row.update(precision_recall(judge_file["features"].float(), features))
    return row


def evaluate(args, out, device):
    """The table and frontier.png for all of --model at all of --steps. Returns the rows."""
    alpha_bar = linear_alpha_bar(device)
    teacher, _ = load_teacher(args.teacher, device)
    coach, coach_file = load_encoder(args.coach, "coach", device)
    judge, judge_file = load_encoder(args.judge, "judge", device)
    models = [(Path(m).stem, *load_model(m, device)) for m in args.model]
    reward = Reward(args.reward, coach, coach_file["scales"])
    out.mkdir(parents=True, exist_ok=True)
    z, target = noise_and_targets(teacher, HELD_OUT, args.n, alpha_bar, device, "held-out targets")
    train_set = (noise_and_targets(teacher, 0, 64, alpha_bar, device, "search targets")
                 if args.search else None)
    print(f"\n{args.n} held-out noises, reward {args.reward} (0: the teacher's {TEACHER_STEPS} "
          "steps); judge features: Frechet distance to all training images, "
          f"precision/recall/density/coverage to {len(judge_file['features'])}")
    header = (f"{'model':24s} {'grid':10s} {'NFE':>5s} {'reward':>17s} {'Frechet':>8s} "
              f"{'prec':>6s} {'recall':>6s} {'dens':>6s} {'cover':>6s} {'ms':>7s}")
    print(header)
    rows = []

    def report(name, grid_name, content, *how):
        row = evaluate_one(*how, z, target, reward, judge, judge_file, alpha_bar, device)
        row = dict(model=name, grid=grid_name, **row, provenance=content["provenance"])
        rows.append(row)
        log_line(out, **row)
        print("{model:24s} {grid:10s} {nfe:5.2f} {reward:8.4f} ± {reward_error:6.4f} "
              "{frechet:8.4f} {precision:6.3f} {recall:6.3f} "
              "{density:6.3f} {coverage:6.3f} {ms:7.2f}".format(**row), flush=True)

    for name, net, policy, content in models:
        for steps in args.steps:
            for grid_name in ("uniform", "quadratic"):
                report(name, grid_name, content, net, None, steps, make_grid(grid_name, steps),
                       False)
            if args.search and steps > 1:
                grid = search_grid(net, *train_set, reward, steps, args.search, alpha_bar)
                report(name, "searched", content, net, None, steps, grid, False)
            if policy is not None and steps == content.get("steps"):
                report(name, "learned", content, net, policy, steps, None,
                       content.get("may_stop", False))
        if content["kind"] == "teacher":
            report(name, "uniform", content, net, None, TEACHER_STEPS,
                   make_grid("uniform", TEACHER_STEPS), False)
    spread_over_seeds(rows)
    plot_frontier(rows, out / "frontier.png")
    return rows


def spread_over_seeds(rows):
    """Checkpoints that differ in their seed alone: mean ± standard deviation of each figure."""
    groups = {}
    for row in rows:
        same = {k: v for k, v in row["provenance"].items() if k not in ("seed", "minutes")}
        groups.setdefault((row["grid"], round(row["nfe"]), str(sorted(same.items()))),
                          []).append(row)
    for (grid, nfe, _), group in groups.items():
        if len(group) > 1:
            cells = []
            for k in ("reward", "frechet", "precision", "recall"):
                values = torch.tensor([r[k] for r in group])
                cells.append(f"{k} {values.mean():.4f} ± {values.std():.4f}")
            print(f"{len(group)} seeds, {grid} grid, {nfe} NFE: " + ", ".join(cells))


def plot_frontier(rows, path):
    """Frechet distance and reward against NFE, a line per model and grid."""
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4))
    for key in dict.fromkeys((r["model"], r["grid"]) for r in rows):
        line = sorted((r["nfe"], r["frechet"], r["reward"]) for r in rows
                      if (r["model"], r["grid"]) == key)
        for axis, column in zip(axes, (1, 2)):
            axis.plot([p[0] for p in line], [p[column] for p in line], marker="o",
                      label=" ".join(key))
    for axis, label in zip(axes, ("Fréchet distance, judge features",
                                  "reward (likeness to the teacher)")):
        axis.set(xlabel="network evaluations", ylabel=label, xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=8)
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
    a("--grid", choices=["auto", "policy", "uniform", "quadratic"], default="auto",
      help="times of the steps; auto: the model's own policy where it was trained for --steps")
    a("--eta", type=number(float, 0, 1), default=0.0, help="0 DDIM .. 1 DDPM, with a fixed grid")
    a("--n", type=number(int, 1), help="number of images (default: 64; 512 with --evaluate)")
    a("--seed", type=number(int, 0, 10 ** 12), default=0, help="seed of the first image; then + 1")
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
    if not args.evaluate and (len(args.model) > 1 or len(args.steps) > 1):
        p.error("several --model or --steps go with --evaluate")
    return args


def main(argv=None):
    args = parse_args(argv)
    device, began = pick_device(args.device), time.time()
    if args.npz and Path(args.npz).exists():
        raise BadInput(f"--npz {args.npz} exists already; give another name")
    if args.evaluate:
        out = output_folder(args.out, "sample")
        print("config:", vars(args))
        evaluate(args, out, device)
        print(f"{(time.time() - began) / 60:.1f} min\nwrote {out}/frontier.png, log.jsonl")
        return
    net, policy, content = load_model(args.model[0], device)
    steps = args.steps[0]
    name, grid = pick_grid("uniform" if args.grid == "auto" and args.eta > 0 else args.grid,
                           policy, content, steps)
    if args.eta > 0 and grid is None:
        raise BadInput("--eta above 0 needs --grid uniform or quadratic: "
                       "the policy is deployed at eta 0")
    out = output_folder(args.out, "sample")
    out.mkdir(parents=True, exist_ok=True)
    print("config:", vars(args))
    print(f"device {device_name(device)} | {content['kind']} {parameter_count(net) / 1e6:.2f} M "
          f"parameters | {name} grid, {steps} evaluations an image | {content['provenance']}")
    alpha_bar, may_stop = (linear_alpha_bar(device),
                           content.get("may_stop", False) and name == "policy")
    images = generate(net, policy, range(args.seed, args.seed + args.n), steps, grid, args.eta,
                      may_stop, alpha_bar, device)
    save_picture(out / "samples.png", images[:256], columns=math.ceil(math.sqrt(min(args.n, 256))))
    side, rows = net.config["image_size"], min(8, args.n)
    path = denoising_path(net, policy, seeded_noise(range(args.seed, args.seed + rows),
                                                    (3, side, side), device=device),
                          steps, grid, alpha_bar)
    shown = path[:, torch.linspace(0, steps, min(steps + 1, 11)).round().long()]
    save_picture(out / "path.png", shown.flatten(0, 1), columns=shown.shape[1])
    if args.npz:
        write_npz(args.npz, images)
    if args.png_dir:
        write_pngs(args.png_dir, images, args.seed)
    print(f"{args.n} images in {time.time() - began:.1f} s\nwrote {out}/samples.png, path.png"
          + "".join(f", {p}" for p in (args.npz, args.png_dir) if p))


if __name__ == "__main__":
    run_main(main)
