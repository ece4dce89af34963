"""Reinforced distillation: a student learns from a reward alone to make in 3 jumps what took 50.

The reward is likeness to the teacher's image of the same noise, the method is ReDiF's (arXiv
2512.22802): roll out, compare within a group, make what was better likelier. Three policies:
    --paper          ReDiF's MDP: state (x_t, t), action x_next ~ N(mean, sigma^2 I) of every jump,
                     reward at the end; the weights of the network that computes the mean learn
    --learn weights  of that the last jump alone, from which many copies land: a contextual bandit
    --learn jumps    ours: action u = (logit rho, lean, a gain for every residual block) of every
                     jump ~ Normal(mean, std^2), drawn first; the few numbers of the mean learn

    python rl_distill.py                    # bundled weights, no data, no internet, minutes
    python rl_distill.py --learn weights

Reads --teacher, --encoders, --init; writes to --out: policy.pt, state.pt (for --resume), log.jsonl,
learned.png (of a second learner to learner-2/), images.png, result.json. Next file: sample.py.
"""
import copy
import time
from pathlib import Path

import torch
from torch import nn

# From earlier files:
from ddpm import action_mask, expand_like, linear_alpha_bar, sample, solver_of, step
from teacher import HELD_OUT, TARGET, noise_and_targets
from student import load_model
from reward import Row, best_baselines, deploy, load_reward, print_table, rewards
from harness.checkpoints import load_state, provenance, save_network, save_state
from harness.images import plot_learned, plot_strips
from harness.runs import (BadInput, autocast, checksum, claim_run, log_line, number, parser_for,
                          run_main)

NOISES, BASELINE_NOISES = 128, 64       # training noises; those that choose the baseline solver
HELD_NOISES, VALIDATION_NOISES = 256, 64      # held-out, of the table; others, of the log
STD = dict(jump=0.05, block=0.08, channel=0.15)     # of u at first, 0.02..0.2; falls to a fifth
JUMPS_FASTER = 3                        # how much faster than the gains logit rho and lean learn
USUAL_STEPS, CLONED = 3, 0.4            # std and rates go as 3 / max(2, K); times 0.4 for clones
CLIP_JUMPS, CLIP_LANDING = 0.2, 1e-4    # PPO's clip range of u; of x_next, see landing_logp
SIGMA_FLOOR = 0.02                      # of the last landing in training, where DDIM's sigma is 0
LOG_EVERY = 8                           # updates from one printed line to the next
# What --learn or --paper sets, unless a flag is given; noises, M of an update, has no flag.
PRESETS = {
    "jumps": dict(init=["teacher", "checkpoints/student.pt"], updates=240, noises=16, group=2,
                  lr=0.01, eta=0.0),
    "weights": dict(init=["teacher"], updates=100, noises=32, group=128, lr=3e-5, eta=0.0),
    "paper": dict(init=["teacher"], updates=200, noises=8, group=8, lr=3e-5, eta=0.3)}

# ==== POLICY OF THE JUMPS =====================================================================


