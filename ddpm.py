"""Denoising diffusion: noise schedule, loss, the jump, solvers, U-Net, known answers.

The ground everything else stands on: Ho et al. 2020 (DDPM, arXiv 2006.11239), Song et al. 2020
(DDIM, arXiv 2010.02502) and Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095).

    python ddpm.py            # no data and no internet needed, five seconds

Run alone it replaces the U-Net by the *optimal* prediction for a mixture of Gaussians, which is
known in closed form, compares the solvers with 1000 small jumps, and lets a policy gradient learn
three better jumps in a second: the idea of rl_distill.py in twenty lines. Writes ddpm.png and
log.jsonl to a new folder under runs/. Next file: teacher.py.
"""
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# For the demonstration and main alone:
from harness.images import plot_panels
from harness.runs import claim_run, log_line, parser_for, run_main

# ==============================================================================================
# CONVENTIONS, used in every file
#   images   float in [-1, 1], shape (B, 3, H, W)
#   t        integer in 0..T. t = 0 is clean data; sampling starts at t = T, which is trained too
#   ab, ab'  alpha_bar[t] and alpha_bar[t_next], the share of signal in the variance of x_t, x_next
#   v        what a network predicts: x_t = sqrt(ab) x0 + sqrt(1 - ab) eps, and
#            v = sqrt(ab) eps - sqrt(1 - ab) x0 (Salimans & Ho 2022, appendix D)
#   jump     one move t -> t_next, one network evaluation; K jumps make an image, NFE = K
#   grid     K + 1 decreasing times from T to 0; rho = t_next / t
#   lean     extrapolation weight: how far a jump follows the trend of the last two estimates
#   gain     of a residual block: it adds (1 + gain) times its branch; 0 changes nothing
#   landing  where a jump ends, x_next = mean + sigma noise; sigma is 0 unless something explores
# ==============================================================================================

T = 1000                                  # number of noise levels, Ho et al. section 4
BETA_FIRST, BETA_LAST = 1e-4, 0.02        # linear schedule, Ho et al. section 4
GRIDS = ("uniform", "quadratic", "logsnr")      # see make_grid
SOLVERS = ("DDIM", "DPM++", "AB2")        # baseline solvers, see baseline_solver
NOISE_STREAMS = 1009                      # per seed: the start, then up to T jumps
POINTS = 1000                             # in the plane, of the closed-form demonstration

# ==== NOISE SCHEDULE AND FORWARD PROCESS ======================================================


def linear_alpha_bar(device="cpu"):
    """alpha_bar[t] = prod_{s <= t} (1 - beta_s) for t = 0..T; alpha_bar[0] = 1. Shape (T + 1,)."""
    beta = torch.linspace(BETA_FIRST, BETA_LAST, T, dtype=torch.float64)       # beta_1 .. beta_T
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])
    return alpha_bar.float().to(device)


def expand_like(values, like):
    """(B,) -> (B, 1, ..): trailing 1s, so that one value per image broadcasts over `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def q_sample(x0, t, eps, alpha_bar) -> torch.Tensor:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps. Eq. 4, Ho et al. 2020.
    x0, eps: (B, ...); t: (B,) integers in 0..T."""
    ab = expand_like(alpha_bar[t], x0)
    return ab.sqrt() * x0 + (1 - ab).sqrt() * eps


def x0_and_eps(x_t, t, v, alpha_bar) -> tuple[torch.Tensor, torch.Tensor]:
    """x0_hat = sqrt(ab) x_t - sqrt(1 - ab) v, eps_hat = sqrt(1 - ab) x_t + sqrt(ab) v. Appendix D,
    Salimans & Ho 2022. x_t, v: (B, ...); t: (B,). For any v at all, noising x0_hat by eps_hat
    gives x_t again."""
    ab = expand_like(alpha_bar[t], x_t)
    return ab.sqrt() * x_t - (1 - ab).sqrt() * v, (1 - ab).sqrt() * x_t + ab.sqrt() * v


