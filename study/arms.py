"""What the policy gradient is compared with: every arm of the study, and its competitors.

Adds to rl_distill.py other ways to find the same numbers u (logit rho, lean and gains of a jump):
random search, the cross-entropy method, and the pathwise gradient of the reward; that gradient for
the network's weights; and the fixed losses of losses.py. All see the same training noises and spend
no more network evaluations; study/README.md says which start elsewhere. Next file: run.py.
"""
import contextlib
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# From the repository:
import rl_distill                                                              # noqa: E402
from ddpm import (SOLVERS, T, action_mask, estimate, expand_like, jump,        # noqa: E402
                  linear_alpha_bar, solver_of, step)
from harness.runs import autocast                                              # noqa: E402
import losses                                                                  # noqa: E402
from reward import View, mse_reward                                            # noqa: E402
from rl_distill import JUMPS_FASTER, JumpPolicy, exploration, rollout           # noqa: E402
from teacher import TARGET, draw                                               # noqa: E402

# Stds of the searches, in those of the policy gradient (rl_distill.STD) for each kind of number:
SEARCH_NOISES, SEARCH_STD = 64, (1.0, 0.2)      # noises of each try; std, first and last try
POPULATION, ELITES = 16, 4                      # of a generation, De Boer et al. 2005
CEM_STD = 1.0, 0.2                              # of the first generation; floor of all others
PATHWISE_LR = 0.03                              # Adam's first rate of (logit rho, lean), falls to 0

# ==== COMPETITORS =============================================================================
# (net, start Solver of lists, (z (N, 3, H, W), View of the targets), reward, args of rl_distill.py,
# budget in network evaluations) -> (Solver of lists, evaluations spent), and the network, where it
# is another one. Weights: net is changed.


def pick(wanted, generator, z, target):
    """Random `wanted` of the noises z (N, 3, H, W), and the View of their targets."""
    rows = torch.randperm(len(z), generator=generator)[:wanted].to(z.device)
    return z[rows], target.rows(rows)


@torch.no_grad()
def mean_reward(net, u, z, target, reward):
    """Mean reward of u (K, 2 + n), as update_jumps() of rl_distill.py finds it. A float."""
    with autocast(z.device):
        images = draw(net, solver_of(u[None]), z, linear_alpha_bar(z.device))
    return reward(images, target).mean().item()


