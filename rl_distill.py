"""Reinforced distillation: a policy gradient over step sizes and denoising transitions.

Few-step sampling as a Markov decision process (ReDiF, arXiv 2512.22802), written out by hand:
    state   (x_t, t, n, h)          n: evaluations left, h: what the last evaluation saw
    action  (rho, x_next)           how far to jump, t_next = rho t, and where to land
    policy  Beta(rho) x N(x_next; mu_theta(x_t, t, t_next), sigma^2 I)
    reward  at the end only: likeness to the teacher's image from the same noise - step_cost * NFE

    python rl_distill.py                                  # bundled weights, no data, no network
    python rl_distill.py --init teacher --steps 8 --learn steps     # a grid for the teacher itself
    python rl_distill.py --smoke                          # seconds, numbers mean nothing

Reads --teacher, --student, --coach; writes to --out: student.pt, state.pt (for --resume),
alignment.png, grid.png, curves.png, result.json, log.jsonl. Next file: sample.py.
"""
import copy
import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

# From earlier files:
from ddpm import (GRIDS, T, BadInput, chunk_size, claim_folder, due, linear_alpha_bar, load_state,
                  load_teacher, log_line, make_grid, number, output_folder, parameter_count,
                  parser_for, pick_device, pyplot, read_log, run_main, sample, save_figure,
                  save_state, seeded_noise, settings, stop_if_wrong, until_stopped, wait_for)
from teacher import TEACHER_STEPS, device_name, provenance, tile
from student import (HELD_OUT, StepPolicy, deploy, jump, land, load_student, nothing_seen, rows_of,
                     save_student, student_from_teacher)
from reward import TERMS, Reward, load_encoder

SIGMA_FLOOR = 0.02          # noise on the jump to t = 0 (DDIM sigma 0); in training, not deployment
RHO_MARGIN = 1e-4           # rho stays this far from 0 and 1, where a Beta log-density is infinite
SIZE = dict(steps="group", pixels="draws")      # flag for the rollouts of each noise in an update
MONITOR = 32                # noises of the reward printed each update; not those of the final table

# ==============================================================================================
# START NOISE AND TARGETS. A noise is a seed: training counts up from 0, monitoring and the
# final table lie above HELD_OUT, so that they are disjoint by construction
# ==============================================================================================


@torch.no_grad()
def noise_and_targets(teacher, first_seed, n, alpha_bar, device, what):
    """Start noise z of seeds first_seed .. first_seed + n - 1 and the teacher's DDIM image of each.

    Returns (z, target), both (n, 3, H, W). One target per z: deterministic, computed once, reused.
    """
    side, chunk = teacher.config["image_size"], chunk_size(device)
    z = seeded_noise(range(first_seed, first_seed + n), (3, side, side), device=device)
    grid = make_grid("uniform", TEACHER_STEPS)
    return z, torch.cat([sample(teacher, x, grid, alpha_bar)
                         for x in tqdm(z.split(chunk), desc=what)])


# ==============================================================================================
# THE TWO CHANNELS OF THE POLICY: log-probabilities of what was done
# ==============================================================================================

def step_logp(policy, t, n, features, rho, stop, may_stop) -> torch.Tensor:
    """log pi of a step: log Beta(rho); with may_stop also log Bernoulli(stop), and then a step that
    stopped has no rho. rho, stop: (B,). The Beta and the Bernoulli are policy.distribution(t, n,
    features). Returns (B,); where n = 1 the jump goes to 0 and the value is not used.
    """
    # -- exercise 5
    ratio, stopping = policy.distribution(t, n, features)
    logp = ratio.log_prob(rho)
    if may_stop:
        logp = stopping.log_prob(stop.float()) + torch.where(stop, torch.zeros_like(logp), logp)
    return logp
    # --


def pixel_logp(mean, x_next, sigma) -> torch.Tensor:
    """log N(x_next; mean, sigma^2 I), only what depends on the mean, per dimension. mean, x_next:
    (B, C, H, W), sigma: (B,). Returns (B,).

    DEVIATES: *mean* over the 3072 dimensions, where the density has their sum (ReDiF's and DDPO's
    code do the same). The summed ratio is e^(+-50) after the smallest change.
    """
    # -- exercise 5
    return -((x_next - mean).square() / (2 * sigma.square()[:, None, None, None])).mean((1, 2, 3))
    # --


def draw_noise(shape, generator):
    """White exploration noise (B, 3, H, W), rows 2i and 2i + 1 antithetic."""
    noise = torch.randn(shape, generator=generator)
    noise[1::2] = -noise[0::2]
    return noise


def gaussian_kl(mean, mean_ref, sigma) -> torch.Tensor:
    """Gaussian KL at equal sigma: |mu - mu_ref|^2 / (2 sigma^2) per dimension. (B, ...) -> (B,)."""
    # -- exercise 6
    return ((mean - mean_ref).square() / (2 * sigma.square()[:, None, None, None])).mean((1, 2, 3))
    # --


