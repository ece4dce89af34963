"""Grade the implement-exercises in a folder, by properties with fresh random numbers.

    python assignments/grade.py PATH                    # PATH: a handout that was worked on
    python assignments/grade.py PATH --only 2 --seed 7 --json result.json

Each exercise runs in a process of its own with a time limit, on the files of PATH alone. The right
values come from formulas written out below in float64, never from the repository's functions; what
is printed names the property that does not hold, the input and the worst entry, never a formula.
A function gets clones of its inputs and must leave them as they are.
Verdicts: passes, not attempted, wrong shape, wrong value, error. Exit code 0 if all pass, else 1.
"""
import argparse
import contextlib
import copy
import functools
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import torch

TRIALS = 5
SECONDS, MOST_PRINTED = 60, 10 ** 6             # of computing, waiting as long again; bytes


class Wrong(Exception):
    """A property that does not hold: verdict, property, and what to show."""

    def __init__(self, verdict, rule, **shown):
        super().__init__(rule)
        self.verdict, self.rule = verdict, rule
        self.shown = {name: text_of(value) for name, value in shown.items()}


def text_of(value, row=0):
    """A short text of an input or a result; of a tensor six entries, of its row `row` and on."""
    if isinstance(value, torch.Tensor):
        rest = value.detach()[row:].flatten() if row else value.detach().flatten()
        flat = ", ".join(f"{v:.6g}" for v in rest[:6].tolist()) + ", ..." * (len(rest) > 6)
        where = f", from row {row}" if row else ""
        return f"tensor of shape {tuple(value.shape)}{where}: [{flat}]"
    return value if isinstance(value, str) else repr(value)[:200]


def same(theirs, wanted, rule, tolerance=1e-4, **inputs):
    """theirs must be a tensor of wanted's shape and values (relative to the largest of wanted)."""
    if not isinstance(theirs, torch.Tensor):
        raise Wrong("wrong shape", f"{rule}: a tensor is wanted", yours=theirs, **inputs)
    if theirs.shape != wanted.shape:
        raise Wrong("wrong shape", f"{rule}: shape {tuple(wanted.shape)} is wanted", yours=theirs,
                    **inputs)
    theirs, wanted = theirs.detach().double(), wanted.double()
    off = (theirs - wanted).abs().nan_to_num(nan=math.inf)
    allowed = tolerance * max(1e-3, wanted.abs().max().item() if wanted.numel() else 1)
    if not (off <= allowed).all():
        at = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
        row = 0 if not at else max(0, at[0] - 2) if len(at) == 1 else at[0]     # show what matters
        shown = {name: text_of(x, row if off.dim() and isinstance(x, torch.Tensor)
                               and x.shape[:1] == off.shape[:1] else 0)
                 for name, x in dict(yours=theirs, wanted=wanted, **inputs).items()}
        raise Wrong("wrong value", rule, farthest_off=(
            f"at {at}: {theirs[at].item():.6g} for {wanted[at].item():.6g}, allowed +- "
            f"{allowed:.1e}"), **shown)


def pair(value, rule):
    """Their result must be two tensors."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise Wrong("wrong shape", f"{rule}: two tensors are wanted", yours=value)
    return value


# ==============================================================================================
# THE RIGHT VALUES, from the papers' formulas
# ==============================================================================================

def alpha_bars(g=None):
    """Linear schedule of Ho et al. 2020: (1001,), in float64; with g one of other betas."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    beta = beta * (0.6 + 0.8 * torch.rand((), generator=g)) if g else beta
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])


def draw(g, *shape):
    return torch.randn(*shape, generator=g)