def simple_loss(net, x0, t, eps, alpha_bar) -> torch.Tensor:
    """L_simple = mean |eps - eps_hat(x_t, t)|^2. Eq. 14 and Algorithm 1, Ho et al. 2020.
    net(x_t, t) -> v, which becomes eps_hat by x0_and_eps. Returns a scalar."""
    x_t = q_sample(x0, t, eps, alpha_bar)
    _, eps_hat = x0_and_eps(x_t, t, net(x_t, t).float(), alpha_bar)
    return F.mse_loss(eps_hat, eps)


# ==== THE JUMP: one function for DDIM, DDPM, DPM-Solver++ and the policy of rl_distill.py =====

def ddim_sigma(t, t_next, eta, alpha_bar) -> torch.Tensor:
    """sigma = eta sqrt((1 - ab') / (1 - ab)) sqrt(1 - ab / ab'). Eq. 16, Song et al. 2020.
    t, t_next: (B,) integers with t > t_next. Returns (B,); 0 where t_next = 0."""
    ab, ab_next = alpha_bar[t], alpha_bar[t_next]
    return eta * ((1 - ab_next) / (1 - ab)).sqrt() * (1 - ab / ab_next).sqrt()


def jump(x_t, x0_hat, t, t_next, alpha_bar, lean=None, x0_last=None, eta=0.0):
    """Mean (B, ...) and sigma (B,) of the jump t -> t_next.

        D    = x0_hat + lean (x0_hat - x0_last)                 follow the trend of the estimates
        eps  = (x_t - sqrt(ab) D) / sqrt(1 - ab)                the noise that belongs to D
        mean = sqrt(ab') D + sqrt(1 - ab' - sigma^2) eps        Eq. 12, Song et al. 2020

    Without lean it is DDIM (eta = 0) or DDPM (eta = 1 and t_next = t - 1: the posterior, Eqs. 6-7,
    Ho et al.); lean = dpm_lean(...) makes it DPM-Solver++(2M). x_t, x0_hat, x0_last: (B, ...);
    x0_last is the estimate of the evaluation before; lean, t, t_next: (B,), t > t_next."""
    D = x0_hat if lean is None else x0_hat + expand_like(lean, x_t) * (x0_hat - x0_last)
    ab, ab_next = expand_like(alpha_bar[t], x_t), expand_like(alpha_bar[t_next], x_t)
    sigma = ddim_sigma(t, t_next, eta, alpha_bar)
    eps = (x_t - ab.sqrt() * D) / (1 - ab).sqrt()
    direction = (1 - ab_next - expand_like(sigma, x_t) ** 2).clamp(min=0).sqrt()
    return ab_next.sqrt() * D + direction * eps, sigma


def half_log_snr(alpha_bar):
    """lambda = log(sqrt(ab) / sqrt(1 - ab)), any shape; infinite at t = 0."""
    return torch.logit(alpha_bar) / 2


def dpm_lean(t, t_next, t_last, alpha_bar) -> torch.Tensor:
    """The lean of DPM-Solver++(2M): h / (2 h_last) with h = lambda(t_next) - lambda(t) and h_last
    that of the jump before, t_last -> t. Algorithm 2, Lu et al. 2022.
    All times (B,) integers. 0 at the first jump (t_last = t) and into t = 0, an infinite lambda."""
    now, then, last = (half_log_snr(alpha_bar[s]) for s in (t, t_next, t_last))
    return torch.where((t_last > t) & (t_next > 0), (then - now) / (2 * (now - last)), 0.0)


# ==== SOLVERS: how to make an image in K evaluations ==========================================

