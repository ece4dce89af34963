"""The student: a smaller U-Net that is told where to land, cloned from the teacher's paths.

Adds to teacher.py a network that sees *both* times of a jump, net(x_t, t, t_next), so that one
evaluation may cover any distance, and data-free cloning: the teacher's paths from new noise are the
only training data. DEVIATES: ReDiF's student starts as a copy of the teacher (--init teacher);
cloning a smaller network from random weights is this project's choice. rl_distill.py reinforces
both: this student, and a copy of the teacher that was not cloned.

    python student.py                          # clones the bundled teacher from random weights
    python student.py --init teacher --lr 3e-4 # clones it too, but from a copy of its weights

Reads --teacher; writes to --out: student.pt (fp16), state.pt (for --resume), samples.png (rows: the
teacher, then 1, 2, 4, 8 steps), loss.png, log.jsonl. Next file: reward.py.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

# From earlier files:
from ddpm import (Solver, T, UNet, baseline_solver, expand_like, linear_alpha_bar, parameter_count,
                  sample, seeded_noise, time_embedding, zeroed)
from teacher import HELD_OUT, TARGET, compiled, draw, fit, noise_and_targets
from harness.checkpoints import load_checkpoint, provenance, rebuild, save_network
from harness.images import plot_loss, save_picture
from harness.runs import (BadInput, autocast, checksum, claim_run, log_line, number, parser_for,
                          rebuilding, run_main)

STUDENT_UNET = dict(width=32, mults=[1, 2, 3], blocks=1, attention=[8], dropout=0.0)   # 1.8 M
START_SHARE = 1 / 3         # share of jumps that start at t = T, where every deployment starts
LAND_SHARE = 1 / 2          # share of jumps that land at t = 0, where every deployment ends
SHORTEST_JUMP = 10          # shortest jump trained (rounding noise grows as 1 / its length)
POOL, JUMPS_PER_PATH = 1024, 64         # teacher paths kept; jumps drawn from each
CLONE_SEEDS = 10 ** 6       # seeds of cloning's noise count up from here

# ==============================================================================================
# A JUMP IS A ROTATION. With sqrt(ab_t) = cos(phi_t), DDIM's update (Eq. 12, Song et al. 2020, at
# sigma = 0) turns x_t by d = phi_t - phi_next:   x_next = cos(d) x_t - sin(d) v
# The teacher's v is the velocity at x_t; the *average velocity* between two points of its path is
# the v of the one DDIM jump that leads from one to the other (as in progressive distillation,
# 2202.00512; the name is that of shortcut models, 2410.12557, and MeanFlow, 2505.13447, whose jumps
# are straight: there it is the mean of v along the way, on an arc it is not).
# ==============================================================================================


def angle(t, alpha_bar, like):
    """phi_t = arccos(sqrt(ab_t)), broadcastable over `like`; 0 at t = 0, almost pi / 2 at t = T."""
    ab = expand_like(alpha_bar[t], like)
    return torch.atan2((1 - ab).sqrt(), ab.sqrt())


def average_velocity(x_t, x_next, t, t_next, alpha_bar) -> torch.Tensor:
    """The v whose one jump, x_next = cos(d) x_t - sin(d) v with d = phi_t - phi_next, lands exactly
    at x_next. x_t, x_next, v: (B, ...); t, t_next: (B,) integers, t > t_next;
    phi_t = angle(t, alpha_bar, x_t)."""
    d = angle(t, alpha_bar, x_t) - angle(t_next, alpha_bar, x_t)
    return (d.cos() * x_t - x_next) / d.sin()


# ==== NETWORK =================================================================================

class JumpUNet(UNet):
    """U-Net that is told where to land as well: (x_t, t, t_next) -> the average velocity v.

    Its x0_hat is where its arc meets t = 0, the image only if t_next = 0: it is not clipped."""
    estimates_image = False

    def __init__(self, **unet):
        super().__init__(**unet)
        width = self.config["width"]
        self.jump_mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))

    def embed(self, t, t_next):
        """(B,) twice -> (B, 4 width), what every residual block is told."""
        width = self.config["width"]
        return F.silu(self.time_mlp(time_embedding(t, width))
                      + self.jump_mlp(time_embedding(t_next, width)))


def student_from_teacher(teacher):
    """The paper's start: the teacher's weights, and a jump embedding that is 0 until it learns."""
    student = JumpUNet(**teacher.config)
    student.load_state_dict(teacher.state_dict(), strict=False)
    zeroed(student.jump_mlp[-1])
    return student


# ==== CLONING =================================================================================

def teacher_paths(teacher, x_T, alpha_bar):
    """All states of the teacher's target: (B, 3, H, W) -> (B, len(TARGET.times), 3, H, W)."""
    return torch.stack(sample(teacher, x_T, TARGET, alpha_bar, path=True), 1)