class JumpPolicy(nn.Module):
    """Normal over u (K, 2 + n): of each of K jumps logit rho, lean, and n gains; see solver_of().

    u is drawn for all jumps before the first evaluation and reads no state: exploration in
    parameters (PGPE, Sehnke et al. 2010), an evolution strategy (OpenAI-ES, Salimans et al. 2017,
    arXiv 1703.03864). Few numbers make it work: the cosine of the estimated gradient with the true
    one grows with rollouts / numbers (study/estimators.py). Gains are an adapter, as LoRA (arXiv
    2106.09685) is in ReDiF's code. DEVIATES: there times are fixed, x_next is the only action."""

    def __init__(self, solver, n_gains):
        super().__init__()
        u = solver.action(n_gains)
        self.jumps, self.gains = nn.Parameter(u[:, :2]), nn.Parameter(u[:, 2:])
        self.register_buffer("mask", action_mask(len(u), n_gains), persistent=False)

    def mean(self):
        """(K, 2 + n)."""
        return torch.cat([self.jumps, self.gains], 1)

    def draw(self, n, std, generator):
        """n u's (n, K, 2 + n_gains) in antithetic pairs: 2i and 2i + 1 are opposite about the mean.
        std: (2 + n_gains,). Entries that do not act stay at the mean."""
        noise = torch.randn(n // 2, *self.mask.shape, generator=generator).to(std.device)
        noise = torch.stack([noise, -noise], 1).flatten(0, 1)
        return (self.mean() + std * self.mask * noise).detach()

    def logp(self, u, std):
        """log N(u; mean, std^2), only what depends on the mean, of the entries that act. (B,)."""
        return (-((u - self.mean()) / std).square() / 2 * self.mask).sum((1, 2))

    @torch.no_grad()
    def solver(self):
        """What is deployed: the mean, as a Solver of lists."""
        return solver_of(self.mean())


# ==== LANDINGS, where the weights learn =======================================================

def landing_logp(mean, x_next, sigma):
    """log N(x_next; mean, sigma^2 I), what depends on the mean: (B, C, H, W) twice, (B,) -> (B,).

    A *mean* over the 3072 dimensions where the density has their sum, as in the code of ReDiF and
    DDPO (Black et al. 2023, arXiv 2305.13301); hence a clip range near 0.2 / 3072. One step of Adam
    takes nearly every ratio beyond it: so a single pass over a batch, where every ratio is 1 and
    nothing is clipped."""
    return -((x_next - mean) / expand_like(sigma, mean)).square().mean((1, 2, 3)) / 2


@torch.no_grad()
def rollout(net, solver, z, group, eta, alpha_bar, generator):
    """Images (M * group, 3, H, W) in [-1, 1] of `group` copies of each noise of z (M, 3, H, W), and
    the landings that explored: (state, x_next (M * group, 3, H, W), sigma, logp (M * group,)).

        eta = 0:  z, x, x shared; then `group` landings, which explore: the copies part at the last
        eta > 0:  z shared; then `group` times x, x, x, all of which explore

    state: what step() was given, one row for all copies until they part, then one for each.
    DEVIATES: with eta 0 only the last evaluation gets a gradient; the jumps before change with it,
    since they share its weights. Copies draw independently: opposite pairs have no unbiased mean
    after the first landing, where their states differ (study/bias.py)."""
    times, leans, gains = solver.per_image(len(z), z.device)
    x, x0_last, landings, K = z, z, [], leans.shape[1]
    for k in range(K):
        state = x, x0_last, times[:, k], times[:, k + 1], leans[:, k], gains[:, k]
        x_next, sigma, x0_hat = step(net, *state, alpha_bar, eta)
        if eta > 0 or k == K - 1:
            copies = group * len(z) // len(x)               # group where they part, afterwards 1
            mean, sigma, x0_hat, times, leans, gains = (
                rows.repeat_interleave(copies, 0) for rows in (
                    x_next, sigma, x0_hat, times, leans, gains))
            sigma = sigma.clamp(min=SIGMA_FLOOR) if k == K - 1 else sigma
            noise = torch.randn(mean.shape, generator=generator).to(z.device)
            x_next = mean + expand_like(sigma, mean) * noise
            landings.append((state, x_next, sigma, landing_logp(mean, x_next, sigma)))
        x, x0_last = x_next, x0_hat
    return x.clamp(-1, 1), landings


# ==== ADVANTAGES AND SURROGATE ================================================================

def advantages(reward, group):
    """A = (R - mean of its group) / rms of that over the whole batch: (M * group,) -> same.

    Members of a group share a noise, side by side; the mean removes how good that noise is anyway.
    DEVIATES from GRPO (Shao et al. 2024), which divides by each group's own std: of a pair
    only the sign is left. Equal rewards give exactly 0, never scaled rounding."""
    groups = reward.reshape(-1, group)                              # (M, group)
    centred = groups - groups.mean(1, keepdim=True)
    rounding = 1e-6 * groups.abs().max()
    centred = torch.where(centred.abs() > rounding, centred, 0.0)
    return (centred / centred.square().mean().sqrt().clamp(min=1e-30)).reshape(-1)


def clipped_surrogate(logp, logp_old, adv, clip_range):
    """-min(ratio A, clip(ratio, 1 - c, 1 + c) A), ratio = exp(logp - logp_old). Eq. 7, Schulman et
    al. 2017. All (B,). Returns (loss, ratio). At ratio 1, as in the first pass over a batch, its
    gradient is REINFORCE's; the clip acts from the second on."""
    ratio = (logp - logp_old).clamp(-20, 20).exp()                  # e^89 is no float any more
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * adv, clipped * adv), ratio.detach()


