"""Rewards and metrics: what "aligned with the teacher" means, and who judges it.

Adds two small CIFAR-10 encoders. The *coach* serves the rewards (ReDiF uses CLIP, DINO and LPIPS,
large and made for larger images); the *judge*, of another architecture and seed, serves the
evaluation alone, so that a student that merely pleases its coach (reward hacking) is found out.
All rewards compare a student's image with the teacher's from the same start noise.

    python reward.py             # what each reward says of graded distortions, a minute

Reads --encoders (trained by checkpoints/train_encoders.py) and --teacher; writes rewards.png and
log.jsonl to --out. Next file: rl_distill.py.
"""
import json
from argparse import ArgumentTypeError
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# From earlier files:
from ddpm import GRIDS, baseline_kinds, baseline_solver
from teacher import draw, noise_and_targets
from student import load_model
from harness.checkpoints import load_checkpoint, rebuild
from harness.images import plot_panels
from harness.runs import (BadInput, claim_run, log_line, number, parser_for, rebuilding, run_main,
                          write_whole)

BINS = 32                   # of the intensity histogram, per colour channel
DISTORTIONS = ("noise", "blur", "shift", "wrong")       # see distort

# ==== ENCODERS: images (B, 3, 32, 32) in [-1, 1] -> (list of feature maps, features (B, C), logits)