def draw_rho(a, b, generator):
    """rho ~ Beta(a, b) as a ratio of gammas, on the CPU from our generator. (B,) twice -> (B,)."""
    x, y = (torch._standard_gamma(s.cpu().double(), generator=generator) for s in (a, b))
    return (x / (x + y)).float().clamp(RHO_MARGIN, 1 - RHO_MARGIN).to(a.device)


def entropy(policy, steps):
    """Mean entropy of the Beta where a step size was chosen: how undecided the policy is."""
    with torch.no_grad():
        chosen = [policy.distribution(s["t"], s["n"], s["features"])[0].entropy()
                  for s in steps if s["n"][0] > 1]
    return torch.cat(chosen).mean().item() if chosen else 0.0


# ==============================================================================================
# SAMPLING
# ==============================================================================================

def draw_groups(n, groups, size, generator):
    """`groups` different indices out of n, each `size` times, side by side: (groups * size,)."""
    return torch.randperm(n, generator=generator)[:groups].repeat_interleave(size)


def shared_jump(net, s, i, alpha_bar, eta):
    """jump() for rows i of a step, of which every s["shared"] neighbours are in one and the same
    state, as all draws of a rollout are until they land: evaluated once for all of them."""
    one, size = i[::s["shared"]], s["shared"]
    mean, sigma, seen = jump(net, s["x_t"][one], s["t"][one], s["t_next"][one], alpha_bar, eta,
                             rows_of(s["last"], one))
    return (mean.repeat_interleave(size, 0), sigma.repeat_interleave(size, 0),
            {key: value.repeat_interleave(size, 0) for key, value in seen.items()})


@torch.no_grad()
def rollout(net, policy, z, channel, args, alpha_bar, generator):
    """Play the policy from start noise z (B, 3, H, W), exploring in one channel: 'steps', where the
    members of a group differ in their step sizes, or 'pixels', where they differ in their landings.

    Returns (images (B, 3, H, W) in [-1, 1], NFE (B,), list of steps). A step is a dict of what was
    seen and done, for the trajectories still running: rows (b,), x_t, t, n, last, rho, stop,
    t_next, x_next, sigma and the log-probability of each channel at the time of acting.
    shared: how many neighbours are in one state; explored: the rows whose pixels had noise.
    DEVIATES: with --eta 0 pixels explore only where they land at t = 0, and until then the draws
    of a noise are one. Earlier jumps, with the same weights, then have no gradient of their own.
    """
    may_stop = args.step_cost > 0
    x, t = z, torch.full((len(z),), T, device=z.device)
    seen, shared = nothing_seen(net, z), args.draws if channel == "pixels" else 1
    nfe, steps = torch.zeros_like(t), []
    for k in range(args.steps):
        rows = (t > 0).nonzero()[:, 0]
        if len(rows) == 0:
            break
        s = dict(rows=rows, x_t=x[rows], t=t[rows], last=rows_of(seen, rows), shared=shared)
        s["features"] = s["last"]["features"]
        s["n"] = torch.full_like(s["t"], args.steps - k)
        if channel == "steps":                                      # action 1: how far
            ratio, stopping = policy.distribution(s["t"], s["n"], s["features"])
            s["rho"] = draw_rho(ratio.concentration1, ratio.concentration0, generator)
            u = torch.rand(len(rows), generator=generator).to(z.device)
            s["stop"] = (u < stopping.probs) & may_stop & (s["n"] > 1)
        else:
            s["rho"], _, stop_logit = policy(s["t"], s["n"], s["features"])
            s["stop"] = (stop_logit > 0) & may_stop
        s["t_next"] = land(s["t"], s["rho"], s["n"], s["stop"])
        s["logp_step"] = step_logp(policy, s["t"], s["n"], s["features"], s["rho"], s["stop"],
                                   may_stop)
        every = torch.arange(len(rows), device=z.device)
        mean, sigma, new = shared_jump(net, s, every, alpha_bar,
                                       args.eta if channel == "pixels" else 0.0)
        if channel == "pixels":                                     # action 2: where
            sigma = torch.where(s["t_next"] == 0, sigma.clamp(min=SIGMA_FLOOR), sigma)
        s["sigma"], s["x_next"], s["explored"] = sigma, mean, every[sigma > 0]
        if len(s["explored"]):
            noise = draw_noise(x.shape, generator).to(z.device)[rows]
            s["x_next"] = mean + sigma[:, None, None, None] * noise
            s["logp_pixel"] = pixel_logp(mean, s["x_next"], sigma)
            if args.eta > 0:                   # with eta 0 those that explored have landed
                shared = 1
        x, t = x.index_put((rows,), s["x_next"]), t.index_put((rows,), s["t_next"])
        seen = {key: value.index_put((rows,), new[key]) for key, value in seen.items()}
        nfe[rows] += 1
        steps.append(s)
    return x.clamp(-1, 1), nfe, steps


# ==============================================================================================
# ADVANTAGES
# ==============================================================================================

