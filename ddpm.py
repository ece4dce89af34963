"""Denoising diffusion: noise schedule, U-Net, loss, one reverse step, sampler, checkpoints.

The ground everything else stands on: Ho et al. 2020 (DDPM, arXiv 2006.11239) and Song et al. 2020
(DDIM, arXiv 2010.02502). ReDiF distils exactly this kind of model.

    python ddpm.py            # no data and no network needed, under a minute on two CPU cores

Run alone it replaces the U-Net by the *optimal* epsilon of a Gaussian and of a Gaussian mixture,
which is known in closed form, so that the sampler can be checked against the right answer.
Writes ddpm.png and log.jsonl to a new folder under runs/. Next file: teacher.py.
"""
import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ==============================================================================================
# CONVENTIONS, used in every file
#   images   float in [-1, 1], shape (B, 3, H, W)
#   t        integer in 0..T. t = 0 is clean data; t = T is where sampling starts (trained!)
#   grid     decreasing list of t from T to 0; a grid of K + 1 entries costs K evaluations
#   NFE      network evaluations per image
# ==============================================================================================

T = 1000                                  # number of noise levels, Ho et al. section 4
BETA_FIRST, BETA_LAST = 1e-4, 0.02        # linear schedule, Ho et al. section 4
FORMAT, CHECKSUM = "redif-2", 64          # checkpoint format; length of a SHA-256 in hex
GRIDS = ("uniform", "quadratic", "logsnr")      # hand grids, see make_grid
LOCKS, STOP = {}, {"signal": None}        # folders of this process; the signal that came
DEMO_POINTS = 1000                        # points in the plane of the closed-form demonstration


class BadInput(Exception):
    """Something the user gave is unusable; the message is the one sentence that is printed."""


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 in 0..255, values outside are clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_unit(images):
    """(B, 3, H, W) in [-1, 1] -> float in [0, 1], values outside are clipped."""
    return (images.float().clamp(-1, 1) + 1) / 2


# ==============================================================================================
# NOISE SCHEDULE AND FORWARD PROCESS
# ==============================================================================================

def linear_alpha_bar(device="cpu"):
    """alpha_bar[t] = prod_{s <= t} (1 - beta_s) for t = 0..T; alpha_bar[0] = 1. Shape (T + 1,)."""
    beta = torch.linspace(BETA_FIRST, BETA_LAST, T, dtype=torch.float64)       # beta_1 .. beta_T
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])
    return alpha_bar.float().to(device)


def at(table, t, like):
    """table[t] with trailing 1s, so that it broadcasts over `like`: (B,) -> (B, 1, 1, 1)."""
    return table[t].reshape(-1, *[1] * (like.dim() - 1))


