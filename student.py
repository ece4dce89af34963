"""The student: a smaller U-Net that jumps, cloned from the teacher's trajectories; the step policy.

Adds to teacher.py a network that sees *both* times of a jump, net(x_t, t, t_next), a small policy
that decides how far to jump, and data-free cloning: the teacher's DDIM paths from new noise are the
only training data. DEVIATES: ReDiF's student starts as a copy of the teacher (--init teacher);
cloning a smaller network from random weights is this project's choice.

    python student.py                          # clones the bundled teacher from random weights
    python student.py --init teacher           # the paper's own start: a copy of the teacher
    python student.py --smoke                  # seconds, numbers mean nothing

Reads --teacher; writes to --out: student.pt (fp16), state.pt (for --resume), samples.png (rows: the
teacher, then 1, 2, 4, 8 steps), loss.png, log.jsonl. Next file: reward.py.
"""
import copy
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# From earlier files:
from ddpm import (T, BadInput, UNet, at, autocast, careful_step, chunk_size, claim_folder,
                  ddim_step, due, half_log_snr, half_weights, linear_alpha_bar, load_checkpoint,
                  load_state, load_teacher, load_weights, log_line, make_grid, number,
                  output_folder, parameter_count, parser_for, pick_device, predict_x0, rebuilding,
                  run_main, sample, save_checkpoint, save_state, second_order, seeded_noise,
                  stop_if_wrong, time_embedding, time_of_level, until_stopped)
from teacher import (EMA_DECAY, GRAD_CLIP, TEACHER_STEPS, device_name, ema_update, learning_rate,
                     plot_loss, provenance, save_picture)

STUDENT_UNET = dict(width=32, mults=[1, 2, 3], blocks=1, attention=[8], dropout=0.0)   # 1.8 M
START_SHARE = 1 / 3         # share of pairs that start at t = T, where every deployment starts
LAND_SHARE = 1 / 2          # share of pairs that land at t = 0, where every deployment ends
SHORTEST_JUMP = 10          # shortest jump trained (rounding noise grows as 1 / sin(d))
CONCENTRATION = 40.0        # of the initial Beta policy: std of rho about 0.07; usual range 10..100
STOP_LOGIT = -2.5           # initial logit of stopping early: 8 percent a step
STOP_GAIN = 4.0             # of its change: it has far to go, and 0 decides in deployment; 1..10
HELD_OUT = 10 ** 9          # seeds from here on are never trained on, in any file

# ==============================================================================================
# A JUMP IS A ROTATION. With sqrt(ab_t) = cos(phi_t), DDIM's update (Eq. 12, Song et al. 2020, at
# sigma = 0) turns x_t by d = phi_t - phi_next:   x_next = cos(d) x_t - sin(d) v,   v the velocity
# ==============================================================================================


def angle(t, alpha_bar, like):
    """phi_t = arccos(sqrt(ab_t)), broadcastable over `like`; 0 at t = 0, almost pi / 2 at t = T."""
    ab = at(alpha_bar, t, like)
    return torch.atan2((1 - ab).sqrt(), ab.sqrt())


def v_to_x0_eps(x_t, t, v, alpha_bar) -> tuple[torch.Tensor, torch.Tensor]:
    """x0_hat = cos(phi_t) x_t - sin(phi_t) v, eps_hat = sin(phi_t) x_t + cos(phi_t) v. Appendix D,
    Salimans & Ho 2022. x_t, v: (B, ...), t: (B,); phi_t = angle(t, alpha_bar, x_t)."""
    # -- exercise 3
    phi = angle(t, alpha_bar, x_t)
    return phi.cos() * x_t - phi.sin() * v, phi.sin() * x_t + phi.cos() * v
    # --


def secant_velocity(x_t, x_next, t, t_next, alpha_bar) -> torch.Tensor:
    """The v whose one jump, x_next = cos(d) x_t - sin(d) v with d = phi_t - phi_next, lands exactly
    at x_next. x_t, x_next, v: (B, ...); t, t_next: (B,) integers, t > t_next.
    """
    # -- exercise 3
    d = angle(t, alpha_bar, x_t) - angle(t_next, alpha_bar, x_t)
    return (d.cos() * x_t - x_next) / d.sin()
    # --