def advantages(reward, group, baseline) -> torch.Tensor:
    """Centred, scaled rewards: (M * group,) -> same. Members of a group share z, side by side.

    'global' (default): R - group mean, divided by the std of that over the whole batch;
    'group':  divided by each group's own std (GRPO, Shao et al. 2024), which blows up near-ties;
    'batch':  (R - batch mean) / batch std (DDPO): easy noises look good, hard ones bad.
    Equal rewards give exactly 0, never noise scaled to 1.
    """
    # -- exercise 4
    groups = reward.double().reshape(-1, group)         # (M, group); the mean of ties is exact
    if baseline == "batch":
        centred = groups - groups.mean()
        scale = centred.std(correction=0)
    else:
        centred = groups - groups.mean(1, keepdim=True)
        scale = (centred.square().mean(1, keepdim=True).sqrt() if baseline == "group" else
                 centred.std(correction=0))
    noise_level = 1e-6 * (1 + groups.abs().max())                   # differences below are rounding
    scaled = torch.where(scale > noise_level, centred / scale.clamp(min=noise_level), 0.0)
    return scaled.reshape(-1).to(reward.dtype)
    # --


# ==============================================================================================
# TRAINING
# ==============================================================================================

def clipped_surrogate(logp, logp_old, adv, clip_range) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(ratio A, clip(ratio, 1 - c, 1 + c) A). Eq. 7, Schulman et al. 2017. All (B,).

    Returns (loss (B,), ratio (B,) detached). clip_range = inf is the plain policy gradient.
    """
    # -- exercise 5
    ratio = (logp - logp_old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * adv, clipped * adv), ratio.detach()
    # --


def channel_loss(logp, logp_old, adv, clip_range, estimator):
    """Loss per action and ratio: PPO's surrogate, or REINFORCE's -A log pi (Williams 1992)."""
    if estimator == "reinforce":
        return -adv * logp, (logp - logp_old).exp().detach()
    return clipped_surrogate(logp, logp_old, adv, clip_range)


def step_surrogate(policy, s, adv, args):
    """Step channel of one stored step: loss and ratio, (b,) each."""
    logp = step_logp(policy, s["t"], s["n"], s["features"], s["rho"], s["stop"], args.step_cost > 0)
    return channel_loss(logp, s["logp_step"], adv, args.clip_steps, args.estimator)


def pixel_surrogate(net, net_ref, s, i, adv, mean_sigma, args, alpha_bar):
    """Pixel channel of rows i of one stored step: loss, ratio and KL, (b,) each."""
    (mean, _, _), sigma = shared_jump(net, s, i, alpha_bar, args.eta), s["sigma"][i]
    logp = pixel_logp(mean, s["x_next"][i], sigma)
    loss, ratio = channel_loss(logp, s["logp_pixel"][i], adv[i], args.clip_pixels, args.estimator)
    # DEVIATES: as in ReDiF's code steps are weighted by sigma, since the score goes as 1 / sigma:
    # less variance, but the sum over steps is no longer the gradient of the expected reward
    loss = loss * sigma / mean_sigma
    if args.kl == 0:
        return loss, ratio, torch.zeros_like(ratio)
    with torch.no_grad():
        mean_ref, _, _ = shared_jump(net_ref, s, i, alpha_bar, args.eta)
    kl = gaussian_kl(mean, mean_ref, sigma)                         # same state, with gradient
    return loss + args.kl * kl, ratio, kl.detach()


def policy_update(net, net_ref, policy, channel, optimizer, steps, adv, args, alpha_bar, update=1):
    """Inner epochs of one update of one channel on the stored steps; adv: (B,). Returns a dict of
    diagnostics."""
    choices = sum((s["n"] > 1).sum().item() for s in steps)         # the last jump chooses no rho
    landings = sum(len(s["explored"]) for s in steps)
    if channel == "pixels":
        mean_sigma = torch.cat([s["sigma"][s["explored"]] for s in steps]).mean()
    result = dict(ratio_t0=1.0, clip=0.0, kl=0.0, grad_norm=0.0)
    for epoch in range(args.inner_epochs):
        ratios, kls = [], []
        optimizer.zero_grad(set_to_none=True)
        for s in steps:
            a = adv[s["rows"]]
            if channel == "steps" and s["n"][0] > 1:
                loss, ratio = step_surrogate(policy, s, a, args)
                (loss.sum() / choices).backward()
                ratios.append(ratio)
            if channel == "pixels" and len(s["explored"]):
                for i in s["explored"].split(args.minibatch * s["shared"]):
                    loss, ratio, kl = pixel_surrogate(net, net_ref, s, i, a, mean_sigma, args,
                                                      alpha_bar)
                    (loss.sum() / landings).backward()
                    ratios.append(ratio)
                    kls.append(kl)
        if ratios:                              # none where no row had a choice
            r = torch.cat(ratios)
            clip_range = args.clip_steps if channel == "steps" else args.clip_pixels
            result["clip"] += ((r - 1).abs() > clip_range).float().mean().item() / args.inner_epochs
            if epoch == 0:                      # before any optimizer step: farthest from 1
                result["ratio_t0"] = r[(r - 1).abs().argmax()].item()
        result["kl"] += torch.cat(kls).mean().item() / args.inner_epochs if kls else 0.0
        result["grad_norm"] += apply_gradients(channel, optimizer, update) / args.inner_epochs
    return result


def backprop_update(net, policy, optimizer, z, target, reward, args, alpha_bar, update=1):
    """Control arm without RL: gradient ascent on the reward itself, through all jumps (eta = 0).

    One run per noise, since all its draws would be equal; as many optimizer steps as PPO.
    'backprop-last' goes through the last jump only: what the policy gradient of --eta 0 estimates.
    """
    z, target, norms = z[::args.draws], target[::args.draws], []
    for _ in range(args.inner_epochs):
        optimizer.zero_grad(set_to_none=True)
        for i in torch.arange(len(z), device=z.device).split(max(1, args.minibatch // args.steps)):
            x, t = z[i], torch.full((len(i),), T, device=z.device)
            seen = nothing_seen(net, x)
            for k in range(args.steps):
                n = torch.full_like(t, args.steps - k)
                with torch.no_grad():
                    rho, _, _ = policy(t, n, seen["features"])
                t_next = land(t, rho, n, stop=torch.zeros_like(t, dtype=torch.bool))
                train_this = args.estimator == "backprop" or k == args.steps - 1
                with torch.set_grad_enabled(train_this):
                    x, _, seen = jump(net, x, t, t_next, alpha_bar, last=seen)
                t = t_next
            (-reward(x.clamp(-1, 1), target[i])[0].sum() / len(z)).backward()
        norms.append(apply_gradients("pixels", optimizer, update))
    return dict(ratio_t0=math.nan, clip=0.0, kl=0.0, grad_norm=sum(norms) / len(norms))


def apply_gradients(channel, optimizer, update=1):
    """Clip the channel's gradient to norm 1 and step. Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    refuse_wrong(update, **{f"gradient of the {channel}": norm})
    optimizer.step()
    return norm.item()


