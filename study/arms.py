"""What the policy gradient is compared with: every arm of the study, and its competitors.

Adds to rl_distill.py other ways to find the same K x 2 numbers, u = (logit rho, lean) of each jump:
random search, the cross-entropy method, the reward's own gradient, and two numbers for all jumps.
All see the same training noises and the same reward, and spend no more network evaluations than the
policy gradient spends on its rollouts; but for the last they start at the same hand solver.
Variants of the policy gradient are its flags, CHANGES or classes below. The settings of the methods
were chosen by tune.py. Next file: run.py, which plays the arms and keeps the books.
"""
import copy
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# From the repository:
from ddpm import (GRIDS, SOLVERS, Solver, T, dpm_leans, estimate,              # noqa: E402
                  hand_solver, make_grid, power_grid, spread)
from rl_distill import (CLIP_JUMP, NOISES_PER_UPDATE, STD,                     # noqa: E402
                        JumpPolicy, acting, advantages, antithetic, deployed, jump_losses,
                        next_time, policy_update, rollout, take_jump)
from harness.runs import find                                                  # noqa: E402

SEARCH_NOISES, SEARCH_STD = 64, (0.15, 0.03)    # noises of each try; std, first and last try
POPULATION, ELITES = 16, 4                      # of a generation, De Boer et al. 2005
CEM_STD = 0.2, 0.01                             # of the first generation; floor of all others
OWN_LR, WEIGHTS_LR = 0.03, 1e-5                 # Adam's first rate, falls to 0; of the weights
POWERS, LEANS = (1.5, 1.75, 2.0), (0.5, 0.6, 0.7, 0.8)      # of two_numbers
BACKWARD = 2                                    # a backward pass costs two evaluations

# ==== BUDGET ==================================================================================


def evaluations(args):
    """Network evaluations that rl_distill.py learns from: K a rollout, and for pixels also the
    passes of the U-Net's own update. Not counted, here and for all competitors: the choice of the
    hand solver, the jumps that an arm starts from, and what is merely printed."""
    rollouts = args.updates * min(NOISES_PER_UPDATE, args.noises) * args.group
    again = args.epochs * (1 + BACKWARD + (args.kl > 0)) * (args.steps if args.eta > 0 else 1)
    return rollouts * (args.steps + again * (args.channel == "pixels"))


# ==== COMPETITORS =============================================================================
# (net, policy at the hand solver, (z (N, 3, H, W), targets of z), reward, rollouts, alpha_bar
# (T + 1,), seed) -> (policy, network evaluations that were spent). own_weights changes net itself.


def mask(policy):
    """Which entries of shift (K, 2) act at all: acting() of every jump."""
    K, device = len(policy.shift), policy.shift.device
    return torch.stack([acting(k, K, device) for k in range(K)])


def mean_reward(net, policy, shift, z, target, reward, alpha_bar):
    """Mean reward of the policy moved by `shift` (K, 2), played without exploration. A float."""
    policy.shift.data.copy_(shift)
    return deployed(net, policy.solver(), z, target, reward, alpha_bar)["reward"].mean().item()


def pick(wanted, generator, z, target):
    """Random `wanted` of the noises z (N, 3, H, W), and their targets."""
    rows = torch.randperm(len(z), generator=generator)[:wanted].to(z.device)
    return z[rows], target[rows]


