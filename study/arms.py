"""What the policy gradient is compared with: every arm of the study, and its competitors.

Adds to rl_distill.py other ways to find the same K x 2 numbers, u = (logit rho, lean) of each jump:
random search, the cross-entropy method, the reward's own gradient, and two numbers for all jumps.
All see the same training noises and the same reward, and spend no more network evaluations than the
policy gradient spends on its rollouts; but for the last they start at the same hand solver.
Variants of the policy gradient are flags of rl_distill.py. The settings above were chosen by
tune.py, four a method. Next file: run.py, which plays the arms and keeps the books.
"""
import copy
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# From the repository:
from ddpm import (GRIDS, SOLVERS, Solver, T, dpm_leans, estimate,              # noqa: E402
                  hand_solver, make_grid, power_grid, spread)
from rl_distill import (NOISES_PER_UPDATE, JumpPolicy, acting, deployed,       # noqa: E402
                        next_time, take_jump)

SEARCH_NOISES, SEARCH_STD = 64, (0.07, 0.01)    # noises of each try; std, first and last try
POPULATION, ELITES = 16, 4                      # of a generation, De Boer et al. 2005
CEM_STD = 0.2, 0.01                             # of the first generation; floor of all others
OWN_LR = 0.2                                    # Adam's first rate, falls to 0; 0.01..0.1
POWERS, LEANS = (1.5, 1.75, 2.0), (0.5, 0.6, 0.7, 0.8)      # of two_numbers
BACKWARD = 2                                    # a backward pass costs two evaluations

# ==== BUDGET ==================================================================================


def rollouts(args):
    """Rollouts that channel 'jump' of rl_distill.py explores with: updates x noises x group."""
    return args.updates * min(NOISES_PER_UPDATE, args.noises) * args.group


def evaluations(args):
    """Network evaluations that rl_distill.py learns from: rollouts, and for pixels also the passes
    of the U-Net's own update. Not counted, here and for all competitors: the choice of the hand
    solver and what is merely printed."""
    M, G, K = min(NOISES_PER_UPDATE, args.noises), args.group, args.steps
    if args.channel == "jump":
        return args.updates * M * G * K
    explored = K if args.eta > 0 else 1                             # jumps of each rollout
    return args.updates * M * G * (K + args.epochs * explored * (1 + BACKWARD + (args.kl > 0)))


# ==== COMPETITORS =============================================================================
# (nets, policy at the hand solver, (z (N, 3, H, W), targets of z), reward, rollouts, alpha_bar
# (T + 1,), seed) -> (policy, network evaluations that were spent)


def mask(policy):
    """Which entries of shift (K, 2) act at all: acting() of every jump."""
    K, device = len(policy.shift), policy.shift.device
    return torch.stack([acting(k, K, device) for k in range(K)])


def mean_reward(nets, policy, shift, z, target, reward, alpha_bar):
    """Mean reward of the policy moved by `shift` (K, 2), played without exploration. A float."""
    policy.shift.data.copy_(shift)
    return deployed(nets, policy.solver(), z, target, reward, alpha_bar)["reward"].mean().item()


def pick(wanted, generator, z, target):
    """Random `wanted` of the noises z (N, 3, H, W), and their targets."""
    rows = torch.randperm(len(z), generator=generator)[:wanted].to(z.device)
    return z[rows], target[rows]