# ==== ONE UPDATE: sampling, advantages, training ==============================================
# z: (M, 3, H, W), target: the View of the training targets of these noises. Returns the rewards
# (M * G,) and the ratios of all actions before it and, where that costs no evaluation, after it.

def update_jumps(net, policy, z, target, reward, optimizer, args, std, alpha_bar, generator):
    """Draw u in pairs, make images, move the mean towards the u that beat their noise's others.

    In pairs and one pass this is (R+ - R-) (u+ - u-), summed: differences along random lines."""
    # SAMPLING
    rows = torch.arange(len(z), device=z.device).repeat_interleave(args.group)
    u = policy.draw(len(rows), std, generator)                      # (M * G, K, 2 + n)
    logp_old = policy.logp(u, std).detach()
    with autocast(z.device):
        images = sample(net, z[rows], solver_of(u), alpha_bar).clamp(-1, 1)
    # ADVANTAGES
    R = rewards(reward, images, target, rows)
    adv = advantages(R, args.group)
    # TRAINING: no network in it
    ratios = []
    for epoch in range(args.epochs):
        loss, ratio = clipped_surrogate(policy.logp(u, std), logp_old, adv, CLIP_JUMPS)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        ratios.append(ratio)
    return R, ratios[0], (policy.logp(u, std).detach() - logp_old).clamp(-20, 20).exp()


