"""The teacher: a DDPM trained on CIFAR-10.

Adds to ddpm.py what training needs: images, augmentation, an average of the weights (EMA) and the
loop of Algorithm 1 (Ho et al. 2020). The result is the model that ReDiF distils.

    python teacher.py                          # CIFAR-10, downloaded on first use
    python teacher.py --data DIR               # any folder of class subfolders of images
    python teacher.py --data shapes --smoke    # nothing needed, seconds, numbers mean nothing

Reads images; writes to --out: teacher.pt (EMA weights in fp16, for the other files), state.pt (all
that --resume needs), samples.png, loss.png, log.jsonl. Next file: student.py.
"""
import copy
import json
import math
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

# From earlier files:
from ddpm import (PAPER_UNET, SMALL_UNET, T, BadInput, UNet, autocast, careful_step, claim_folder,
                  due, half_weights, linear_alpha_bar, load_state, log_line, make_grid, number,
                  output_folder, parameter_count, parser_for, pick_device, pyplot, read_log,
                  run_main, sample, save_checkpoint, save_figure, save_state, seeded_noise,
                  settings, simple_loss, stop_if_wrong, to_uint8, until_stopped)

EMA_DECAY = 0.999           # per update; Ho et al. use 0.9999 for runs a hundred times as long
WARMUP = 200                # updates until the learning rate is full
GRAD_CLIP = 1.0             # largest norm of the gradient, Ho et al. section 4 (code)
MOST_PIXELS = 50_000_000    # larger image files are skipped
TEACHER_STEPS = 50          # DDIM steps of the teacher's own result, which is distilled

# ==============================================================================================
# IMAGES: one uint8 tensor (N, 3, 32, 32) that lives on the device
# ==============================================================================================


def shapes_images(n=2000, size=32, seed=0):
    """Procedural set of discs, squares and stripes in random colours: needs no download.

    Returns (images uint8 (n, 3, size, size), labels (n,) in 0..2).
    """
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:size, :size]
    images, labels = np.empty((n, 3, size, size), np.uint8), rng.integers(0, 3, n)
    for i, label in enumerate(labels):
        ground, colour = rng.integers(0, 256, (2, 3, 1, 1))
        (cy, cx), radius = rng.uniform(0.3, 0.7, 2) * size, rng.uniform(5, 12)
        mask = [(yy - cy) ** 2 + (xx - cx) ** 2 < radius ** 2,
                np.maximum(abs(yy - cy), abs(xx - cx)) < radius,
                (np.cos(yy / radius * 3 + cy) > 0) & (abs(xx - cx) < 12)][label]
        images[i] = np.where(mask, colour, ground)
    return torch.from_numpy(images), torch.from_numpy(labels)


