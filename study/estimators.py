"""How well does the policy gradient point where the reward rises? One picture for all of the study.

    python study/estimators.py           # figures/estimators.png; minutes

For the jumps' numbers (logit rho, lean and gains, one a block or one a channel) and for all
weights: the cosine of the policy gradient with the pathwise one, by the number of rollouts, or of
landings of each evaluation, it comes from. All at three evaluations, at the best baseline solver.
"""
import argparse

import torch

import arms                                     # puts the repository on the path
# From the repository:
import rl_distill
from ddpm import action_mask, linear_alpha_bar, parameter_count, sample, solver_of, step
from harness.images import plot_panels
from harness.runs import ROOT, autocast, pick_device, run_main
from reward import best_baselines, rewards
from rl_distill import exploration, landing_logp, load_inputs, rollout
from teacher import noise_and_targets

STEPS, NOISES, SEED = 3, 64, 0
ROLLOUTS, LANDINGS = (16, 64, 256, 1024), (8, 32, 128, 512)
REPEATS, BATCH = 4, 16                          # estimates of each size; noises of a backward pass


def cosine(a, b):
    """Of two tensors, as vectors; a float."""
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0).item()


# ==== NUMBERS OF THE JUMPS ====================================================================

def pathwise_jumps(net, u, z, target, reward):
    """d mean reward / d u (K, 2 + n), through the whole rollout."""
    u = u.clone().requires_grad_()
    schedule = arms.SmoothSchedule(linear_alpha_bar(z.device))
    for i in range(0, len(z), BATCH):
        images = arms.smooth_rollout(net, u, z[i:i + BATCH], schedule)
        (reward(images, target.rows(slice(i, i + BATCH))).sum() / len(z)).backward()
    return u.grad


@torch.no_grad()
def pair_estimates(net, u, std, z, target, reward, pairs, generator):
    """Half the reward's difference of two opposite draws, times their noise, over std: each row an
    estimate of d mean reward / d u, (pairs, K, 2 + n). A noise of z each, going round."""
    mask, rows = action_mask(len(u), u.shape[1] - 2), torch.arange(pairs) % len(z)
    noise = torch.randn(pairs, *u.shape, generator=generator) * mask
    R = []
    for sign in (1, -1):
        for some, e in zip(rows.split(64), noise.split(64)):
            with autocast(z.device):
                images = sample(net, z[some], solver_of(u + sign * std * e.to(z.device)),
                                linear_alpha_bar(z.device)).clamp(-1, 1)
            R.append(rewards(reward, images, target, some))
    up, down = torch.cat(R).chunk(2)
    return ((up - down)[:, None, None] / 2 * noise.to(z.device)) / std


# ==== ALL WEIGHTS, by the last landing ========================================================

def weights_gradients(net, solver, z, target, reward, group, generator):
    """(policy gradient, pathwise gradient) of the expected reward by all weights, flat; of the last
    evaluation, from `group` landings of each noise. The pathwise one goes through the landings."""
    alpha_bar = linear_alpha_bar(z.device)
    _, [(state, x_next, sigma, _)] = rollout(net, solver, z, group, 0.0, alpha_bar, generator)
    mean, *_ = step(net, *state, alpha_bar)
    at = mean.detach().repeat_interleave(group, 0)
    rows = torch.arange(len(z)).repeat_interleave(group)
    found = []
    for pathwise in (False, True):
        slope = torch.zeros_like(mean)
        for some, x, m, s in zip(*(v.split(256) for v in (rows, x_next, at, sigma))):
            leaf = (x if pathwise else m).clone().requires_grad_()
            if pathwise:
                reward(leaf.clamp(-1, 1), target.rows(some)).sum().backward()
            else:
                with torch.no_grad():
                    R = reward(x.clamp(-1, 1), target.rows(some))
                n = min(group, len(R))
                level = R.reshape(-1, n).mean(1).repeat_interleave(n)
                (landing_logp(leaf, x, s) * leaf[0].numel() * (R - level)).sum().backward()
            slope.index_add_(0, some, leaf.grad / group / len(z))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(
            mean, [*net.parameters()], slope, retain_graph=True)]))
    return found


# ==== THE PICTURE =============================================================================

def measure(device):
    """Yields (name, rollouts or landings, REPEATS cosines) of every estimator and their number."""
    args = rl_distill.parse_args(["--init", "teacher"])
    net, _, reward, _ = load_inputs(args, device)
    z, target = noise_and_targets(net, 0, rl_distill.NOISES, device)
    z, target = z[:NOISES], reward.view(target[:NOISES])
    baselines = best_baselines(net, STEPS, z, target, reward, linear_alpha_bar(device))
    (_, start), *_ = baselines.values()
    generator = torch.Generator().manual_seed(SEED)
    for args.gains in ("block", "channel"):
        n, std, _ = exploration(net, args)
        u, std = start.action(n).to(device), std.to(device)
        numbers = action_mask(STEPS, n).sum().item()
        exact = pathwise_jumps(net, u, z, target, reward) * std     # in units of the exploration
        for count in ROLLOUTS:
            found = [cosine(pair_estimates(net, u, std, z, target, reward, count // 2, generator)
                            .mean(0) * std, exact) for _ in range(REPEATS)]
            yield f"jumps, {numbers:,} numbers", count, found
    numbers = parameter_count(net.requires_grad_(True))
    for count in LANDINGS:
        found = [cosine(*weights_gradients(net, start, z[i * 8:i * 8 + 8], target.rows(
            slice(i * 8, i * 8 + 8)), reward, count, generator)) for i in range(REPEATS)]
        yield f"weights, {numbers:,}, 8 noises", count, found


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="auto", help="auto, cuda or cpu")
    lines = {}
    for what, count, found in measure(pick_device(p.parse_args(argv).device)):
        mean = sum(found) / REPEATS
        print(f"{what:32s} {count:6d}  cosine {mean:6.3f}  ({min(found):.3f} .. {max(found):.3f})",
              flush=True)
        lines.setdefault(what, []).append((count, mean))
    plot_panels([("rollouts, or landings of an evaluation", "cosine with the pathwise gradient", [
        (what, *zip(*points), "o-") for what, points in lines.items()])],
        ROOT / "figures" / "estimators.png", xscale="log", yscale="log")


if __name__ == "__main__":
    run_main(main)