def refuse_wrong(update, **values):
    """BadInput where one of the tensors has a number that is not finite."""
    stop_if_wrong({name.replace("_", "-"): 0 if value.isfinite().all() else update
                   for name, value in values.items()}, "--lr-steps or --lr-pixels")


@torch.no_grad()
def drift(net, net_ref):
    """Relative distance of the parameters from where they started."""
    pairs = list(zip(net.parameters(), net_ref.parameters()))
    moved = sum((p - q).square().sum() for p, q in pairs)
    return (moved / sum(q.square().sum() for _, q in pairs)).sqrt().item()


@torch.no_grad()
def deployed(net, policy, z, target, reward, steps, alpha_bar, grid=None, may_stop=False):
    """Deterministic deployment from noise z, scored: the policy's mean steps, or a fixed grid.

    Returns a dict of reward, nfe (B,), raw terms {name: (B,)}, times (B, steps + 1), images
    (B, 3, H, W) and the seconds that the networks took.
    """
    parts, seconds, size = [], 0.0, chunk_size(z.device)
    for x, y in zip(z.split(size), target.split(size)):
        wait_for(z.device)
        start = time.time()
        images, times, _ = deploy(net, x, steps, alpha_bar, policy, grid, may_stop)
        wait_for(z.device)
        seconds += time.time() - start
        score, raw = reward(images, y)
        parts.append((images, times, (times[:, :-1] > 0).sum(1).float(), score, *raw.values()))
    images, times, nfe, score, *values = (torch.cat(column) for column in zip(*parts))
    return dict(reward=score, nfe=nfe, raw=dict(zip(raw, values)), times=times, images=images,
                seconds=seconds)


def best_base(net, z, target, reward, steps, alpha_bar):
    """Hand grid with the largest reward on *training* noise: where the step policy starts."""
    scores = {name: deployed(net, None, z, target, reward, steps, alpha_bar,
                             make_grid(name, steps))["reward"].mean()
              for name in GRIDS}
    return max(scores, key=scores.get)


def learners(net, args):
    """Step policy at the hand grid --base, frozen copy of the student, an optimizer per channel."""
    device = next(net.parameters()).device
    policy, net_ref = StepPolicy(net.features, args.base).to(device), copy.deepcopy(net)
    learner = dict(steps=(policy, args.lr_steps), pixels=(net, args.lr_pixels))
    optimizers = {channel: torch.optim.Adam(module.parameters(), lr=rate)
                  for channel, (module, rate) in learner.items() if channel in channels(args)}
    return policy, net_ref.requires_grad_(False), optimizers


def channels(args):
    """The channels of the action that learn."""
    return ("steps", "pixels") if args.learn == "both" else (args.learn,)


def turns(args):
    """The channel that learns in each update. DEVIATES: with --learn both they take turns, since
    a reward that both moved at once tells neither which of them was right."""
    names = channels(args)
    return [names[update % len(names)] for update in range(args.updates)]


def rollouts(args, updates):
    """How many rollouts the first `updates` updates play."""
    return args.noises_per_update * sum(getattr(args, SIZE[c]) for c in turns(args)[:updates])