def update_weights(net, solver, z, target, reward, optimizer, args, alpha_bar, generator):
    """Land in groups, move the weights so that the better landings of a group become likelier.

    The score of a landing by its mean is noise / sigma (landing_logp has it over 3072); A noise /
    sigma, averaged over the copies of a state, estimates d E[R] / d mean: the reward is evaluated,
    never differentiated. A backward pass multiplies it by d mean / d weights, once for all copies.
    Not quite the gradient: landings are weighted by sigma, as in ReDiF's code, which matters with
    eta above 0; and where a jump leans, the estimate before counts as given, though the weights
    made it."""
    # SAMPLING
    rows = torch.arange(len(z), device=z.device).repeat_interleave(args.group)
    with autocast(z.device):
        images, landings = rollout(net, solver, z, args.group, args.eta, alpha_bar, generator)
        R = rewards(reward, images, target, rows)           # bf16: off by 7 % of a group's std
    # ADVANTAGES
    adv = advantages(R, args.group)
    # TRAINING: one backward pass for all copies of a state
    optimizer.zero_grad()
    mean_sigma = torch.stack([sigma.mean() for _, _, sigma, _ in landings]).mean()
    ratios = []
    for state, x_next, sigma, logp_old in landings:
        with autocast(z.device):
            mean, *_ = step(net, *state, alpha_bar, args.eta)
        mean = mean.repeat_interleave(len(x_next) // len(mean), 0)
        loss, ratio = clipped_surrogate(landing_logp(mean, x_next, sigma), logp_old, adv,
                                        CLIP_LANDING)
        (loss * sigma / mean_sigma).mean().div(len(landings)).backward()
        ratios.append(ratio)
    optimizer.step()
    return R, torch.cat(ratios), None


# ==== LOOP ====================================================================================

def exploration(net, args):
    """Of the jumps: n gains of each, std (2 + n,) of u at the first update, and the factor of that
    std and of the rates: the more jumps, the less each may move; a clone has little to gain. By
    tries on noises of their own: there six jumps close 52 %, unscaled 39."""
    n = dict(none=0, block=len(net.branches), channel=sum(net.branches))[args.gains]
    scale = (1 if net.estimates_image else CLONED) * USUAL_STEPS / max(2, args.steps)
    return n, scale * torch.tensor([STD["jump"]] * 2 + [STD.get(args.gains)] * n), scale


def training_evaluations(args, M):
    """Network evaluations of all updates of M noises; a backward pass counts as two."""
    if args.learn == "jumps":
        return args.updates * M * args.group * args.steps
    if args.eta == 0:                   # copies share all evaluations; the last is made again
        return args.updates * M * (args.steps + 3)
    states = M + M * args.group * (args.steps - 1)          # copies share the first evaluation
    return args.updates * 4 * states


def train(net, start, train_set, validation_set, reward, args, out):
    """Learn from Solver `start` on: the policy of the jumps, or the weights of net itself. Sets:
    (noise, View of its targets). Returns (Solver, seconds)."""
    (z, target), device, jumps = train_set, train_set[0].device, args.learn == "jumps"
    alpha_bar, generator = linear_alpha_bar(device), torch.Generator().manual_seed(args.seed)
    if jumps:
        n_gains, std, scale = exploration(net, args)
        std, learns = std.to(device), JumpPolicy(start, n_gains).to(device)
        groups = [dict(params=[learns.jumps], lr=scale * args.lr * JUMPS_FASTER),
                  dict(params=[learns.gains], lr=scale * args.lr)]
    else:
        learns = net.requires_grad_(True)
        groups = [dict(params=[*net.parameters()], lr=args.lr)]
    optimizer, rates = torch.optim.Adam(groups), [group["lr"] for group in groups]
    parts = dict(learns=learns, optimizer=optimizer, generator=generator)
    first, seconds = load_state(out / "state.pt", parts) if args.resume else (0, 0.0)
    seen, solver, began = {}, learns.solver() if jumps else start, time.time() - seconds
    print("update validation | times | leans | rms of gains | batch std in_group ratio_before"
          + " approx_kl clipped" * jumps)
    for update in range(first, args.updates + 1):                   # 0: before the first
        if update > 0:
            left = 1 - (update - 1) / args.updates
            for parameters, rate in zip(optimizer.param_groups, rates):
                parameters["lr"] = rate * left
            pick = torch.randperm(len(z), generator=generator)[:args.noises].to(device)
            some = z[pick], target.rows(pick), reward, optimizer, args
            seen = diagnostics(args.group, *(
                update_jumps(net, learns, *some, std * (0.2 + 0.8 * left), alpha_bar, generator)
                if jumps else update_weights(net, start, *some, alpha_bar, generator)))
        if update % LOG_EVERY and update < args.updates:
            continue
        solver, seconds = learns.solver() if jumps else start, time.time() - began
        value = deploy(net, solver, *validation_set, reward, alpha_bar)[1].mean().item()
        row = dict(update=update, validation=value, **seen, times=solver.times, leans=solver.leans,
                   gains=solver.gains, seconds=seconds)
        rms = torch.tensor(solver.gains or []).square().mean().nan_to_num().sqrt()
        print(f"{update:6d} {value:8.4f} |", *solver.times, "|",
              *(f"{lean:.2f}" for lean in solver.leans), f"| {rms:.3f} |",
              *(f"{x:.4g}" for x in seen.values()), flush=True)
        log_line(out / "log.jsonl", **row)
        save_state(out / "state.pt", parts, update + 1, seconds)
    return solver, seconds


def diagnostics(group, R, before, after):
    """What is printed of an update's rewards and ratios: see README, Columns. A dict of floats."""
    values = dict(batch=R.mean(), std=R.std(), in_group=R.reshape(-1, group).std(1).mean(),
                  ratio_before=before[(before - 1).abs().argmax()])
    if after is not None:
        values.update(approx_kl=(after - 1 - after.log()).mean(),
                      clipped=((after - 1).abs() > CLIP_JUMPS).float().mean())
    return {name: value.item() for name, value in values.items()}


# ==== INPUTS AND COMMAND LINE =================================================================

def load_inputs(args, device):
    """Read the checkpoints. Returns (teacher, learners, reward, judge). A learner is
    (name before its rows, net, its own Solver or None, evaluations that it has learned from)."""
    (teacher, *_), learners = load_model(args.teacher, device, "teacher"), []
    for path in args.init:
        if path == "teacher":
            learners.append(("", copy.deepcopy(teacher), None, 0))
            continue
        net, content, solver = load_model(path, device, "student", "policy", teacher=teacher)
        K, n = (len(solver.leans), len((solver.gains or [[]])[0])) if solver else (args.steps, 0)
        if K != args.steps or args.learn == "jumps" and n not in (0, exploration(net, args)[0]):
            raise BadInput(f"{path} has {K} jumps of {n} gains; give --steps and --gains that fit")
        learners.append((f"{Path(path).stem}: ", net, solver, content["trained"]))
    return teacher, learners, *load_reward(args.reward, args.encoders, device)


def parse_args(argv=None):
    """Command line of rl_distill.py."""
    p = parser_for(__doc__, "python rl_distill.py --steps 2 --reward feature:2+mse --seed 1")
    a = p.add_argument_group("inputs").add_argument
    a("--teacher", default="checkpoints/teacher.pt", help="checkpoint of teacher.py")
    a("--encoders", default="checkpoints", help="folder of coach.pt and judge.pt")
    a("--init", nargs="+", help="who learns, one after the other: 'teacher' (a copy of it), or a "
      "file of student.py or of this script, which goes on from its jumps *")
    what = p.add_argument_group("what is learned")
    a, either = what.add_argument, what.add_mutually_exclusive_group().add_argument
    either("--learn", choices=["jumps", "weights"], default="jumps", help="which action, see above")
    either("--paper", dest="learn", action="store_const", const="paper", help="as ReDiF's code *")
    a("--gains", choices=["none", "block", "channel"], default="block",
      help="what u holds of a residual block: no gain, one, or one of each channel (jumps)")
    a("--steps", type=number(int, 1, 64), default=3, help="K, evaluations per image, 1..16")
    a("--reward", default="feature+perceptual",
      help="sum of feature, perceptual, mse, histogram; term:weight")
    a = p.add_argument_group("how (* see the last lines)").add_argument
    a("--updates", type=number(int, 1), help="20..500 *")
    a("--group", type=number(int, 2), help="G, rollouts, or landings, of each noise, 2..512 *")
    a("--epochs", type=number(int, 1), default=1, help="PPO's passes over a batch of jumps")
    a("--lr", type=number(float, 1e-9, 1), help="Adam's first rate, falls to 0: of gains 0.003.."
      "0.03 (rho and lean three times it), of weights 1e-6..1e-4 *")
    a("--eta", type=number(float, 0, 1), help="of the weights' landings before the last, Eq. 16 "
      "DDIM; 0: only the last explores *")
    p.epilog += "".join(f" *  --{'learn ' * (name != 'paper')}{name}: {preset}"
                        for name, preset in PRESETS.items())
    p.set_defaults(noises=None)
    p.set_defaults(**PRESETS[p.parse_args(argv).learn])     # parsed once to learn which preset
    args = p.parse_args(argv)
    args.updates = 4 if args.smoke else args.updates
    if args.learn == "jumps" and (args.group % 2 or args.eta > 0):
        p.error("jumps are drawn in antithetic pairs, without noise: --group is even and --eta 0")
    if args.learn != "jumps" and (args.epochs > 1 or args.gains != "block"):
        p.error("--epochs and --gains go with --learn jumps: the weights learn in a single pass")
    if args.learn == "jumps" and args.steps == 1 and args.gains == "none":
        p.error("one jump without gains has nothing to learn; give --steps or --gains")
    return args


def distil(learner, teacher, train_set, validation_set, held_set, reward, args, out):
    """Baselines, training and deployment of one learner, into folder `out`. Returns its Rows."""
    (name, net, own, trained), (z, target), K = learner, held_set, args.steps
    alpha_bar, first = linear_alpha_bar(z.device), slice(BASELINE_NOISES)
    starts = {"before": ("", own)} if own else best_baselines(
        net, K, train_set[0][first], train_set[1].rows(first), reward, alpha_bar)
    rows = {kind: Row(f"{name}{kind} {grid}".strip(), K, trained, *deploy(
        net, solver, z, target, reward, alpha_bar)) for kind, (grid, solver) in starts.items()}
    kind = "DDIM" if args.eta > 0 and not own else next(iter(starts))   # leans magnify eta's noise
    print(f"\nstarts from {rows[kind].name}")
    solver, seconds = train(net, starts[kind][1], train_set, validation_set, reward, args, out)
    trained += training_evaluations(args, min(args.noises, len(train_set[0])))
    save_network(out / "policy.pt", "policy", net, provenance(
        "rl_distill.py", args, seconds, z.device, start=rows[kind].name, trained=trained,
        teacher=checksum(teacher)), network=type(net).__name__, solver=list(solver),
        half=all(torch.equal(w.half().float(), w) for w in net.parameters()))   # loses nothing
    net, _, solver = load_model(out / "policy.pt", z.device)       # what is measured is the file
    learned = Row(f"{name}learned", K, trained, *deploy(net, solver, z, target, reward, alpha_bar),
                  rows[kind])
    plot_learned(out, rows[kind], learned)
    print(f"learned in {seconds / 60:.1f} min, wrote {out}/policy.pt, state.pt, learned.png")
    return [*list(rows.values())[::-1], learned]


def main(argv=None):
    args = parse_args(argv)
    teacher, learners, reward, judge = load_inputs(args, args.device)
    out = claim_run(args, "rl_distill")
    noises, watched, held = (8, 8, 8) if args.smoke else (NOISES, VALIDATION_NOISES, HELD_NOISES)
    print(f"{args.steps} evaluations per image, {args.updates} updates of "
          f"{min(args.noises, noises)} noises x {args.group}")
    sets = [(z, reward.view(target)) for z, target in (
        noise_and_targets(teacher, *seeds, args.device) for seeds in (
            (0, noises), (HELD_OUT + 10 ** 6, watched), (HELD_OUT, held)))]
    rows = [Row("target", len(TARGET.leans), 0, sets[2][1].images,
                torch.zeros(held, device=args.device))]
    for i, learner in enumerate(learners):
        folder = out / f"learner-{i + 1}" if i else out
        folder.mkdir(exist_ok=True)
        rows += distil(learner, teacher, *sets, reward, args, folder)
        if not i:
            plot_strips([(f"{row.nfe} evaluations, {row.name}", row.images)
                         for row in rows[1:] + rows[:1]], 12, out / "images.png")
    print(f"\n{held} held-out noises, of which ± is the standard error; one training seed; the "
          f"training noises' targets took {noises * len(TARGET.leans):,} more evaluations")
    print_table(rows, judge, out / "result.json")
    print(f"wrote {out}/images.png, result.json, log.jsonl")


if __name__ == "__main__":
    run_main(main)