def q_sample(x0, t, eps, alpha_bar) -> torch.Tensor:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps. Eq. 4, Ho et al. 2020.

    x0, eps: (B, ...); t: (B,) integers in 0..T.
    """
    # -- exercise 1
    ab = at(alpha_bar, t, x0)
    return ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    # --


def simple_loss(net, x0, t, eps, alpha_bar) -> torch.Tensor:
    """L_simple = mean |eps - eps_hat(x_t, t)|^2. Eq. 14 and Algorithm 1, Ho et al. 2020."""
    # -- exercise 1
    eps_hat = net(q_sample(x0, t, eps, alpha_bar), t)
    return F.mse_loss(eps_hat.float(), eps)
    # --


# ==============================================================================================
# REVERSE PROCESS: one step for everything between DDIM (eta = 0) and DDPM (eta = 1)
# ==============================================================================================

def predict_x0(x_t, t, eps_hat, alpha_bar, clip=True):
    """Denoised estimate and the epsilon that belongs to it.

    x0_hat = (x_t - sqrt(1 - ab_t) eps_hat) / sqrt(ab_t): first bracket of Eq. 12, Song et al. 2020.
    With clip, x0_hat is kept in [-1, 1] (as in Ho et al.'s code) and eps_hat is recomputed so that
    the pair still explains x_t. Returns (x0_hat, eps_hat), each of x_t's shape.
    """
    ab = at(alpha_bar, t, x_t)
    x0_hat = (x_t - (1 - ab).sqrt() * eps_hat) / ab.sqrt()
    if clip:
        x0_hat = x0_hat.clamp(-1, 1)
        eps_hat = (x_t - ab.sqrt() * x0_hat) / (1 - ab).sqrt()
    return x0_hat, eps_hat


def half_log_snr(alpha_bar):
    """lambda = log(sqrt(ab) / sqrt(1 - ab)), any shape; infinite at t = 0."""
    return torch.logit(alpha_bar) / 2


def ddim_sigma(t, t_next, eta, alpha_bar) -> torch.Tensor:
    """sigma = eta sqrt((1 - ab') / (1 - ab)) sqrt(1 - ab / ab'). Eq. 16, Song et al. 2020.

    t, t_next: (B,) integers with t > t_next. Returns (B,); 0 where t_next = 0.
    """
    # -- exercise 2
    ab, ab_next = alpha_bar[t], alpha_bar[t_next]
    return eta * ((1 - ab_next) / (1 - ab)).sqrt() * (1 - ab / ab_next).sqrt()
    # --


def ddim_step(x0_hat, eps_hat, t, t_next, eta, alpha_bar) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sigma of the jump t -> t_next. Eq. 12, Song et al. 2020.

    mean = sqrt(ab') x0_hat + sqrt(1 - ab' - sigma^2) eps_hat. eta = 0 is DDIM; eta = 1 with
    t_next = t - 1 is DDPM's posterior (Eqs. 6-7, Ho et al.). Returns mean (B, ...) and sigma (B,).
    """
    # -- exercise 2
    sigma = ddim_sigma(t, t_next, eta, alpha_bar)
    ab_next = at(alpha_bar, t_next, x0_hat)
    direction = (1 - ab_next - sigma.reshape(ab_next.shape) ** 2).clamp(min=0).sqrt()
    return ab_next.sqrt() * x0_hat + direction * eps_hat, sigma
    # --


def make_grid(name, steps):
    """Decreasing list of steps + 1 integers from T to 0, a hand grid.

    'uniform' and 'quadratic' in t (appendix D.2, Song et al. 2020); 'logsnr': uniform in
    lambda = log(sqrt(ab / (1 - ab))) (Lu et al. 2022), its last point, t = 1, moved on to 0.
    """
    if not 1 <= steps <= T:
        raise BadInput(f"the number of steps must be between 1 and {T}, not {steps}")
    if name not in GRIDS:
        raise BadInput(f"unknown grid '{name}'; choose one of {', '.join(GRIDS)}")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if name == "logsnr":
        levels = half_log_snr(linear_alpha_bar()[1:])                          # of t = 1 .. T
        times = time_of_level(levels[0] + u * (levels[-1] - levels[0]), levels).tolist()
        return strictly_decreasing([*times[:-1], 0])
    u = u if name == "uniform" else u ** 2
    return strictly_decreasing([round(v) for v in (T * u).tolist()])


def time_of_level(wanted, levels):
    """Times t >= 1 whose lambda is nearest: (B,) -> (B,) integers; levels: lambda of 1 .. T."""
    return (levels - wanted[:, None]).abs().argmin(1) + 1


def strictly_decreasing(grid):
    """Push apart entries that rounding made equal, within T .. 0: every jump needs t > t_next."""
    for k in range(len(grid) - 2, -1, -1):
        grid[k] = max(grid[k], grid[k + 1] + 1)
    return [min(t, T - k) for k, t in enumerate(grid)]


def check_grid(grid):
    """BadInput for anything but a list of times that decreases from T to 0."""
    if grid[0] != T or grid[-1] != 0 or any(a <= b for a, b in zip(grid, grid[1:])):
        raise BadInput(f"a grid must decrease from {T} to 0, not {grid}")


def seeded_noise(seeds, shape, stream=0, device="cpu"):
    """Standard normal noise, one seed per image: the same seed is the same image in any batch.

    seeds: iterable of int; shape: of one image; stream: 0 for the start noise, k for step k.
    Drawn on the CPU so that all devices agree; its generator uses 32 bits of a seed, so seeds must
    lie below 4e9. Returns (len(seeds), *shape).
    """
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(int(s) * 1009 + stream))
             for s in seeds]
    return torch.stack(noise).to(device)