def folder_images(root, size=32):
    """Every image below root/<class>/, upright, its central square resized to size x size RGB.

    Returns (images uint8 (N, 3, size, size), labels (N,)). Files that cannot be used are skipped,
    counted and named. Raises BadInput where nothing is left.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS
    from torchvision.transforms.functional import pil_to_tensor
    if not Path(root).is_dir():
        raise BadInput(f"--data {root}: no such folder; give cifar10, shapes, or a folder")
    classes = sorted(f for f in Path(root).iterdir() if f.is_dir())
    if not classes:
        raise BadInput(f"--data {root} has no class subfolders with images")
    files = [(path, label) for label, folder in enumerate(classes)
             for path in files_below(folder, set()) if path.suffix.lower() in IMG_EXTENSIONS]
    images, labels, bad = [], [], []
    for path, label in tqdm(files, desc="reading images", disable=len(files) < 1000):
        try:
            images.append(pil_to_tensor(read_image(path, size)))
            labels.append(label)
        except Exception:                      # decoders of hostile bytes can raise anything
            bad.append(str(path))
    if bad:
        print(f"skipped {len(bad)} files that are no usable images: {', '.join(bad[:3])}"
              + ", ..." * (len(bad) > 3))
    if not images:
        raise BadInput(f"--data {root} has no readable image below its class subfolders")
    return torch.stack(images), torch.tensor(labels)


def files_below(folder, seen):
    """All files below a folder, sorted; a folder that links lead back to is entered once."""
    real = folder.resolve()
    if real in seen or not os.access(folder, os.R_OK | os.X_OK):
        return []
    seen.add(real)
    return [file for entry in sorted(folder.iterdir()) for file in (
        files_below(entry, seen) if entry.is_dir() else [entry])]


def read_image(path, size):
    """One image file as RGB, size x size: turned as its EXIF data say, transparency on white."""
    from PIL import Image, ImageOps
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")        # of odd metadata
        if image.width * image.height > MOST_PIXELS:
            raise ValueError("too large")      # a small file can unpack to all of the memory
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return ImageOps.fit(image.convert("RGB"), (size, size), Image.BILINEAR)


def cifar10_images(root="data", train=True):
    """CIFAR-10 through torchvision: an existing copy under root, or a download of 170 MB.

    Returns (images uint8 (N, 3, 32, 32), labels (N,)).
    """
    from torchvision.datasets import CIFAR10
    try:
        data = CIFAR10(root, train=train)
    except RuntimeError:                       # not there, or not whole
        print(f"downloading CIFAR-10 (170 MB) to {root}/; at the 50 kB/s its host gives of late "
              f"this takes an hour, and --data DIR takes an existing copy as an image folder")
        try:
            data = CIFAR10(root, train=train, download=True)
        except (OSError, RuntimeError) as error:          # URLError is an OSError
            raise BadInput(f"CIFAR-10 could not be downloaded ({error}); check the network, give a "
                           f"folder of images with --data DIR, or use --data shapes") from None
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(data.targets)


def load_images(data, train=True):
    """--data cifar10 | shapes | DIR -> (images uint8 (N, 3, 32, 32), labels (N,)).

    DIR holds DIR/train and DIR/test, or the class subfolders itself (then there is no test split).
    """
    if data == "shapes":
        return shapes_images(seed=0 if train else 1)
    if data == "cifar10":
        return cifar10_images(train=train)
    if not train or (Path(data) / "train").is_dir():
        return folder_images(str(Path(data) / ("train" if train else "test")))
    return folder_images(str(data))


def draw_batch(images, batch_size, generator, in_order=False):
    """Random images (or, in_order, just these), half of them mirrored, in [-1, 1]: (B, 3, H, W).

    Indices and flips are drawn on the CPU (so that all devices agree), the rest is the device's.
    """
    if not in_order:
        index = torch.randint(len(images), (batch_size,), generator=generator)
        images = images[index.to(images.device)]
    mirror = (torch.rand(batch_size, generator=generator) < 0.5).to(images.device)
    x = images.float() / 127.5 - 1
    return torch.where(mirror[:, None, None, None], x.flip(-1), x)


# ==============================================================================================
# TRAINING
# ==============================================================================================

def draw_times(n, generator):
    """Uniform t in 1..T, (n,). T itself is included: sampling starts there."""
    return torch.randint(1, T + 1, (n,), generator=generator)


@torch.no_grad()
def ema_update(ema, net, decay):
    """ema <- decay ema + (1 - decay) net, parameters only."""
    for p_ema, p in zip(ema.parameters(), net.parameters()):
        p_ema.lerp_(p, 1 - decay)


def learning_rate(update, updates, peak):
    """Linear warm-up, then a cosine down to zero at the last update."""
    return peak * min(1, (update + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * update / updates))


def train(net, ema, images, args, out, device):
    """Algorithm 1, Ho et al. 2020; goes on from out/state.pt with --resume. Returns seconds."""
    alpha_bar = linear_alpha_bar(device)
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.0,
                                  fused=device.type != "mps")
    parts = dict(net=net, ema=ema, optimizer=optimizer, generator=generator, running=[])
    first, seconds_before = 0, 0.0
    if args.resume:
        first, seconds_before = load_state(out / "state.pt", "teacher", parts, args)

    start, running, wrong = time.time(), parts["running"], {}
    progress = tqdm(range(first, args.updates), initial=first, total=args.updates, mininterval=5,
                    desc="teacher", unit_scale=args.batch_size, unit="img")
    for update in until_stopped(progress, out):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, args.updates, args.lr)
        x0 = draw_batch(images, args.batch_size, generator)
        t = draw_times(len(x0), generator).to(device)
        eps = torch.randn(x0.shape, generator=generator).to(device)
        with autocast(device, not args.fp32):
            loss = simple_loss(net, x0, t, eps, alpha_bar)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), GRAD_CLIP)
        careful_step(optimizer, wrong, update + 1, loss=loss, gradient=grad_norm)
        ema_update(ema, net, min(EMA_DECAY, (1 + update) / (10 + update)))     # short at first

        running.append(loss.detach())          # stays on the device: reading it would wait
        done = update + 1
        seconds = seconds_before + time.time() - start
        if done % args.log_every == 0 or done == args.updates:
            stop_if_wrong(wrong)
            mean_loss = torch.stack(running).mean().item()
            running.clear()
            log_line(out, update=done, images=done * args.batch_size, loss=mean_loss,
                     grad_norm=grad_norm.item(), lr=group["lr"], seconds=seconds)
            progress.set_postfix(loss=f"{mean_loss:.4f}")
        if due(done, args.save_every, args.updates):
            stop_if_wrong(wrong)
            save_state(out / "state.pt", "teacher", parts, args, done, seconds)
            save_teacher(out / "teacher.pt", ema, args, done, seconds, device)
            save_samples(out / "samples.png", ema, device, n=4 if args.smoke else 64)
    return seconds_before + time.time() - start


def save_teacher(path, ema, args, updates, seconds, device):
    """The small file for the other scripts: fp16 EMA weights, config, provenance."""
    save_checkpoint(path, "teacher", config=ema.config, weights=half_weights(ema),
                    provenance=provenance("teacher.py", args, seconds, device, updates=updates,
                                          images=updates * args.batch_size, ema=EMA_DECAY))


def provenance(script, args, seconds, device, **more):
    """Where a checkpoint comes from: flags, minutes, hardware, torch version; plain values."""
    flags = {k: Path(v).name if "/" in str(v) else v for k, v in settings(args).items()}
    return dict(script=script, settings=flags, minutes=round(seconds / 60, 1),
                device=device_name(device), torch=str(torch.__version__), **more)


def device_name(device):
    """A short honest name of the hardware: the GPU's, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads, {os.cpu_count()} cores"


