"""The teacher: a DDPM trained on CIFAR-10, and the target it sets.

Adds to ddpm.py augmentation, an average of the weights (EMA) and Algorithm 1 (Ho et al. 2020). Its
image of a noise z in 50 quadratic DDIM steps is *the* target of z in every later file.

    python teacher.py                          # CIFAR-10, downloaded on first use
    python teacher.py --data DIR               # any folder of class subfolders of images

Writes to --out: teacher.pt (EMA weights in fp16), state.pt (for --resume), samples.png, loss.png,
log.jsonl. Next file: student.py.
"""
import copy
import math
import time

import torch
from tqdm import tqdm

# From earlier files:
from ddpm import (PAPER_UNET, SMALL_UNET, T, UNet, baseline_solver, linear_alpha_bar,
                  parameter_count, sample, seeded_noise, simple_loss)
from harness.checkpoints import kept, load_state, provenance, save_network, save_state
from harness.images import load_images, plot_loss, save_picture
from harness.runs import autocast, checksum, claim_run, log_line, number, parser_for, run_main

EMA_DECAY = 0.9995          # per update; Ho et al. use 0.9999 for 800,000 updates
WARMUP = 200                # updates until the learning rate is full
GRAD_CLIP = 1.0             # largest norm of the gradient, as in Ho et al.'s code
TARGET = baseline_solver("DDIM", "quadratic", 50)   # of the DDIM grids the one with the best images
HELD_OUT = 10 ** 9          # seeds of noise from here on are never trained on, in any file
LOG_EVERY, SAVE_EVERY = 50, 500                 # updates
CHUNK = dict(cpu=64, cuda=512)      # images at once where nothing is learned

# ==== PIECES: batches, times, averaged weights, learning rate, images =========================


def draw_batch(images, batch_size, generator):
    """Random images of (N, 3, H, W) uint8, half of them mirrored, in [-1, 1]: (B, 3, H, W)."""
    device = generator.device                     # that of the images: the CPU waits for no GPU
    index = torch.randint(len(images), (batch_size,), generator=generator, device=device)
    mirror = torch.rand(batch_size, generator=generator, device=device) < 0.5
    x = images[index].float() / 127.5 - 1
    return torch.where(mirror[:, None, None, None], x.flip(-1), x)


def draw_times(n, generator):
    """Uniform t in 1..T, (n,). T itself is included: sampling starts there."""
    return torch.randint(1, T + 1, (n,), generator=generator, device=generator.device)


@torch.no_grad()
def ema_update(ema, net, update, decay=EMA_DECAY):
    """ema <- decay ema + (1 - decay) net, parameters only; a shorter memory at first."""
    decay = min(decay, (1 + update) / (10 + update))
    torch._foreach_lerp_([*ema.parameters()], [*net.parameters()], 1 - decay)   # all in one kernel


def compiled(net, wanted):
    """net, or the same weights behind faster code, for which its first calls take a minute."""
    return torch.compile(net, mode="reduce-overhead") if wanted else net      # CUDA graphs


def learning_rate(update, updates, peak):
    """Linear warm-up, times a cosine that falls from 1 to 0 over all updates."""
    return peak * min(1, (update + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * update / updates))


def draw(net, solver, z, alpha_bar, eta=0.0, seeds=None):
    """Images (B, 3, H, W) in [-1, 1] of start noise z, in chunks; eta, seeds: see sample()."""
    images, size = [], CHUNK[z.device.type]
    for i in tqdm(range(0, len(z), size), desc="drawing", delay=3, leave=False):
        x, some = z[i:i + size], seeds[i:i + size] if seeds else None
        images.append(sample(net, x, solver, alpha_bar, eta, some).clamp(-1, 1))
    return torch.cat(images)


def noise_and_targets(teacher, first_seed, n, device):
    """Start noise z of seeds first_seed .. first_seed + n - 1, (n, 3, H, W), and the targets: what
    the teacher makes of each, (n, 3, H, W) in [-1, 1]. Targets are drawn once and kept in runs/."""
    side = teacher.config["image_size"]
    z = seeded_noise(range(first_seed, first_seed + n), (3, side, side), device=device)
    key = dict(weights=checksum(teacher), solver=list(TARGET), first_seed=first_seed, n=n)
    return z, kept("targets", key, lambda: draw(teacher, TARGET, z, linear_alpha_bar(device)),
                   device)


# ==== TRAINING ================================================================================