class Solver(NamedTuple):
    """Lists that serve every image, or tensors with one row per image: times (B, K + 1), leans
    (B, K), gains (B, K, n). A rollout has drawn rows; what is deployed and saved is lists."""
    times: list                     # K + 1 integers, decreasing from T to 0
    leans: list                     # K floats; the first has nothing to lean on
    gains: list = None              # K lists, a float per residual block or channel; None: none

    def per_image(self, n, device):
        """Times, leans and gains as tensors of n rows (gains None: 0 columns). The first lean is 0,
        whatever it says here: there is nothing to lean on. ValueError: times that do not decrease
        from T to 0, or lengths that do not fit."""
        K = len(self.leans[0] if torch.is_tensor(self.leans) else self.leans)
        times, leans, gains = (
            (x if torch.is_tensor(x) else torch.tensor(x)[None]).to(device).expand(n, *[-1] * dims)
            for x, dims in ((self.times, 1), (self.leans, 1),
                            ([[]] * K if self.gains is None else self.gains, 2)))
        if ((times[:, 0] != T).any() or (times[:, -1] != 0).any() or (times.diff(dim=1) >= 0).any()
                or times.shape[1] != K + 1 or gains.shape[1] != K):
            raise ValueError(f"no times that decrease from {T} to 0, with a lean, and gains where "
                             f"there are any, of every jump: {self}")
        return times, leans * (torch.arange(K, device=device) > 0), gains

    def action(self, n_gains):
        """u (K, 2 + n_gains) of a Solver of lists: the inverse of solver_of(); None: gains of 0."""
        times = torch.tensor(self.times, dtype=torch.float64)
        logit_rho = torch.logit(times[1:] / times[:-1], eps=1e-6).float()
        known = self.gains and len(self.gains[0]) > 0
        gains = torch.tensor(self.gains if known else [[0.0] * n_gains] * len(logit_rho))
        return torch.cat([torch.stack([logit_rho, torch.tensor(self.leans)], 1), gains], 1)


def make_grid(name, steps):
    """Decreasing list of steps + 1 integers from T to 0: 'uniform' and 'quadratic' in t (appendix
    D.2, Song et al. 2020); 'logsnr': uniform in lambda (Lu et al. 2022), its last point, t = 1,
    moved on to 0. ValueError for what cannot be."""
    if not 1 <= steps <= T or name not in GRIDS:
        raise ValueError(f"no '{name}' grid of {steps} steps; take one of {GRIDS} and 1..{T} steps")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    grid = (T * u ** (2 if name == "quadratic" else 1)).round().int().tolist()
    if name == "logsnr":
        levels = half_log_snr(linear_alpha_bar()[1:])                          # of t = 1 .. T
        wanted = levels[0] + u * (levels[-1] - levels[0])
        grid = [*((levels - wanted[:, None]).abs().argmin(1) + 1).tolist()[:-1], 0]
    for k in range(steps - 1, -1, -1):                     # push apart what rounding made equal
        grid[k] = max(grid[k], grid[k + 1] + 1)
    return [min(t, T - k) for k, t in enumerate(grid)]


def baseline_solver(kind, grid_name, steps):
    """Solver of a kind on a grid. 'DDIM' never leans, 'DPM++' is DPM-Solver++(2M), 'AB2' leans by
    1/2 at every jump after the first, the last one too: the rule of Adams and Bashforth for equal
    steps, as in PNDM (Liu et al. 2022, arXiv 2202.09778) with more terms, and for eps. ValueError
    for any other."""
    if kind not in SOLVERS:
        raise ValueError(f"no solver '{kind}'; take one of {SOLVERS}")
    times = torch.tensor(make_grid(grid_name, steps))
    t, t_next, t_last = times[:-1], times[1:], torch.cat([times[:1], times[:-2]])
    leans = (dpm_lean(t, t_next, t_last, linear_alpha_bar()) if kind == "DPM++" else
             torch.where(t_last > t, 0.5 if kind == "AB2" else 0.0, 0.0))
    return Solver(times.tolist(), leans.tolist())


def baseline_kinds(net, steps):
    """The baseline solvers that differ: with one evaluation all are DDIM; and a student that is
    told where to land (net.estimates_image is False) has no formula for leans, though a policy may
    learn some."""
    return SOLVERS if net.estimates_image and steps > 1 else SOLVERS[:1]