# ==============================================================================================
# PICTURES
# ==============================================================================================

def tile(images, columns=8, gap=1):
    """(B, 3, H, W) in [-1, 1] -> one uint8 array (rows H, columns W, 3), gaps of `gap` pixels."""
    from torchvision.utils import make_grid as tiled
    picture = tiled(to_uint8(images.cpu()), nrow=columns, padding=gap, pad_value=255)
    return picture.permute(1, 2, 0).numpy()


def save_picture(path, images, columns=8, scale=3, gap=1):
    """Write images as one PNG, each pixel scale x scale. Draws no random numbers."""
    from PIL import Image                       # comes with torchvision
    picture = Image.fromarray(tile(images, columns, gap))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)
    picture.save(path)


def save_samples(path, net, device, n=64):
    """DDIM samples from seeds 0..n-1: always the same noise; leaves training's RNG alone."""
    size, grid = net.config["image_size"], make_grid("uniform", TEACHER_STEPS)
    x_T = seeded_noise(range(n), (3, size, size), device=device)
    save_picture(path, sample(net.eval(), x_T, grid, linear_alpha_bar(device)))


def plot_loss(folder, unit, label):
    """loss.png from log.jsonl: the loss against thousands of `unit` ('images', 'pairs')."""
    rows = [r for r in read_log(folder) if "loss" in r]
    figure, axis = pyplot().subplots(figsize=(6, 3.5))
    axis.plot([r[unit] / 1e3 for r in rows], [r["loss"] for r in rows], linewidth=1)
    axis.set(xlabel=f"thousand training {unit}", ylabel=label, yscale="log")
    axis.grid(alpha=0.3)
    save_figure(figure, folder / "loss.png")


# ==============================================================================================
# COMMAND LINE
# ==============================================================================================

def parse_args(argv=None):
    """Command line of teacher.py."""
    p = parser_for(__doc__, "python teacher.py --data shapes --updates 2000")
    count = number(int, 1)
    p.add_argument("--data", default="cifar10", help="cifar10, shapes, or a folder of classes")
    p.add_argument("--updates", type=count, default=6300, help="optimizer updates")
    p.add_argument("--batch-size", type=count, default=64, help="images per update, 32..512")
    p.add_argument("--lr", type=number(float, 1e-7, 1), default=1e-3, help="peak rate, 1e-4..2e-3")
    p.add_argument("--width", type=int, choices=[16, 32, 48, 64, 96, 128], default=32,
                   help="channels at full resolution")
    p.add_argument("--paper-shape", action="store_true", help="the paper's 35.7 M U-Net instead")
    p.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    p.add_argument("--out", help="folder of the run (default: next free runs/teacher)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument("--seed", type=number(int, 0, 10 ** 9), default=0, help="of weights and noise")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--log-every", type=count, default=50, help="updates between log lines")
    p.add_argument("--save-every", type=count, default=900, help="updates between checkpoints")
    p.add_argument("--smoke", action="store_true", help="tiny, seconds; its numbers mean nothing")
    args = p.parse_args(argv)
    if args.smoke:
        args.updates, args.batch_size, args.width, args.log_every, args.save_every = 4, 4, 16, 2, 4
    return args


def main(argv=None):
    args = parse_args(argv)
    device, out = pick_device(args.device), output_folder(args.out, "teacher", args.resume)
    print("config:", vars(args))
    images, _ = load_images(args.data)
    claim_folder(out)
    torch.manual_seed(args.seed)
    shape = PAPER_UNET if args.paper_shape else {**SMALL_UNET, "width": args.width}
    net = UNet(**shape).to(device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    print(f"device {device_name(device)} | {parameter_count(net) / 1e6:.2f} M parameters | "
          f"{len(images)} images, {args.updates * args.batch_size / len(images):.1f} epochs")
    seconds = train(net, ema, images.to(device), args, out, device)
    plot_loss(out, "images", "L_simple")
    print(f"trained {args.updates} updates in {seconds / 60:.1f} min\n"
          f"wrote {out}/teacher.pt, state.pt, samples.png, loss.png, log.jsonl")


if __name__ == "__main__":
    run_main(main)