def train(net, net_ref, policy, optimizers, train_set, monitor_set, reward, args, out, device):
    """The loop: SAMPLING, ADVANTAGES, TRAINING, one printed line per update. Returns seconds."""
    alpha_bar, (z_all, target_all) = linear_alpha_bar(device), train_set
    generator, turn = torch.Generator().manual_seed(args.seed), turns(args)
    parts = dict(net=net, policy=policy, generator=generator, **optimizers)
    first, seconds_before = 0, 0.0
    if args.resume:
        first, seconds_before = load_state(out / "state.pt", "rl", parts, args)
    print("update channel  reward ± std    held-out  ratio_t0  clip  kl       in-group  entropy  "
          "drift    grad     NFE   grid")
    start = time.time()
    for update in until_stopped(range(first, args.updates), out):
        channel = turn[update]
        optimizer, size = optimizers[channel], getattr(args, SIZE[channel])
        optimizer.param_groups[0]["lr"] = (                    # falls linearly, as PPO's does
            getattr(args, f"lr_{channel}") * (1 - update / args.updates))
        # SAMPLING: each noise `size` times, side by side
        pick = draw_groups(len(z_all), args.noises_per_update, size, generator).to(device)
        z, target = z_all[pick], target_all[pick]
        images, nfe, steps = rollout(net, policy, z, channel, args, alpha_bar, generator)
        # ADVANTAGES
        with torch.no_grad():
            score, raw = reward(images, target)
        score = score - args.step_cost * nfe
        refuse_wrong(update + 1, reward=score, log_probability=torch.cat(
            [s["logp_step"] for s in steps] + [s["logp_pixel"][s["explored"]] for s in steps
                                               if len(s["explored"])]))
        adv = advantages(score, size, args.baseline)
        # TRAINING
        if "backprop" in args.estimator:
            diagnostics = backprop_update(net, policy, optimizer, z, target, reward, args,
                                          alpha_bar, update + 1)
        else:
            diagnostics = policy_update(net, net_ref, policy, channel, optimizer, steps, adv,
                                        args, alpha_bar, update + 1)

        held = deployed(net, policy, *monitor_set, reward, args.steps, alpha_bar,
                        may_stop=args.step_cost > 0)
        row = dict(update=update + 1, channel=channel, rollouts=rollouts(args, update + 1),
                   reward=score.mean().item(), reward_std=score.std().item(), **diagnostics,
                   held_out=(held["reward"] - args.step_cost * held["nfe"]).mean().item(),
                   entropy=entropy(policy, steps),
                   within_group_std=score.reshape(-1, size).std(1).mean().item(),
                   drift=drift(net, net_ref), nfe=held["nfe"].mean().item(),
                   grid=held["times"].float().mean(0).tolist(),
                   grid_std=held["times"].float().std(0).tolist(),
                   terms={k: v.mean().item() for k, v in raw.items()},
                   seconds=seconds_before + time.time() - start)
        log_line(out, **row)
        print("{update:6d} {channel:7s} {reward:7.4f} ±{reward_std:6.4f} {held_out:9.4f}  "
              "{ratio_t0:.6f}  {clip:.2f}  {kl:.1e}  {within_group_std:.4f} {entropy:8.3f}  "
              "{drift:.1e}  {grad_norm:.1e}  {nfe:.2f}  ".format(**row)
              + " ".join(f"{g:.0f}" for g in row["grid"]), flush=True)
        if due(update + 1, args.save_every, args.updates):
            save_state(out / "state.pt", "rl", parts, args, update + 1, row["seconds"])
    return seconds_before + time.time() - start


def train_and_save(net, train_set, monitor_set, reward, args, out, device, **origin):
    """Choose the first grid, train, write out/student.pt; origin: more for its provenance.

    Returns (a frozen copy of the student before, seconds of training).
    """
    if args.base == "auto":                    # in args, so that --resume notices another choice
        args.base = best_base(net, *(x[:64] for x in train_set), reward, args.steps,
                              linear_alpha_bar(device))
    print(f"the step policy starts at the {args.base} grid")
    policy, net_ref, optimizers = learners(net, args)
    seconds = train(net, net_ref, policy, optimizers, train_set, monitor_set, reward, args, out,
                    device)
    save_student(out / "student.pt", net, policy, provenance(
        "rl_distill.py", args, seconds, device, **origin,
        rollouts=rollouts(args, args.updates)),
        half=args.learn == "steps", steps=args.steps, may_stop=args.step_cost > 0)
    return net_ref, seconds


# ==============================================================================================
# RESULT: before and after on held-out noise
# ==============================================================================================

