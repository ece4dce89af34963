"""Reinforced distillation: a policy gradient over how far to jump, how far to lean, where to land.

Few-step sampling as a Markov decision process (ReDiF, arXiv 2512.22802), written out by hand:
    state   (x_t, t, k, x0_last)    k: which jump, x0_last: the last evaluation's x0_hat
    action  (u, x_next)             u = (logit rho, lean): how far to jump, how far to lean
    policy  Normal(u; mean_k, std^2) x N(x_next; mu_theta(x_t, t, u, x0_last), sigma^2 I);
            --channel jump: u explores and learns, x_next is its mean; --channel pixels: the reverse
    reward  at the end only: likeness to the teacher's image of the same noise

    python rl_distill.py                            # bundled weights, no data, no internet
    python rl_distill.py --channel pixels --eta 0.3 --lr 3e-5   # as ReDiF: the weights learn
    python rl_distill.py --smoke                    # seconds, numbers mean nothing

Reads --teacher, --encoders and, with --init student, --student; writes to --out: policy.pt,
state.pt (for --resume), alignment.png, grid.png, result.json, log.jsonl. Next file: sample.py.
"""
import copy
import itertools
import json
import math
import time
from typing import NamedTuple

import torch
from torch import nn

# From earlier files:
from ddpm import (GRIDS, SOLVERS, Solver, T, UNet, dpm_leans, estimate, hand_solver, jump,
                  linear_alpha_bar, make_grid, parameter_count, spread)
from teacher import HELD_OUT, TARGET, draw, load_teacher, noise_and_targets
from student import JumpUNet, load_student
from reward import TERMS, Reward, load_encoder, print_comparison, rewards
from harness.checkpoints import (frozen_network, half_weights, load_checkpoint, load_state,
                                 provenance, rebuilding, save_checkpoint, save_state)
from harness.figures import plot_panels, plot_strips
from harness.runs import (BadInput, checksum, claim_run, device_name, log_line, number,
                          parser_for, pick_device, read_log, run_flags, run_main, settings,
                          write_whole)

STD = 0.07, 0.01            # of u, at the first update, 0.05..0.2, and towards the last
CLIP_JUMP = 0.2             # PPO's clip range, 0.1..0.3
CLIP_PIXELS = 1e-4          # the same for a density that is a mean over dimensions, 1e-5..1e-3
SIGMA_FLOOR = 0.02          # noise on the jump to t = 0 (DDIM sigma 0); in training, not deployment
PIXELS = dict(updates=20, group=8, epochs=1, lr=1e-5)       # --channel pixels; one pass, no clip
NOISES_PER_UPDATE = 16      # M, 8..64
HAND_NOISES = 64            # training noises on which the hand solvers are chosen
LOG_EVERY = 4               # updates from one printed line to the next
MONITOR = 64                # noises of its held-out reward; others than those of the final table

# ==== POLICY ==================================================================================


class JumpPolicy(nn.Module):
    """Normal over u = (logit rho, lean) of each of K jumps; its mean starts at a hand solver's.

    t_next = rho t is how far to jump, D = x0_hat + lean (x0_hat - x0_last) how far to lean on the
    trend, as jump() in ddpm.py does. DEVIATES: in ReDiF's code the grid is fixed and only x_next is
    an action; that u is one is this project's extension (for its relatives see README).
    """

    def __init__(self, solver):
        super().__init__()
        grid, leans = torch.tensor(solver.grid).float(), torch.tensor(solver.leans)
        logit_rho = torch.logit(grid[1:] / grid[:-1], eps=1e-3)
        self.register_buffer("hand", torch.stack([logit_rho, leans], 1), persistent=False)
        self.shift = nn.Parameter(torch.zeros_like(self.hand))                 # (K, 2)

    def forward(self, k):
        """Mean of u for jump k, 0..K-1: (2,), whatever the state x_t: in an earlier version reading
        it brought nothing (study/README.md)."""
        return self.hand[k] + self.shift[k]

    @torch.no_grad()
    def solver(self):
        """What is deployed: the mean of every jump, without exploration, as a Solver."""
        t, grid, leans, K = torch.tensor([T], device=self.hand.device), [T], [], len(self.hand)
        for k in range(K):
            logit_rho, lean = self(k) * acting(k, K, t.device)
            t = next_time(t, logit_rho, K - k)
            grid.append(t.item())
            leans.append(lean.item())
        return Solver(grid, leans)


