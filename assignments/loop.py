"""Draws figures/loop.png, one page for the projector: the decision process of one image.

    python assignments/loop.py                     # seconds; --policy, --seed, --out for others

Everything in it is what the code does with the bundled policy: the states it visits, what the
network makes of each, the times, leans and gains that were learned, the reward at the end.
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# From the repository:
from ddpm import estimate, linear_alpha_bar, sample                             # noqa: E402
from harness.images import new_figure, tile                                    # noqa: E402
from harness.runs import run_main                                              # noqa: E402
from reward import load_reward                                                 # noqa: E402
from student import load_model                                              # noqa: E402
from teacher import HELD_OUT, noise_and_targets                                # noqa: E402


def show(axis, image, title):
    """One image (1, 3, H, W) in [-1, 1], with a title above it."""
    axis.imshow(tile(image, gap=0), interpolation="nearest")
    axis.set_title(title, fontsize=12)
    axis.axis("off")


def draw(net, solver, teacher, reward, seed, path):
    """The page for the image of one seed. Returns its reward."""
    alpha_bar = linear_alpha_bar()
    z, target = noise_and_targets(teacher, seed, 1, torch.device("cpu"))
    K, gains = len(solver.leans), solver.per_image(1, z.device)[2]
    *states, image = sample(net, z, solver, alpha_bar, path=True)
    score = reward(image.clamp(-1, 1), reward.view(target))[0].item()
    figure, axes = new_figure(3, K + 1, (2.6 * (K + 1), 7.4), height_ratios=[1, 1, 0.5])
    for k, (x_t, now, then) in enumerate(zip(states, solver.times, solver.times[1:])):
        t, t_next = torch.tensor([now]), torch.tensor([then])
        with torch.no_grad():
            x0_hat = estimate(net, x_t, t, t_next, gains[:, k], alpha_bar)
        show(axes[0, k], x_t / 2, f"state $x_t$, t = {now}")
        show(axes[1, k], x0_hat, "the network's estimate")
        lean = f"lean = {solver.leans[k]:.2f}" if k else "nothing to lean on yet"
        text = f"action {k + 1}\nrho = {then / now:.2f}, land at t = {then}\n{lean}\ngains:"
        for row in gains[0, k, :12].split(4):                       # of many channels the first
            text += "\n" + " ".join(f"{gain:+.2f}" for gain in row.tolist())
        axes[2, k].text(0.5, 1, text, ha="center", va="top", fontsize=12)
        axes[2, k].axis("off")
    show(axes[0, K], image, f"image, {K} evaluations")
    show(axes[1, K], target, "target, the teacher's 50")
    axes[2, K].text(0.5, 1, f"reward {score:.2f}\n(0: the same image)\n\ncredit goes to\nall "
                    f"{K} actions", ha="center", va="top", fontsize=13)
    axes[2, K].axis("off")
    figure.suptitle("One image is one episode. All its actions are chosen before the first look:\n"
                    "how far to jump (rho), how far to lean on the trend, a gain for every block",
                    fontsize=14)
    figure.savefig(path)
    return score


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--policy", default="checkpoints/policy.pt", help="checkpoint of rl_distill.py")
    p.add_argument("--seed", type=int, default=HELD_OUT, help="of the noise")
    p.add_argument("--out", default=str(ROOT / "figures" / "loop.png"), help="the picture")
    args = p.parse_args(argv)
    net, _, solver = load_model(args.policy, "cpu", "policy")
    teacher, *_ = load_model("checkpoints/teacher.pt", "cpu", "teacher")
    reward, _ = load_reward("feature+perceptual", "checkpoints", "cpu")
    draw(net, solver, teacher, reward, args.seed, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_main(main)