def random_search(nets, policy, train_set, reward, rollouts, alpha_bar, seed):
    """Gaussian steps around the best so far, whose std falls linearly; keep what scores higher on a
    fixed choice of the training noises. (1 + 1)-evolution strategy, Rechenberg 1973."""
    generator, policy = torch.Generator().manual_seed(seed), copy.deepcopy(policy)
    noises = pick(SEARCH_NOISES, generator, *train_set)
    tries = max(1, rollouts // len(noises[0]))
    best = policy.shift.data.clone()                                # the hand solver: first try
    highest = mean_reward(nets, policy, best, *noises, reward, alpha_bar)
    for i in range(1, tries):
        std = SEARCH_STD[0] + (SEARCH_STD[1] - SEARCH_STD[0]) * i / tries
        step = std * torch.randn(best.shape, generator=generator).to(best.device)
        shift = best + mask(policy) * step
        score = mean_reward(nets, policy, shift, *noises, reward, alpha_bar)
        if score > highest:
            best, highest = shift, score
    policy.shift.data.copy_(best)
    return policy, tries * len(noises[0]) * len(nets)


def two_numbers(nets, policy, train_set, reward, rollouts, alpha_bar, seed):
    """The best of twelve: times T (1 - k / K)^power, the same lean at every jump but the first."""
    K, noises = len(nets), pick(SEARCH_NOISES, torch.Generator().manual_seed(seed), *train_set)
    tries = [JumpPolicy(Solver(power_grid(K, power), [0.0] + [lean] * (K - 1))).to(noises[0].device)
             for power, lean in itertools.product(POWERS, LEANS)]
    scores = [mean_reward(nets, p, p.shift.data, *noises, reward, alpha_bar) for p in tries]
    return tries[scores.index(max(scores))], len(tries) * len(noises[0]) * K


def cross_entropy(nets, policy, train_set, reward, rollouts, alpha_bar, seed):
    """Mean and std of each entry become those of the best quarter of a generation; a generation
    shares fresh noises. Cross-entropy method, De Boer et al. 2005. The last mean is deployed."""
    generator, policy = torch.Generator().manual_seed(seed), copy.deepcopy(policy)
    mean, acts = policy.shift.data.clone(), mask(policy)
    std, size = torch.full_like(mean, CEM_STD[0]), min(NOISES_PER_UPDATE, len(train_set[0]))
    generations = max(1, rollouts // (POPULATION * size))
    for _ in range(generations):
        noises = pick(size, generator, *train_set)
        draws = torch.randn(POPULATION, *mean.shape, generator=generator).to(mean.device)
        shifts = mean + acts * std * draws                          # (POPULATION, K, 2)
        scores = torch.tensor([mean_reward(nets, policy, shift, *noises, reward, alpha_bar)
                               for shift in shifts])
        elites = shifts[scores.topk(ELITES).indices.to(shifts.device)]
        mean, std = elites.mean(0), elites.std(0).clamp(min=CEM_STD[1])
    policy.shift.data.copy_(mean)
    return policy, generations * POPULATION * size * len(nets)


# ==== THE REWARD'S OWN GRADIENT ===============================================================
# of the same numbers, as LD3 does (Tong et al. 2024, arXiv 2405.15506)

class SmoothSchedule:
    """alpha_bar[t] for times that are no integers: linear in log alpha_bar between two integers, so
    exact at integers, where the derivative is that of the interval above: -alpha_bar beta_(t+1)."""

    def __init__(self, alpha_bar):
        self.alpha_bar = alpha_bar                                  # (T + 1,)

    def __getitem__(self, t):
        """t: (B,) in 0..T, of any type -> (B,), with the gradient of a float t."""
        low = t.detach().long()
        here, above = self.alpha_bar[low], self.alpha_bar[(low + 1).clamp(max=T)]
        return here * ((t - low) * (above / here).log()).exp()


def smooth_time(t, logit_rho, n):
    """next_time() forward; backward as if t_next = rho t had not been rounded (straight through).
    t: (B,) floats that are integers, logit_rho: (B,), n: evaluations left with this one."""
    t_next = torch.sigmoid(logit_rho) * t
    return next_time(t.detach().long(), logit_rho.detach(), n) + (t_next - t_next.detach())


def smooth_rollout(nets, policy, z, schedule):
    """The images (M, 3, H, W) of rollout(nets, policy, z, alpha_bar), with the gradient of every
    logit rho and lean: through the times, the schedule and the networks."""
    t, x, x0_last = torch.full((len(z),), float(T), device=z.device), z, z
    for k, net in enumerate(nets):
        u = policy(k, x) * acting(k, len(nets), z.device)
        if k == len(nets) - 1:          # D itself; in jump() sqrt(1 - ab') has no derivative here
            x0_hat = estimate(net, x, t, net(x, t, torch.zeros_like(t)), schedule)
            return (x0_hat + spread(u[:, 1], x) * (x0_hat - x0_last)).clamp(-1, 1)
        t_next = smooth_time(t, u[:, 0], len(nets) - k)
        x, _, x0_last = take_jump(net, x, t, t_next, u, x0_last, schedule, 0.0)
        t = t_next


def own_gradient(nets, policy, train_set, reward, rollouts, alpha_bar, seed):
    """Adam on shift through the whole rollout; needs a reward that autograd sees through, and the
    memory of 16 x K evaluations. One noise costs 3 K: forward, and backward twice that."""
    generator, policy = torch.Generator().manual_seed(seed), copy.deepcopy(policy)
    size, schedule = min(NOISES_PER_UPDATE, len(train_set[0])), SmoothSchedule(alpha_bar)
    updates = max(1, rollouts // ((1 + BACKWARD) * size))
    optimizer = torch.optim.Adam(policy.parameters(), lr=OWN_LR)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = OWN_LR * (1 - update / updates)
        z, target = pick(size, generator, *train_set)
        loss = -reward(smooth_rollout(nets, policy, z, schedule), target)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy, updates * size * (1 + BACKWARD) * len(nets)


# ==== A STRONGER HAND SOLVER ==================================================================

ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12),
                   (55 / 24, -59 / 24, 37 / 24, -9 / 24))           # for equal steps, newest first


class Ipndm(NamedTuple):
    """iPNDM (Zhang & Chen 2022, arXiv 2204.13902, after PNDM, Liu et al. 2022): Adams-Bashforth on
    eps, in the first jumps of the order that the past allows. No Solver: it remembers eps."""
    grid: list
    order: int                          # 2..4

    @torch.no_grad()
    def __call__(self, net, z, alpha_bar):
        """Images (B, 3, H, W) in [-1, 1] of start noise z."""
        x, past = z, []
        for now, then in zip(self.grid, self.grid[1:]):
            t, ab, ab_next = torch.full((len(x),), now), alpha_bar[now], alpha_bar[then]
            t = t.to(x.device)
            x0_hat = estimate(net, x, t, net(x, t, torch.full_like(t, then)), alpha_bar)
            past = [(x - ab.sqrt() * x0_hat) / (1 - ab).sqrt(), *past][:self.order]
            eps = sum(w * e for w, e in zip(ADAMS_BASHFORTH[len(past) - 1], past))
            x = (ab_next / ab).sqrt() * (x - (1 - ab).sqrt() * eps) + (1 - ab_next).sqrt() * eps
        return x.clamp(-1, 1)


# ==== ALL ARMS ================================================================================

class Arm(NamedTuple):
    """One row of the tables at one number of evaluations; played once per seed."""
    group: str
    name: str
    init: str                           # who jumps: 'teacher', 'student', or 'relay' of the two
    steps: int                          # K
    flags: tuple = ()                   # of rl_distill.py, besides --steps, --seed and INIT's


GROUPS = ("hand", "two", "jump", "search", "own", "cem", "relay", "ablation", "pixels")
COMPETITORS = {"two": two_numbers, "search": random_search, "own": own_gradient,
               "cem": cross_entropy}
INIT = {"teacher": (), "student": ("--init", "student"), "relay": ("--relay",)}
HAND_STEPS = {"teacher": (4, 3, 6, 8), "student": (1, 2, 4, 8)}


def hand_solvers(init, steps):
    """{name: Solver or Ipndm} of a start: those of rl_distill.py (hand_kinds), DPM-Solver++(2M)
    whose last lean aims at t = 1, where lambda is finite, in place of 0, and iPNDM."""
    if init == "student":
        return {f"DDIM {grid}": hand_solver("DDIM", grid, steps) for grid in GRIDS}
    found = {f"{kind} {grid}": hand_solver(kind, grid, steps) for kind in SOLVERS for grid in GRIDS}
    for grid in GRIDS:
        times = make_grid(grid, steps)
        found[f"DPM++ to t = 1, {grid}"] = Solver(times, dpm_leans([*times[:-1], 1]))
        found.update({f"iPNDM-{order} {grid}": Ipndm(times, order)
                      for order in (2, 3, 4) if order <= steps})
    return found


def arms():
    """Every arm, the most important first."""
    pixels = "--channel", "pixels"
    out = [Arm("hand", name, init, k) for init, counts in HAND_STEPS.items()
           for k in counts for name in hand_solvers(init, k)]
    out += [Arm(group, name, init, k) for group, name, init, counts in (
        ("two", "two numbers", "teacher", (4, 3, 6, 8)),
        ("jump", "policy gradient", "teacher", (4, 6, 3, 8)),
        ("search", "random search", "teacher", (4, 6, 8)),
        ("own", "own gradient", "teacher", (4, 6, 3, 8)),
        ("cem", "cross-entropy method", "teacher", (4, 6)),
        ("relay", "policy gradient", "relay", (4, 3)),
        ("relay", "policy gradient", "student", (2, 4))) for k in counts]
    return out + [
        Arm("ablation", "REINFORCE (1 epoch)", "teacher", 4, ("--epochs", "1")),
        Arm("pixels", "pixels, as published", "teacher", 4, (*pixels, "--eta", "0.3")),
        Arm("pixels", "last landing", "teacher", 4, pixels),
        Arm("pixels", "last landing", "student", 1, pixels),
        Arm("pixels", "last landing", "student", 4, pixels)]