def acting(k, steps, device="cpu"):
    """Which entries of u act: the first jump has nothing to lean on, the last one must reach 0."""
    return torch.tensor([k < steps - 1, k > 0], device=device)


def next_time(t, logit_rho, n):
    """t_next = round(rho t), at most t - 1 and at least n - 1, so that the n - 1 evaluations to
    come can still fall. t (B,) integers, n: evaluations left with this one; 0 where n = 1."""
    if n == 1:
        return torch.zeros_like(t)
    return torch.minimum((torch.sigmoid(logit_rho) * t).round().long().clamp(min=n - 1), t - 1)


def jump_logp(mean, u, std, acts) -> torch.Tensor:
    """log N(u; mean, std^2) summed over the entries that act. mean, acts (bool): (2,), u: (B, 2).
    Returns (B,)."""
    logp = -((u - mean) / std).square() / 2 - math.log(std) - math.log(2 * math.pi) / 2
    return (logp * acts).sum(1)


def pixel_logp(mean, x_next, sigma) -> torch.Tensor:
    """log N(x_next; mean, sigma^2 I), only what depends on the mean, per dimension. mean, x_next:
    (B, C, H, W), sigma: (B,). Returns (B,).

    DEVIATES: *mean* over the 3072 dimensions, where the density has their sum (ReDiF's and DDPO's
    code do the same). The summed ratio is e^(+-50) after the smallest change.
    """
    return -((x_next - mean).square() / (2 * sigma.square()[:, None, None, None])).mean((1, 2, 3))


def gaussian_kl(mean, mean_ref, sigma) -> torch.Tensor:
    """Gaussian KL at equal sigma: |mu - mu_ref|^2 / (2 sigma^2) per dimension. (B, ...) -> (B,)."""
    return ((mean - mean_ref).square() / (2 * sigma.square()[:, None, None, None])).mean((1, 2, 3))


# ==== ROLLOUT AND ADVANTAGES ==================================================================

class Jump(NamedTuple):
    """One jump of B rollouts: what was seen, what was done, how likely that was at the time."""
    k: int                              # which jump, 0..K-1
    x_t: torch.Tensor                   # (B, 3, H, W), state: where it started
    t: torch.Tensor                     # (B,)
    x0_last: torch.Tensor               # (B, 3, H, W), the last evaluation's estimate of the image
    u: torch.Tensor                     # (B, 2), action: logit rho, lean
    t_next: torch.Tensor                # (B,), next_time(t, logit rho)
    logp: torch.Tensor                  # (B,), of u; None where jumps do not explore
    x_next: torch.Tensor                # (B, 3, H, W), action: where it landed
    sigma: torch.Tensor                 # (B,), of x_next
    logp_pixels: torch.Tensor           # (B,), of x_next; None where this landing does not explore


def antithetic(shape, generator, device):
    """Standard normal noise (B, ...), rows 2i and 2i + 1 opposite: less variance, and where their
    scores are opposite too (u, the first landing) a group's mean drops out of the sum."""
    noise = torch.randn(shape, generator=generator)
    noise[1::2] = -noise[0::2]
    return noise.to(device)