def conv_norm(c_in, c_out, stride=1):
    """3x3 convolution with batch norm."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out))


class Coach(nn.Module):
    """Residual network with strided convolutions and ReLU; features (B, 192)."""

    def __init__(self, classes=10):
        super().__init__()
        self.stem = conv_norm(3, 24)
        widths = [24, 48, 96, 192]
        self.shrink = nn.ModuleList(conv_norm(a, b, stride=2) for a, b in zip(widths, widths[1:]))
        self.residual = nn.ModuleList(nn.Sequential(conv_norm(c, c), nn.ReLU(), conv_norm(c, c))
                                      for c in widths[1:])
        self.classify = nn.Linear(widths[-1], classes)

    def forward(self, x):
        h, maps = F.relu(self.stem(x)), []
        for shrink, residual in zip(self.shrink, self.residual):
            h = F.relu(shrink(h))
            h = F.relu(h + residual(h))
            maps.append(h)
        features = h.mean(dim=(2, 3))
        return maps, features, self.classify(features)


class Judge(nn.Module):
    """Plain VGG-like network with max-pooling, GroupNorm and GELU; features (B, 160)."""

    def __init__(self, classes=10):
        super().__init__()

        def block(*layers):
            return nn.Sequential(*(m for a, b in layers for m in (
                nn.Conv2d(a, b, 3, padding=1, bias=False), nn.GroupNorm(8, b), nn.GELU())))
        self.blocks = nn.ModuleList([block((3, 32)), block((32, 80)), block((80, 160), (160, 160))])
        self.classify = nn.Linear(160, classes)

    def forward(self, x):
        h, maps = x, []
        for block in self.blocks:
            h = block(F.max_pool2d(h, 2) if maps else h)
            maps.append(h)
        features = h.mean(dim=(2, 3))
        return maps, features, self.classify(features)


ENCODERS = {"coach": Coach, "judge": Judge}


def load_encoder(path, role, device="cpu"):
    """Frozen encoder of train_encoders.py, in eval mode, and its checkpoint. Gradients still reach
    the *images*: only its weights are frozen."""
    content = load_checkpoint(path, role)
    net = rebuild(ENCODERS[role], content, path, device)
    return net.to(memory_format=torch.channels_last), content


class View(NamedTuple):
    """Images with what an encoder sees in them: all that a reward term may look at."""
    images: torch.Tensor            # (B, 3, H, W) in [-1, 1]
    maps: list                      # of (B, C, h, w), one per layer
    features: torch.Tensor          # (B, C), pooled

    def rows(self, index):
        """The View of some of the images; index: as of a tensor."""
        return View(self.images[index], [m[index] for m in self.maps], self.features[index])


def view_of(encoder, images):
    """(B, 3, H, W) -> View in fp32, through a frozen encoder; gradients reach the images."""
    maps, features, _ = encoder(images)
    return View(images, [m.float() for m in maps], features.float())


@torch.no_grad()
def encode(net, images, batch=500):
    """Pooled features of (N, 3, 32, 32) images in [-1, 1], in batches: (N, C), on the CPU."""
    return torch.cat([net(x)[1].float().cpu() for x in images.split(batch)])


# ==============================================================================================
# REWARD TERMS: (View of the images, View of the targets) -> (B,), at most 0, which is reached where
# they are equal. Each looks at its own pair alone, so no reward depends on the batch.
# DEVIATES: small encoders trained here stand in for ReDiF's CLIP, DINO and LPIPS.
# ==============================================================================================

def feature_reward(seen, target):
    """Cosine of the coach's pooled features, less 1; in the place of ReDiF's CLIP and DINO."""
    return F.cosine_similarity(seen.features, target.features, dim=1) - 1


def perceptual_reward(seen, target):
    """-mean over layers of the squared distance of unit feature vectors (as LPIPS, unweighted)."""
    return -torch.stack([
        (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2))
        for a, b in zip(seen.maps, target.maps)]).mean(0)


def mse_reward(seen, target):
    """-mean squared error over pixels."""
    return -(seen.images - target.images).square().mean((1, 2, 3))


def histogram(images):
    """Smoothed intensity histogram per colour: (B, 3, H, W) -> (B, 3, BINS), each summing to 1."""
    bins = ((images.clamp(-1, 1) + 1) / 2 * BINS).long().clamp(max=BINS - 1).flatten(2)
    counts = torch.ones(*bins.shape[:2], BINS, device=images.device)           # one each, smoothing
    counts = counts.scatter_add(2, bins, torch.ones_like(bins, dtype=torch.float))
    return counts / counts.sum(2, keepdim=True)


def histogram_reward(seen, target):
    """-KL(teacher || student) of the histograms. Counting has no gradient; RL needs none."""
    p, q = histogram(target.images), histogram(seen.images)
    return -(p * (p / q).log()).sum(2).mean(1)


TERMS = {"feature": feature_reward, "perceptual": perceptual_reward, "mse": mse_reward,
         "histogram": histogram_reward}


class Reward:
    """Weighted sum of standardised terms, sum_i w_i r_i / scale_i: at most 0, the target's own (up
    to rounding).

    spec: 'feature+perceptual' or with weights 'feature:2+mse:0.5'. scale_i is the term's standard
    deviation over distorted real images (measured once, stored with the coach), so that weights of
    different terms mean the same."""

    def __init__(self, spec, coach, scales):
        self.coach, self.scales, self.weights = coach, scales, parse_reward(spec)

    @torch.no_grad()
    def view(self, targets, batch=500):
        """View of targets (N, 3, H, W), which the coach sees once, however many images follow."""
        views = [view_of(self.coach, x) for x in targets.split(batch)]
        return View(targets, [torch.cat(m) for m in zip(*(v.maps for v in views))],
                    torch.cat([v.features for v in views]))

    def __call__(self, images, target):
        """Reward (B,) of images (B, 3, H, W) in [-1, 1]; target: the View of as many targets."""
        seen = view_of(self.coach, images)
        return sum(weight * TERMS[name](seen, target) / self.scales[name]
                   for name, weight in self.weights.items())


def load_reward(spec, folder, device):
    """(Reward, (judge, (mean, covariance) of its features of all training images)) from coach.pt
    and judge.pt in a folder."""
    (coach, file), (judge, other) = (
        load_encoder(f"{folder}/{role}.pt", role, device) for role in ENCODERS)
    with rebuilding(folder, "scales and moments"):
        return Reward(spec, coach, file["scales"]), (judge, (other["mean"], other["covariance"]))


@torch.no_grad()
def rewards(reward, images, target, rows, batch=128):
    """Rewards (N,) of images (N, 3, H, W), in batches; rows (N,): which target is each one's."""
    return torch.cat([reward(x, target.rows(i))
                      for x, i in zip(images.split(batch), rows.split(batch))])