@torch.no_grad()
def final_table(net, net_before, teacher, policy, held_set, reward, args, alpha_bar):
    """The before/after table: {row name: deployed(...)}, all at args.steps evaluations or fewer."""
    z, target = held_set
    teacher_as_student, rows = student_from_teacher(teacher).to(z.device).eval(), {}
    for model, name in ((teacher_as_student, "teacher DDIM {}"),
                        (net_before, "student before, {}")):
        for grid in GRIDS:
            rows[name.format(grid)] = deployed(model, None, z, target, reward, args.steps,
                                               alpha_bar, make_grid(grid, args.steps))
    rows["student after"] = deployed(net, policy, z, target, reward, args.steps, alpha_bar,
                                     may_stop=args.step_cost > 0)
    return rows


def standard_error(x):
    """Standard error of the mean of (B,) values."""
    return (x.std() / math.sqrt(len(x))).item()


def print_result(rows, args):
    """Print the table and the paired comparison with the best hand grid; returns plain values."""
    terms = list(rows["student after"]["raw"])
    print(f"\nheld-out noise, n = {args.held_out}, at most {args.steps} evaluations, eta = 0; "
          "mean ± standard error")
    print(f"{'':26s} {'reward':>17s} {'NFE':>5s}  " + "  ".join(f"{t:>17s}" for t in terms))
    result = dict(steps=args.steps, n=args.held_out, rows={})
    for name, row in rows.items():
        cells = {"reward": row["reward"], **row["raw"]}
        values = {k: (v.mean().item(), standard_error(v)) for k, v in cells.items()}
        print(f"{name:26s} {values['reward'][0]:8.4f} ± {values['reward'][1]:6.4f} "
              f"{row['nfe'].mean():5.2f}  "
              + "  ".join(f"{values[t][0]:8.4f} ± {values[t][1]:6.4f}" for t in terms))
        result["rows"][name] = dict(nfe=row["nfe"].mean().item(),
                                    **{k: list(v) for k, v in values.items()})
    best = max((n for n in rows if "before" in n), key=lambda n: rows[n]["reward"].mean())
    after, before = rows["student after"], rows[best]
    gain = after["reward"] - before["reward"]                      # same noises, so paired
    missing = -before["reward"].mean().item()                      # the teacher's own image has 0
    gap, error = gain.mean().item() / max(missing, 1e-9), standard_error(gain)
    closed = 1 - (after["reward"].mean() / rows["teacher DDIM uniform"]["reward"].mean()).item()
    print(f"gain over '{best}', same noises: {gain.mean():.4f} ± {error:.4f} "
          f"({gain.mean() / max(error, 1e-12):+.1f} standard errors), {100 * gap:.0f} % of the gap "
          f"to the teacher's {TEACHER_STEPS} steps, with {after['nfe'].mean():.2f} evaluations "
          f"in place of {before['nfe'].mean():.2f}\n"
          f"of the gap from uniform DDIM at {args.steps} evaluations to {TEACHER_STEPS} steps, "
          f"{100 * closed:.0f} % are closed")
    if args.step_cost > 0:
        saved = args.step_cost * (before["nfe"] - after["nfe"])
        paid = gain + saved
        print(f"with the step cost: gain {paid.mean():.4f} ± {standard_error(paid):.4f}")
    result.update(best_before=best, gain=gain.mean().item(), gain_error=error, gap_closed=gap,
                  uniform_gap_closed=closed)
    times = rows["student after"]["times"].float()
    print("learned grid: "
          + " ".join(f"{m:.0f}±{s:.0f}" for m, s in zip(times.mean(0), times.std(0))))
    return result


def plot_alignment(rows, before, target, path):
    """Same noise through the teacher's 50 steps, its few steps, the student before and after.

    before: name of the row to show as 'before'.
    """
    names = ["teacher DDIM uniform", before, "student after"]
    panels = [(f"teacher, {TEACHER_STEPS} evaluations", target)]
    panels += [(f"{n}, {rows[n]['nfe'].mean():.1f} evaluations", rows[n]["images"]) for n in names]
    plot_strips(panels, 12, (9, 4.6), path)


def plot_strips(panels, columns, size, path):
    """One strip per panel (title, images (B, 3, H, W)): the first `columns` images of each."""
    figure, axes = pyplot().subplots(len(panels), 1, figsize=size)
    for axis, (title, images) in zip(axes, panels):
        axis.imshow(tile(images[:columns], columns), interpolation="nearest")
        axis.set_title(title, fontsize=9, loc="left", pad=2)
        axis.axis("off")
    save_figure(figure, path)


def plot_grid(times, path):
    """Learned times, mean and spread over held-out noises (times: (B, K + 1)), and hand grids."""
    figure, axis = pyplot().subplots(figsize=(5, 3.6))
    evaluations = range(times.shape[1])
    for name, style in zip(GRIDS, ("--", ":", "-.")):
        axis.plot(make_grid(name, len(evaluations) - 1), style, color="grey", label=f"{name} grid")
    axis.errorbar(evaluations, times.mean(0), yerr=times.std(0), marker="o", capsize=3,
                  label="learned, ± std over noises")
    axis.set(xlabel="network evaluations", ylabel="t", xticks=evaluations)
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