def take_jump(net, x_t, t, t_next, u, x0_last, alpha_bar, eta):
    """One evaluation and one jump: mean (B, 3, H, W), sigma (B,) and x0_hat (B, 3, H, W)."""
    x0_hat = estimate(net, x_t, t, net(x_t, t, t_next), alpha_bar)
    mean, sigma = jump(x_t, x0_hat, t, t_next, alpha_bar, u[:, 1], x0_last, eta)
    return mean, sigma, x0_hat


@torch.no_grad()
def rollout(net, policy, z, alpha_bar, channel=None, group=1, std=0.0, eta=0.0, generator=None):
    """Play the policy from noise z (M, 3, H, W), each noise `group` times.

    channel: what explores, 'jump' (u, by std), 'pixels' (x_next, by DDIM's sigma(eta) and by at
    least SIGMA_FLOOR at the last jump), or None: nothing, as sample(net, z, policy.solver(),
    alpha_bar). Returns (images (M * group, 3, H, W) in [-1, 1], list of K Jumps).
    DEVIATES: with eta 0 pixels explore only where they land at t = 0; earlier jumps, which have
    the same weights, then have no gradient of their own.
    """
    x, K = z.repeat_interleave(group, 0), len(policy.hand)
    t, x0_last, jumps = torch.full((len(x),), T, device=z.device), x, []
    for k in range(K):
        last, logp, logp_pixels = k == K - 1, None, None
        acts = acting(k, K, z.device)
        u = mean_u = (policy(k) * acts).expand(len(x), 2)
        if channel == "jump":                                       # u: how far to jump, to lean
            u = mean_u + std * acts * antithetic(u.shape, generator, z.device)
            logp = jump_logp(mean_u, u, std, acts)
        t_next = next_time(t, u[:, 0], K - k)
        explores = channel == "pixels" and (eta > 0 or last)
        x_next, sigma, x0_hat = take_jump(net, x, t, t_next, u, x0_last, alpha_bar,
                                          eta if explores else 0.0)
        if explores:                                                # x_next: where to land
            mean, sigma = x_next, sigma.clamp(min=SIGMA_FLOOR) if last else sigma
            x_next = mean + spread(sigma, x) * antithetic(x.shape, generator, z.device)
            logp_pixels = pixel_logp(mean, x_next, sigma)
        jumps.append(Jump(k, x, t, x0_last, u, t_next, logp, x_next, sigma, logp_pixels))
        x, t, x0_last = x_next, t_next, x0_hat
    return x.clamp(-1, 1), jumps


def advantages(reward, group) -> torch.Tensor:
    """A = (R - mean of its group) / rms of that over the whole batch: (M * group,) -> same.

    Members of a group share a noise, side by side; the mean removes how good that noise is anyway.
    DEVIATES from GRPO (Shao et al. 2024), which divides by each group's own std: a group whose
    rewards hardly differ stays small here. Equal rewards give exactly 0, never scaled rounding.
    """
    groups = reward.reshape(-1, group)                              # (M, group)
    centred = groups - groups.mean(1, keepdim=True)
    rounding = 1e-6 * (1 + groups.abs().max())
    centred = torch.where(centred.abs() > rounding, centred, 0.0)
    return (centred / centred.square().mean().sqrt().clamp(min=rounding)).reshape(-1)


# ==== UPDATE AND LOOP =========================================================================