def parse_reward(spec):
    """'feature:2+mse' -> {'feature': 2.0, 'mse': 1.0}; BadInput for unknown terms or weights."""
    weights = {}
    for part in spec.split("+"):
        name, _, weight = part.strip().partition(":")
        if name not in TERMS or name in weights:
            raise BadInput(f"reward '{name}' is unknown or named twice; choose from "
                           f"{', '.join(TERMS)}, joined by + (feature:2+mse)")
        try:
            weights[name] = number(float, 1e-6, 1e6)(weight or "1")
        except (ValueError, ArgumentTypeError):
            raise BadInput(f"the weight of reward '{name}' must be a number from 1e-6 to 1e6, not "
                           f"'{weight}'") from None
    return weights


# ==== METRICS, in the judge's features ========================================================

def moments(features):
    """Mean (C,) and covariance (C, C) in fp64 on the CPU of features (N, C), N >= 2."""
    features = features.cpu().double()
    centred = features - features.mean(0)
    return features.mean(0), centred.T @ centred / (len(features) - 1)


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). Heusel et al. 2017 (on Inception features).

    tr (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of S C2 S, S = C1^(1/2),
    symmetric, positive semi-definite: rank-deficient covariances need no epsilon. A float."""
    mean1, cov1, mean2, cov2 = (x.cpu().double() for x in (mean1, cov1, mean2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).item()


def judged(images, judge):
    """Frechet distance of images (N, 3, H, W) in [-1, 1] to all training images; judge: that of
    load_reward(). Compare at equal N, more than there are features (160)."""
    encoder, reference = judge
    return frechet_distance(*moments(encode(encoder, images)), *reference)


def standard_error(x):
    """Standard error of the mean of (B,) values."""
    return (x.std() / len(x) ** 0.5).item()


def closed(reward, start):
    """(share, standard error) of the way from `start` to the target that `reward` has gone; both
    (B,), of the same noises; the target's reward is 0. The error is that of a ratio of means."""
    gain, left = reward - start, -start
    mean = left.mean().clamp(min=1e-9).item()               # the start may be the target itself
    share = gain.mean().item() / mean
    return share, standard_error(gain - share * left) / mean


# ==== BASELINES AND THE TABLE =================================================================

class Row(NamedTuple):
    """One sampler in the table of results, all on the same noises."""
    name: str
    nfe: int                        # network evaluations per image
    trained: int                    # network evaluations that it learned from
    images: torch.Tensor            # (B, 3, H, W)
    reward: torch.Tensor            # (B,)
    start: "Row" = None             # of what was learned: the row it started from


def deploy(net, solver, z, target, reward, alpha_bar):
    """Images (B, 3, H, W) that a solver makes of z, and their reward (B,). target: a View."""
    images = draw(net, solver, z, alpha_bar)
    return images, rewards(reward, images, target, torch.arange(len(z), device=z.device))


def best_baselines(net, steps, z, target, reward, alpha_bar):
    """{kind: (grid, Solver)}: of each kind of baseline solver the grid with the largest mean reward
    on these noises; the best kind comes first."""
    best = {}
    for kind in baseline_kinds(net, steps):
        for grid in GRIDS:
            solver = baseline_solver(kind, grid, steps)
            mean = deploy(net, solver, z, target, reward, alpha_bar)[1].mean().item()
            best[kind] = max(best.get(kind, (-float("inf"),)), (mean, grid, solver))
    return {kind: best[kind][1:] for kind in sorted(best, key=best.get, reverse=True)}


def print_table(rows, judge, path):
    """Print Rows, and write them to a .json. closed: of the way from what a learned row started at
    to the target, in per cent."""
    width, table = max(len(row.name) for row in rows), []
    print(f"{'':{width}s}  NFE    trained   reward ± error    closed       Fréchet")
    for row in rows:
        values = dict(name=row.name, nfe=row.nfe, trained=row.trained,
                      reward=row.reward.mean().item(), error=standard_error(row.reward),
                      frechet=judged(row.images, judge))
        text = " " * 12
        if row.start:
            share, error = closed(row.reward, row.start.reward)
            values.update(closed=share, closed_error=error, start=row.start.name)
            text = f"{share:6.0%} ± {error:3.0%}"
        print("{name:{width}s} {nfe:4d} {trained:10,d} {reward:8.3f} ± {error:.3f} {}"
              "{frechet:9.2f}".format(text, width=width, **values))
        table.append(values)
    write_whole(path, json.dumps(dict(rows=table, n=len(rows[0].reward)), indent=1).encode())


# ==== GRADED DISTORTIONS: for the scales of the terms (train_encoders.py), and for the figure =

def distort(images, kind, level, generator):
    """images (B, 3, H, W) -> distorted copy; level in 0..1 (0 changes nothing).

    'noise': Gaussian of std level / 2; 'blur': Gaussian of std 2 level pixels; 'shift': sideways by
    level / 4 of the width; 'wrong': a level-share of blending with another image of the batch."""
    if level == 0:
        return images.clone()
    if kind == "noise":
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        return (images + level / 2 * noise).clamp(-1, 1)
    if kind == "blur":
        x = torch.arange(-6, 7, device=images.device)
        kernel = torch.softmax(-x.square() / (2 * (2 * level) ** 2), 0)
        padded = F.pad(images, (6, 6, 6, 6), mode="reflect")
        kernel = (kernel[:, None] * kernel).expand(3, 1, 13, 13)
        return F.conv2d(padded, kernel, groups=3)
    if kind == "shift":
        pixels = round(images.shape[-1] / 4 * level)
        return F.pad(images, (pixels, 0, 0, 0), mode="reflect")[..., :images.shape[-1]]
    return torch.lerp(images, images.roll(1, 0), level)


@torch.no_grad()
def show_rewards(images, coach, scales, path):
    """Print and draw each term's mean standardised reward of distorted images (B, 3, H, W).
    Returns {'distortion term': [reward at levels 0, 1/4, 1/2, 3/4, 1]}."""
    levels, target, table, panels = (0.0, 0.25, 0.5, 0.75, 1.0), view_of(coach, images), {}, []
    print(f"standardised reward of {len(images)} images (0: the teacher's), of levels", *levels)
    for kind in DISTORTIONS:
        generator = torch.Generator().manual_seed(0)
        seen = [view_of(coach, distort(images, kind, level, generator)) for level in levels]
        curves = {name: [(term(view, target).mean() / scales[name]).item() for view in seen]
                  for name, term in TERMS.items()}
        for name, curve in curves.items():
            table[f"{kind} {name}"] = curve
            print(f"{kind:>6s} {name:>11s} " + " ".join(f"{value:8.3f}" for value in curve))
        panels.append((f"level of '{kind}'", "standardised reward", [
            (name, levels, curve, "o-") for name, curve in curves.items()]))
    plot_panels(panels, path)
    return table


# ==== COMMAND LINE ============================================================================

def parse_args(argv=None):
    """Command line of reward.py."""
    p = parser_for(__doc__, "python reward.py --encoders checkpoints --seed 1", trains=False)
    p.add_argument("--encoders", default="checkpoints", help="folder of the coach.pt to show")
    p.add_argument("--teacher", default="checkpoints/teacher.pt", help="whose images are shown")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    made, _ = load_reward("feature+perceptual", args.encoders, args.device)
    teacher, *_ = load_model(args.teacher, args.device, "teacher")
    out = claim_run(args, "reward")
    _, images = noise_and_targets(teacher, args.seed, 32, args.device)
    table = show_rewards(images, made.coach, made.scales, out / "rewards.png")
    log_line(out / "log.jsonl", **table)
    print(f"wrote {out}/rewards.png, log.jsonl")


if __name__ == "__main__":
    run_main(main)