def random_search(net, policy, train_set, reward, rollouts, alpha_bar, seed):
    """Gaussian steps around the best so far, whose std falls linearly; keep what scores higher on a
    fixed choice of the training noises. (1 + 1)-evolution strategy, Rechenberg 1973."""
    generator, policy = torch.Generator().manual_seed(seed), copy.deepcopy(policy)
    noises = pick(SEARCH_NOISES, generator, *train_set)
    tries = max(1, rollouts // len(noises[0]))
    best = policy.shift.data.clone()                                # the hand solver: first try
    highest = mean_reward(net, policy, best, *noises, reward, alpha_bar)
    for i in range(1, tries):
        std = SEARCH_STD[0] + (SEARCH_STD[1] - SEARCH_STD[0]) * i / tries
        step = std * torch.randn(best.shape, generator=generator).to(best.device)
        shift = best + mask(policy) * step
        score = mean_reward(net, policy, shift, *noises, reward, alpha_bar)
        if score > highest:
            best, highest = shift, score
    policy.shift.data.copy_(best)
    return policy, tries * len(noises[0]) * len(policy.hand)


def two_numbers(net, policy, train_set, reward, rollouts, alpha_bar, seed):
    """The best of twelve: times T (1 - k / K)^power, the same lean at every jump but the first."""
    K, generator = len(policy.hand), torch.Generator().manual_seed(seed)
    noises = pick(SEARCH_NOISES, generator, *train_set)
    tries = [JumpPolicy(Solver(power_grid(K, power), [0.0] + [lean] * (K - 1))).to(noises[0].device)
             for power, lean in itertools.product(POWERS, LEANS)]
    scores = [mean_reward(net, p, p.shift.data, *noises, reward, alpha_bar) for p in tries]
    return tries[scores.index(max(scores))], len(tries) * len(noises[0]) * K


def cross_entropy(net, policy, train_set, reward, rollouts, alpha_bar, seed):
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
        scores = torch.tensor([mean_reward(net, policy, shift, *noises, reward, alpha_bar)
                               for shift in shifts])
        elites = shifts[scores.topk(ELITES).indices.to(shifts.device)]
        mean, std = elites.mean(0), elites.std(0).clamp(min=CEM_STD[1])
    policy.shift.data.copy_(mean)
    return policy, generations * POPULATION * size * len(policy.hand)


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


def smooth_rollout(net, policy, z, schedule):
    """The images (M, 3, H, W) of rollout(net, policy, z, alpha_bar), with the gradient of every
    logit rho and lean: through the times, the schedule and the network."""
    t, x, x0_last = torch.full((len(z),), float(T), device=z.device), z, z
    K = len(policy.hand)
    for k in range(K):
        u = (policy(k) * acting(k, K, z.device)).expand(len(x), 2)
        if k == K - 1:                   # D itself; in jump() sqrt(1 - ab') has no derivative here
            x0_hat = estimate(net, x, t, net(x, t, torch.zeros_like(t)), schedule)
            return (x0_hat + spread(u[:, 1], x) * (x0_hat - x0_last)).clamp(-1, 1)
        t_next = smooth_time(t, u[:, 0], K - k)
        x, _, x0_last = take_jump(net, x, t, t_next, u, x0_last, schedule, 0.0)
        t = t_next


def ascend(learns, first_rate, net, policy, train_set, reward, rollouts, alpha_bar, seed):
    """Adam on the parameters of `learns`, the policy or a net, through the whole rollout. Needs a
    reward that autograd sees through, and the memory of 16 x K evaluations. One noise costs 3 K:
    forward, and backward twice that. Returns the network evaluations that were spent."""
    generator, schedule = torch.Generator().manual_seed(seed), SmoothSchedule(alpha_bar)
    size = min(NOISES_PER_UPDATE, len(train_set[0]))
    updates = max(1, rollouts // ((1 + BACKWARD) * size))
    optimizer = torch.optim.Adam(learns.parameters(), lr=first_rate)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = first_rate * (1 - update / updates)
        z, target = pick(size, generator, *train_set)
        loss = -reward(smooth_rollout(net, policy, z, schedule), target)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return updates * size * (1 + BACKWARD) * len(policy.hand)


def own_gradient(net, policy, *rest):
    """The reward's own gradient of the jumps."""
    policy = copy.deepcopy(policy)
    return policy, ascend(policy, OWN_LR, net, policy, *rest)


def own_weights(net, policy, *rest):
    """The same of the network's weights, at the policy's mean jumps."""
    policy.requires_grad_(False)
    spent = ascend(net.requires_grad_(True), WEIGHTS_LR, net, policy, *rest)
    net.requires_grad_(False)
    return policy, spent


# ==== A STRONGER HAND SOLVER ==================================================================

ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12),
                   (55 / 24, -59 / 24, 37 / 24, -9 / 24))           # for equal steps, newest first