# ==============================================================================================
# NETWORK
# ==============================================================================================

class JumpUNet(UNet):
    """U-Net that is told where it comes from and where it is to land.

    predicts: 'v' (secant velocity of the jump) or 'eps' (as the teacher does). order: 1 for DDIM's
    jump, 2 for that of DPM-Solver++(2M), which needs an epsilon: see second_order() in ddpm.py.
    """

    def __init__(self, predicts="v", order=1, **unet):
        super().__init__(**unet)
        self.config.update(predicts=predicts, order=order)
        self.predicts, self.order = predicts, order
        c_time = 4 * self.config["width"]
        self.jump_mlp = nn.Sequential(
            nn.Linear(self.config["width"], c_time), nn.SiLU(), nn.Linear(c_time, c_time))

    @property
    def features(self):
        """Length of the pooled bottleneck that the step policy reads."""
        return self.config["width"] * self.config["mults"][-1]

    def forward(self, x, t, t_next, with_features=False):
        """x (B, 3, H, W); t, t_next (B,) -> (B, 3, H, W), and pooled bottleneck (B, C) if asked."""
        emb = self.time_mlp(time_embedding(t, self.config["width"]))
        emb = F.silu(emb + self.jump_mlp(time_embedding(t_next, self.config["width"])))
        bottleneck, skips = self.encode(x, emb)
        out = self.decode(bottleneck, skips, emb)
        out = self.to_eps(out, x, t) if self.predicts == "eps" else out
        return (out, bottleneck.mean(dim=(2, 3))) if with_features else out


def student_from_teacher(teacher, order=1):
    """The paper's start: teacher's weights, jump embedding zeroed: outputs are the teacher's."""
    student = JumpUNet(**{**teacher.config, "predicts": "eps", "order": order})
    student.load_state_dict(teacher.state_dict(), strict=False)
    nn.init.zeros_(student.jump_mlp[-1].weight)
    nn.init.zeros_(student.jump_mlp[-1].bias)
    return student


def nothing_seen(net, x_T):
    """What jump() remembers of the last evaluation, before the first: a dict of (B, ...) tensors.

    features (B, C) for the step policy; x0_last (B, 3, H, W) and t_last (B,) for order 2. Here
    x0_last is x_T for its shape only: with t_last = T it counts for nothing.
    """
    B = len(x_T)
    return dict(features=torch.zeros(B, net.features, device=x_T.device), x0_last=x_T,
                t_last=torch.full((B,), T, device=x_T.device))


def rows_of(seen, i):
    """Rows i of what was seen."""
    return {key: value[i] for key, value in seen.items()}


def jump(net, x_t, t, t_next, alpha_bar, eta=0.0, last=None):
    """One student step t -> t_next: (mean (B, 3, H, W), sigma (B,), what was seen, a dict).

    last: what the jump before saw, read by nets of order 2 alone; without it, as at the start and
    on the jump into t = 0, a jump is of first order. A secant's x0_hat is where the straight jump
    would end, no estimate of the image, so it is not clipped to [-1, 1] as an epsilon student's is.
    """
    out, features = net(x_t, t, t_next, with_features=True)
    if net.predicts == "v":
        x0_hat, eps_hat = v_to_x0_eps(x_t, t, out.float(), alpha_bar)
    else:
        x0_hat, eps_hat = predict_x0(x_t, t, out.float(), alpha_bar)
    seen = dict(features=features.float(), x0_last=x0_hat, t_last=t)
    if net.order == 2 and last is not None:
        x0_hat, eps_hat = second_order(x_t, x0_hat, t, t_next, last["x0_last"], last["t_last"],
                                       alpha_bar)
    mean, sigma = ddim_step(x0_hat, eps_hat, t, t_next, eta, alpha_bar)
    return mean, sigma, seen