def whole(g, low, high):
    """A random whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def wide(values, like):
    """(B,) -> (B, 1, ...), to go with `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def images(g, B):
    return draw(g, B, 3, whole(g, 2, 5), whole(g, 2, 5))


def times(g, B, low=1, high=1000):
    return torch.randint(low, high + 1, (B,), generator=g)


def jump_times(g, B):
    """t > t_next for each of B, some of them landing at 0."""
    t = times(g, B, 2)
    t_next = (t * torch.rand(B, generator=g)).long()
    return t, torch.where(torch.arange(B) % 3 == 0, 0, t_next)


def sigma_of(t, t_next, eta, ab):
    """Eq. 16, Song et al. 2020."""
    return eta * ((1 - ab[t_next]) / (1 - ab[t])).sqrt() * (1 - ab[t] / ab[t_next]).sqrt()


def lent(x_t, t, v, alpha_bar):
    """Appendix D of Salimans & Ho 2022. Exercise 1 is graded with it, so as not to wait for 4."""
    a = wide(alpha_bar[t], x_t)
    return a.sqrt() * x_t - (1 - a).sqrt() * v, (1 - a).sqrt() * x_t + a.sqrt() * v


# ==============================================================================================
# THE EXERCISES: each gets their modules and a torch.Generator, and raises Wrong
# ==============================================================================================

def exercise_1(ddpm, g):
    """q_sample and L_simple"""
    for _ in range(TRIALS):
        ab = alpha_bars(g)
        B = whole(g, 2, 6)
        x0, t = images(g, B), times(g, B, 0)
        eps = draw(g, *x0.shape)
        a = wide(ab[t], x0)
        right = a.sqrt() * x0.double() + (1 - a).sqrt() * eps.double()
        same(ddpm.q_sample(x0, t, eps, ab.float()), right,
             "x_t holds x0 and eps in the shares that alpha_bar[t] gives to their variances", t=t,
             x0=x0, eps=eps)
        points = draw(g, B, 2)
        a = ab[t][:, None]
        same(ddpm.q_sample(points, t, points, ab.float()),
             (a.sqrt() + (1 - a).sqrt()) * points.double(),
             "q_sample takes points (B, 2) as well as images", t=t)
        same(ddpm.q_sample(x0, torch.zeros_like(t), eps, ab.float()), x0,
             "at t = 0 q_sample gives x0 back", x0=x0)
        guess, seen = draw(g, *x0.shape).requires_grad_(), []

        def net(x_t, when):
            seen.append((x_t, when))
            return guess * 1                                # has a gradient only where one is kept
        with mock.patch.object(ddpm, "x0_and_eps", lent, create=True):
            loss = ddpm.simple_loss(net, x0, t, eps, ab.float())
        a = wide(ab[t], x0)
        off = (1 - a).sqrt() * right + a.sqrt() * guess.detach().double() - eps.double()
        same(loss, off.square().mean(), "L_simple is the mean squared error of eps_hat over all "
             "images, channels and pixels", t=t, x0=x0, eps=eps, v=guess)
        with mock.patch.object(ddpm, "x0_and_eps", lent, create=True):
            half = ddpm.simple_loss(lambda x_t, t: guess.bfloat16(), x0, t, eps, ab.float())
        if half.dtype != torch.float32:
            raise Wrong("wrong value", "where the network answers in bfloat16, L_simple makes "
                        "floats of its answer first", dtype_of_the_loss=half.dtype)
        if len(seen) != 1:
            raise Wrong("wrong value", "L_simple asks the network exactly once", calls=len(seen))
        same(seen[0][0], right, "the network sees x_t, drawn by q_sample", t=t)
        same(seen[0][1], t, "the network is told t", 1e-6)
        if not loss.requires_grad:
            raise Wrong("wrong value", "L_simple must have a gradient with respect to v", loss=loss)
        grad, = torch.autograd.grad(loss, guess)
        same(grad, 2 * a.sqrt() * off / eps.numel(), "the gradient of L_simple with respect to v is"
             " that of the mean squared error", t=t)


def jump_right(x_t, D, t, t_next, eta, ab):
    """Eq. 12 of Song et al. without its noise, of the estimate D: mean (B, ...), in float64."""
    a, a_next = wide(ab[t], x_t), wide(ab[t_next], x_t)
    eps = (x_t.double() - a.sqrt() * D) / (1 - a).sqrt()
    direction = (1 - a_next - wide(sigma_of(t, t_next, eta, ab), x_t) ** 2).clamp(min=0).sqrt()
    return a_next.sqrt() * D + direction * eps


def exercise_2(ddpm, g):
    """One jump for DDIM and DDPM"""
    for _ in range(TRIALS):
        ab = alpha_bars(g)
        B = whole(g, 3, 7)
        t, t_next = jump_times(g, B)
        eta, x_t = torch.rand((), generator=g).item(), images(g, B)
        x0_hat, told = draw(g, *x_t.shape), dict(t=t, t_next=t_next)
        same(ddpm.ddim_sigma(t, t_next, eta, ab.float()), sigma_of(t, t_next, eta, ab),
             "sigma is eta times the std of x_next given x_t and x0, per image", 1e-3, eta=eta,
             **told)
        same(ddpm.ddim_sigma(t, t_next, 0.0, ab.float()), torch.zeros(B), "eta = 0: sigma is 0")
        same(ddpm.ddim_sigma(t, torch.zeros_like(t), 1.0, ab.float()), torch.zeros(B),
             "no noise on the jump into t = 0", t=t)
        for e in (eta, 0.0, 1.0):
            shown = dict(told, eta=e, x_t=x_t, x0_hat=x0_hat)
            mean, theirs = pair(ddpm.jump(x_t, x0_hat, t, t_next, ab.float(), eta=e),
                                "jump returns mean and sigma")
            same(mean, jump_right(x_t, x0_hat.double(), t, t_next, e, ab), "mean and sigma leave "
                 "x_next distributed as q_sample of x0_hat at t_next, its eps kept", 1e-3, **shown)
            same(theirs, sigma_of(t, t_next, e, ab), "jump returns the sigma of ddim_sigma, (B,)",
                 1e-3, **shown)
        jump_gradient(ddpm, x_t, x0_hat, t, t_next, ab)
    ab = alpha_bars()
    for then in (1, 2, 3):                          # here rounding can put a negative under a root
        t = torch.arange(then + 1, 1001)
        mean, _ = ddpm.jump(torch.ones(len(t), 1), torch.zeros(len(t), 1), t,
                            torch.full_like(t, then), ab.float(), eta=1.0)
        if not mean.isfinite().all():
            raise Wrong("wrong value", "rounding must not put a negative number under a root",
                        eta=1.0, t_next=then, t=t[~mean.isfinite().reshape(-1)])


def jump_gradient(ddpm, x_t, x0_hat, t, t_next, ab, **lean):
    """The jump lets the gradient through to the estimate."""
    theirs, mine = x0_hat.clone().requires_grad_(), x0_hat.double().requires_grad_()
    mean, _ = pair(ddpm.jump(x_t, theirs, t, t_next, ab.float(), **lean),
                   "jump returns mean and sigma")
    rule = "the mean of the jump has its gradient with respect to x0_hat"
    if not mean.requires_grad:
        raise Wrong("wrong value", rule, mean=mean)
    D = mine + wide(lean["lean"].double(), mine) * (mine - lean["x0_last"]) if lean else mine
    grads = [torch.autograd.grad(out.sum(), x)[0] for out, x in (
        (mean, theirs), (jump_right(x_t, D, t, t_next, 0.0, ab), mine))]
    same(*grads, rule, 1e-3, t=t, t_next=t_next, **lean)


class GaussianNet:
    """What the best network says of points from N(mean, std^2), and where its flow ends."""
    estimates_image = False

    def __init__(self, mean, std):
        self.mean, self.std, self.ab = mean, std, alpha_bars()

    def x0(self, x, t):
        """E[x0 | x_t = x], (B, 2) in float64."""
        a = wide(self.ab[t], x)
        return self.mean + a.sqrt() * self.std ** 2 / (a * self.std ** 2 + 1 - a) * (
            x - a.sqrt() * self.mean)

    def __call__(self, x, t, *_):
        a = wide(self.ab[t], x)
        return ((a.sqrt() * x - self.x0(x, t)) / (1 - a).sqrt()).float()

    def end(self, x_T):
        a = self.ab[1000]
        return self.mean + self.std * (x_T - a.sqrt() * self.mean) / (
            a * self.std ** 2 + 1 - a).sqrt()


def gaussian_errors(ddpm, g):
    """How far 16, 32 and 64 jumps of theirs, even in lambda, end from the flow of a Gaussian."""
    ab, std = alpha_bars(), 0.2 + 0.2 * torch.rand((), generator=g).item()
    x_T, mean, errors = draw(g, 64, 2), draw(g, 2), []
    net = GaussianNet(mean, std)
    level = torch.logit(ab[1:]) / 2
    for steps in (16, 32, 64):
        wanted = torch.linspace(level[-1], level[0], steps + 1, dtype=torch.float64)
        grid = [*((level - w).abs().argmin().item() + 1 for w in wanted[:-1]), 0]
        x, x0_last, last = x_T, x_T, grid[0]
        for now, then in zip(grid, grid[1:]):
            t_last, t, t_next = (torch.full((64,), s) for s in (last, now, then))
            x0 = net.x0(x, t).float()
            lean = ddpm.dpm_lean(t, t_next, t_last, ab.float())
            x, _ = ddpm.jump(x, x0, t, t_next, ab.float(), lean=lean, x0_last=x0_last)
            x0_last, last = x0, now
        errors.append((x - net.end(x_T)).square().mean().sqrt().item())
    return errors


def exercise_3(ddpm, g):
    """The lean: DPM-Solver++(2M)"""
    with mock.patch.object(ddpm, "ddim_sigma", sigma_of, create=True):      # not to wait for 2
        leaning(ddpm, g)


def leaning(ddpm, g):
    """The checks of exercise 3."""
    for _ in range(TRIALS):
        ab = alpha_bars(g)
        level = torch.logit(ab) / 2
        B = whole(g, 3, 7)
        t_last = times(g, B, 100)
        t = 20 + ((0.8 * t_last - 20) * torch.rand(B, generator=g)).long()
        t_next = 1 + (0.8 * (t - 1) * torch.rand(B, generator=g)).long()
        told = dict(t_last=t_last, t=t, t_next=t_next)
        right = (level[t_next] - level[t]) / (2 * (level[t] - level[t_last]))
        theirs = ddpm.dpm_lean(t, t_next, t_last, ab.float())
        same(theirs, right, "the lean that reaches the best point of a short jump, on the line "
             "through the last two estimates", 1e-2, **told)
        same(theirs / right, torch.ones(B), "the same, relative to the right value", 2e-3, **told)
        mixed = t_last.clone(), t_next.clone()
        mixed[0][0], mixed[1][1], right[:2] = t[0], 0, 0
        same(ddpm.dpm_lean(t, mixed[1], mixed[0], ab.float()), right, "each image of a batch has "
             "its own lean: 0 at the first jump and into t = 0, the others as they are", 1e-2,
             t_last=mixed[0], t=t, t_next=mixed[1])
        same(ddpm.dpm_lean(t, t_next, t, ab.float()), torch.zeros(B), "no lean at the first jump",
             0, t=t, t_next=t_next)
        same(ddpm.dpm_lean(t, torch.zeros_like(t), t_last, ab.float()), torch.zeros(B),
             "no lean into t = 0", 0, t=t, t_last=t_last)
        t, t_next = jump_times(g, B)
        x_t, lean, eta = images(g, B), draw(g, B), torch.rand((), generator=g).item()
        x0_hat, x0_last = draw(g, *x_t.shape), draw(g, *x_t.shape)
        D = x0_hat.double() + wide(lean.double(), x_t) * (x0_hat.double() - x0_last.double())
        same(ddpm.jump(x_t, x0_hat, t, t_next, ab.float(), lean=0 * lean, x0_last=x0_last)[0],
             jump_right(x_t, x0_hat.double(), t, t_next, 0.0, ab), "with lean 0 the jump is that "
             "of exercise 2", 1e-3, t=t, t_next=t_next, x_t=x_t, x0_hat=x0_hat)
        for e in (0.0, eta):
            mean, _ = pair(ddpm.jump(x_t, x0_hat, t, t_next, ab.float(), lean=lean,
                                     x0_last=x0_last, eta=e), "jump returns mean and sigma")
            same(mean, jump_right(x_t, D, t, t_next, e, ab), "with a lean the jump is that of D "
                 "and of the eps that belongs to it", 1e-3, t=t, t_next=t_next, lean=lean, eta=e,
                 x_t=x_t, x0_hat=x0_hat, x0_last=x0_last)
        jump_gradient(ddpm, x_t, x0_hat, t, t_next, ab, lean=lean, x0_last=x0_last)
        errors = gaussian_errors(ddpm, g)
        if not errors[0] > 3 * errors[1] > 9 * errors[2]:
            raise Wrong("wrong value", "with the lean, half the step leaves about a quarter of the "
                        "error (Gaussian data, 16, 32, 64 jumps)", errors=errors)


def exercise_4(ddpm, student, g):
    """What v says, and the average velocity"""
    for trial in range(TRIALS):
        ab = alpha_bars(g)
        B = whole(g, 2, 6)
        t, t_next = jump_times(g, B)
        x_t = draw(g, B, 2) if trial else images(g, B)              # points as well as images
        x_next, v = draw(g, *x_t.shape), draw(g, *x_t.shape)
        when = torch.cat([torch.zeros(1).long(), t[1:]])            # t = 0 as well
        told = dict(t=when, x_t=x_t, v=v)
        both = x_t.clone().requires_grad_(), v.clone().requires_grad_()
        phi, phi_next, now = (wide(torch.atan2((1 - ab[k]).sqrt(), ab[k].sqrt()), x_t)
                              for k in (t, t_next, when))
        for result, x_share, v_share, name in zip(
                pair(ddpm.x0_and_eps(both[0], when, both[1], ab.float()),
                     "x0_and_eps returns x0_hat and eps_hat"),
                (now.cos(), now.sin()), (-now.sin(), now.cos()), ("x0", "eps")):
            same(result, x_share * x_t + v_share * v, f"{name}_hat: x_t is q_sample of x0_hat "
                 "and eps_hat, v its derivative by phi", **told)
            rule = f"{name}_hat has its gradient with respect to x_t and v"
            if not result.requires_grad:
                raise Wrong("wrong value", rule)
            for share, grad in zip((x_share, v_share), torch.autograd.grad(
                    result.sum(), both, retain_graph=True, allow_unused=True)):
                grad = torch.zeros_like(x_t) if grad is None else grad
                same(grad, share.expand_as(x_t), rule, t=when)
        d = phi - phi_next
        theirs = student.average_velocity(x_t, x_next, t, t_next, ab.float())
        told = dict(t=t, t_next=t_next, x_t=x_t, x_next=x_next)
        same(theirs, (d.cos() * x_t.double() - x_next.double()) / d.sin(),
             "average_velocity is the v whose jump lands at x_next", 2e-3, **told)
        same(d.cos() * x_t - d.sin() * theirs, x_next.double(),
             "the jump with this v lands exactly at x_next", 2e-3, **told)


def exercise_5(rl_distill, g):
    """Group advantages"""
    f = rl_distill.advantages
    for _ in range(TRIALS):
        M, G = whole(g, 2, 6), whole(g, 2, 8)
        level = 3 * draw(g, M, 1)
        spread = draw(g, M, G)                      # of std 1 in each group: no ties by chance
        spread = (spread - spread.mean(1, keepdim=True)) / spread.std(1, keepdim=True)
        r = level + spread * (0.1 + torch.rand(M, 1, generator=g))
        flat, deep = r.reshape(-1), r.double()
        centred = deep - deep.mean(1, keepdim=True)
        told = dict(reward=flat, group=G)
        same(f(flat, G), (centred / centred.square().mean().sqrt()).reshape(-1),
             "distances from the group's mean, of mean square 1 over the batch", 2e-5, **told)
        same(f(flat + 5, G), f(flat, G), "a shift of all rewards changes nothing", 1e-3, **told)
        same(f(1e-12 * flat, G), f(flat, G), "a factor of 1e-12 on all rewards changes nothing",
             1e-3, reward=1e-12 * flat, group=G)
        tie = r.clone()
        tie[0] = tie[0, 0]
        same(f(tie.reshape(-1), G)[:G], torch.zeros(G), "where the rewards of one group are equal, "
             "its advantages are exactly 0", 0, reward=tie.reshape(-1), group=G)
        for size in (G, 7):                         # the mean of seven equal numbers is rounded
            ties = (3 * draw(g, 16)).repeat_interleave(size)
            same(f(ties, size), torch.zeros(16 * size), "where the rewards of each group are "
                 "equal, all advantages are exactly 0", 0, reward=ties, group=size)


def exercise_6(rl_distill, g):
    """The clipped surrogate"""
    for _ in range(TRIALS):
        B = whole(g, 4, 9)
        mean = draw(g, B, 3, 8, 8).requires_grad_()
        sigma, step = 0.05 + torch.rand(B, generator=g), draw(g, B, 3, 8, 8)
        x_next = mean.detach() + step
        off = step.double()
        right = -(off ** 2 / (2 * wide(sigma.double(), off) ** 2)).mean((1, 2, 3))
        logp = rl_distill.landing_logp(mean, x_next, sigma)
        same(logp, right, "the log density of x_next per dimension, without what does not depend "
             "on the mean, (B,)", 1e-3, sigma=sigma, mean=mean, x_next=x_next)
        if not logp.requires_grad:
            raise Wrong("wrong value", "landing_logp must have a gradient with respect to the mean")

        old, adv = draw(g, B) - 200 * whole(g, 0, 1), draw(g, B)    # log densities may be large
        adv[0] = 0
        logp = (old + 0.4 * draw(g, B)).requires_grad_()
        for clip in (0.2, 0.05, math.inf):
            ratio = (logp.detach() - old).double().exp()
            clipped = ratio.clamp(1 - clip, 1 + clip)
            right = -torch.minimum(ratio * adv, clipped * adv)
            loss, theirs = pair(rl_distill.clipped_surrogate(logp, old, adv, clip),
                                "clipped_surrogate returns loss and ratio")
            told = dict(logp=logp, logp_old=old, adv=adv, clip_range=clip)
            same(loss, right, "the loss is Eq. 7 with its sign turned, per action", 1e-3, **told)
            same(theirs, ratio, "the ratio is new over old probability", 1e-3, **told)
            if theirs.requires_grad:
                raise Wrong("wrong value", "the ratio that is returned must be detached")
            if not loss.requires_grad:
                raise Wrong("wrong value", "the loss must have a gradient with respect to logp")
            grad, = torch.autograd.grad(loss.sum(), logp)
            free = ratio * adv <= clipped * adv
            same(grad, torch.where(free, -ratio * adv, 0.0),
                 "the gradient is that of the ratio where clipping does not bind, else 0", 1e-3,
                 **told)


def lent_jump(x_t, x0_hat, t, t_next, alpha_bar, lean=None, x0_last=None, eta=0.0):
    """Exercise 7 is graded with it, so as not to wait for 2 and 3."""
    D = x0_hat if lean is None else x0_hat + wide(lean, x_t) * (x0_hat - x0_last)
    mean = jump_right(x_t, D.double(), t, t_next, eta, alpha_bar.double())
    return mean.float(), sigma_of(t, t_next, eta, alpha_bar)


def ends(net, x, u):
    """Where points (B, 2) end by u (B, K, 2), the logit of rho and the lean of each jump."""
    t, last, K = torch.full((len(x),), 1000), x, u.shape[1]
    for k in range(K):
        t_next = (torch.sigmoid(u[:, k, 0]) * t).round().long().clamp(min=K - 1 - k)
        t_next = torch.minimum(t_next, t - 1) if k < K - 1 else torch.zeros_like(t)
        x0, _ = lent(x, t, net(x, t), net.ab.float())
        x, _ = lent_jump(x, x0, t, t_next, net.ab.float(), u[:, k, 1] * (k > 0), last)
        t, last = t_next, x0
    return x


def learned(net, x_T, target, u, g, updates, std, rate):
    """Times and leans u (K, 2) after REINFORCE with opposite pairs."""
    acts = torch.ones_like(u)
    acts[-1, 0] = acts[0, 1] = 0
    for _ in range(updates):
        index, e = torch.randint(len(x_T), (64,), generator=g), torch.randn(64, *u.shape,
                                                                            generator=g) * acts
        up, down = (-(ends(net, x_T[index], u + sign * std * e) - target[index]).square().sum(1)
                    for sign in (1, -1))
        half = (up - down) / 2                      # advantage of the one, minus that of the other
        u = u + rate * std * (half[:, None, None] * e).mean(0) / half.square().mean().sqrt()
    return u


def exercise_7(ddpm, g):
    """The loop"""
    lends = dict(jump=lent_jump, x0_and_eps=lent, ddim_sigma=sigma_of)
    with mock.patch.multiple(ddpm, **lends):
        for updates in (1, 3, 100):
            K, std, rate = whole(g, 3, 4), *(0.05 + 0.1 * torch.rand(2, generator=g)).tolist()
            rate *= 3 if updates == 100 else 100
            net = GaussianNet(draw(g, 2), 0.1 + 0.2 * torch.rand((), generator=g).item())
            x_T, fresh, seed = draw(g, 200, 2), draw(g, 200, 2), whole(g, 0, 10 ** 6)
            target = net.end(x_T).float()
            start = ddpm.baseline_solver("DDIM", "uniform", K)
            first = start.action(0)
            solver = ddpm.policy_gradient(net, x_T, target, start, alpha_bars().float(),
                                          torch.Generator().manual_seed(seed), updates, std, rate)
            if not isinstance(solver, ddpm.Solver) or not isinstance(solver.times, list):
                raise Wrong("wrong shape", "policy_gradient returns a Solver of lists, made by "
                            "solver_of", yours=solver)
            theirs, right = solver.action(0), learned(
                net, x_T, target, first, torch.Generator().manual_seed(seed), updates, std, rate)
            told = dict(K=K, updates=updates, std=std, rate=rate)
            if updates == 100:
                before, mine, best = (
                    (ends(net, fresh, u.expand(200, -1, -1)) - net.end(fresh)).square().sum(1)
                    .mean().item() for u in (first, theirs, right))
                if not before - mine > 0.7 * (before - best):
                    raise Wrong("wrong value", "after 100 updates points that were not trained on "
                                "end much nearer to their targets", mean_square_distance=(
                                    f"{before:.4f} before, {mine:.4f} by yours, below "
                                    f"{before - 0.7 * (before - best):.4f} is wanted"), **told)
                continue
            same((theirs - first)[1:, 1], (right - first)[1:, 1], "how far the leans moved: the "
                 "draws, who is compared with whom, reward, scale and step are the docstring's",
                 1e-3, **told)
            same(theirs[0, 1], torch.zeros(()), "the first lean stays 0", 0, **told)
            wanted = 1000 * torch.sigmoid(right[:-1, 0]).cumprod(0) - torch.tensor(
                start.times[1:-1])
            moved = torch.tensor(solver.times[1:-1]) - torch.tensor(start.times[1:-1])
            same(moved, wanted, "the same of the times, which are rounded", max(
                2e-2, 2 / wanted.abs().max().item()), **told)


def toy(theta, mu, s1, s2, c, group):
    """(of advantage times score, of the score times the reward): expectations. With x1' the first
    landing of the partner: E[R score] = -2 E[(theta x1 - c) x1], E[R' score] = 2 E[(theta x1' - c)
    x1]; rewards of other pairs know nothing of the score, whose mean is 0."""
    own, partner = (sign * 2 * (theta * (mu ** 2 - sign * s1 ** 2) - c * mu) for sign in (-1, 1))
    return own - (own + partner) / group, own


def exercise_8(yours, g):
    """A baseline for pairs"""
    for _ in range(TRIALS):
        theta, mu, c = (1 + draw(g, 3).abs()).double()
        s1, s2 = (0.3 + torch.rand(2, generator=g)).double()
        x1, x2 = draw(g, 2, 9).double()
        told = dict(theta=theta, s2=s2)
        same(yours.score(x1, x2, theta, s2), (x2 - theta * x1) * x1 / s2 ** 2, "the derivative by "
             "theta of the log density of x2 given x1", 1e-4, x1=x1, x2=x2, **told)
        for group in (2, 8):
            theirs, told = yours.expected(theta, mu, s1, s2, c, group), dict(
                theta=theta, mu=mu, s1=s1, s2=s2, c=c, group=group)
            for value, right, what in zip(pair(theirs, "expected returns two numbers"), toy(
                    theta, mu, s1, s2, c, group), ("first, advantage", "second, reward")):
                same(torch.as_tensor(value), right, f"of the two expectations the {what} times "
                     "score (how does the partner's reward go with a score that is not its own?)",
                     1e-4, **told)
    f = yours.paired_advantages
    for _ in range(TRIALS):
        M, G = whole(g, 2, 3), 2 * whole(g, 2, 4)
        r, told = draw(g, M * G), dict(group=G)
        before = f(r, G)
        same(before, r, "an advantage for each reward", math.inf, reward=r, **told)
        # how each reward moves all advantages: [of the advantage, of the reward]
        effect = torch.stack([f(r + raised, G) - before for raised in torch.eye(M * G)], 1)
        member = torch.arange(M * G)
        own, pair_, group = (member[:, None] // n == member // n for n in (1, 2, G))
        zero = torch.zeros(())
        told["shown"] = "[i, j]: by how much advantage i moves if reward j is raised by 1"
        same(torch.where(own, effect, zero), torch.eye(M * G), "a reward raises its own advantage "
             "by as much", 1e-3, **told)
        same(torch.where(pair_ & ~own, effect, zero), torch.zeros_like(effect), "the reward of the "
             "partner changes nothing", 1e-1, **told)
        same(torch.where(group, zero, effect), torch.zeros_like(effect), "rewards of other groups "
             "change nothing", 1e-1, **told)
        others = effect[group & ~pair_]
        same(others, others.mean().expand_as(others), "all others of the group count alike", 1e-3,
             **told)
        same(f(r + 7, G), before, "a shift of all rewards changes nothing", 1e-3, **told)
        same(f(torch.zeros(M * G), G), torch.zeros(M * G), "equal rewards give 0", 0, **told)
    for size in (2, 3, 5):
        r = draw(g, 2 * size)
        try:
            result = f(r, size)
        except ValueError:
            continue
        raise Wrong("wrong value", f"a group of {size} raises ValueError", reward=r, group=size,
                    yours=result)


# number: (names of the modules it stands in, the check)
EXERCISES = {1: (["ddpm"], exercise_1), 2: (["ddpm"], exercise_2), 3: (["ddpm"], exercise_3),
             4: (["ddpm", "student"], exercise_4), 5: (["rl_distill"], exercise_5),
             6: (["rl_distill"], exercise_6), 7: (["ddpm"], exercise_7),
             8: (["assignments.yours"], exercise_8)}

# ==============================================================================================
# RUNNING
# ==============================================================================================


HANDED = ("q_sample", "simple_loss", "x0_and_eps", "ddim_sigma", "jump", "dpm_lean",
          "average_velocity", "advantages", "landing_logp", "clipped_surrogate", "policy_gradient",
          "score", "expected", "paired_advantages")


def careful(function):
    """The function, called with copies of its inputs; Wrong: it changed one of them, or torch."""
    def copied(x):
        return x.clone() if isinstance(x, torch.Tensor) else (
            copy.deepcopy(x) if isinstance(x, (list, tuple)) else x)

    @functools.wraps(function)
    def called(*args, **kwargs):
        given, rng = [*args, *kwargs.values()], torch.get_rng_state()
        cloned = [copied(x) for x in given]
        result = function(*cloned[:len(args)], **dict(zip(kwargs, cloned[len(args):])))
        for before, after in zip(given, cloned):
            if not (torch.equal(before, after) if isinstance(before, torch.Tensor) else
                    not isinstance(before, (list, tuple)) or before == after):
                raise Wrong("wrong value", f"{function.__name__} leaves its inputs as they are: it "
                            "works on results of its own, not in place", given=before, left=after)
        if not torch.equal(rng, torch.get_rng_state()) or torch.get_default_dtype() != torch.float:
            raise Wrong("wrong value", f"{function.__name__} leaves torch as it is: it draws from "
                        "no generator but a given one, and sets no seed or dtype of torch's own")
        return result
    return called


def last_line(error):
    """Type, message and place of an exception, even of one whose message raises another."""
    frames = [(frame.filename, frame.lineno, frame.name)
              for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno, "<module>"))
    theirs = [frame for frame in frames if Path(frame[0]).is_relative_to(sys.path[0])
              and Path(frame[0]).resolve() != Path(__file__).resolve()]
    place = " ({}, line {}, {})".format(Path(theirs[-1][0]).name, *theirs[-1][1:]) if theirs else ""
    return traceback.format_exception_only(error)[-1].strip()[:300] + place


def judge(modules, number, seed):
    """One exercise in its loaded modules: dict of verdict, property and what to show."""
    torch.seed()                                    # not where a seed of theirs would leave it
    try:
        with contextlib.ExitStack() as stack:
            for module, name in ((m, name) for m in modules for name in HANDED if hasattr(m, name)):
                stack.enter_context(mock.patch.object(module, name, careful(getattr(module, name))))
            EXERCISES[number][1](*modules, torch.Generator().manual_seed(seed * 100 + number))
    except Wrong as wrong:
        return dict(verdict=wrong.verdict, property=wrong.rule, shown=wrong.shown)
    except NotImplementedError as error:
        return dict(verdict="not attempted", property=str(error), shown={})
    except BaseException as error:                  # whatever theirs raises, sys.exit too
        return dict(verdict="error", property=last_line(error), shown={})
    return dict(verdict="passes", property="", shown={})


def work(path, number, seed, answer):
    """In a process of its own: load the files of `path`, judge, write the answer."""
    sys.path.insert(0, str(path))
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):          # Windows has none
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_PRINTED, MOST_PRINTED))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        modules = [importlib.import_module(name) for name in EXERCISES[number][0]]
        result = judge(modules, number, seed)
    except BaseException as error:                  # an import that fails or exits
        result = dict(verdict="error", shown={},
                      property=f"importing the files: {last_line(error)}")
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


def grade(path, number, seed, seconds=2 * SECONDS):
    """One exercise of a folder, whatever its code does. Returns the dict of judge()."""
    with tempfile.TemporaryDirectory() as folder:
        answer, printed = Path(folder, "answer.json"), Path(folder, "printed")
        words = [sys.executable, str(Path(__file__).resolve()), str(path), "--seed", str(seed),
                 "--only", str(number), "--answer", str(answer)]
        with open(printed, "wb") as file:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                       cwd=folder, start_new_session=True,
                                       env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1"))
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return dict(verdict="error", property=f"no end after {seconds} s", shown={})
        finally:                                    # with all that it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
            process.wait()
        try:
            result = json.loads(answer.read_bytes())
            return dict(verdict=str(result["verdict"]), property=str(result["property"]),
                        shown=dict(result["shown"]))
        except Exception:                           # none, half of one, or another's
            text = printed.read_bytes()[-2000:].decode(errors="backslashreplace").strip()
            last = (text or f"no message, exit code {process.returncode}").splitlines()[-1][:300]
            return dict(verdict="error", property=f"its process left no answer: {last}", shown={})


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("path", help="folder with the files to grade")
    p.add_argument("--only", type=int, nargs="+", choices=EXERCISES, default=list(EXERCISES))
    p.add_argument("--seed", type=int, help="of the random inputs (default: a new one)")
    p.add_argument("--json", help="also write the verdicts to this file")
    p.add_argument("--answer", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    path = Path(args.path).resolve()
    if not path.is_dir():
        p.error(f"there is no folder {path}")
    if not any((path / f"{name.replace('.', '/')}.py").exists()
               for names, _ in EXERCISES.values() for name in names):
        p.error(f"{path} has no file of the exercises; give the folder of a handout")
    if args.answer:
        return work(path, args.only[0], args.seed, args.answer)
    if args.json and Path(args.json).exists():
        p.error(f"{args.json} exists already; give another name")
    sys.stdout.reconfigure(errors="backslashreplace")           # of what theirs raises
    seed = torch.seed() % 10 ** 6 if args.seed is None else args.seed
    print(f"grading {path}, seed {seed}")
    results = {}
    for number in args.only:
        result = results[number] = grade(path, number, seed)
        print(f"exercise {number}, {EXERCISES[number][1].__doc__}: {result['verdict']}")
        if result["verdict"] not in ("passes", "not attempted"):
            print(f"    {result['property']}")
        for name, text in result["shown"].items():
            print(f"      {name}: {text}")
    passed = sum(r["verdict"] == "passes" for r in results.values())
    print(f"{passed} of {len(results)} pass")
    if args.json:
        Path(args.json).write_text(json.dumps(dict(seed=seed, exercises=results), indent=1),
                                   encoding="utf-8")
    sys.exit(0 if passed == len(results) else 1)


if __name__ == "__main__":
    main()