def plot_curves(folder, path):
    """Rewards, grid and spread over training, from the log of a run."""
    log = read_log(folder)
    panels = [("reward", {"training rollouts": "reward"}, {"held-out, eta 0": "held_out"}),
              ("spread", {"reward std in a group": "within_group_std"},
               {"entropy of the steps": "entropy"})]
    figure, axes = pyplot().subplots(1, 3, figsize=(12, 3.4))
    for axis, (label, by_channel, curves) in zip(axes[::2], panels):
        lines = [(f"{name}, {c}", key, [r for r in log if r["channel"] == c])
                 for c in SIZE for name, key in by_channel.items()]
        for name, key, rows in lines + [(name, key, log) for name, key in curves.items()]:
            if rows:
                axis.plot([r["rollouts"] for r in rows], [r[key] for r in rows], label=name)
        axis.set(xlabel="rollouts", ylabel=label)
        axis.legend()
    for k in range(1, len(log[0]["grid"]) - 1):
        axes[1].plot([r["rollouts"] for r in log], [r["grid"][k] for r in log])
    axes[1].set(xlabel="rollouts", ylabel="mean t after each step")
    for axis in axes:
        axis.grid(alpha=0.3)
    save_figure(figure, path)


# ==============================================================================================
# COMMAND LINE
# ==============================================================================================

def parse_args(argv=None):
    """Command line of rl_distill.py."""
    p = parser_for(__doc__, "python rl_distill.py --steps 4 --reward feature:2+mse --learn steps")
    count, share, rate = number(int, 1), number(float, 0, 1e6), number(float, 1e-9, 1)
    a = p.add_argument_group("inputs and outputs").add_argument
    a("--teacher", default="checkpoints/teacher.pt", help="checkpoint of teacher.py")
    a("--student", default="checkpoints/student.pt", help="cloned student, for --init student")
    a("--coach", default="checkpoints/coach.pt", help="encoder that serves the rewards")
    a("--out", help="folder of the run (default: next free runs/rl_distill)")
    a("--resume", action="store_true", help="go on with the run in --out")
    a("--seed", type=number(int, 0, 10 ** 9), default=0, help="seed of exploration and batches")
    a("--device", default="auto", help="auto, cuda, mps or cpu")
    a("--smoke", action="store_true", help="tiny sizes, seconds; its numbers mean nothing")
    a = p.add_argument_group("what is learned").add_argument
    a("--init", choices=["student", "teacher"], default="student", help="cloned, or teacher's copy")
    a("--order", type=int, choices=[1, 2], help="with --init teacher, a jump is a step of: 1 DDIM, "
      "2 (default) DPM-Solver++(2M)")
    a("--learn", choices=["steps", "pixels", "both"], default="both",
      help="channel of the action; both: in turns")
    a("--steps", type=number(int, 1, 64), default=2, help="K, most evaluations per image, 1..16")
    a("--reward", default="feature+perceptual", help=f"sum of {', '.join(TERMS)}; term:weight")
    a("--step-cost", type=share, default=0.0, help="c, reward paid per evaluation; above 0 the "
      "policy may stop early, 0..0.2")
    a("--base", choices=["auto", *GRIDS], default="auto",
      help="hand grid the steps start at; auto: the best on training noise")
    a = p.add_argument_group("how").add_argument
    a("--estimator", choices=["ppo", "reinforce", "backprop", "backprop-last"], default="ppo",
      help="policy gradient; backprop: the reward's own gradient, no RL, through all jumps or only "
      "the last")
    a("--baseline", choices=["global", "group", "batch"], default="global", help="see advantages()")
    a("--updates", type=count, default=40, help="policy updates, 20..500")
    a("--noises", type=count, default=256, help="training noises, each with one target, 128..8192")
    a("--noises-per-update", type=count, default=16, help="M, noises per update, 8..512")
    a("--group", type=number(int, 2), help="G, rollouts of each noise when the steps learn, 4..16 "
      "(default 8)")
    a("--draws", type=number(int, 2), help="P, the same when the pixels learn, even, 8..256 "
      "(default 64); with --eta 0 they share their network calls up to the landing")
    a("--inner-epochs", type=count, help="PPO's passes over a batch, 1..8 (default 4)")
    a("--clip-steps", type=number(float, 1e-9), default=0.2, help="clip range of steps, 0.1..0.3")
    a("--clip-pixels", type=number(float, 1e-9), default=1e-4,
      help="clip range of the pixels' log-density per dimension, 1e-5..1e-3")
    a("--lr-steps", type=rate, default=2e-3, help="first learning rate of the step policy, "
      "falls to 0; 5e-4..5e-3")
    a("--lr-pixels", type=rate, help="the same of the U-Net, 1e-6..1e-4 (default 3e-6; 6e-5 with "
      "--init teacher, which has farther to go)")
    a("--eta", type=number(float, 0, 1), default=0.0, help="exploration of the pixels before the "
      "last jump, Eq. 16 DDIM; 0: only the last jump explores, 0..0.3")
    a("--kl", type=share, default=0.0, help="weight of the KL to the cloned student, 0..1")
    a("--minibatch", type=count, default=128, help="states per backward pass of the U-Net (memory)")
    a("--held-out", type=number(int, 2), default=256, help="noises of the final table")
    a("--save-every", type=count, default=20, help="updates between checkpoints")
    args = p.parse_args(argv)
    if args.smoke:
        args.updates, args.noises, args.noises_per_update = 2, 4, 2
        args.held_out = 4
    if args.learn == "pixels" and args.group:
        p.error("--group needs --learn steps or both: with fixed steps use --draws")
    if args.learn == "steps" and args.draws:
        p.error("--draws needs --learn pixels or both: without them all landings are equal")
    args.group = args.group or (2 if args.smoke else 8)
    args.draws = args.draws or (2 if args.smoke else 64)
    if args.init == "student" and args.order:
        p.error("--order belongs to --init teacher: the cloned student learned its own jumps")
    args.order = args.order or (2 if args.init == "teacher" else 1)
    if args.estimator == "reinforce" and args.inner_epochs:
        p.error("--inner-epochs belongs to ppo and backprop: REINFORCE uses a batch once")
    args.lr_pixels = args.lr_pixels or (6e-5 if args.init == "teacher" else 3e-6)
    args.inner_epochs = args.inner_epochs or (1 if args.estimator == "reinforce" else 4)
    if args.draws % 2:
        p.error("--draws must be even: exploration noise comes in antithetic pairs")
    if args.noises < args.noises_per_update:
        p.error("--noises must be at least --noises-per-update")
    if "backprop" in args.estimator and (args.learn != "pixels" or args.step_cost > 0):
        p.error("--estimator backprop needs --learn pixels and no --step-cost")
    if args.step_cost > 0 and args.learn == "pixels":
        p.error("--step-cost needs --learn steps or both: only the step policy can save a step")
    if args.learn == "steps" and (args.kl > 0 or args.eta > 0):
        p.error("--kl and --eta belong to the pixel channel: add --learn pixels or both")
    if "backprop" in args.estimator and (args.kl > 0 or args.eta > 0):
        p.error("--estimator backprop has no exploration and no KL: leave out --kl and --eta")
    if args.steps == 1 and args.learn != "pixels":
        p.error("--steps 1 leaves no step size to learn; use --learn pixels or more steps")
    return args