def solver_of(u):
    """The Solver of u: of every jump logit rho, lean, n gains. u (B, K, 2 + n) gives rows, one per
    image; u (K, 2 + n) gives lists, for every image. t_next = round(rho t), but at most t - 1, and
    high enough for the jumps to come to still fall. The last jump lands at 0, whatever u says."""
    if u.dim() == 2:
        return Solver(*(rows[0].tolist() for rows in solver_of(u[None])))
    K, times = u.shape[1], [torch.full_like(u[:, 0, 0], T).long()]
    for k in range(K - 1):
        t_next = (torch.sigmoid(u[:, k, 0]) * times[-1]).round().long().clamp(min=K - 1 - k)
        times.append(torch.minimum(t_next, times[-1] - 1))
    times.append(torch.zeros_like(times[0]))
    return Solver(torch.stack(times, 1), u[:, :, 1], u[:, :, 2:])


def action_mask(steps, n_gains):
    """Which entries of u act, (K, 2 + n_gains) of bool: the last rho and the first lean do not."""
    mask = torch.ones(steps, 2 + n_gains, dtype=torch.bool)
    mask[-1, 0] = mask[0, 1] = False
    return mask


def seeded_noise(seeds, shape, stream=0, device="cpu"):
    """Standard normal noise, one seed per image: the same seed is the same image in any batch.
    seeds: iterable of int; shape: of one image; stream: 0 for the start noise, k for jump k.
    Drawn on the CPU, whose generator takes a seed modulo 2^32: an odd factor keeps them distinct.
    Returns (len(seeds), *shape)."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(
        int(seed) * NOISE_STREAMS + stream)) for seed in seeds]).to(device)


def estimate(net, x_t, t, t_next, gains, alpha_bar):
    """One network evaluation, as x0_hat (B, ...). Where it is an image it is kept in [-1, 1],
    as in Ho et al.'s code; jump() then finds the epsilon that belongs to it."""
    x0_hat, _ = x0_and_eps(x_t, t, net(x_t, t, t_next, gains).float(), alpha_bar)
    return x0_hat.clamp(-1, 1) if net.estimates_image else x0_hat


def step(net, x_t, x0_last, t, t_next, lean, gains, alpha_bar, eta=0.0):
    """One network evaluation and one jump: mean (B, ...), sigma (B,), x0_hat (B, ...)."""
    x0_hat = estimate(net, x_t, t, t_next, gains, alpha_bar)
    return *jump(x_t, x0_hat, t, t_next, alpha_bar, lean, x0_last, eta), x0_hat


@torch.no_grad()
def sample(net, x_T, solver, alpha_bar, eta=0.0, seeds=None, path=False):
    """Run the reverse process. Algorithm 2, Ho et al. (eta = 1), DDIM or DPM-Solver++ (eta = 0).
    net(x, t, t_next, gains) -> v; x_T: (B, ...) standard normal; seeds: one per image, where
    eta > 0. Returns x_0 (B, ...), with path the list of all K + 1 states, from x_T on. Nothing adds
    noise on the jump into t = 0: its sigma is 0. ValueError: no seeds, or an impossible solver."""
    if eta > 0 and seeds is None:
        raise ValueError("eta above 0 adds noise: give one seed per image")
    times, leans, gains = solver.per_image(len(x_T), x_T.device)
    x, x0_last, states = x_T, x_T, [x_T]        # x0_last: anything, for the first lean is 0
    for k in range(leans.shape[1]):
        x, sigma, x0_last = step(net, x, x0_last, times[:, k], times[:, k + 1], leans[:, k],
                                 gains[:, k], alpha_bar, eta)
        if eta > 0 and sigma.any():
            x = x + expand_like(sigma, x) * seeded_noise(seeds, x.shape[1:], k + 1, x.device)
        states += [x] * path
    return states if path else x


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
    """norm SiLU conv, + time, norm SiLU dropout conv: the branch. (B, C, H, W) -> (B, C', H, W).
    Returns shortcut(x) + (1 + gain) branch(x); gain: (B, 1), or (B, C') of every channel."""

    def __init__(self, c_in, c_out, c_time, dropout):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, c_out)
        self.norm2, self.conv2 = group_norm(c_out), zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb, gain=None):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        if gain is not None:
            h = (1 + gain)[:, :, None, None] * h
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