def clipped_surrogate(logp, logp_old, adv, clip_range) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(ratio A, clip(ratio, 1 - c, 1 + c) A). Eq. 7, Schulman et al. 2017. All (B,).

    Returns (loss (B,), ratio (B,) detached). At ratio 1 it is the plain policy gradient.
    """
    ratio = (logp - logp_old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * adv, clipped * adv), ratio.detach()


def jump_losses(policy, jumps, adv, std):
    """Surrogate of every u: yields (loss, ratio, KL), (B,) each. Costs no network evaluation."""
    for j in jumps:
        acts = acting(j.k, len(jumps), adv.device)
        logp = jump_logp(policy(j.k) * acts, j.u, std, acts)
        loss, ratio = clipped_surrogate(logp, j.logp, adv, CLIP_JUMP)
        yield loss, ratio, torch.zeros_like(ratio)


def pixel_losses(net, net_ref, jumps, adv, eta, kl_weight, alpha_bar):
    """Surrogate of every x_next, of jumps that explored it: yields (loss, ratio, KL), (B,) each.

    DEVIATES: as in ReDiF's code jumps are weighted by sigma, since the score goes as 1 / sigma:
    less variance, but the sum over jumps is no longer the gradient of the expected reward.
    """
    mean_sigma = torch.stack([j.sigma.mean() for j in jumps]).mean()
    for j in jumps:
        state = j.x_t, j.t, j.t_next, j.u, j.x0_last, alpha_bar, eta
        mean = take_jump(net, *state)[0]
        logp = pixel_logp(mean, j.x_next, j.sigma)
        loss, ratio = clipped_surrogate(logp, j.logp_pixels, adv, CLIP_PIXELS)
        loss, kl = loss * j.sigma / mean_sigma, torch.zeros_like(ratio)
        if kl_weight > 0:
            with torch.no_grad():
                mean_ref = take_jump(net_ref, *state)[0]            # same state
            kl = gaussian_kl(mean, mean_ref, j.sigma)               # with gradient
            loss = loss + kl_weight * kl
        yield loss, ratio, kl.detach()


def policy_update(losses, actions, optimizer, clip_range, epochs):
    """`epochs` passes over one batch of `actions` actions, an optimizer step each. losses: function
    that yields (loss, ratio, KL) of all of them. Returns a dict of diagnostics: ratio_t0, the ratio
    farthest from 1 in the first pass, when nothing has moved yet; the others of the last pass."""
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for epoch in range(epochs):
        optimizer.zero_grad(set_to_none=True)
        seen = []
        for loss, ratio, kl in losses():
            (loss.sum() / actions).backward()
            seen.append((ratio, kl))
        ratio, kl = (torch.cat(column) for column in zip(*seen))
        if epoch == 0:
            ratio_t0 = ratio[(ratio - 1).abs().argmax()].item()
        grad_norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    clip = ((ratio - 1).abs() > clip_range).float().mean().item()
    return dict(ratio_t0=ratio_t0, clip=clip, kl=kl.mean().item(), grad_norm=grad_norm.item())


@torch.no_grad()
def deployed(net, solver, z, target, reward, alpha_bar):
    """Images (B, 3, H, W) of start noise z by a solver, and their reward (B,). A dict of both."""
    images = draw(net, solver, z, alpha_bar)
    return dict(images=images, reward=rewards(reward, images, target))


def hand_kinds(net):
    """The hand solvers of a network: a JumpUNet's x0_hat is the end of an arc, no estimate of the
    image, so that formulas for leans do not apply. (A policy may still learn one.)"""
    return SOLVERS[:1] if isinstance(net, JumpUNet) else SOLVERS


def best_by_hand(net, steps, z, target, reward, alpha_bar):
    """{'kind grid': Solver}: of each kind the hand grid with the largest mean reward on these
    noises; the best kind comes first."""
    score, solvers = {}, {}
    for kind, grid in itertools.product(hand_kinds(net), GRIDS):
        solver = hand_solver(kind, grid, steps)
        mean = deployed(net, solver, z, target, reward, alpha_bar)["reward"].mean().item()
        if mean > score.get(kind, -math.inf):
            score[kind], solvers[kind] = mean, (f"{kind} {grid}", solver)
    return dict(solvers[kind] for kind in sorted(score, key=score.get, reverse=True))


def train(net, policy, train_set, monitor_set, reward, args, out, device):
    """SAMPLING, ADVANTAGES, TRAINING; a printed line every LOG_EVERY updates. What learns is the
    policy, or with channel 'pixels' the network. Returns seconds."""
    alpha_bar, (z_all, target_all) = linear_alpha_bar(device), train_set
    net_ref = copy.deepcopy(net) if args.kl else net
    learns = (policy if args.channel == "jump" else net).requires_grad_(True)
    optimizer = torch.optim.Adam(learns.parameters())
    generator = torch.Generator().manual_seed(args.seed)
    parts = dict(learns=learns, optimizer=optimizer, generator=generator)
    first, seconds_before = load_state(out / "state.pt", parts) if args.resume else (0, 0.0)
    print("update  reward ± std   held-out ratio_t0  clip  kl     in-group  grad    grid | leans")
    start = time.time()
    for update in range(first, args.updates):
        left = 1 - update / args.updates
        optimizer.param_groups[0]["lr"] = args.lr * left
        std = STD[1] + (STD[0] - STD[1]) * left
        # SAMPLING: each noise `group` times, side by side
        pick = torch.randperm(len(z_all), generator=generator)[:NOISES_PER_UPDATE].to(device)
        images, jumps = rollout(net, policy, z_all[pick], alpha_bar, args.channel, args.group, std,
                                args.eta, generator)
        # ADVANTAGES
        score, raw = reward(images, target_all[pick].repeat_interleave(args.group, 0))
        adv = advantages(score, args.group)
        # TRAINING
        if args.channel == "jump":
            clip, losses = CLIP_JUMP, lambda: jump_losses(policy, jumps, adv, std)
        else:
            jumps = [j for j in jumps if j.logp_pixels is not None]
            clip, losses = CLIP_PIXELS, lambda: pixel_losses(net, net_ref, jumps, adv, args.eta,
                                                             args.kl, alpha_bar)
        diagnostics = policy_update(losses, len(adv) * len(jumps), optimizer, clip, args.epochs)

        if (update + 1) % LOG_EVERY and update + 1 < args.updates:
            continue
        solver = policy.solver()
        held = deployed(net, solver, *monitor_set, reward, alpha_bar)
        row = dict(update=update + 1, reward=score.mean().item(), std=score.std().item(),
                   held_out=held["reward"].mean().item(), **diagnostics,
                   in_group=score.reshape(-1, args.group).std(1).mean().item(),
                   terms={k: v.mean().item() for k, v in raw.items()}, grid=solver.grid,
                   leans=solver.leans, seconds=seconds_before + time.time() - start)
        log_line(out / "log.jsonl", **row)
        print("{update:6d} {reward:7.4f} ±{std:6.4f} {held_out:8.4f} {ratio_t0:.6f}  {clip:.2f} "
              "{kl:.1e} {in_group:.4f}  {grad_norm:.1e} ".format(**row), *solver.grid, "|",
              *(f"{lean:.2f}" for lean in solver.leans), flush=True)
        save_state(out / "state.pt", parts, update + 1, row["seconds"])
    return seconds_before + time.time() - start


# ==== RESULT: the checkpoint, two pictures ====================================================

def save_policy(path, net, solver, origin, half=True):
    """What is deployed: the network and the solver. half=False keeps fp32: small updates of pixels
    are lost in the rounding."""
    save_checkpoint(path, "policy", solver=[*map(list, solver)], provenance=origin, net=dict(
        kind=type(net).__name__, config=net.config,
        weights=half_weights(net) if half else net.state_dict()))


def load_policy(path, device="cpu"):
    """Rebuild what was saved, frozen, in eval mode. Returns (net, Solver, content)."""
    content = load_checkpoint(path, "policy")
    with rebuilding(path, "policy"):
        saved = content["net"]
        net = dict(UNet=UNet, JumpUNet=JumpUNet)[saved["kind"]](**saved["config"])
        net = frozen_network(net, saved["weights"], path, device)
        solver = Solver(*content["solver"])
    return net, solver, content


def plot_alignment(rows, K, path):
    """The same noises through the hand solvers, the table's last first, the policy, the target."""
    target, *hand, policy = rows
    titles = [*(f"{K} evaluations, by hand: {name}" for name in hand[::-1]),
              f"{K} evaluations, learned by the policy gradient",
              f"{len(TARGET.leans)} evaluations: the teacher's own images, the target"]
    images = [rows[name]["images"] for name in (*hand[::-1], policy, target)]
    plot_strips([*zip(titles, images)], 12, (9, 1.15 * len(titles)), path)