def fit(net, ema, loss_of, save, args, out, device, unit):
    """Minimise loss_of(net, update, generator) over net, average it into ema: the loop of teacher
    and student. save(updates, seconds) writes what is handed on; with --resume it goes on from
    out/state.pt; unit: of the batch, in the log. Returns seconds."""
    generator = torch.Generator(device).manual_seed(args.seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    parts = dict(net=net, ema=ema, optimizer=optimizer, generator=generator)
    fast = compiled(net, args.compile)
    first, seconds_before = load_state(out / "state.pt", parts) if args.resume else (0, 0.0)
    start, losses = time.time(), []
    for update in tqdm(range(first, args.updates), initial=first, total=args.updates, mininterval=5,
                       unit_scale=args.batch_size, unit=f" {unit}"):
        optimizer.param_groups[0]["lr"] = rate = learning_rate(update, args.updates, args.lr)
        torch.manual_seed(args.seed + update)                       # of dropout
        with autocast(device):
            loss = loss_of(fast, update, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), GRAD_CLIP)
        optimizer.step()
        ema_update(ema, net, update)

        losses.append(loss.detach())           # stays on the device: reading it would wait
        done, seconds = update + 1, seconds_before + time.time() - start
        if done % LOG_EVERY == 0 or done == args.updates:
            log_line(out / "log.jsonl", update=done, **{unit: done * args.batch_size},
                     loss=torch.stack(losses).mean().item(), grad_norm=grad_norm.item(),
                     lr=rate, seconds=seconds)
            losses.clear()
        if done % SAVE_EVERY == 0 or done == args.updates:
            save(done, seconds)
            save_state(out / "state.pt", parts, done, seconds)      # last: its files are there
    return seconds_before + time.time() - start


def train(net, ema, images, args, out, device):
    """Algorithm 1, Ho et al. 2020, on images (N, 3, H, W) uint8. Returns seconds."""
    alpha_bar, side = linear_alpha_bar(device), net.config["image_size"]
    z = seeded_noise(range(4 if args.smoke else 64), (3, side, side), device=device)

    def loss_of(net, update, generator):
        x0 = draw_batch(images, args.batch_size, generator)
        t = draw_times(len(x0), generator)
        eps = torch.randn(x0.shape, generator=generator, device=device)
        return simple_loss(net, x0, t, eps, alpha_bar)

    def save(updates, seconds):
        save_network(out / "teacher.pt", "teacher", ema, provenance(
            "teacher.py", args, seconds, device, updates=updates,
            images=updates * args.batch_size, ema=EMA_DECAY))
        save_picture(out / "samples.png", draw(ema, TARGET, z, alpha_bar))
    return fit(net, ema, loss_of, save, args, out, device, "images")


# ==== COMMAND LINE ============================================================================

def parse_args(argv=None):
    """Command line of teacher.py."""
    p = parser_for(__doc__, "python teacher.py --data shapes --updates 2000")
    count = number(int, 1)
    p.add_argument("--data", default="cifar10", help="cifar10, shapes, or a folder of classes")
    p.add_argument("--updates", type=count, default=20000, help="optimizer updates")
    p.add_argument("--batch-size", type=count, default=64, help="images per update, 32..512")
    p.add_argument("--lr", type=number(float, 1e-7, 1), default=1e-3, help="peak rate, 1e-4..2e-3")
    p.add_argument("--paper-shape", action="store_true", help="Ho et al.'s 35.7 M U-Net instead")
    p.add_argument("--compile", action="store_true", help="a minute first, then faster on GPUs")
    args = p.parse_args(argv)
    if args.smoke:
        args.updates, args.batch_size = 4, 4
        args.data = "shapes" if args.data == "cifar10" else args.data          # no download
    return args


def main(argv=None):
    args = parse_args(argv)
    images, _ = load_images(args.data)
    out = claim_run(args, "teacher")
    torch.manual_seed(args.seed)
    shape = PAPER_UNET if args.paper_shape else SMALL_UNET
    net = UNet(**shape | (dict(width=16) if args.smoke else {})).to(args.device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    print(f"{parameter_count(net) / 1e6:.2f} M parameters | {len(images)} images, "
          f"{args.updates * args.batch_size / len(images):.1f} epochs")
    seconds = train(net, ema, images.to(args.device), args, out, args.device)
    plot_loss(out, "images", "L_simple")
    print(f"trained {args.updates} updates in {seconds / 60:.1f} min\n"
          f"wrote {out}/teacher.pt, state.pt, samples.png, loss.png, log.jsonl")


if __name__ == "__main__":
    run_main(main)