class Ipndm(NamedTuple):
    """iPNDM (Zhang & Chen 2022, arXiv 2204.13902, after PNDM, Liu et al. 2022): Adams-Bashforth on
    eps, in the first jumps of the order that the past allows. No Solver: it remembers eps."""
    grid: list
    order: int                          # 1..4

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


# ==== VARIANTS OF THE POLICY GRADIENT =========================================================

def exploring(*entries):
    """antithetic() of the entries of u that are 1 in `entries` alone: only they are learned."""
    def noise(shape, generator, device):
        return antithetic(shape, generator, device) * torch.tensor(entries, device=device)
    return noise


def batch_advantages(reward, group):
    """One baseline for the whole batch in place of one for each noise."""
    return (reward - reward.mean()) / reward.std().clamp(min=1e-6)


CHANGES = {                             # {name: what is put into rl_distill.py}
    "": {}, "rho": dict(antithetic=exploring(1, 0)), "lean": dict(antithetic=exploring(0, 1)),
    "batch": dict(advantages=batch_advantages), "wide": dict(STD=(0.28, 0.04)),
    "narrow": dict(STD=(0.0175, 0.0025))}


class SharedPolicy(JumpPolicy):
    """For all numbers of evaluations K: how far to move from K's own hand solver depends on the
    evaluations left alone. shared: Parameter (largest K, 2)."""

    def __init__(self, solver, shared):
        super().__init__(solver)
        self.shared = shared

    def forward(self, k):
        """Mean of u for jump k, (2,)."""
        return self.hand[k] + self.shared[len(self.hand) - k - 1]


def learn_shared(net, hand, train_set, reward, args, alpha_bar):
    """The loop of rl_distill.py with a K drawn anew in each update. hand: {K: Solver}; args:
    those of the main job; as many updates for each K. Returns {K: Solver}."""
    z, target = train_set
    generator = torch.Generator().manual_seed(args.seed)
    shared = nn.Parameter(torch.zeros(max(hand), 2, device=z.device))
    policies = {K: SharedPolicy(solver, shared).to(z.device) for K, solver in hand.items()}
    optimizer, updates = torch.optim.Adam([shared]), args.updates * len(hand)
    for update in range(updates):
        left = 1 - update / updates
        optimizer.param_groups[0]["lr"] = args.lr * left
        std = STD[1] + (STD[0] - STD[1]) * left
        K = list(hand)[torch.randint(len(hand), (), generator=generator).item()]
        policy = policies[K]
        rows = torch.randperm(len(z), generator=generator)[:NOISES_PER_UPDATE].to(z.device)
        images, jumps = rollout(net, policy, z[rows], alpha_bar, "jump", args.group, std,
                                0.0, generator)
        adv = advantages(reward(images, target[rows].repeat_interleave(args.group, 0))[0],
                         args.group)
        policy_update(lambda: jump_losses(policy, jumps, adv, std), len(adv) * K, optimizer,
                      CLIP_JUMP, args.epochs)
    return {K: policy.solver() for K, policy in policies.items()}


# ==== ALL ARMS ================================================================================

class Arm(NamedTuple):
    """One row of the tables at one number of evaluations; played once per seed."""
    group: str
    name: str
    init: str                           # who jumps, a key of INIT
    steps: int                          # K
    flags: tuple = ()                   # of rl_distill.py, besides --steps, --seed and INIT's
    change: str = ""                    # of CHANGES
    learned: bool = False               # starts at (transfer: is) what arm 'jump' learned


COMPETITORS = {"two": two_numbers, "search": random_search, "own": own_gradient,
               "cem": cross_entropy, "control": own_weights}
INIT = {"teacher": (), "student": ("--init", "student"),
        "copy": ("--init", "student", "--student", "checkpoints/student_copy.pt"),
        "earlier": ("--teacher", "checkpoints/teacher_earlier.pt")}
COUNTS = 3, 4, 6, 8                     # where the policy gradient is compared
HAND_STEPS = {"teacher": (1, 2, 3, 4, 6, 8, 10, 20, 50), "copy": (1, 2, 3, 4, 6, 8),
              "student": (1, 2, 4, 8), "earlier": (4,)}
