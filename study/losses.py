"""Fixed losses: what is learned where nobody asks a reward, at the compute of the policy gradient.

A function per objective, all of the same signature, to be read side by side. All start from a copy
of the teacher and see its paths from the training noises alone, whose evaluations are those of the
targets, which every other arm needs too. Next file: arms.py, which lists them among all arms.
"""
import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# From the repository:
from ddpm import baseline_solver, estimate, jump, linear_alpha_bar, make_grid   # noqa: E402
from harness.runs import autocast                                              # noqa: E402
from student import (average_velocity, clone_loss, state_at,                   # noqa: E402
                     student_from_teacher, teacher_paths)
from teacher import TARGET                                                     # noqa: E402

BATCH, BACKWARD = 32, 2                         # of an update; evaluations of a backward pass
RATES = dict(cloning=1e-4, progressive=3e-5, consistency=1e-4)      # Adam's first, falls to 0
ROUNDS = 4                                      # of progressive distillation: 16 K -> 8 K .. -> K
EMA = 0.95                                      # of the consistency target, per update


def descend(groups, loss_of, cost, args, budget, device):
    """Adam on parameter groups, whose rates fall to 0, of loss_of(generator); cost: evaluations of
    one update. Returns the evaluations that were spent."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer, updates = torch.optim.Adam(groups), max(1, budget // cost)
    rates = [group["lr"] for group in optimizer.param_groups]
    for update in range(updates):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (1 - update / updates)
        with autocast(device):
            loss = loss_of(generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return updates * cost


def descend_weights(net, loss_of, cost, rate, args, budget):
    """The same of all weights of net, which is frozen again afterwards."""
    groups = [dict(params=[*net.requires_grad_(True).parameters()], lr=rate)]
    spent = descend(groups, loss_of, cost, args, budget, next(net.parameters()).device)
    net.requires_grad_(False)
    return spent


def paths_of(net, z):
    """(states of the teacher's 50 steps from z, alpha_bar, function that draws BATCH rows)."""
    alpha_bar = linear_alpha_bar(z.device)
    with autocast(z.device):
        paths = torch.cat([teacher_paths(net, x, alpha_bar) for x in z.split(64)])
    return paths, alpha_bar, lambda generator: torch.randint(len(z), (BATCH,), generator=generator)


# ==== OBJECTIVES ==============================================================================
# (net, start Solver, (z, View of the targets), reward, args, budget)
# -> (Solver, evaluations spent, net that learned). Regression through all jumps, of the weights or
# of the jumps' numbers (Luhman & Luhman 2021, arXiv 2101.02388), is in arms.py.

def cloning(net, start, train_set, reward, args, budget):
    """student.py's loss, of the K jumps that are deployed: each lands on the teacher's own path
    (MeanFlow, 2505.13447; shortcut models, 2410.12557)."""
    paths, alpha_bar, draw_rows = paths_of(net, train_set[0])
    net, grid = student_from_teacher(net).to(paths.device), torch.tensor(
        make_grid("quadratic", args.steps))

    def loss_of(generator):
        rows, k = draw_rows(generator), torch.randint(args.steps, (BATCH,), generator=generator)
        return clone_loss(net, paths, rows, grid[k], grid[k + 1], alpha_bar)
    spent = descend_weights(net, loss_of, BATCH * (1 + BACKWARD), RATES["cloning"], args, budget)
    return baseline_solver("DDIM", "quadratic", args.steps), spent, net


def progressive(net, start, train_set, reward, args, budget):
    """One jump is to land where two of the student before land (Salimans & Ho 2022, 2202.00512)."""
    paths, alpha_bar, draw_rows = paths_of(net, train_set[0])
    net, spent = student_from_teacher(net).to(paths.device), 0
    for K in (args.steps * 2 ** i for i in reversed(range(ROUNDS))):
        before, grid = copy.deepcopy(net), torch.tensor(make_grid("quadratic", 2 * K))
        before.requires_grad_(False)

        def loss_of(generator):
            rows, k = draw_rows(generator), 2 * torch.randint(K, (BATCH,), generator=generator)
            t, t_mid, t_next = grid[k], grid[k + 1], grid[k + 2]
            x_t = x = state_at(paths, rows, t, alpha_bar)
            with torch.no_grad():
                for now, then in ((t, t_mid), (t_mid, t_next)):
                    x0_hat = estimate(before, x, now, then, None, alpha_bar)
                    x, _ = jump(x, x0_hat, now, then, alpha_bar)
            return F.mse_loss(net(x_t, t, t_next).float(),
                              average_velocity(x_t, x, t, t_next, alpha_bar))
        spent += descend_weights(net, loss_of, BATCH * (2 + 1 + BACKWARD), RATES["progressive"],
                                 args, budget // ROUNDS)
    return baseline_solver("DDIM", "quadratic", args.steps), spent, net


def consistency(net, start, train_set, reward, args, budget):
    """Neighbours on a path say the same of its end (Song et al. 2023, arXiv 2303.01469). With more
    than one evaluation DDIM's jump follows, which keeps the noise: no noise is drawn anew."""
    paths, alpha_bar, draw_rows = paths_of(net, train_set[0])
    ema, grid = copy.deepcopy(net), torch.tensor(TARGET.times)

    def loss_of(generator):
        for old, new in zip(ema.parameters(), net.parameters()):
            old.lerp_(new.detach(), 1 - EMA)
        rows, k = draw_rows(generator), torch.randint(len(grid) - 1, (BATCH,), generator=generator)
        t, t_next = grid[k], grid[k + 1]
        x_next = paths[rows, k + 1]
        with torch.no_grad():
            aim = estimate(ema, x_next, t_next, None, None, alpha_bar)
        aim = torch.where((t_next > 0)[:, None, None, None], aim, x_next)
        return F.mse_loss(estimate(net, paths[rows, k], t, None, None, alpha_bar), aim)
    spent = descend_weights(net, loss_of, BATCH * (1 + 1 + BACKWARD), RATES["consistency"], args,
                            budget)
    return baseline_solver("DDIM", "quadratic", args.steps), spent, net