def load_inputs(args, device):
    """Seed torch, read --teacher, --student and --coach. Returns (teacher, net, reward)."""
    torch.manual_seed(args.seed)
    teacher, _ = load_teacher(args.teacher, device)
    if args.init == "teacher":
        net = student_from_teacher(teacher, args.order).to(device).eval()
    else:
        net, policy, _ = load_student(args.student, device)
        if policy is not None or net.config["image_size"] != teacher.config["image_size"]:
            raise BadInput(f"{args.student} was reinforced already, or made for other images than "
                           "the teacher's; give a cloned student of this teacher")
    coach, coach_file = load_encoder(args.coach, "coach", device)
    reward = Reward(args.reward, coach, coach_file["scales"])
    if "backprop" in args.estimator and not reward.differentiable:
        raise BadInput(f"--estimator backprop needs a differentiable reward, not '{args.reward}'")
    return teacher, net, reward


def main(argv=None):
    args = parse_args(argv)
    began, device = time.time(), pick_device(args.device)
    alpha_bar = linear_alpha_bar(device)
    teacher, net, reward = load_inputs(args, device)
    out = output_folder(args.out, "rl_distill", args.resume)
    claim_folder(out)
    print("config:", vars(args))
    print(f"device {device_name(device)}, fp32 | student {parameter_count(net) / 1e6:.2f} M, "
          f"teacher {parameter_count(teacher) / 1e6:.2f} M parameters | "
          f"{rollouts(args, args.updates)} rollouts of {args.steps} steps")

    train_set, held_set, monitor_set = (
        noise_and_targets(teacher, first, n, alpha_bar, device, f"{what} targets")
        for first, n, what in ((0, args.noises, "training"), (HELD_OUT, args.held_out, "held-out"),
                               (HELD_OUT + 10 ** 6, min(MONITOR, args.held_out), "monitor")))
    net_ref, seconds = train_and_save(net, train_set, monitor_set, reward, args, out, device)
    net, policy, _ = load_student(out / "student.pt", device)      # what is measured is the file
    rows = final_table(net, net_ref, teacher, policy, held_set, reward, args, alpha_bar)
    result = print_result(rows, args)
    result.update(settings=settings(args), minutes=(time.time() - began) / 60)
    Path(out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    plot_alignment(rows, result["best_before"], held_set[1], out / "alignment.png")
    plot_grid(rows["student after"]["times"].float().cpu(), out / "grid.png")
    plot_curves(out, out / "curves.png")
    print(f"reinforced in {seconds / 60:.1f} min, {result['minutes']:.1f} min in all\n"
          f"wrote {out}/student.pt, state.pt, alignment.png, grid.png, curves.png, result.json, "
          "log.jsonl")


if __name__ == "__main__":
    run_main(main, "--noises-per-update or --minibatch")