def random_search(net, start, train_set, reward, args, budget):
    """Gaussian steps around the best so far, whose std falls linearly; keep what scores higher on a
    fixed choice of the training noises. (1 + 1)-evolution strategy, Rechenberg 1973."""
    generator, (n, std, _) = torch.Generator().manual_seed(args.seed), exploration(net, args)
    policy, noises = JumpPolicy(start, n), pick(SEARCH_NOISES, generator, *train_set)
    cost = len(noises[0]) * args.steps
    best, tries = policy.mean().detach(), max(1, budget // cost)
    highest = mean_reward(net, best, *noises, reward)               # the baseline: first try
    for i in range(1, tries):
        size = SEARCH_STD[0] + (SEARCH_STD[1] - SEARCH_STD[0]) * i / tries
        u = best + policy.mask * size * std * torch.randn(best.shape, generator=generator)
        value = mean_reward(net, u, *noises, reward)
        if value > highest:
            best, highest = u, value
    return solver_of(best), tries * cost


def cross_entropy(net, start, train_set, reward, args, budget):
    """Mean and std of each number become those of the best quarter of a generation; a generation
    shares fresh noises. Cross-entropy method, De Boer et al. 2005. The last mean is deployed."""
    generator, (n, unit, _) = torch.Generator().manual_seed(args.seed), exploration(net, args)
    policy, size = JumpPolicy(start, n), min(args.noises, len(train_set[0]))
    mean, cost = policy.mean().detach(), POPULATION * size * args.steps
    std, generations = CEM_STD[0] * unit.expand_as(mean), max(1, budget // cost)
    for _ in range(generations):
        noises = pick(size, generator, *train_set)
        draws = torch.randn(POPULATION, *mean.shape, generator=generator)
        us = mean + policy.mask * std * draws                       # (POPULATION, K, 2 + n)
        values = torch.tensor([mean_reward(net, u, *noises, reward) for u in us])
        elites = us[values.topk(ELITES).indices]
        mean, std = elites.mean(0), torch.maximum(elites.std(0), CEM_STD[1] * unit)
    return solver_of(mean), generations * cost


# ==== PATHWISE GRADIENT =======================================================================
# of the reward, backpropagated through sampler and coach; of the same numbers, as LD3 does for the
# times (Tong et al. 2024, arXiv 2405.15506)

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


def smooth_rollout(net, u, z, schedule):
    """The images (M, 3, H, W) of sample(net, z, solver_of(u)), with the gradient of every number of
    u (K, 2 + n) that acts: of rho through the times, the schedule and the network, as if
    t_next = rho t had not been rounded (straight through)."""
    times, n = solver_of(u.detach()[None]).times[0], len(z)
    t, x, x0_last = torch.full((n,), float(T), device=z.device), z, z
    for k, (logit_rho, lean, *_) in enumerate(u):
        last, gains, lean = k == len(u) - 1, u[k, 2:].expand(n, -1), lean.expand(n) * (k > 0)
        smooth = torch.sigmoid(logit_rho) * t
        t_next = torch.zeros_like(t) if last else times[k + 1] + (smooth - smooth.detach())
        x0_hat = estimate(net, x, t, t_next, gains, schedule)
        if last:                             # D itself: in jump() sqrt(1 - ab') has no derivative
            return (x0_hat + expand_like(lean, x) * (x0_hat - x0_last)).clamp(-1, 1)
        x, _ = jump(x, x0_hat, t, t_next, schedule, lean, x0_last)
        t, x0_last = t_next, x0_hat


def rollout_loss(numbers, net, train_set, reward, args):
    """(loss_of(generator) through the whole rollout of numbers() -> u (K, 2 + n), evaluations that
    it costs). Needs a reward that autograd sees through, and the memory of M x K evaluations. One
    noise costs 3 K: forward, and backward twice that."""
    size, schedule = min(args.noises, len(train_set[0])), SmoothSchedule(
        linear_alpha_bar(train_set[0].device))

    def loss_of(generator):
        z, target = pick(size, generator, *train_set)
        return -reward(smooth_rollout(net, numbers(), z, schedule), target).mean()
    return loss_of, size * (1 + losses.BACKWARD) * args.steps


def pathwise(net, start, train_set, reward, args, budget):
    """The pathwise gradient of the numbers of the jumps."""
    n, _, scale = exploration(net, args)
    policy, rate = JumpPolicy(start, n).to(train_set[0].device), PATHWISE_LR * scale
    groups = [dict(params=[policy.jumps], lr=rate),
              dict(params=[policy.gains], lr=rate / JUMPS_FASTER)]
    spent = losses.descend(groups, *rollout_loss(policy.mean, net, train_set, reward, args), args,
                           budget, train_set[0].device)
    return policy.solver(), spent


def pathwise_weights(net, start, train_set, reward, args, budget):
    """The same of the network's weights, at the jumps of `start`."""
    u = start.action(0).to(train_set[0].device)                     # with its gains, if it has any
    return start, losses.descend_weights(net, *rollout_loss(lambda: u, net, train_set, reward,
                                                            args), args.lr, args, budget)


def pathwise_last(net, start, train_set, reward, args, budget):
    """The same through the last jump alone: what the policy gradient of the weights estimates."""
    size, alpha_bar = min(args.noises, len(train_set[0])), linear_alpha_bar(train_set[0].device)

    def loss_of(generator):
        z, target = pick(size, generator, *train_set)
        _, [(state, *_)] = rollout(net, start, z, 1, 0.0, alpha_bar, generator)
        mean, *_ = step(net, *state, alpha_bar)
        return -reward(mean.clamp(-1, 1), target).mean()
    return start, losses.descend_weights(net, loss_of, size * (args.steps + 1 + losses.BACKWARD),
                                         args.lr, args, budget)


# Regression to the target through all jumps, Luhman & Luhman 2021 (arXiv 2101.02388): the pathwise
# gradient again, of a reward that looks at pixels alone.

def squared_error(images, target):
    """-mean squared error over pixels, (B,); target: a View."""
    return mse_reward(View(images, [], None), target)


def regression_jumps(net, start, train_set, reward, args, budget):
    """Regression by the numbers of the jumps."""
    return pathwise(net, start, train_set, squared_error, args, budget)


def regression_weights(net, start, train_set, reward, args, budget):
    """Regression by the weights."""
    return pathwise_weights(net, start, train_set, squared_error, args, budget)


# ==== VARIANTS OF THE POLICY GRADIENT =========================================================

def channel_gains(solver, branches):
    """The same Solver with its gain of a residual block given to each of the block's channels.
    branches: channels of every block."""
    return solver._replace(gains=[[gain for gain, channels in zip(row, branches, strict=True)
                                   for _ in range(channels)] for row in solver.gains])


def only(columns):
    """Within: of u only these act; 0: logit rho, 1: lean, 2: the gains."""
    def mask(steps, n_gains):
        kinds = torch.tensor([0, 1] + [2] * n_gains)
        return action_mask(steps, n_gains) & torch.isin(kinds, torch.tensor(columns))
    return mock.patch.object(rl_distill, "action_mask", mask)


def shuffled(seed):
    """Within: the policy gradient's advantages are those of other draws of its batch."""
    generator, real = torch.Generator().manual_seed(seed), rl_distill.advantages

    def advantages(reward, group):
        order = torch.randperm(len(reward), generator=generator).to(reward.device)
        return real(reward, group)[order]
    return mock.patch.object(rl_distill, "advantages", advantages)


def preferences():
    """Within: of a pair of images the policy gradient is told no more than which has the higher
    reward. A preference has no gradient."""
    real = rl_distill.advantages
    return mock.patch.object(rl_distill, "advantages", lambda *args: real(*args).sign())


def within(method, seed):
    """The context in which rl_distill.train() plays a method."""
    return (shuffled(seed) if method == "placebo" else preferences() if method == "preferences" else
            only(PARTS[method]) if method in PARTS else contextlib.nullcontext())


# ==== ALL ARMS ================================================================================

class Arm(NamedTuple):
    """One deployed sampler; played once per seed."""
    group: str
    name: str
    init: str                           # whose network, a key of INIT
    steps: int                          # K
    flags: tuple = ()                   # of rl_distill.py, besides --init, --steps and --seed
    start: str = "best"                 # kind of baseline solver; "best"; or a key of LEARNED
    method: str = "train"               # "placebo", "preferences"; a key of COMPETITORS, PARTS
    once: bool = False                  # seed 0 alone: it draws nothing, or costs too much


INIT = {"teacher": "teacher", "student": "checkpoints/student.pt",      # --init of rl_distill.py
        "copy": "checkpoints/student_copy.pt"}
COMPETITORS = {"random search": random_search, "cross-entropy": cross_entropy,
               "pathwise": pathwise, "pathwise, weights": pathwise_weights,
               "pathwise, weights, last jump": pathwise_last,
               "regression": regression_jumps, "regression, weights": regression_weights,
               "cloning": losses.cloning, "progressive distillation": losses.progressive,
               "consistency distillation": losses.consistency}
NEED_GRADIENT = [name for name in COMPETITORS if "pathwise" in name]     # of the reward
COACH = 0.107                           # a call of the reward, in evaluations (0.081, 0.756 GFLOP)
FIXED = [*COMPETITORS][-4:]                     # losses of the weights: they ask no reward
GRADIENT, ALL, WEIGHTS = "policy gradient", "times, leans, gains", "pathwise, weights"
GAINS = {"times and leans": ("--gains", "none"), ALL: (), "channel gains": ("--gains", "channel")}
PARTS = {"times": [0], "leans": [1], "gains": [2], "times, gains": [0, 2], "leans, gains": [1, 2]}
LEARNED = {"learned": f"{GRADIENT}, {ALL}", "regression": "regression, weights"}    # arm.start
BASELINE_STEPS = {"teacher": (1, 2, 3, 4, 6, 8), "student": (1, 2, 3, 4, 8),
                  "copy": (1, 2, 3, 4, 8)}
FEW = 1, 2, 3, 4


def arms():
    """Every arm, the most important groups first."""
    weights, later = ("--learn", "weights"), ("--learn", "weights", "--updates", "60", "--lr")
    out = [Arm("baseline", "target", "teacher", len(TARGET.leans), once=True)]
    out += [Arm("baseline", kind, init, K, once=True)
            for init, steps in BASELINE_STEPS.items() for K in steps
            for kind in (SOLVERS if init == "teacher" and K > 1 else SOLVERS[:1])]
    out += [Arm("jumps", f"{GRADIENT}, {ALL}", init, K) for init, steps in (
        ("teacher", (2, 3, 4, 6, 8, 1)), ("student", FEW), ("copy", FEW)) for K in steps]
    out += [Arm("none", f"{GRADIENT}, times and leans", "teacher", K, GAINS["times and leans"],
                once=K > 4) for K in (2, 3, 4, 6, 8)]
    out += [Arm("search", f"{name}, {what}", "teacher", K, flags, method=name)
            for name in ("random search", "cross-entropy") for what, flags in GAINS.items()
            for K in ((2, 3, 4) if what == ALL else (3,))]
    out += [Arm("pathwise", f"pathwise, {ALL}", "teacher", K, method="pathwise")
            for K in (2, 3, 4)]
    out += [Arm("fixed", f"regression, {ALL}", "teacher", 3, method="regression")]
    for K in FEW:                       # about as many evaluations as the jumps
        more = (*weights, "--updates", str(240 * K // (K + 4)))
        out += [Arm("fixed", name, "teacher", K, more, method=name)
                for name in (FIXED if K < 4 else FIXED[:1])]
        out += [Arm("weights", f"{GRADIENT}, weights", "teacher", K, more),
                Arm("pathwise", WEIGHTS, "teacher", K, more, method=WEIGHTS)]
    # More at three evaluations: 102 updates as above, 60 more as after regression; and, at two too,
    # as many as cost what the policy gradient does with its 128 calls of the reward a noise
    usual, longer, dear2, dear = ((*weights, "--updates", str(n)) for n in (
        102, 102 + 60, round(80 + 80 * 128 * COACH / 5), round(102 + 102 * 128 * COACH / 6)))
    out += [Arm("pathwise", f"{WEIGHTS}, last jump", "teacher", 3, usual,
                method=f"{WEIGHTS}, last jump"),
            Arm("fixed", f"{FIXED[0]}, from DDIM", "teacher", 3, usual, "DDIM", FIXED[0]),
            Arm("fixed", f"{FIXED[0]}, half more", "teacher", 3, longer, method=FIXED[0]),
            *(Arm("fixed", f"{FIXED[0]}, equal cost", "teacher", K, flags, method=FIXED[0])
              for K, flags in ((2, dear2), (3, dear))),
            Arm("fixed", "cloning, equal cost", "teacher", 3, dear, method="cloning", once=True),
            Arm("pathwise", f"{WEIGHTS}, equal cost", "teacher", 3, dear, method=WEIGHTS,
                once=True),
            Arm("jumps", f"{GRADIENT}, {ALL}, equal cost", "teacher", 3, ("--updates", "640"),
                once=True)]
    out += [Arm("weights", f"{GRADIENT}, weights, {words}", init, K, flags, start)
            for init, words, start, steps, flags in (
                ("teacher", "from learned jumps", "learned", FEW, (*later, "1e-5")),
                ("teacher", "after regression", "regression", (2, 3), (*later, "1e-5")),
                ("teacher", "from DDIM", "DDIM", (2, 3, 4), weights),
                ("student", "from DDIM", "DDIM", FEW, (*later, "3e-6")),
                ("copy", "from DDIM", "DDIM", FEW, (*later, "3e-6"))) for K in steps]
    channel = f"{GRADIENT}, channel gains"
    return out + [
        Arm("pathwise", f"{WEIGHTS}, after regression", "teacher", 3, (*later, "1e-5"),
            "regression", WEIGHTS),
        Arm("channel", channel, "teacher", 3, GAINS["channel gains"]),
        Arm("channel", f"{channel}, from block gains", "teacher", 3, GAINS["channel gains"],
            "learned"),
        Arm("paper", f"{GRADIENT}, --paper", "teacher", 3, ("--paper",), "DDIM"),
        *(Arm("part", f"{GRADIENT}, {what}", "teacher", 3, method=what, once=True)
          for what in PARTS),
        Arm("preferences", f"{GRADIENT}, {ALL}, of preferences", "teacher", 3,
            method="preferences"),
        Arm("placebo", "placebo: shuffled advantages", "teacher", 3, method="placebo")]


GROUPS = tuple(dict.fromkeys(arm.group for arm in arms()))