@torch.no_grad()
def sample(net, x_T, grid, alpha_bar, eta=0.0, seeds=None, clip=True, keep_path=False):
    """Run the reverse process along a grid. Algorithm 2, Ho et al. (eta = 1) or DDIM (eta = 0).

    net(x, t) -> eps_hat; x_T: (B, ...) standard normal; grid: decreasing, from T to 0.
    seeds: one per image, needed where eta > 0. Returns x0 (B, ...), or the list of all states
    x_T .. x_0 with keep_path. Nothing adds noise on the jump into t = 0 (its sigma is 0).
    """
    check_grid(grid)
    x, path = x_T, [x_T]
    for k, (now, then) in enumerate(zip(grid, grid[1:]), start=1):
        t = torch.full((len(x),), now, device=x.device)
        t_next = torch.full_like(t, then)
        x0_hat, eps_hat = predict_x0(x, t, net(x, t).float(), alpha_bar, clip)
        x, sigma = ddim_step(x0_hat, eps_hat, t, t_next, eta, alpha_bar)
        if eta > 0 and then > 0:
            noise = seeded_noise(seeds, x.shape[1:], stream=k, device=x.device)
            x = x + sigma.reshape(-1, *[1] * (x.dim() - 1)) * noise
        path.append(x)
    return path if keep_path else x


def second_order(x_t, x0_hat, t, t_next, x0_last, t_last, alpha_bar):
    """What makes a DDIM step a step of DPM-Solver++(2M). Algorithm 2, Lu et al. 2022.

    x0_hat is extrapolated along lambda from the last evaluation's x0_last at t_last (B,), with
    h = lambda(t_next) - lambda(t):  D = x0_hat + h / (2 h_last) (x0_hat - x0_last); D is x0_hat
    itself at the first step (t_last = t) and on the jump into t = 0, where lambda is infinite.
    Returns (D, eps_hat of D), both like x_t.
    """
    now, then, last = (half_log_snr(alpha_bar[k]) for k in (t, t_next, t_last))
    known = (t_last > t) & (t_next > 0)
    weight = torch.where(known, (then - now) / (2 * (now - last)), 0.0)
    D = x0_hat + weight.reshape(-1, *[1] * (x_t.dim() - 1)) * (x0_hat - x0_last)
    ab = at(alpha_bar, t, x_t)
    return D, (x_t - ab.sqrt() * D) / (1 - ab).sqrt()


@torch.no_grad()
def dpm_solver(net, x_T, grid, alpha_bar, clip=True):
    """DPM-Solver++(2M): what a user would reach for before distilling anything. Lu et al. 2022
    (arXiv 2211.01095). Arguments and result as in sample(), with eta = 0."""
    check_grid(grid)
    x, x0_last, t_last = x_T, x_T, torch.full((len(x_T),), T, device=x_T.device)
    for now, then in zip(grid, grid[1:]):
        t = torch.full_like(t_last, now)
        t_next = torch.full_like(t, then)
        x0_hat, _ = predict_x0(x, t, net(x, t).float(), alpha_bar, clip)
        x, _ = ddim_step(*second_order(x, x0_hat, t, t_next, x0_last, t_last, alpha_bar), t,
                         t_next, 0.0, alpha_bar)
        x0_last, t_last = x0_hat, t
    return x


# ==============================================================================================
# U-NET, Ho et al. 2020, appendix B
# ==============================================================================================

PAPER_UNET = dict(width=128, mults=[1, 2, 2, 2], blocks=2, attention=[16], dropout=0.1)     # 35.7 M
SMALL_UNET = dict(width=32, mults=[1, 2, 4], blocks=1, attention=[8], dropout=0.0)          # 2.7 M