def plot_grid(result, folder, path):
    """Reward over training; learned times and leans beside those of the hand solvers."""
    log, K, dpm = read_log(folder / "log.jsonl"), result["steps"], dpm_leans(result["times"])
    updates, jumps, ends = [row["update"] for row in log], range(1, K + 1), range(K + 1)
    plot_panels([
        ("update", "reward", [("exploring", updates, [row["reward"] for row in log], "-"),
                              ("held out", updates, [row["held_out"] for row in log], "-")]),
        ("network evaluations", "t", [("learned", ends, result["times"], "o-"), *(
            (f"{name} grid", ends, make_grid(name, K), style)
            for name, style in zip(GRIDS, ("--", ":", "-.")))]),
        ("jump", "lean", [("learned", jumps, result["leans"], "o-"),
                          ("DPM-Solver++(2M) on these times", jumps, dpm, "--"),
                          ("AB2", jumps[1:], [0.5] * (K - 1), "-."),
                          ("DDIM", jumps, [0] * K, ":")])], path)


# ==== COMMAND LINE ============================================================================

def parse_args(argv=None):
    """Command line of rl_distill.py."""
    p = parser_for(__doc__, "python rl_distill.py --steps 6 --reward feature:2+mse --seed 1")
    a = p.add_argument_group("inputs").add_argument
    a("--teacher", default="checkpoints/teacher.pt", help="checkpoint of teacher.py")
    a("--student", default="checkpoints/student.pt", help="its clone; with --init student")
    a("--encoders", default="checkpoints", help="folder of coach.pt and judge.pt")
    a = p.add_argument_group("what is learned").add_argument
    a("--init", choices=["teacher", "student"], default="teacher",
      help="who jumps: a copy of the teacher, or the cloned student")
    a("--channel", choices=["jump", "pixels"], default="jump",
      help=f"action that explores and learns: u, or x_next by the network's weights; then {PIXELS}")
    a("--steps", type=number(int, 1, 64), default=4, help="K, evaluations per image, 1..16")
    a("--reward", default="feature+perceptual", help=f"sum of {', '.join(TERMS)}; term:weight")
    a = p.add_argument_group("how").add_argument
    a("--updates", type=number(int, 1), default=80, help="policy updates, 20..500")
    a("--noises", type=number(int, 4), default=128, help="training noises, each with one target")
    a("--group", type=number(int, 2), default=2, help="G, rollouts of each noise, even, 2..16")
    a("--epochs", type=number(int, 1), default=4, help="PPO's passes, 1..8; 1: REINFORCE")
    a("--lr", type=number(float, 1e-9, 1), default=0.05, help="Adam's first rate, falls to 0: of u "
      "0.01..0.1, of the network 3e-6..3e-5")
    a("--eta", type=number(float, 0, 1), default=0.0, help="exploration of the pixels before the "
      "last jump, Eq. 16 DDIM; 0: only the last jump explores, 0..0.3")
    a("--kl", type=number(float, 0, 1e6), default=0.0, help="weight of the KL to the start, 0..1")
    a("--held-out", type=number(int, 6), default=256, help="noises of the final table")
    run_flags(p)
    args = p.parse_args(argv)
    if args.channel == "pixels":
        p.set_defaults(**PIXELS)
        args = p.parse_args(argv)
    if args.smoke:
        args.updates, args.noises, args.held_out = 8, 4, 8
    args.student = args.student if args.init == "student" else None
    if args.group % 2:
        p.error("--group must be even: exploration comes in antithetic pairs")
    if args.steps == 1 and args.channel == "jump":
        p.error("--steps 1 leaves no jump to learn; use --channel pixels or more steps")
    if args.channel == "jump" and (args.eta > 0 or args.kl > 0):
        p.error("--eta and --kl belong to the pixels: add --channel pixels")
    return args