class UNet(nn.Module):
    """The teacher's network: (x_t (B, 3, H, W), t (B,)) -> v (B, 3, H, W).
    forward's gains: (B, blocks), one of every residual block in the order of evaluation; or
    (B, channels) of every channel of their branches; None or 0 columns: the plain network.
    DEVIATES: in Ho et al. it predicts eps, whose error is magnified by 1 / sqrt(ab), up to 157
    times, in x0_hat. Predicting v, an untrained network's eps_hat is right at t = T. The loss is
    theirs: of eps, ab |v - v_hat|^2.
    width: channels at full resolution; mults: channel multiple per level, each level but the first
    halves the image; blocks: residual blocks per level; attention: resolutions that have it.
    `config` rebuilds the network, and is what a checkpoint stores."""
    estimates_image = True          # x0_hat is an estimate of the image, so it lies in [-1, 1]

    def __init__(self, width, mults, blocks, attention, dropout=0.0, image_size=32):
        super().__init__()
        self.config = dict(width=width, mults=list(mults), blocks=blocks, attention=list(attention),
                           dropout=dropout, image_size=image_size)
        c_time = 4 * width
        self.time_mlp = nn.Sequential(
            nn.Linear(width, c_time), nn.SiLU(), nn.Linear(c_time, c_time))
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)

        def stage(c_in, c_out, size):
            last = Attention(c_out) if size in attention else nn.Identity()
            return nn.ModuleList([ResBlock(c_in, c_out, c_time, dropout), last])

        self.down = nn.ModuleList()
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
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(stage(c + skips.pop(), width * mult, size))
                c = width * mult
            if level > 0:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))
                size *= 2
        self.norm_out, self.conv_out = group_norm(c), zeroed(nn.Conv2d(c, 3, 3, padding=1))
        self.branches = [m.conv2.out_channels for m in self.modules() if isinstance(m, ResBlock)]
        self.to(memory_format=torch.channels_last)      # about twice as fast on a CPU, measured

    def embed(self, t, t_next):
        """(B,) -> (B, 4 width), what every residual block is told. A teacher needs no t_next."""
        return F.silu(self.time_mlp(time_embedding(t, self.config["width"])))

    def forward(self, x, t, t_next=None, gains=None):
        emb = self.embed(t, t_next)
        gain = itertools.repeat(None)
        if gains is not None and gains.shape[1]:
            each = gains.shape[1] == len(self.branches)
            gain = iter(gains.split([1] * len(self.branches) if each else self.branches, dim=1))
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for layer in self.down:
            h = (layer(h) if isinstance(layer, nn.Conv2d) else
                 layer[1](layer[0](h, emb, next(gain))))
            skips.append(h)
        h = self.mid2(self.mid_attention(self.mid1(h, emb, next(gain))), emb, next(gain))
        for layer in self.up:
            h = (layer(F.interpolate(h, scale_factor=2.0)) if isinstance(layer, nn.Conv2d) else
                 layer[1](layer[0](torch.cat([h, skips.pop()], dim=1), emb, next(gain))))
        return self.conv_out(F.silu(self.norm_out(h)))


def parameter_count(net):
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())


# ==== KNOWN ANSWERS: data whose optimal prediction can be written down ========================

class MixtureNet:
    """A perfect network for data from an equal mixture of N(mean_i, std^2 I); one mean: Gaussian.
    x_t given i is N(sqrt(ab) mean_i, ab std^2 + 1 - ab), so that
    E[x0 | x_t] = sum_i p(i | x_t) (mean_i + ab^(1/2) std^2 (x_t - sqrt(ab) mean_i) / variance)."""
    estimates_image = False         # points of a plane, of no range to be kept in

    def __init__(self, means, std, alpha_bar):
        self.means, self.std, self.alpha_bar = means, std, alpha_bar           # means: (M, D)

    def __call__(self, x, t, t_next=None, gains=None):
        """(B, D), (B,) -> v (B, D), that of x0_hat = E[x0 | x_t = x]."""
        ab = expand_like(self.alpha_bar[t], x)                                 # (B, 1)
        offset = x[:, None] - ab[..., None].sqrt() * self.means                # (B, M, D)
        variance = ab * self.std ** 2 + 1 - ab                                 # (B, 1)
        share = torch.softmax(-offset.square().sum(-1) / (2 * variance), 1)    # (B, M)
        shrink = ab.sqrt() * self.std ** 2 / variance
        x0_hat = (share[..., None] * (self.means + shrink[..., None] * offset)).sum(1)
        return (ab.sqrt() * x - x0_hat) / (1 - ab).sqrt()