def time_embedding(t, dim):
    """Sinusoidal embedding of integer times (B,) -> (B, dim). Section 3.5, Vaswani et al. 2017."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * freqs                                        # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def group_norm(channels):
    """GroupNorm with 32 groups where there are enough channels, and at least 4 channels a group."""
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
    """Nearest-neighbour doubling, then this 3x3 convolution. (B, C, H, W) -> (B, C', 2H, 2W).

    From 128 channels on it is computed as four 2x2 convolutions, one per output parity: of the
    three taps in a row, two fall on one source pixel and add up. Same result, 9/4 fewer products.
    """

    def forward(self, x):
        B, C, H, W = x.shape
        if C < 128:                            # there the plain way is faster, measured
            return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        fold = self.weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        kernel = torch.einsum("pak,qbl,oikl->pqoiab", fold, fold, self.weight)  # p, q: parities
        kernel = kernel.reshape(-1, C, 2, 2).contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, kernel, self.bias.repeat(4), padding=1)                 # (B, 4C', H+1, W+1)
        y = y.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))                      # channels last
        rows = [torch.stack([y[:, p:p + H, q:q + W, p, q] for q in (0, 1)], dim=3).flatten(2, 3)
                for p in (0, 1)]                                                # (B, H, 2W, C')
        return torch.stack(rows, dim=2).flatten(1, 2).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """Noise predictor: (x_t (B, 3, H, W), t (B,)) -> eps_hat (B, 3, H, W).

    eps_hat = sqrt(1 - ab_t) x_t + sqrt(ab_t) F(x_t, t), F the layers below.
    DEVIATES: in Ho et al. eps_hat is F itself. That network spends its first epochs learning to
    copy x_t at high noise, and what is left of its error is magnified by 1 / sqrt(ab_t), up to 157
    times, in x0_hat. With the skip an untrained network is right at t = T. The loss stays the same.
    width: channels at full resolution; mults: channel multiple per level, each level halves the
    image; blocks: residual blocks per level; attention: resolutions that get self-attention.
    `config` rebuilds the network, and is what a checkpoint stores.
    """

    def __init__(self, width, mults, blocks, attention, dropout=0.0, image_size=32):
        super().__init__()
        sizes = (width, *mults, blocks, image_size)
        if (not all(isinstance(n, int) and n >= 1 for n in sizes) or width * max(mults) > 4096
                or len(mults) > 6 or blocks > 16 or image_size > 1024):
            raise BadInput(f"a U-Net cannot have the sizes {sizes}")
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
        self.register_buffer("alpha_bar", linear_alpha_bar(), persistent=False)
        self.to(memory_format=torch.channels_last)      # about twice as fast on a CPU, measured

    def embed(self, t):
        """(B,) -> (B, 4 width), the vector every residual block is told the time with."""
        return F.silu(self.time_mlp(time_embedding(t, self.config["width"])))

    def encode(self, x, emb):
        """Down path and middle: returns the bottleneck (B, C, h, w) and the list of skips."""
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for layer in self.down:
            h = layer(h) if isinstance(layer, nn.Conv2d) else layer[1](layer[0](h, emb))
            skips.append(h)
        return self.mid2(self.mid_attention(self.mid1(h, emb)), emb), skips

    def decode(self, h, skips, emb):
        """Up path: bottleneck and skips -> (B, 3, H, W)."""
        skips = list(skips)
        for layer in self.up:
            h = (layer(h) if isinstance(layer, Upsample)
                 else layer[1](layer[0](torch.cat([h, skips.pop()], dim=1), emb)))
        return self.conv_out(F.silu(self.norm_out(h)))

    def to_eps(self, out, x, t):
        """The skip, sqrt(1 - ab_t) x_t + sqrt(ab_t) F, in fp32: bf16 cannot copy x_t well."""
        ab = at(self.alpha_bar, t, x)
        return (1 - ab).sqrt() * x + ab.sqrt() * out.float()

    def forward(self, x, t):
        emb = self.embed(t)
        return self.to_eps(self.decode(*self.encode(x, emb), emb), x, t)


def parameter_count(net):
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())


# ==============================================================================================
# DEVICE AND PRECISION
# ==============================================================================================

def pick_device(name="auto"):
    """'auto' takes cuda, then mps, then cpu; any other name must be usable here."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available()
                else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError
        torch.zeros(1, device=device)
        torch.backends.cudnn.allow_tf32 = False         # where we say fp32 we mean it
        return device
    except (RuntimeError, AssertionError):
        raise BadInput(f"device '{name}' cannot be used here; try --device cpu") from None


def autocast(device, enabled=True):
    """bf16 where the hardware computes in it: GPUs from Ampere on, and CPUs with AVX512-BF16 or AMX
    (1.7 times faster there with channels-last, measured). Elsewhere, or not enabled, plain fp32."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = device.type == "cpu" and any(getattr(torch.cpu, n, bool)() for n in names)
    if enabled and native:
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def wait_for(device):
    """Let the GPU finish, so that a clock read now is right."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def chunk_size(device):
    """Images per forward pass where nothing is learned: fills the device, not its memory."""
    return 64 if device.type == "cpu" else 512


# ==============================================================================================
# CHECKPOINTS: one dict of tensors and plain values
# ==============================================================================================

def save_checkpoint(path, kind, **content):
    """Write {format, kind, **content}: the file that torch.save writes, a zip, with the SHA-256 of
    all that stands before it as the zip's comment.

    kind: 'teacher', 'student', ...; content: tensors, plain values, dicts and lists of them.
    """
    memory = io.BytesIO()
    torch.save({"format": FORMAT, "kind": kind, **content}, memory)
    data = bytearray(memory.getvalue())
    data[-2:] = CHECKSUM.to_bytes(2, "little")                      # length of a zip's comment
    data += hashlib.sha256(data).hexdigest().encode()
    write_whole(path, data)


def write_whole(path, data):
    """Write bytes to a temporary name, to the disk, then rename: the old file or the new, never
    half a one, whenever the power fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):                              # Windows opens no folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)                                            # the new name, too
        os.close(folder)


def load_checkpoint(path, kind):
    """Read a checkpoint of the given kind on the CPU. Data only: weights_only=True runs no code.

    kind: a name, or a tuple of names that are all welcome.
    Raises BadInput where the file is missing, truncated, foreign or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"there is no checkpoint {path}; train one, or give the path of another")
    data = path.read_bytes()
    if hashlib.sha256(data[:-CHECKSUM]).hexdigest().encode() != data[-CHECKSUM:]:
        raise BadInput(f"{path} cannot be read: its checksum does not fit, so it is truncated, "
                       "changed since it was saved, or no checkpoint of this project")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:                 # hostile content can make the reader raise anything
        reason = (str(error).strip() or "no reason given").splitlines()[0][:90]
        raise BadInput(f"{path} cannot be read as plain data: {reason}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(f"{path} is not a checkpoint of this project (format {FORMAT})")
    kinds = (kind,) if isinstance(kind, str) else kind
    if content.get("kind") not in kinds:
        raise BadInput(f"{path} holds a {content.get('kind')}; a {' or '.join(kinds)} is needed")
    return content


def settings(args):
    """The flags that decide the result, as plain values; not those that say where and how often."""
    aside = ("out", "resume", "device", "log_every", "save_every")
    return {name: value for name, value in vars(args).items() if name not in aside}


def save_state(path, kind, parts, args, update, seconds):
    """All that --resume needs. parts: {name: network, optimizer, schedule, torch.Generator, or a
    list of tensors (a running statistic)}."""
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    log = path.parent / "log.jsonl"
    save_checkpoint(path, f"{kind}-state", settings=settings(args), update=update, seconds=seconds,
                    log_bytes=log.stat().st_size if log.exists() else 0,
                    rng=torch.get_rng_state(), gpu_rng=gpu, parts={
                        name: p.get_state() if isinstance(p, torch.Generator) else
                        list(p) if isinstance(p, list) else p.state_dict()
                        for name, p in parts.items()})


def load_state(path, kind, parts, args):
    """Put parts, random numbers and log.jsonl back to where save_state found them.

    Returns (update, seconds): zeros where the run was killed before its first checkpoint. Raises
    BadInput where the run had other settings.
    """
    if not path.exists() and {f.name for f in path.parent.iterdir()} <= {".lock", "log.jsonl"}:
        (path.parent / "log.jsonl").unlink(missing_ok=True)
        print("this run had no checkpoint yet, so it starts from the beginning")
        return 0, 0.0
    state = load_checkpoint(path, f"{kind}-state")
    for name, value in settings(args).items():
        if state["settings"].get(name) != value:
            raise BadInput(f"the run in {path.parent} had --{name.replace('_', '-')} "
                           f"{state['settings'].get(name)}, not {value}; resume with the same")
    try:
        for name, part in parts.items():
            put_back = (part.set_state if isinstance(part, torch.Generator) else
                        part.extend if isinstance(part, list) else part.load_state_dict)
            put_back(state["parts"][name])
        torch.set_rng_state(state["rng"])
        if len(state["gpu_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["gpu_rng"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise BadInput(f"{path} does not fit this run ({str(error)[:90]})") from None
    log = path.parent / "log.jsonl"
    if log.exists() and log.stat().st_size > state["log_bytes"]:
        os.truncate(log, state["log_bytes"])            # lines written after the checkpoint
    print(f"resumed at update {state['update']}")
    return state["update"], state["seconds"]


def load_weights(net, weights, path="checkpoint"):
    """Copy a state dict into net, exactly; BadInput where names or shapes differ, or for NaN."""
    try:
        net.load_state_dict({k: v.float() for k, v in weights.items()})
    except (RuntimeError, AttributeError, TypeError) as error:
        raise BadInput(f"{path} does not fit the network its config describes: "
                       f"{str(error).splitlines()[-1].strip()[:120]}") from None
    if not all(p.isfinite().all() for p in net.parameters()):
        raise BadInput(f"{path} holds weights that are not finite; train it again")
    return net


@contextlib.contextmanager
def rebuilding(path, what):
    """Within: whatever the content of a checkpoint makes go wrong is one sentence."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"{path} has no usable {what} ({type(error).__name__}: "
                       f"{str(error).strip()[:90]})") from None


def half_weights(net):
    """State dict in fp16, for the small files that are handed on (loaded back as fp32)."""
    return {k: v.detach().half().cpu() for k, v in net.state_dict().items()}


def load_teacher(path, device="cpu"):
    """Rebuild a teacher from its own config, frozen, in eval mode. Returns (net, checkpoint)."""
    content = load_checkpoint(path, "teacher")
    with rebuilding(path, "U-Net config"):
        net = load_weights(UNet(**content["config"]), content["weights"], path).to(device)
    return net.eval().requires_grad_(False), content


# ==============================================================================================
# RUNS: folders that belong to one process, stopping on request, numbers that go wrong
# ==============================================================================================

def output_folder(out, default, resume=False):
    """The folder of a run: the next free runs/default-N, or `out`, which must be new or empty.

    Only looks: claim_folder makes it once all inputs are read, so that a refused command leaves
    nothing.
    """
    if out is None:
        if resume:
            raise BadInput("--resume needs --out DIR, the folder of the run to go on with")
        folders = (Path("runs", default + (f"-{n}" if n > 1 else "")) for n in itertools.count(1))
        return next(f for f in folders if not f.exists() or not any(f.iterdir()))
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file; give a folder")
    if resume and not out.is_dir():
        raise BadInput(f"there is no run to resume in {out}; leave out --resume to start one")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise BadInput(f"--out {out} is not empty; add --resume to go on, or give a new folder")
    return out


def lock_file(path):
    """An open file that this process alone has locked, or None; freed when the process dies."""
    file = open(path, "a+", encoding="utf-8")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return file.close()
    return file


def claim_folder(folder):
    """Make the folder of a run and lock it: a second process on it is refused. Freed at exit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / ".lock"
    while path not in LOCKS:
        file = lock_file(path)
        if file is None:
            raise BadInput(f"another process is writing to {folder}; wait for it, or give another "
                           "--out")
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            LOCKS[path] = file
        else:
            file.close()                                 # its last owner deleted it just now


def release_folders():
    """Give back the locks of claim_folder."""
    for path, file in list(LOCKS.items()):
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()
        del LOCKS[path]


class Stopped(Exception):
    """The run was asked to stop, and has saved."""


def until_stopped(updates, out):
    """Iterate over `updates`; after Ctrl-C or SIGTERM end the one at hand, which due() then saves,
    and raise Stopped before the next. A second signal stops at once."""
    def ask(number, frame):
        if STOP["signal"]:
            raise KeyboardInterrupt
        STOP["signal"] = number
        print("\nstopping once this update is saved; again to stop at once", file=sys.stderr)
    STOP["signal"], before = None, {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):            # only the main thread may do this
            before[number] = signal.signal(number, ask)
    try:
        for update in updates:
            if STOP["signal"]:
                raise Stopped(out)
            yield update
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def due(done, every, updates):
    """Is it time to save? Every so many updates, after the last, and when asked to stop."""
    return done % every == 0 or done == updates or STOP["signal"] is not None


def careful_step(optimizer, wrong, update, **values):
    """optimizer.step(), unless one of `values` (scalar tensors) is not finite: then nothing moves,
    and wrong[name] keeps the number of the update, for stop_if_wrong().

    The step is skipped on the device (found_inf of fused optimizers), so that a GPU never waits.
    """
    bad = torch.stack([~v.detach().isfinite() for v in values.values()])
    for name, is_bad in zip(values, bad):
        before = wrong.get(name, torch.zeros((), dtype=torch.long, device=bad.device))
        wrong[name] = torch.where((before == 0) & is_bad, update, before)
    if bad.device.type == "cuda":
        optimizer.found_inf = bad.any().float()
    else:
        stop_if_wrong(wrong)
    optimizer.step()


def stop_if_wrong(wrong, flag="--lr"):
    """BadInput for {name: update}, unless all updates are 0: what was not finite, and when."""
    for name, update in wrong.items():
        if update:
            raise BadInput(f"the {name} was not finite at update {int(update)}, and the run "
                           "stopped before that step, keeping its last checkpoint; usually the "
                           f"learning rate is too high: start again with a lower {flag}")


def log_line(folder, **row):
    """Append one JSON object to folder/log.jsonl, the file that plots are drawn from."""
    with open(Path(folder) / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_log(folder):
    """The rows that log_line wrote, [] where there are none."""
    path = Path(folder) / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def number(kind, low, high=math.inf):
    """argparse type: an int or float within low..high, both included."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be between {low} and {high}, not {text}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def parser_for(doc, example):
    """The argument parser every script starts from: defaults are shown, one example at the end."""
    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            return super()._get_help_string(action) if action.default else action.help
    return argparse.ArgumentParser(description=doc.splitlines()[0], epilog=f"example: {example}",
                                   formatter_class=Help)


def pyplot():
    """matplotlib without a screen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save_figure(figure, path):
    """Write a figure as PNG and free it."""
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


def run_main(main, memory="--batch-size"):
    """Run a script's main: bad input ends in one sentence and exit code 2, never in a traceback;
    a stopped run in 128 + signal (Ctrl-C: 130). memory: the flags to lower where it runs out."""
    script, code = Path(sys.argv[0]).name, 2
    try:
        main()
        return
    except (BadInput, OSError) as error:                # OSError: full disk, unwritable folder, ...
        sentence = error
    except Stopped as stopped:
        flags = " ".join(word for word in sys.argv[1:] if word != "--resume")
        out = "" if "--out" in flags else f" --out {stopped}"
        sentence = f"stopped and saved; to go on: python {script} {flags}{out} --resume"
        code = 128 + STOP["signal"]
    except KeyboardInterrupt:
        sentence, code = "interrupted; the last checkpoint, if there is one, stays", 130
    except (RuntimeError, MemoryError) as error:        # torch.OutOfMemoryError is a RuntimeError
        words = ("out of memory", "not enough memory", "alloc")
        if not isinstance(error, MemoryError) and not any(w in str(error).lower() for w in words):
            raise
        sentence = f"memory ran out; lower {memory}, or use another --device"
    finally:
        release_folders()
    print(f"{script}: {sentence}", file=sys.stderr)
    sys.exit(code)


# ==============================================================================================
# KNOWN ANSWERS: data whose optimal epsilon can be written down
# ==============================================================================================

def mixture_eps(x, t, means, std, alpha_bar):
    """Optimal epsilon E[eps | x_t] of an equal mixture of N(mean_i, std^2 I); one mean: Gaussian.

    x: (B, D); means: (M, D). x_t given i is N(sqrt(ab) mean_i, ab std^2 + 1 - ab), so that
    eps* = sqrt(1 - ab) sum_i p(i | x_t) (x_t - sqrt(ab) mean_i) / (ab std^2 + 1 - ab).
    """
    ab = at(alpha_bar, t, x)                                                   # (B, 1)
    offset = x[:, None] - ab[..., None].sqrt() * means                         # (B, M, D)
    variance = ab * std ** 2 + 1 - ab                                          # (B, 1)
    share = torch.softmax(-offset.square().sum(-1) / (2 * variance), dim=1)    # (B, M), p(i | x_t)
    return (1 - ab).sqrt() * (share[..., None] * offset).sum(1) / variance


def gaussian_flow(x_T, mean, std, alpha_bar):
    """Where infinitely many DDIM steps take x_T if the data are N(mean, std^2 I): same quantile."""
    ab = alpha_bar[T]
    return mean + std * (x_T - ab.sqrt() * mean) / (ab * std ** 2 + 1 - ab).sqrt()


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'|, 0 for equal distributions. Szekely & Rizzo 2013."""
    def within(x):
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))
    return (2 * torch.cdist(a, b).mean() - within(a) - within(b)).item()


def demo(out, seed):
    """Run the sampler on a Gaussian and a mixture in the plane; print errors, draw ddpm.png."""
    alpha_bar, generator, n = linear_alpha_bar(), torch.Generator().manual_seed(seed), DEMO_POINTS
    x_T, circle = torch.randn(n, 2, generator=generator), torch.arange(6) * math.pi / 3
    mean, std = torch.tensor([[0.5, -0.3]]), 0.2                               # the Gaussian
    means, spread = 0.7 * torch.stack([circle.cos(), circle.sin()], 1), 0.07   # the mixture
    noise = torch.randn(2, n, 2, generator=generator)
    exact = means[torch.randint(6, (n,), generator=generator)] + spread * noise[0]

    def run(steps, eta, *data):
        return sample(lambda x, t: mixture_eps(x, t, *data, alpha_bar), x_T,
                      make_grid("uniform", steps), alpha_bar, eta, seeds=range(n), clip=False)

    print("       --- one Gaussian ----------------------------   --- mixture of six ---\n"
          "       rms to exact end, eta 0             std          energy distance\n"
          "  NFE  uniform   logsnr  logsnr, 2nd order  at eta 1       eta 0      eta 1")
    ends, errors, exact_end = {}, [], gaussian_flow(x_T, mean, std, alpha_bar)
    for steps in (1, 2, 5, 10, 20, 50, 100, 1000):
        rms = [(end - exact_end).square().mean().sqrt().item() for end in (
            run(steps, 0.0, mean, std), *(solver(
                lambda x, t: mixture_eps(x, t, mean, std, alpha_bar), x_T,
                make_grid("logsnr", steps), alpha_bar, clip=False)
                for solver in (sample, dpm_solver)))]
        std_1 = run(steps, 1.0, mean, std).std(0).mean()                       # should become 0.2
        for eta in (0.0, 1.0):
            ends[steps, eta] = run(steps, eta, means, spread)
        distances = [energy_distance(ends[steps, eta], exact) for eta in (0.0, 1.0)]
        errors.append((steps, *rms, *distances))
        print(f"{steps:5d}  {rms[0]:.5f}  {rms[1]:.5f}  {rms[2]:.5f} {std_1:20.5f} "
              f"{distances[0]:11.5f} {distances[1]:10.5f}")
        log_line(out, nfe=steps, rms=rms, std=std_1.item(), mixture=distances)

    figure, axes = pyplot().subplots(2, 5, figsize=(14, 5.8))
    panels = [(f"forward, t = {t}", q_sample(exact, torch.full((n,), t), noise[1], alpha_bar), t)
              for t in (0, 50, 200, 500, 1000)]
    panels += [(f"reverse, {steps} steps, eta {eta:.0f}", ends[steps, eta], 0)
               for steps, eta in ((5, 0.0), (20, 0.0), (1000, 0.0), (20, 1.0))]
    for axis, (title, points, t) in zip(axes.flat, panels):
        limit = 1.2 if t <= 50 else 2.5
        axis.scatter(*points.T, s=1, color="tab:blue" if "forward" in title else "tab:orange")
        axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    names = ("Gaussian, uniform", "Gaussian, logsnr", "the same, 2nd order", "mixture, eta 0",
             "mixture, eta 1")
    for column, name in enumerate(names, start=1):
        axes[1, 4].loglog([e[0] for e in errors], [max(e[column], 1e-6) for e in errors], "o-",
                          markersize=3, label=name)
    axes[1, 4].set(title="error, known answer", xlabel="network evaluations")
    axes[1, 4].legend(fontsize=7)
    save_figure(figure, out / "ddpm.png")


def throughput(shape, batch, repeats, device):
    """(images/s of a forward pass, of a training step) of a U-Net of the given shape."""
    net, rates = UNet(**shape).to(device), []
    optimizer = torch.optim.AdamW(net.parameters())
    x, t = torch.randn(batch, 3, 32, 32, device=device), torch.full((batch,), T, device=device)
    for training in (False, True):
        for i in range(repeats + 1):
            if i <= 1:                          # the first pass warms up
                wait_for(device)
                start = time.time()
            with torch.set_grad_enabled(training), autocast(device):
                loss = net(x, t).square().mean()
            if training:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        wait_for(device)
        rates.append(batch * repeats / (time.time() - start))
    return rates


# ==============================================================================================
# COMMAND LINE
# ==============================================================================================

def parse_args(argv=None):
    """Command line of ddpm.py."""
    p = parser_for(__doc__, "python ddpm.py --batch 64 --device cuda")
    p.add_argument("--batch", type=number(int, 1), default=8, help="images per timed pass")
    p.add_argument("--out", help="folder of the result (default: next free runs/ddpm)")
    p.add_argument("--seed", type=number(int, 0, 10 ** 9), default=0, help="of data and noise")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device, out = pick_device(args.device), output_folder(args.out, "ddpm")
    out.mkdir(parents=True, exist_ok=True)
    print("config:", vars(args))
    demo(out, args.seed)
    print(f"\nU-Net on {device}, batch {args.batch}")
    for name, shape in (("small", SMALL_UNET), ("paper", PAPER_UNET)):
        forward, training = throughput(shape, args.batch, 3, device)
        print(f"{name:6s} {parameter_count(UNet(**shape)) / 1e6:6.2f} M parameters   "
              f"forward {forward:8.1f} images/s   training {training:8.1f} images/s")
    print(f"wrote {out}/ddpm.png, log.jsonl")


if __name__ == "__main__":
    run_main(main)