# ==============================================================================================
# STEP-SIZE POLICY. DEVIATES: in the paper's code the grid is fixed and only the Gaussian transition
# is an action; learning the step sizes is this project's extension. TPDM (arXiv 2412.01243) too
# puts a Beta on t_next / t; ART-RL (arXiv 2601.18681) learns the clock by an actor and a critic.
# ==============================================================================================

def bounded(x, limit):
    """x near 0, never beyond +-limit, and never without gradient (as a hard clamp would be)."""
    return limit * torch.tanh(x / limit)


class StepPolicy(nn.Module):
    """Beta over rho = t_next / t, and a Bernoulli that stops early (jumps to 0) where steps cost.

    Reads t, the number n of steps left, and the pooled bottleneck of the *last* network call (zeros
    before the first), so that deciding costs no evaluation. Its last layer starts at zero: the mean
    is then the hand grid's, and the concentration CONCENTRATION.
    """

    def __init__(self, features, base="uniform", hidden=64):
        super().__init__()
        self.config = dict(features=features, base=base, hidden=hidden)
        self.register_buffer("levels", half_log_snr(linear_alpha_bar()[1:]), persistent=False)
        self.normalise = nn.LayerNorm(features, elementwise_affine=False)
        self.body = nn.Sequential(nn.Linear(features + 3, hidden), nn.SiLU(),
                                  nn.Linear(hidden, hidden), nn.SiLU())
        self.head = nn.Linear(hidden, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def hand_ratio(self, t, n):
        """t_next / t of the hand grid with n steps left: uniform (n-1)/n, quadratic its square;
        logsnr: one n-th of the way from lambda(t) to lambda(1). All (B,)."""
        if self.config["base"] == "logsnr":
            level = self.levels[t.long() - 1]
            ratio = time_of_level(level + (self.levels[0] - level) / n, self.levels) / t
        else:
            ratio = ((n - 1) / n) ** (1 if self.config["base"] == "uniform" else 2)
        return ratio.clamp(0.01, 0.99)

    def forward(self, t, n, features):
        """t, n (B,); features (B, C) -> mean of rho, concentration, stopping logit, each (B,)."""
        t, n = t.float(), n.float()
        clock = torch.stack([t / T, 1 / n, torch.log(n)], dim=1)               # (B, 3)
        seen = self.normalise(features.detach())                               # (B, C)
        shift, log_spread, stop = self.head(self.body(torch.cat([clock, seen], 1))).unbind(1)
        shift, log_spread = bounded(shift, 8), bounded(log_spread, 2)
        mean = torch.sigmoid(torch.logit(self.hand_ratio(t, n)) + shift)
        return mean, CONCENTRATION * log_spread.exp(), STOP_LOGIT + STOP_GAIN * stop

    def distribution(self, t, n, features):
        """The Beta over rho and the Bernoulli over stopping, as torch distributions."""
        mean, concentration, stop_logit = self(t, n, features)
        a, b = mean * concentration, (1 - mean) * concentration
        return torch.distributions.Beta(a, b), torch.distributions.Bernoulli(logits=stop_logit)


def land(t, rho, n, stop):
    """Next time of a jump: round(rho t), at most t - 1, at least n - 1 so that every later jump can
    still fall; 0 on the last allowed step (n = 1) and where stop is set. All (B,) -> integers."""
    t_next = torch.minimum(torch.maximum((rho * t).round().long(), n - 1), t - 1)
    return torch.where((n == 1) | stop, torch.zeros_like(t), t_next)


@torch.no_grad()
def deploy(net, x_T, steps, alpha_bar, policy=None, grid=None, may_stop=False, eta=0.0, seeds=None):
    """Few-step sampling as it is used: the policy's mean step, or a fixed grid; eta = 0.

    eta > 0 adds noise as the sampler of ddpm.py does (seeds: one per image). Returns (images
    (B, 3, H, W) in [-1, 1], times visited (B, steps + 1), states (B, steps + 1, 3, H, W)); the NFE
    of an image is its number of times above 0.
    """
    x, t = x_T, torch.full((len(x_T),), T, device=x_T.device)
    seen, times, states = nothing_seen(net, x), [t], [x]
    for k in range(steps):
        live = t > 0                                           # who has not landed at 0 yet
        if grid is not None:
            t_next = torch.full_like(t, grid[k + 1])
        else:
            n = torch.full_like(t, steps - k)
            rho, _, stop_logit = policy(t, n, seen["features"])
            t_next = land(t, rho, n, (stop_logit > 0) & may_stop)
        if live.any():
            mean, sigma, new = jump(net, x[live], t[live], t_next[live], alpha_bar, eta,
                                    rows_of(seen, live))
            if eta > 0:
                noise = seeded_noise(seeds, x.shape[1:], stream=k + 1, device=x.device)
                mean = mean + sigma[:, None, None, None] * noise[live]
            x = x.index_put((live,), mean)
            seen = {key: value.index_put((live,), new[key]) for key, value in seen.items()}
        t = torch.where(live, t_next, t)
        times.append(t)
        states.append(x)
    return x.clamp(-1, 1), torch.stack(times, 1), torch.stack(states, 1)


# ==============================================================================================
# CLONING
# ==============================================================================================

@torch.no_grad()
def teacher_paths(teacher, x_T, alpha_bar, device, fp32=False):
    """All states of the teacher's deterministic DDIM, T to 0: (B, TEACHER_STEPS + 1, 3, H, W)."""
    with autocast(device, not fp32):
        path = sample(teacher, x_T, make_grid("uniform", TEACHER_STEPS), alpha_bar, keep_path=True)
    return torch.stack(path, dim=1)


def segment(paths, rows, t):
    """The teacher's own step in which t lies: states x_a, x_b (B, 3, H, W), times t_a > t_b."""
    grid = torch.tensor(make_grid("uniform", TEACHER_STEPS), device=t.device)
    k = ((T - t) * TEACHER_STEPS // T).clamp(max=TEACHER_STEPS - 1)
    return paths[rows, k], paths[rows, k + 1], grid[k], grid[k + 1]


def state_at(paths, rows, t, alpha_bar):
    """State of paths[rows] at any integer t, on the teacher's grid or not: (B,) -> (B, 3, H, W).

    Between two grid points DDIM moves on a circle (x0_hat and eps_hat stay), so the state there is
    x = (sin(phi - phi_b) x_a + sin(phi_a - phi) x_b) / sin(phi_a - phi_b).
    """
    x_a, x_b, t_a, t_b = segment(paths, rows, t)
    phi, phi_a, phi_b = (angle(s, alpha_bar, x_a) for s in (t, t_a, t_b))
    return ((phi - phi_b).sin() * x_a + (phi_a - phi).sin() * x_b) / (phi_a - phi_b).sin()


def draw_jumps(n, generator):
    """Random jumps (t, t_next), each (n,): many from T, many to 0, none below SHORTEST_JUMP."""
    u = torch.rand(4, n, generator=generator)
    anywhere = SHORTEST_JUMP + (u[1] * (T + 1 - SHORTEST_JUMP)).long()
    t = torch.where(u[0] < START_SHARE, T, anywhere)
    return t, torch.where(u[2] < LAND_SHARE, 0, (u[3] * (t - SHORTEST_JUMP + 1)).long())


def clone_loss(net, paths, rows, t, t_next, alpha_bar):
    """Mean squared error to the teacher's own path, in v-space ('v') or in epsilon ('eps').

    'v', secant: the landing point x_next of a jump of any length, weighted back by 1 / sin(d)^2.
    'eps', behaviour cloning: the epsilon of the teacher's step in which t lies, whatever t_next.
    """
    x_t = state_at(paths, rows, t, alpha_bar)
    if net.predicts == "eps":
        x_a, x_b, t_a, t_b = segment(paths, rows, t)
        v = secant_velocity(x_a, x_b, t_a, t_b, alpha_bar)
        target = v_to_x0_eps(x_a, t_a, v, alpha_bar)[1]
    else:
        x_next = state_at(paths, rows, t_next, alpha_bar)
        target = secant_velocity(x_t, x_next, t, t_next, alpha_bar)
    return F.mse_loss(net(x_t, t, t_next).float(), target)


class PathPool:
    """The newest teacher paths; refilled during training, so that no noise is used for long."""

    def __init__(self, teacher, size, seed, alpha_bar, device, fp32=False):
        self.teacher, self.alpha_bar, self.device, self.fp32 = teacher, alpha_bar, device, fp32
        self.chunk = max(1, min(chunk_size(device), size // 4))
        self.size, self.made = size // self.chunk * self.chunk, 0
        side = teacher.config["image_size"]
        self.paths = torch.zeros(self.size, TEACHER_STEPS + 1, 3, side, side, device=device)
        self.generator = torch.Generator().manual_seed(seed)

    def run(self, slot, x_T):
        """Put the teacher's paths from x_T (chunk, 3, H, W) into the slots from `slot` on."""
        self.paths[slot:slot + self.chunk] = teacher_paths(
            self.teacher, x_T.to(self.device), self.alpha_bar, self.device, self.fp32)

    def grow(self, wanted):
        """Run the teacher from new noise until `wanted` paths were made; the oldest make room."""
        while self.made < wanted:
            x_T = torch.randn(self.chunk, *self.paths.shape[2:], generator=self.generator)
            self.run(self.made % self.size, x_T)
            self.made += self.chunk

    def draw(self, n, generator):
        """Numbers of n random paths, with replacement: (n,)."""
        return torch.randint(min(self.made, self.size), (n,), generator=generator).to(self.device)

    def state_dict(self):
        """For a checkpoint: the start noises alone, from which load_state_dict runs the teacher."""
        return dict(noise=self.paths[:min(self.made, self.size), 0].cpu(), made=self.made,
                    chunk=self.chunk, generator=self.generator.get_state())

    def load_state_dict(self, saved):
        """Inverse of state_dict. BadInput where the run was on a device with other chunks."""
        if saved["chunk"] != self.chunk:
            raise BadInput(f"this run made {saved['chunk']} paths at a time, this device makes "
                           f"{self.chunk}; resume it on the kind of device it was started on")
        for slot, x_T in zip(range(0, self.size, self.chunk), saved["noise"].split(self.chunk)):
            self.run(slot, x_T)
        self.made = saved["made"]
        self.generator.set_state(saved["generator"])


def clone(net, ema, teacher, args, out, device):
    """Regress the student on the teacher's paths. Returns (seconds, number of paths)."""
    alpha_bar = linear_alpha_bar(device)
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.0,
                                  fused=device.type != "mps")
    pool = PathPool(teacher, args.pool, args.seed + 1, alpha_bar, device, args.fp32)
    parts = dict(net=net, ema=ema, optimizer=optimizer, generator=generator, pool=pool, running=[])
    first, seconds_before = 0, 0.0
    if args.resume:
        first, seconds_before = load_state(out / "state.pt", "student", parts, args)
    start, running, wrong = time.time(), parts["running"], {}
    progress = tqdm(range(first, args.updates), initial=first, total=args.updates, mininterval=5,
                    desc="clone")
    for update in until_stopped(progress, out):
        pool.grow(max(args.pool // 4, update * args.batch_size // args.pairs_per_path))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, args.updates, args.lr)
        t, t_next = (s.to(device) for s in draw_jumps(args.batch_size, generator))
        rows = pool.draw(args.batch_size, generator)
        with autocast(device, not args.fp32):
            loss = clone_loss(net, pool.paths, rows, t, t_next, alpha_bar)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), GRAD_CLIP)
        careful_step(optimizer, wrong, update + 1, loss=loss, gradient=grad_norm)
        ema_update(ema, net, min(EMA_DECAY, (1 + update) / (10 + update)))

        running.append(loss.detach())
        done, seconds = update + 1, seconds_before + time.time() - start
        if done % args.log_every == 0 or done == args.updates:
            stop_if_wrong(wrong)
            mean_loss = torch.stack(running).mean().item()
            running.clear()
            log_line(out, update=done, pairs=done * args.batch_size, paths=pool.made,
                     loss=mean_loss, seconds=seconds)
            progress.set_postfix(loss=f"{mean_loss:.4f}", paths=pool.made)
        if due(done, args.save_every, args.updates):
            stop_if_wrong(wrong)
            save_state(out / "state.pt", "student", parts, args, done, seconds)
            save_student(out / "student.pt", ema, None, provenance(
                "student.py", args, seconds, device, updates=done, teacher_paths=pool.made))
    return seconds_before + time.time() - start, pool.made


def save_student(path, net, policy, origin, half=True, **more):
    """fp16 weights of student and policy (None before reinforcement), configs, provenance.

    half=False keeps the student in fp32: small updates of its pixels are lost in the rounding.
    """
    save_checkpoint(path, "student", config=net.config,
                    weights=half_weights(net) if half else net.state_dict(),
                    provenance=origin, policy_config=policy.config if policy else None,
                    policy_weights=half_weights(policy) if policy else None, **more)


def load_student(path, device="cpu"):
    """Rebuild student and policy, in eval mode. Returns (net, policy or None, checkpoint)."""
    content = load_checkpoint(path, "student")
    with rebuilding(path, "student config"):
        net, policy = JumpUNet(**content["config"]), None
        load_weights(net, content["weights"], path).to(device).eval()
        if content["policy_config"]:
            policy = StepPolicy(**content["policy_config"])
            load_weights(policy, content["policy_weights"], path).to(device).eval()
    return net, policy, content


# ==============================================================================================
# EVALUATION on held-out noise
# ==============================================================================================

def held_out_noise(n, side, device):
    """Start noise no training ever sees: seeds HELD_OUT .. HELD_OUT + n - 1. (n, 3, side, side)."""
    return seeded_noise(range(HELD_OUT, HELD_OUT + n), (3, side, side), device=device)


@torch.no_grad()
def landing_error(net, paths, alpha_bar, jumps=((T, 0), (T, 500), (500, 0), (750, 250))):
    """Mean squared distance of a jump's landing point from the teacher's state: {jump: float}."""
    errors, rows = {}, torch.arange(len(paths), device=paths.device)
    for a, b in jumps:
        t, t_next = (torch.full_like(rows, s) for s in (a, b))
        mean, _, _ = jump(net, state_at(paths, rows, t, alpha_bar), t, t_next, alpha_bar)
        errors[f"{a}->{b}"] = F.mse_loss(mean, state_at(paths, rows, t_next, alpha_bar)).item()
    return errors


def evaluate(net, teacher, n, alpha_bar, device):
    """MSE to the teacher's 50-step result on n held-out noises, student and teacher, by steps.

    Returns (rows of the table, landing errors, pictures: the teacher's, then 1, 2, 4, 8 steps).
    """
    noise = held_out_noise(n, net.config["image_size"], device).split(chunk_size(device))
    target = torch.cat([sample(teacher, x, make_grid("uniform", TEACHER_STEPS), alpha_bar)
                        for x in noise])
    rows, pictures = [], [target[:8]]
    for steps in (1, 2, 4, 8):
        row = dict(steps=steps)
        for name in ("quadratic", "uniform"):
            grid = make_grid(name, steps)
            images = torch.cat([deploy(net, x, steps, alpha_bar, grid=grid)[0] for x in noise])
            own = torch.cat([sample(teacher, x, grid, alpha_bar) for x in noise])
            row[f"student {name}"] = F.mse_loss(images, target).item()
            row[f"teacher {name}"] = F.mse_loss(own, target).item()
        rows.append(row)
        pictures.append(images[:8])                                            # uniform grid
    paths = teacher_paths(teacher, noise[0], alpha_bar, device, fp32=True)
    return rows, landing_error(net, paths, alpha_bar), torch.cat(pictures)


# ==============================================================================================
# COMMAND LINE
# ==============================================================================================

def parse_args(argv=None):
    """Command line of student.py."""
    p = parser_for(__doc__, "python student.py --clone eps --updates 1000")
    count = number(int, 1)
    p.add_argument("--teacher", default="checkpoints/teacher.pt", help="checkpoint of teacher.py")
    p.add_argument("--init", choices=["scratch", "teacher"], default="scratch",
                   help="first weights")
    p.add_argument("--clone", choices=["secant", "eps"], default="secant", help="what is regressed:"
                   " landing points of long jumps, or (always with --init teacher) its epsilon")
    p.add_argument("--updates", type=number(int, 0), default=6000, help="0 keeps the first weights")
    p.add_argument("--batch-size", type=count, default=64, help="jumps per update, 32..512")
    p.add_argument("--pairs-per-path", type=count, default=64, help="jumps per teacher path, 8..64")
    p.add_argument("--pool", type=number(int, 4), default=1024, help="paths kept, 0.63 MB each")
    p.add_argument("--lr", type=number(float, 1e-7, 1), default=1e-3, help="peak rate, 1e-4..2e-3")
    p.add_argument("--evaluate", type=count, default=256, help="held-out noises of the final table")
    p.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    p.add_argument("--out", help="folder of the run (default: next free runs/student)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument("--seed", type=number(int, 0, 10 ** 9), default=0, help="of weights and noise")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--log-every", type=count, default=20, help="updates between log lines")
    p.add_argument("--save-every", type=count, default=400, help="updates between checkpoints")
    p.add_argument("--smoke", action="store_true", help="tiny, seconds; its numbers mean nothing")
    args = p.parse_args(argv)
    if args.smoke:
        args.updates, args.batch_size, args.pool, args.evaluate = 2, 4, 8, 8
        args.log_every = args.save_every = 1
    if args.resume and not args.updates:
        p.error("--updates 0 trains nothing, so there is nothing to --resume")
    if args.init == "teacher":
        args.clone = "eps"                     # a copy predicts epsilon
    return args


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    teacher, _ = load_teacher(args.teacher, device)
    out = output_folder(args.out, "student", args.resume)
    claim_folder(out)
    print("config:", vars(args))
    torch.manual_seed(args.seed)
    if args.init == "teacher":
        net = student_from_teacher(teacher)
    else:
        net = JumpUNet(predicts="v" if args.clone == "secant" else "eps",
                       **{**STUDENT_UNET, "image_size": teacher.config["image_size"]})
    net = net.to(device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    print(f"device {device_name(device)} | student {parameter_count(net) / 1e6:.2f} M, teacher "
          f"{parameter_count(teacher) / 1e6:.2f} M parameters | "
          f"{args.updates * args.batch_size} jumps")
    seconds, paths = 0.0, 0
    if args.updates:
        seconds, paths = clone(net, ema, teacher, args, out, device)
        plot_loss(out, "pairs", "cloning loss")
    else:                                      # the first weights, untrained
        save_student(out / "student.pt", ema, None, provenance("student.py", args, 0, device))

    load_weights(ema, half_weights(ema))       # what the file holds is what is measured
    rows, landing, pictures = evaluate(ema, teacher, args.evaluate, linear_alpha_bar(device),
                                       device)
    save_picture(out / "samples.png", pictures)
    print(f"\nMSE to the teacher's {TEACHER_STEPS}-step result, {args.evaluate} held-out noises")
    names = ["student uniform", "student quadratic", "teacher uniform", "teacher quadratic"]
    print("steps  " + "  ".join(f"{name:>17s}" for name in names))
    for row in rows:
        print(f"{row['steps']:5d}  " + "  ".join(f"{row[name]:17.4f}" for name in names))
        log_line(out, evaluation=row)
    print("landing error of a jump: " + ", ".join(f"{k} {v:.4f}" for k, v in landing.items()))
    log_line(out, landing=landing)
    more = "state.pt, loss.png, " if args.updates else ""
    print(f"cloned in {seconds / 60:.1f} min from {paths} teacher paths\n"
          f"wrote {out}/student.pt, samples.png, {more}log.jsonl")


if __name__ == "__main__":
    run_main(main)