JUDGED = "jump", "student"              # groups whose Fréchet distances are of more images
ONCE = "hand", "two"                    # played with seed 0 alone: nothing, or little, is drawn


def hand_solvers(kind, steps):
    """The solvers of a kind, one a grid: [Solver or Ipndm]; of many steps the target's kind."""
    if steps >= 10:
        return [hand_solver("DDIM", "quadratic", steps)]
    if kind.startswith("iPNDM"):
        return [Ipndm(make_grid(grid, steps), int(kind[-1])) for grid in GRIDS]
    if kind == "DPM++ to t = 1":        # its last lean as if it aimed there, where lambda is finite
        grids = [make_grid(grid, steps) for grid in GRIDS]
        return [Solver(grid, dpm_leans([*grid[:-1], 1])) for grid in grids]
    return [hand_solver(kind, grid, steps) for grid in GRIDS]


def hand_kinds(init, steps):
    """Names of the hand solvers that are compared at this number of evaluations."""
    if init in ("student", "copy") or steps == 1 or steps >= 10:
        return ["DDIM"]
    if init == "earlier":
        return [*SOLVERS]
    return [*SOLVERS, "DPM++ to t = 1", *(f"iPNDM-{order}" for order in (3, 4) if order <= steps)]


def arms():
    """Every arm, the most important first."""
    pixels = "--channel", "pixels"
    out = [Arm("hand", kind, init, k) for init, counts in HAND_STEPS.items() for k in counts
           for kind in hand_kinds(init, k)]
    out += [Arm(group, name, init, k) for group, name, init, counts in (
        ("jump", "policy gradient", "teacher", (4, 6, 8, 3, 2)),
        ("student", "policy gradient", "copy", (4, 2)),
        ("student", "policy gradient", "student", (4,)),
        ("two", "two numbers", "teacher", COUNTS),
        ("search", "random search", "teacher", (4, 6)),
        ("cem", "cross-entropy method", "teacher", (4, 6)),
        ("own", "own gradient", "teacher", (4, 6))) for k in counts]
    out += [
        Arm("half", "rho alone", "teacher", 4, change="rho"),
        Arm("half", "lean alone", "teacher", 4, change="lean"),
        Arm("pixels", "as published", "teacher", 4, (*pixels, "--eta", "0.3", "--lr", "3e-5")),
        Arm("pixels", "last landing, from the learned jumps", "teacher", 4, pixels, learned=True),
        Arm("pixels", "last landing", "copy", 1, pixels),
        Arm("control", "own gradient of the weights", "teacher", 4, pixels, learned=True),
        Arm("reward", "feature alone", "teacher", 4, ("--reward", "feature")),
        Arm("reward", "perceptual alone", "teacher", 4, ("--reward", "perceptual")),
        Arm("reward", "MSE alone", "teacher", 4, ("--reward", "mse")),
        Arm("reward", "histogram alone", "teacher", 4, ("--reward", "histogram")),
        Arm("transfer", "the teacher's jumps", "earlier", 4, learned=True),
        Arm("transfer", "the teacher's jumps", "copy", 4, learned=True),
        Arm("transfer", "16 training noises", "teacher", 4, ("--noises", "16")),
        Arm("ablation", "REINFORCE (1 epoch)", "teacher", 4, ("--epochs", "1")),
        Arm("ablation", "one baseline for all", "teacher", 4, change="batch"),
        Arm("ablation", "4 times the spread", "teacher", 4, change="wide"),
        Arm("ablation", "a quarter of it", "teacher", 4, change="narrow"),
        Arm("ablation", "groups of 8, a quarter of the updates", "teacher", 4,
            ("--group", "8", "--updates", "20"))]
    out += [Arm("all", "one policy for K = 3, 4, 6, 8", "teacher", k) for k in COUNTS]
    return [arm for arm in out if all(find(word).exists() for word in INIT[arm.init]
                                      if word.endswith(".pt"))]


GROUPS = tuple(dict.fromkeys(arm.group for arm in arms()))
