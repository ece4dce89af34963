"""Trains coach and judge of reward.py, two small classifiers of CIFAR-10: nothing of the paper.

    python checkpoints/train_encoders.py                    # 20 epochs each, 40 minutes on 2 cores
    python checkpoints/train_encoders.py --data DIR         # DIR/train and DIR/test, classes inside
    python checkpoints/train_encoders.py --smoke            # seconds, numbers mean nothing

Reads images; writes to --out: coach.pt with the scales of the reward terms, judge.pt with what it
sees in the training images (both fp16, for --encoders DIR of the other scripts), state-coach.pt and
state-judge.pt (for --resume), log.jsonl.
"""
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# From the repository:
from ddpm import parameter_count                                               # noqa: E402
from teacher import LOG_EVERY                                                  # noqa: E402
from reward import DISTORTIONS, ENCODERS, TERMS, distort, encode, moments, view_of  # noqa: E402
from harness.checkpoints import (load_state, provenance, save_checkpoint,      # noqa: E402
                                 save_state)
from harness.images import load_images                                         # noqa: E402
from harness.runs import (BadInput, autocast, claim_run, log_line, number,     # noqa: E402
                          parser_for, run_main)

SAVE_EVERY = 200            # updates

# ==== TRAINING ================================================================================


def random_crop(x, generator, padding=4):
    """Shift each image up to `padding` pixels each way, mirrored at the border: (B, 3, H, W)."""
    B, _, H, W = x.shape
    padded = F.pad(x, [padding] * 4, mode="reflect")
    dy, dx = (torch.randint(2 * padding + 1, (B, 1), generator=generator, device=x.device)
              for _ in range(2))
    rows = dy + torch.arange(H, device=x.device)                              # (B, H)
    columns = dx + torch.arange(W, device=x.device)                           # (B, W)
    batch = torch.arange(B, device=x.device)[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def draw_labelled(images, labels, batch_size, generator):
    """Random images, cropped and half of them mirrored: (B, 3, H, W) in [-1, 1], labels (B,)."""
    device = generator.device                     # that of the images, as in draw_batch
    index = torch.randint(len(images), (batch_size,), generator=generator, device=device)
    mirror = torch.rand(batch_size, generator=generator, device=device) < 0.5
    x = random_crop(images[index].float() / 127.5 - 1, generator)
    return torch.where(mirror[:, None, None, None], x.flip(-1), x), labels[index]


def train_encoder(role, images, labels, args, out, device):
    """Cross-entropy, label smoothing, AdamW, one-cycle learning rate. Returns (net, seconds)."""
    seed = args.seed + 1000 * (role == "judge")
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    net = ENCODERS[role](classes=int(labels.max()) + 1).to(
        device, memory_format=torch.channels_last).train()
    updates = max(2, args.epochs * len(images) // args.batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, updates, pct_start=0.2)
    state, parts = out / f"state-{role}.pt", dict(net=net, optimizer=optimizer, schedule=schedule,
                                                  generator=generator)
    if not args.resume or not state.exists():
        save_state(state, parts, 0, 0.0)       # from here on it knows which lines of the log count
    first, seconds_before = load_state(state, parts) if args.resume else (0, 0.0)
    start = time.time()
    for update in tqdm(range(first, updates), initial=first, total=updates, mininterval=5,
                       desc=role):
        x, y = draw_labelled(images, labels, args.batch_size, generator)
        with autocast(device):
            logits = net(x.contiguous(memory_format=torch.channels_last))[2]
        loss = F.cross_entropy(logits.float(), y, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        done, seconds = update + 1, seconds_before + time.time() - start
        if done % LOG_EVERY == 0 or done == updates:
            log_line(out / "log.jsonl", encoder=role, update=done, loss=loss.item(),
                     seconds=seconds)
        if done % SAVE_EVERY == 0 or done == updates:
            save_state(state, parts, done, seconds)
    return net.eval().requires_grad_(False), seconds_before + time.time() - start


@torch.no_grad()
def accuracy(net, images, labels, batch=500):
    """Share of (N, 3, H, W) uint8 images classified rightly."""
    right = sum((net(x.float() / 127.5 - 1)[2].argmax(1) == y).sum().item()
                for x, y in zip(images.split(batch), labels.split(batch)))
    return right / len(images)


def judge_reference(net, images):
    """Moments of the judge's features of all training images."""
    features = torch.cat([encode(net, x.float() / 127.5 - 1) for x in images.split(500)])
    mean, covariance = moments(features)
    return dict(mean=mean, covariance=covariance)


@torch.no_grad()
def term_scales(coach, images):
    """Std of every term over all distortions at levels 1/4, 1/2, 3/4, 1: {term: float}."""
    generator, target = torch.Generator().manual_seed(0), view_of(coach, images)
    seen = [view_of(coach, distort(images, kind, level, generator))
            for kind in DISTORTIONS for level in (0.25, 0.5, 0.75, 1.0)]
    return {name: torch.cat([term(view, target) for view in seen]).std().item()
            for name, term in TERMS.items()}


# ==== COMMAND LINE ============================================================================

def parse_args(argv=None):
    """Command line of checkpoints/train_encoders.py."""
    p = parser_for(__doc__, "python checkpoints/train_encoders.py --data cifar10 --epochs 6")
    count = number(int, 1)
    p.add_argument("--data", default="cifar10", help="cifar10, shapes, or a folder")
    p.add_argument("--epochs", type=count, default=20, help="passes over the images, 5..30")
    p.add_argument("--batch-size", type=count, default=256, help="images per update, 64..1024")
    p.add_argument("--lr", type=number(float, 1e-7, 1), default=3e-3, help="peak rate, 1e-3..5e-3")
    args = p.parse_args(argv)
    if args.smoke:
        args.data, args.epochs, args.batch_size = "shapes", 1, 100
    return args


def main(argv=None):
    args = parse_args(argv)
    device, most = args.device, 600 if args.smoke else None
    sets = [x[:most] for x in (*load_images(args.data), *load_images(args.data, train=False))]
    if len(sets[0]) < 2 or len(sets[2]) == 0:
        raise BadInput(f"--data {args.data} has {len(sets[0])} training and {len(sets[2])} test "
                       "images; at least 2 and 1 are needed")
    out = claim_run(args, "encoders")
    print(f"{len(sets[0])} images")
    images, labels, test_images, test_labels = (x.to(device) for x in sets)
    for role in ENCODERS:
        if (out / f"{role}.pt").exists():      # finished before --resume
            continue
        net, seconds = train_encoder(role, images, labels, args, out, device)
        net.half().float()                     # what the file holds is what is measured
        share = accuracy(net, test_images, test_labels)
        some = images[:512].float() / 127.5 - 1
        extra = (dict(scales=term_scales(net, some)) if role == "coach" else
                 judge_reference(net, images))
        save_checkpoint(out / f"{role}.pt", role, config=dict(classes=net.classify.out_features),
                        weights=net.half().state_dict(), **extra, provenance=provenance(
                            "checkpoints/train_encoders.py", args, seconds, device, accuracy=share))
        log_line(out / "log.jsonl", encoder=role, accuracy=share, seconds=seconds)
        print(f"{role}: {parameter_count(net) / 1e6:.2f} M parameters, "
              f"test accuracy {share:.4f}, {seconds / 60:.1f} min")
    print(f"wrote {out}/coach.pt, judge.pt, log.jsonl")


if __name__ == "__main__":
    run_main(main)