def state_at(paths, rows, t, alpha_bar):
    """State of paths[rows] at any integer t, on the teacher's grid or not: (B,) -> (B, 3, H, W).

    Between two grid points DDIM moves on a circle (x0_hat and eps_hat stay), so the state there is
    x = (sin(phi - phi_b) x_a + sin(phi_a - phi) x_b) / sin(phi_a - phi_b), t_a >= t >= t_b."""
    grid = torch.tensor(TARGET.times, device=t.device)
    k = ((grid[None, :] >= t[:, None]).sum(1) - 1).clamp(max=len(grid) - 2)    # t lies in jump k
    x_a, x_b = paths[rows, k], paths[rows, k + 1]
    phi, phi_a, phi_b = (angle(s, alpha_bar, x_a) for s in (t, grid[k], grid[k + 1]))
    return ((phi - phi_b).sin() * x_a + (phi_a - phi).sin() * x_b) / (phi_a - phi_b).sin()


def draw_jumps(n, generator):
    """Random jumps (t, t_next), each (n,): many from T, many to 0, none below SHORTEST_JUMP."""
    u = torch.rand(4, n, generator=generator, device=generator.device)
    anywhere = SHORTEST_JUMP + (u[1] * (T + 1 - SHORTEST_JUMP)).long()
    t = torch.where(u[0] < START_SHARE, T, anywhere)
    return t, torch.where(u[2] < LAND_SHARE, 0, (u[3] * (t - SHORTEST_JUMP + 1)).long())


def clone_loss(net, paths, rows, t, t_next, alpha_bar):
    """Mean squared error of the velocity that lands on the teacher's own path, a scalar.

    Measured at the landing point x_next it would be weighted by sin(d)^2: long jumps only."""
    x_t, x_next = (state_at(paths, rows, s, alpha_bar) for s in (t, t_next))
    return F.mse_loss(net(x_t, t, t_next).float(),
                      average_velocity(x_t, x_next, t, t_next, alpha_bar))