def load_inputs(args, device):
    """Read the checkpoints. Returns (teacher, who jumps, reward, judge and its file)."""
    teacher, _ = load_teacher(args.teacher, device)
    net = copy.deepcopy(teacher)
    if args.init == "student":
        net, content = load_student(args.student, device)
        if content["provenance"].get("teacher") != checksum([args.teacher]):
            raise BadInput(f"{args.student} was not cloned from {args.teacher}; give another one")
    coach, coach_file = load_encoder(f"{args.encoders}/coach.pt", "coach", device)
    judge = load_encoder(f"{args.encoders}/judge.pt", "judge", device)
    return teacher, net, Reward(args.reward, coach, coach_file["scales"]), judge


def main(argv=None):
    args = parse_args(argv)
    began, device = time.time(), pick_device(args.device)
    alpha_bar = linear_alpha_bar(device)
    teacher, net, reward, judge = load_inputs(args, device)
    out = claim_run(args, "rl_distill")
    print("config:", vars(args))
    print(f"device {device_name(device)}, fp32 | {parameter_count(net) / 1e6:.2f} M "
          f"parameters | {args.steps} evaluations per image, {args.updates} updates")
    train_set = noise_and_targets(teacher, 0, args.noises, device)
    held_set = noise_and_targets(teacher, HELD_OUT, args.held_out, device)
    watched = min(MONITOR, args.held_out)
    monitor_set = noise_and_targets(teacher, HELD_OUT + 10 ** 6, watched, device)
    rows = dict(target=dict(images=held_set[1], reward=torch.zeros(args.held_out, device=device)))
    some = [x[:HAND_NOISES] for x in train_set]
    jumpers = [("", net)] if args.init == "teacher" else [("teacher, ", teacher), ("", net)]
    for who, jumper in jumpers:
        hand = best_by_hand(jumper, args.steps, *some, reward, alpha_bar)
        rows.update({who + name: deployed(jumper, solver, *held_set, reward, alpha_bar)
                     for name, solver in hand.items()})
    start = next(name for name in hand if args.eta == 0 or "DDIM" in name)   # leans magnify noise
    policy = JumpPolicy(hand[start]).to(device)
    print(f"the policy starts at {start}, the best on training noise"
          + " of the DDIM grids" * (args.eta > 0))
    seconds = train(net, policy, train_set, monitor_set, reward, args, out, device)
    save_policy(out / "policy.pt", net, policy.solver(), provenance(
        "rl_distill.py", args, seconds, device, start=start), half=args.channel == "jump")

    net, solver, _ = load_policy(out / "policy.pt", device)        # what is measured is the file
    rows["policy"] = deployed(net, solver, *held_set, reward, alpha_bar)
    print(f"\n{args.held_out} held-out noises, {args.steps} evaluations (target: "
          f"{len(TARGET.leans)}); gain, closed: what the policy adds to a row, of the way to 0")
    result = dict(rows=print_comparison(rows, judge), n=args.held_out, steps=args.steps,
                  times=solver.grid, leans=solver.leans,
                  settings=settings(args), minutes=(time.time() - began) / 60)
    write_whole(out / "result.json", json.dumps(result, indent=1).encode())
    plot_alignment(rows, args.steps, out / "alignment.png")
    plot_grid(result, out, out / "grid.png")
    print(f"learned in {seconds / 60:.1f} min, {result['minutes']:.1f} min in all\n"
          f"wrote {out}/policy.pt, state.pt, alignment.png, grid.png, result.json, log.jsonl")


if __name__ == "__main__":
    run_main(main, "--group")
