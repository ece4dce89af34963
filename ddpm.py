"""Denoising diffusion: noise schedule, loss, U-Net, the jump, hand solvers, known answers.

The ground everything else stands on: Ho et al. 2020 (DDPM, arXiv 2006.11239), Song et al. 2020
(DDIM, arXiv 2010.02502) and Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095). ReDiF distils exactly
this kind of model.

    python ddpm.py            # no data and no network needed, under a minute on two CPU cores

Run alone it replaces the U-Net by the *optimal* prediction for a Gaussian and for a Gaussian
mixture, which is known in closed form, so that every solver can be checked against the right
answer. Writes ddpm.png and log.jsonl to a new folder under runs/. Next file: teacher.py.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# For the demonstration and main alone:
from harness.figures import new_figure
from harness.runs import claim_run, log_line, parser_for, pick_device, run_flags, run_main

# ==============================================================================================
# CONVENTIONS, used in every file
#   images   float in [-1, 1], shape (B, 3, H, W)
#   t        integer in 0..T. t = 0 is clean data; t = T is where sampling starts (trained!)
#   ab       alpha_bar[t], the share of signal in x_t; ab' that of t_next
#   v        what a network predicts: x_t = sqrt(ab) x0 + sqrt(1 - ab) eps, and
#            v = sqrt(ab) eps - sqrt(1 - ab) x0 (Salimans & Ho 2022, appendix D)
#   jump     one move t -> t_next, one network evaluation; K jumps make an image, NFE = K
#   grid     decreasing list of K + 1 times from T to 0
# ==============================================================================================

T = 1000                                  # number of noise levels, Ho et al. section 4
BETA_FIRST, BETA_LAST = 1e-4, 0.02        # linear schedule, Ho et al. section 4
GRIDS = ("uniform", "quadratic", "logsnr")      # hand grids, see make_grid
SOLVERS = ("DDIM", "DPM++", "AB2")        # hand solvers, see hand_solver
POINTS = 1000                             # in the plane, of the closed-form demonstration

# ==== NOISE SCHEDULE AND FORWARD PROCESS ======================================================


def linear_alpha_bar(device="cpu"):
    """alpha_bar[t] = prod_{s <= t} (1 - beta_s) for t = 0..T; alpha_bar[0] = 1. Shape (T + 1,)."""
    beta = torch.linspace(BETA_FIRST, BETA_LAST, T, dtype=torch.float64)       # beta_1 .. beta_T
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])
    return alpha_bar.float().to(device)


def spread(values, like):
    """(B,) -> (B, 1, 1, 1): trailing 1s, so that one value per image broadcasts over `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def q_sample(x0, t, eps, alpha_bar) -> torch.Tensor:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps. Eq. 4, Ho et al. 2020.

    x0, eps: (B, ...); t: (B,) integers in 0..T.
    """
    ab = spread(alpha_bar[t], x0)
    return ab.sqrt() * x0 + (1 - ab).sqrt() * eps


def x0_and_eps(x_t, t, v, alpha_bar) -> tuple[torch.Tensor, torch.Tensor]:
    """x0_hat = sqrt(ab) x_t - sqrt(1 - ab) v, eps_hat = sqrt(1 - ab) x_t + sqrt(ab) v. Appendix D,
    Salimans & Ho 2022. x_t, v: (B, ...); t: (B,). The pair explains x_t, whatever v."""
    ab = spread(alpha_bar[t], x_t)
    return ab.sqrt() * x_t - (1 - ab).sqrt() * v, (1 - ab).sqrt() * x_t + ab.sqrt() * v


def simple_loss(net, x0, t, eps, alpha_bar) -> torch.Tensor:
    """L_simple = mean |eps - eps_hat(x_t, t)|^2. Eq. 14 and Algorithm 1, Ho et al. 2020.

    net(x_t, t) -> v, which becomes eps_hat by x0_and_eps. Returns a scalar.
    """
    x_t = q_sample(x0, t, eps, alpha_bar)
    _, eps_hat = x0_and_eps(x_t, t, net(x_t, t).float(), alpha_bar)
    return F.mse_loss(eps_hat, eps)


# ==== THE JUMP: one function for DDIM, DDPM, DPM-Solver++ and the policy of rl_distill.py =====

def ddim_sigma(t, t_next, eta, alpha_bar) -> torch.Tensor:
    """sigma = eta sqrt((1 - ab') / (1 - ab)) sqrt(1 - ab / ab'). Eq. 16, Song et al. 2020.

    t, t_next: (B,) integers with t > t_next. Returns (B,); 0 where t_next = 0.
    """
    ab, ab_next = alpha_bar[t], alpha_bar[t_next]
    return eta * ((1 - ab_next) / (1 - ab)).sqrt() * (1 - ab / ab_next).sqrt()


def jump(x_t, x0_hat, t, t_next, alpha_bar, lean=None, x0_last=None, eta=0.0):
    """Mean (B, ...) and sigma (B,) of the jump t -> t_next.

        D    = x0_hat + lean (x0_hat - x0_last)                 follow the trend of the estimates
        eps  = (x_t - sqrt(ab) D) / sqrt(1 - ab)                the noise that belongs to D
        mean = sqrt(ab') D + sqrt(1 - ab' - sigma^2) eps        Eq. 12, Song et al. 2020

    Without lean it is DDIM (eta = 0) or DDPM (eta = 1 and t_next = t - 1: the posterior, Eqs. 6-7,
    Ho et al.); lean = dpm_lean(...) makes it DPM-Solver++(2M). x_t, x0_hat, x0_last: (B, ...);
    x0_last is the estimate of the evaluation before; lean, t, t_next: (B,), t > t_next.
    """
    D = x0_hat if lean is None else x0_hat + spread(lean, x_t) * (x0_hat - x0_last)
    ab, ab_next = spread(alpha_bar[t], x_t), spread(alpha_bar[t_next], x_t)
    sigma = ddim_sigma(t, t_next, eta, alpha_bar)
    eps = (x_t - ab.sqrt() * D) / (1 - ab).sqrt()
    direction = (1 - ab_next - spread(sigma, x_t) ** 2).clamp(min=0).sqrt()
    return ab_next.sqrt() * D + direction * eps, sigma


def half_log_snr(alpha_bar):
    """lambda = log(sqrt(ab) / sqrt(1 - ab)), any shape; infinite at t = 0."""
    return torch.logit(alpha_bar) / 2


def dpm_lean(t, t_next, t_last, alpha_bar) -> torch.Tensor:
    """The lean of DPM-Solver++(2M): h / (2 h_last) with h = lambda(t_next) - lambda(t) and h_last
    that of the jump before, t_last -> t. Algorithm 2, Lu et al. 2022.

    All times (B,) integers. 0 at the first jump (t_last = t) and into t = 0 (lambda is infinite).
    """
    now, then, last = (half_log_snr(alpha_bar[s]) for s in (t, t_next, t_last))
    return torch.where((t_last > t) & (t_next > 0), (then - now) / (2 * (now - last)), 0.0)


# ==== HAND SOLVERS: K evaluations are K + 1 times and K leans =================================

class Solver(NamedTuple):
    """How an image is made in K evaluations, the same way for every noise."""
    grid: list                      # K + 1 integers, decreasing from T to 0
    leans: list                     # K floats, one per jump


def power_grid(steps, power):
    """T (1 - k / steps)^power for k = 0..steps, as strictly decreasing integers."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** power
    return strictly_decreasing([round(v) for v in (T * u).tolist()])


def make_grid(name, steps):
    """Decreasing list of steps + 1 integers from T to 0, a hand grid.

    'uniform' and 'quadratic' in t (appendix D.2, Song et al. 2020); 'logsnr': uniform in lambda
    (Lu et al. 2022), its last point, t = 1, moved on to 0. ValueError for what cannot be.
    """
    if not 1 <= steps <= T or name not in GRIDS:
        raise ValueError(f"no '{name}' grid of {steps} steps; take one of {GRIDS} and 1..{T} steps")
    if name != "logsnr":
        return power_grid(steps, 1 if name == "uniform" else 2)
    levels = half_log_snr(linear_alpha_bar()[1:])                              # of t = 1 .. T
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    wanted = levels[0] + u * (levels[-1] - levels[0])
    nearest = (levels - wanted[:, None]).abs().argmin(1) + 1
    return strictly_decreasing([*nearest.tolist()[:-1], 0])


def strictly_decreasing(grid):
    """Push apart entries that rounding made equal, within T .. 0: every jump needs t > t_next."""
    for k in range(len(grid) - 2, -1, -1):
        grid[k] = max(grid[k], grid[k + 1] + 1)
    return [min(t, T - k) for k, t in enumerate(grid)]


def dpm_leans(grid):
    """dpm_lean() of every jump of a grid, a list of K floats."""
    times = torch.tensor(grid)
    return dpm_lean(times[:-1], times[1:], torch.cat([times[:1], times[:-2]]),
                    linear_alpha_bar()).tolist()


def hand_solver(kind, grid_name, steps):
    """Solver of a kind on a hand grid. 'DDIM' never leans, 'DPM++' is DPM-Solver++(2M), 'AB2' leans
    by 1/2 at every jump after the first, the last one too: the rule of Adams and Bashforth for
    equal steps, which PNDM (Liu et al. 2022, arXiv 2202.09778) has for eps, here for x0_hat."""
    grid = make_grid(grid_name, steps)
    if kind == "DPM++":
        return Solver(grid, dpm_leans(grid))
    return Solver(grid, [0.0] + [0.5 if kind == "AB2" else 0.0] * (steps - 1))


def seeded_noise(seeds, shape, stream=0, device="cpu"):
    """Standard normal noise, one seed per image: the same seed is the same image in any batch.

    seeds: iterable of int; shape: of one image; stream: 0 for the start noise, k for jump k.
    Drawn on the CPU so that all devices agree; its generator uses 32 bits of a seed, so seeds must
    lie below 4e9. Returns (len(seeds), *shape).
    """
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(int(s) * 1009 + stream))
             for s in seeds]
    return torch.stack(noise).to(device)


def estimate(net, x_t, t, v, alpha_bar):
    """x0_hat of a prediction v. Where the network predicts images (net.clip) it is kept in [-1, 1],
    as in Ho et al.'s code; jump() then finds the epsilon that belongs to it."""
    x0_hat, _ = x0_and_eps(x_t, t, v.float(), alpha_bar)
    return x0_hat.clamp(-1, 1) if net.clip else x0_hat


@torch.no_grad()
def sample(net, x_T, solver, alpha_bar, eta=0.0, seeds=None, keep=None):
    """Run the reverse process. Algorithm 2, Ho et al. (eta = 1), DDIM or DPM-Solver++ (eta = 0).

    net(x, t, t_next) -> v; x_T: (B, ...) standard normal; seeds: one per image, where eta > 0.
    Returns x_0 (B, ...); with keep, the list of the states after keep's numbers of jumps (0: x_T).
    Nothing adds noise on the jump into t = 0: its sigma is 0. ValueError for an impossible grid.
    """
    grid, leans = solver
    if (grid[0] != T or grid[-1] != 0 or any(a <= b for a, b in zip(grid, grid[1:]))
            or len(leans) != len(grid) - 1):
        raise ValueError(f"a grid must decrease from {T} to 0, with a lean a jump, not {solver}")
    x, x0_last, kept = x_T, x_T, {0: x_T}
    for k, (now, then, lean) in enumerate(zip(grid, grid[1:], leans), start=1):
        t = torch.full((len(x),), now, device=x.device)
        t_next = torch.full_like(t, then)
        x0_hat = estimate(net, x, t, net(x, t, t_next), alpha_bar)
        lean = torch.full((len(x),), lean if k > 1 else 0.0, device=x.device)
        x, sigma = jump(x, x0_hat, t, t_next, alpha_bar, lean, x0_last, eta)
        if eta > 0 and then > 0:
            x = x + spread(sigma, x) * seeded_noise(seeds, x.shape[1:], k, x.device)
        x0_last = x0_hat
        if keep is not None and k in keep:
            kept[k] = x
    return x if keep is None else [kept[k] for k in keep]


# ==== U-NET, Ho et al. 2020, appendix B =======================================================

PAPER_UNET = dict(width=128, mults=[1, 2, 2, 2], blocks=2, attention=[16], dropout=0.1)     # 35.7 M
SMALL_UNET = dict(width=32, mults=[1, 2, 4], blocks=1, attention=[8], dropout=0.0)          # 2.7 M


def time_embedding(t, dim):
    """Sinusoidal embedding of integer times (B,) -> (B, dim). Section 3.5, Vaswani et al. 2017."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * freqs                                        # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def group_norm(channels):
    """GroupNorm of as many groups as divide both 32 and channels / 4: at least 4 channels each."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels, eps=1e-6)


def zeroed(module):
    """Zero the parameters: a residual branch that starts as nothing trains more stably."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    """norm SiLU conv, + time, norm SiLU dropout conv, + shortcut. (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, c_in, c_out, c_time, dropout):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, c_out)
        self.norm2, self.conv2 = group_norm(c_out), zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over the H W positions, residual. (B, C, H, W) -> same."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(B, 1, H * W, C)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)                            # each (B, 1, HW, C)
        tokens = self.out(F.scaled_dot_product_attention(q, k, v))
        return x + tokens.reshape(B, H, W, C).permute(0, 3, 1, 2)


class Upsample(nn.Conv2d):
    """Nearest-neighbour doubling, then this 3x3 convolution. (B, C, H, W) -> (B, C', 2H, 2W)."""

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """The teacher's network: (x_t (B, 3, H, W), t (B,)) -> v (B, 3, H, W).

    DEVIATES: in Ho et al. it predicts eps. That network spends its first epochs learning to copy
    x_t at high noise, and what is left of its error is magnified by 1 / sqrt(ab), up to 157 times,
    in x0_hat. Predicting v, an untrained network's eps_hat is right at t = T. The loss is theirs:
    of eps, ab |v - v_hat|^2.
    width: channels at full resolution; mults: channel multiple per level, each level halves the
    image; blocks: residual blocks per level; attention: resolutions that get self-attention.
    `config` rebuilds the network, and is what a checkpoint stores. ValueError for absurd sizes.
    """
    clip = True                     # x0_hat is an estimate of the image, so it lies in [-1, 1]

    def __init__(self, width, mults, blocks, attention, dropout=0.0, image_size=32):
        super().__init__()
        sizes = (width, *mults, blocks, image_size)
        if (not all(isinstance(n, int) and n >= 1 for n in sizes) or width * max(mults) > 4096
                or len(mults) > 6 or blocks > 16 or image_size > 1024):
            raise ValueError(f"a U-Net cannot have the sizes {sizes}")
        self.config = dict(width=width, mults=list(mults), blocks=blocks, attention=list(attention),
                           dropout=dropout, image_size=image_size)
        c_time = 4 * width
        self.time_mlp = nn.Sequential(
            nn.Linear(width, c_time), nn.SiLU(), nn.Linear(c_time, c_time))
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)

        def stage(c_in, c_out, size):
            """One residual block, with attention at the chosen resolutions."""
            last = Attention(c_out) if size in attention else nn.Identity()
            return nn.ModuleList([ResBlock(c_in, c_out, c_time, dropout), last])

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, size, skips = width, image_size, [width]
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(stage(c, width * mult, size))
                c = width * mult
                skips.append(c)
            if level < len(mults) - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
                size //= 2
        self.mid1, self.mid_attention, self.mid2 = (
            ResBlock(c, c, c_time, dropout), Attention(c), ResBlock(c, c, c_time, dropout))
        for level, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(stage(c + skips.pop(), width * mult, size))
                c = width * mult
            if level > 0:
                self.up.append(Upsample(c, c, 3, padding=1))
                size *= 2
        self.norm_out, self.conv_out = group_norm(c), zeroed(nn.Conv2d(c, 3, 3, padding=1))
        self.to(memory_format=torch.channels_last)      # about twice as fast on a CPU, measured

    def embed(self, t, t_next):
        """(B,) -> (B, 4 width), what every residual block is told. A teacher needs no t_next."""
        return F.silu(self.time_mlp(time_embedding(t, self.config["width"])))

    def forward(self, x, t, t_next=None):
        emb = self.embed(t, t_next)
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for layer in self.down:
            h = layer(h) if isinstance(layer, nn.Conv2d) else layer[1](layer[0](h, emb))
            skips.append(h)
        h = self.mid2(self.mid_attention(self.mid1(h, emb)), emb)
        for layer in self.up:
            h = (layer(h) if isinstance(layer, Upsample)
                 else layer[1](layer[0](torch.cat([h, skips.pop()], dim=1), emb)))
        return self.conv_out(F.silu(self.norm_out(h)))


def parameter_count(net):
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())


# ==== KNOWN ANSWERS: data whose optimal prediction can be written down ========================

class MixtureNet:
    """A perfect network for data from an equal mixture of N(mean_i, std^2 I); one mean: Gaussian.

    x_t given i is N(sqrt(ab) mean_i, ab std^2 + 1 - ab), so that
    E[x0 | x_t] = sum_i p(i | x_t) (mean_i + ab^(1/2) std^2 (x_t - sqrt(ab) mean_i) / variance).
    """
    clip = False

    def __init__(self, means, std, alpha_bar):
        self.means, self.std, self.alpha_bar = means, std, alpha_bar           # means: (M, D)

    def x0(self, x, t):
        """E[x0 | x_t = x]: (B, D), (B,) -> (B, D)."""
        ab = spread(self.alpha_bar[t], x)                                      # (B, 1)
        offset = x[:, None] - ab[..., None].sqrt() * self.means                # (B, M, D)
        variance = ab * self.std ** 2 + 1 - ab                                 # (B, 1)
        share = torch.softmax(-offset.square().sum(-1) / (2 * variance), 1)[..., None]
        shrink = ab.sqrt() * self.std ** 2 / variance
        return (share * (self.means + shrink[..., None] * offset)).sum(1)

    def __call__(self, x, t, t_next=None):
        ab = spread(self.alpha_bar[t], x)
        return (ab.sqrt() * x - self.x0(x, t)) / (1 - ab).sqrt()


def gaussian_flow(x_T, mean, std, alpha_bar):
    """Where infinitely many DDIM steps take x_T if the data are N(mean, std^2 I): same quantile."""
    ab = alpha_bar[T]
    return mean + std * (x_T - ab.sqrt() * mean) / (ab * std ** 2 + 1 - ab).sqrt()


def demo(out, seed, device):
    """Run the solvers on a Gaussian and a mixture in the plane; print errors, draw ddpm.png."""
    alpha_bar, generator, n = linear_alpha_bar(device), torch.Generator().manual_seed(seed), POINTS
    x_T, noise, more = torch.randn(3, n, 2, generator=generator).to(device)
    circle = torch.arange(6, device=device) * math.pi / 3
    gaussian = MixtureNet(torch.tensor([[0.5, -0.3]], device=device), 0.2, alpha_bar)
    six = MixtureNet(0.7 * torch.stack([circle.cos(), circle.sin()], 1), 0.07, alpha_bar)
    exact = six.means.repeat(n // 6 + 1, 1)[:n] + six.std * noise
    exact_end, rows = gaussian_flow(x_T, gaussian.means, gaussian.std, alpha_bar), []
    counts, seeds = (2, 3, 4, 6, 8, 20, 50, 1000), range(seed, seed + n)

    print("       one Gaussian: rms distance to the exact end, eta 0    std at eta 1\n  NFE  "
          + "  ".join(f"{kind:>5s} quadratic" for kind in SOLVERS) + f"  exact: {gaussian.std:.3f}")
    for steps in counts:
        rms = [(sample(gaussian, x_T, hand_solver(kind, "quadratic", steps), alpha_bar)
                - exact_end).square().mean().sqrt().item() for kind in SOLVERS]
        ddim = hand_solver("DDIM", "uniform", steps)
        std = sample(gaussian, x_T, ddim, alpha_bar, 1.0, seeds).std(0).mean().item()
        rows.append(rms)
        print(f"{steps:5d}  " + "  ".join(f"{value:15.5f}" for value in rms) + f"  {std:12.5f}")
        log_line(out / "log.jsonl", nfe=steps, rms=rms, std=std)

    figure, axes = new_figure(2, 5, (14, 5.8))
    panels = [(f"forward, t = {t}", q_sample(exact, torch.full((n,), t), more, alpha_bar))
              for t in (0, 50, 200, 500, 1000)]
    panels += [(f"reverse, {steps} steps, eta {eta:.0f}", sample(
        six, x_T, hand_solver("DDIM", "uniform", steps), alpha_bar, eta, seeds))
        for steps, eta in ((4, 0.0), (20, 0.0), (1000, 0.0), (20, 1.0))]
    for axis, (title, points) in zip(axes.flat, panels):
        axis.scatter(*points.T.cpu(), s=1, color="C0" if "forward" in title else "C1")
        axis.set(title=title, xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal")
    axes[1, 4].loglog(counts, rows, "o-", markersize=3)
    axes[1, 4].legend(SOLVERS, fontsize=8)
    axes[1, 4].set(title="rms error, one Gaussian", xlabel="network evaluations")
    figure.savefig(out / "ddpm.png")


# ==== COMMAND LINE ============================================================================

def parse_args(argv=None):
    """Command line of ddpm.py."""
    p = parser_for(__doc__, "python ddpm.py --seed 1")
    run_flags(p, trains=False)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device, out = pick_device(args.device), claim_run(args, "ddpm")
    print("config:", vars(args))
    demo(out, args.seed, device)
    print(f"wrote {out}/ddpm.png, log.jsonl")


if __name__ == "__main__":
    run_main(main)