def policy_gradient(net, x_T, target, start, alpha_bar, generator, updates=200, std=0.1, rate=0.3):
    """The main job of rl_distill.py for points in the plane: times and leans from a reward alone,
    from the Solver `start` on. x_T: (N, 2), target: (N, 2), the ends to reach. Returns a Solver."""
    mean, device = start.action(0).to(x_T.device), x_T.device  # (K, 2): logit rho, lean
    for _ in range(updates):
        pick = torch.randint(len(x_T), (64,), generator=generator).repeat_interleave(2)
        noise = torch.randn(64, *mean.shape, generator=generator) * action_mask(len(mean), 0)
        noise = torch.stack([noise, -noise], 1).flatten(0, 1).to(device)    # pairs, (128, K, 2)
        x_0 = sample(net, x_T[pick], solver_of(mean + std * noise), alpha_bar)
        R = -(x_0 - target[pick]).square().sum(1)                   # reward
        A = R - R.reshape(-1, 2).mean(1).repeat_interleave(2)       # advantage over its pair
        A = A / A.square().mean().sqrt()
        mean = mean + rate * std * (A[:, None, None] * noise).mean(0)       # std^2 A score
    return solver_of(mean)


def demo(out, seed, device):
    """Three jumps, of the solvers and of one that is learned, on a mixture of six; where 1000 jumps
    end is the target. Prints a table and draws a picture."""
    alpha_bar, generator = linear_alpha_bar(device), torch.Generator().manual_seed(seed)
    corner = torch.arange(6, device=device) * math.pi / 3
    net = MixtureNet(0.7 * torch.stack([corner.cos(), corner.sin()], 1), 0.07, alpha_bar)
    x_T = torch.randn(2, POINTS, 2, generator=generator).to(device)     # to learn from; to measure
    ends = [sample(net, x, baseline_solver("DDIM", "uniform", T), alpha_bar) for x in x_T]

    def rms(solver, i):
        x_0 = sample(net, x_T[i], solver, alpha_bar)
        return (x_0 - ends[i]).square().sum(1).mean().sqrt().item()
    solvers = {name: min((baseline_solver(name, grid, 3) for grid in GRIDS),
                         key=lambda solver: rms(solver, 0)) for name in SOLVERS}
    solvers["learned"] = policy_gradient(net, x_T[0], ends[0], solvers["DDIM"], alpha_bar,
                                         generator)
    print("three jumps, rms distance to where 1000 jumps end, times | leans")
    for name, solver in solvers.items():
        print(f"{name:12s}{(error := rms(solver, 1)):.4f}  ", *solver.times, "|",
              *(f"{lean:.2f}" for lean in solver.leans))
        log_line(out / "log.jsonl", name=name, rms=error, **solver._asdict())
    points = [(f"3 jumps, {name}", sample(net, x_T[1], solvers[name], alpha_bar))
              for name in ("DDIM", "AB2", "learned")] + [("1000 jumps", ends[1])]
    plot_panels([*((label, "", [("", *x.T.cpu(), ".")]) for label, x in points),
                 ("jumps made", "t", [(name, range(4), solvers[name].times, "o-")
                                      for name in ("DDIM", "learned")])], out / "ddpm.png")


# ==== COMMAND LINE ============================================================================

def parse_args(argv=None):
    """Command line of ddpm.py."""
    return parser_for(__doc__, "python ddpm.py --seed 1", trains=False).parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = claim_run(args, "ddpm")
    demo(out, args.seed, args.device)
    print(f"wrote {out}/ddpm.png, log.jsonl")


if __name__ == "__main__":
    run_main(main)