class PathPool:
    """The newest teacher paths; refilled during training, so that no noise is used for long."""

    def __init__(self, teacher, size, alpha_bar, device):
        self.teacher, self.alpha_bar, self.device = teacher, alpha_bar, device
        self.chunk = max(1, min(256, size // 4))       # on all devices alike
        self.size, self.made = size // self.chunk * self.chunk, 0
        side = teacher.config["image_size"]
        self.paths = torch.zeros(self.size, len(TARGET.times), 3, side, side, device=device)

    def grow(self, wanted):
        """Run the teacher from new noise until `wanted` paths were made; the oldest make room. What
        would be overwritten at once is skipped: after --resume the newest are made again."""
        self.made = max(self.made, -(-wanted // self.chunk) * self.chunk - self.size)
        while self.made < wanted:
            seeds = range(CLONE_SEEDS + self.made, CLONE_SEEDS + self.made + self.chunk)
            slot, z = self.made % self.size, seeded_noise(seeds, self.paths.shape[2:])
            with autocast(self.device):
                self.paths[slot:slot + self.chunk] = teacher_paths(
                    self.teacher, z.to(self.device), self.alpha_bar)
            self.made += self.chunk

    def draw(self, n, generator):
        """Indices of n random paths, with replacement: (n,)."""
        return torch.randint(min(self.made, self.size), (n,), generator=generator,
                             device=self.device)


def clone(net, ema, teacher, args, out, device):
    """Regress net on the teacher's paths, average it into ema. Returns seconds."""
    alpha_bar, size = linear_alpha_bar(device), 8 if args.smoke else POOL
    pool = PathPool(compiled(teacher, args.compile), size, alpha_bar, device)

    def loss_of(net, update, generator):
        pool.grow(max(size // 4, update * args.batch_size // JUMPS_PER_PATH))
        t, t_next = draw_jumps(args.batch_size, generator)
        rows = pool.draw(args.batch_size, generator)
        return clone_loss(net, pool.paths, rows, t, t_next, alpha_bar)

    def save(updates, seconds):
        save_network(out / "student.pt", "student", ema, provenance(
            "student.py", args, seconds, device, updates=updates, teacher_paths=pool.made,
            teacher=checksum(teacher), target=f"{len(TARGET.leans)} quadratic steps"))
    return fit(net, ema, loss_of, save, args, out, device, "jumps")


def cloning_evaluations(origin):
    """Network evaluations that a student's cloning took, of its provenance: the teacher's paths,
    and a forward and a backward pass, which counts as two, for every jump."""
    return (origin["teacher_paths"] * len(TARGET.leans)
            + 3 * origin["updates"] * origin["settings"]["batch_size"])


def load_model(path, device="cpu", *kinds, teacher=None):
    """The frozen network of a checkpoint of one of these kinds, or of any that makes images: (net,
    content, None or the Solver of a policy, which rl_distill.py learned for this network); to the
    content `trained` is added, the evaluations it learned from. BadInput, as for any file that is
    of no use, where `teacher` is given and it learned from another."""
    content = load_checkpoint(path, *kinds or ("teacher", "student", "policy"))
    with rebuilding(path, content["kind"]):
        origin = content["provenance"]
        if teacher and origin.get("teacher") != checksum(teacher):
            raise BadInput(f"{path} learned from another --teacher; give that, or --init teacher")
        content["trained"] = (cloning_evaluations(origin) if content["kind"] == "student" else
                              origin.get("trained", 0))
        name = dict(teacher="UNet", student="JumpUNet").get(content["kind"]) or content["network"]
        net, solver = rebuild(dict(UNet=UNet, JumpUNet=JumpUNet)[name], content, path, device), None
        if content["kind"] == "policy":                             # ValueError if impossible
            solver = Solver(*content["solver"])
            n = solver.per_image(1, device)[2].shape[2]
            if n not in (0, len(net.branches), sum(net.branches)):
                raise ValueError("gains that do not fit the network")
        return net, content, solver


# ==== EVALUATION on held-out noise ============================================================

def evaluate(net, teacher, n, out, device):
    """MSE to the teacher's target on n held-out noises, of student and teacher in 1, 2, 4, 8 steps,
    printed; the target and the student's images into samples.png."""
    alpha_bar = linear_alpha_bar(device)
    z, target = noise_and_targets(teacher, HELD_OUT, n, device)
    print(f"\nMSE to the teacher's {len(TARGET.leans)}-step image, {n} held-out noises, quadratic "
          "grid\nsteps   student   teacher")
    pictures = [target[:8]]
    for steps in (1, 2, 4, 8):
        solver = baseline_solver("DDIM", "quadratic", steps)
        images, others = (draw(model, solver, z, alpha_bar) for model in (net, teacher))
        mse, theirs = F.mse_loss(images, target).item(), F.mse_loss(others, target).item()
        print(f"{steps:5d} {mse:9.4f} {theirs:9.4f}")
        log_line(out / "log.jsonl", steps=steps, student=mse, teacher=theirs)
        pictures.append(images[:8])
    save_picture(out / "samples.png", torch.cat(pictures))


# ==== COMMAND LINE ============================================================================

def parse_args(argv=None):
    """Command line of student.py."""
    p = parser_for(__doc__, "python student.py --init teacher --updates 1000 --lr 3e-4")
    count = number(int, 1)
    p.add_argument("--teacher", default="checkpoints/teacher.pt", help="checkpoint of teacher.py")
    p.add_argument("--init", choices=["scratch", "teacher"], default="scratch",
                   help="first weights: random, of a smaller network, or the teacher's")
    p.add_argument("--updates", type=count, default=6000, help="optimizer updates")
    p.add_argument("--batch-size", type=count, default=64, help="jumps per update, 32..512")
    p.add_argument("--lr", type=number(float, 1e-7, 1), default=1e-3, help="peak rate, 1e-4..2e-3")
    p.add_argument("--compile", action="store_true", help="a minute first, then faster on GPUs")
    args = p.parse_args(argv)
    if args.smoke:
        args.updates, args.batch_size = 2, 4
    return args


def main(argv=None):
    args = parse_args(argv)
    teacher, *_ = load_model(args.teacher, args.device, "teacher")
    out = claim_run(args, "student")
    torch.manual_seed(args.seed)
    net = (student_from_teacher(teacher) if args.init == "teacher" else
           JumpUNet(**{**STUDENT_UNET, "image_size": teacher.config["image_size"]})).to(args.device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    print(f"student {parameter_count(net) / 1e6:.2f} M, teacher "
          f"{parameter_count(teacher) / 1e6:.2f} M parameters | "
          f"{args.updates * args.batch_size} jumps")
    seconds = clone(net, ema, teacher, args, out, args.device)
    plot_loss(out, "jumps", "cloning loss")

    net, *_ = load_model(out / "student.pt", args.device)      # what is measured is the file
    evaluate(net, teacher, 8 if args.smoke else 256, out, args.device)
    print(f"cloned in {seconds / 60:.1f} min\n"
          f"wrote {out}/student.pt, samples.png, state.pt, loss.png, log.jsonl")


if __name__ == "__main__":
    run_main(main)
