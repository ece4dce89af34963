"""The specification of harness/. Test names are sentences; no network, no GPU, seconds.

    python harness/test_harness.py
"""
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import shlex
import subprocess
import sys
import tempfile
import threading
import types
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import teacher                                                                 # noqa: E402
from harness import checkpoints, figures, images, runs                         # noqa: E402
from harness.runs import BadInput, claim_run                                   # noqa: E402


def quiet(function, *args, **kw):
    """Call with the output caught; returns (result, what was printed)."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        result = function(*args, **kw)
    return result, text.getvalue()


def process(code, *words, python=(sys.executable,), **environment):
    """Start code in a new process, the repository on its path."""
    return subprocess.Popen(
        [*python, "-c", code, *words], stdin=subprocess.PIPE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(runs.ROOT), **environment})


def flags(out=None, **more):
    return types.SimpleNamespace(**{"out": out, "seed": 0, "lr": 1e-3, "device": "cpu", **more})


class Case(unittest.TestCase):
    """A temporary folder is the working directory of every test."""

    def setUp(self):
        keep = tempfile.TemporaryDirectory()
        self.addCleanup(keep.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(keep.name)
        runs.CLAIMED.clear()

    def bad_input(self, text, function, *args, **kw):
        with self.assertRaises(BadInput) as caught:
            quiet(function, *args, **kw)
        self.assertIn(text, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))


class Folders(Case):
    def test_a_run_takes_the_next_free_folder_and_notes_its_settings(self):
        Path("runs/run-2").mkdir(parents=True)         # of somebody who is about to claim it
        for expected in ("run", "run-3", "run-4"):
            images = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
            self.assertEqual(claim_run(flags(lr=0.5), "run", images), Path("runs", expected))
        config = json.loads(Path("runs/run-4/config.json").read_text())
        none, zeros = (hashlib.sha256(x).hexdigest()[:12] for x in (b"", bytes(24)))
        self.assertEqual(config, {"--seed": 0, "--lr": 0.5, "checkpoints": none,
                                  "training images": zeros})

    def test_no_run_lands_in_the_folder_of_another_and_a_refused_one_leaves_nothing(self):
        Path("x").mkdir()
        Path("x/file").write_text("mine")
        for text, args in (("not empty", flags("x")), ("no folder", flags("x/file")),
                           ("no run to resume", flags("y", resume=True)),
                           ("no run to resume", flags("x", resume=True)),
                           ("--resume needs", flags(resume=True))):
            self.bad_input(text, claim_run, args, "run")
        self.assertEqual(sorted(map(str, Path().rglob("*"))), ["x", "x/file"])

    def test_of_many_that_start_at_once_each_gets_its_own_default_folder(self):
        gate, got = threading.Barrier(8), []
        threads = [threading.Thread(target=lambda: (gate.wait(), got.append(
            claim_run(flags(), "run")))) for _ in range(8)]
        for step in (threading.Thread.start, threading.Thread.join):
            for thread in threads:
                step(thread)
        self.assertEqual((len(got), len(set(got))), (8, 8))

    def test_of_two_processes_with_one_out_one_wins_and_one_gets_a_sentence(self):
        code = ("import sys; from types import SimpleNamespace as Flags; from harness.runs import *"
                "\nprint(flush=True); sys.stdin.read(1)\n"
                "run_main(lambda: claim_run(Flags(out='same'), 'run'))")
        both = [process(code), process(code)]
        for one in both:
            one.stdout.readline()                                  # both are ready: now
        for one in both:
            one.stdin.write("x")
            one.stdin.flush()
        errors = sorted(one.communicate()[1] for one in both)
        self.assertEqual(sorted(one.returncode for one in both), [0, 2], errors)
        self.assertEqual(errors[0], "")
        self.assertIn("same is not empty", errors[1])

    def test_the_later_one_loses_even_where_both_saw_an_empty_folder(self):
        claim_run(flags("x"), "run")
        with mock.patch.object(Path, "iterdir", lambda self: iter([])):
            self.bad_input("give another --out", claim_run, flags("x", lr=9), "run")
        self.assertEqual(json.loads(Path("x/config.json").read_text())["--lr"], 1e-3)

    def test_a_resumed_run_must_have_the_same_settings_images_and_checkpoints(self):
        Path("e").mkdir()
        for file in ("t.pt", "e/coach.pt"):
            Path(file).write_text(file)
        same = dict(out="x", grid=("a", "b"), teacher="t.pt", encoders="e")
        images = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
        changed = images.clone()
        changed[1, 2, 1, 1] = 1
        claim_run(flags(**same), "run", images)
        same["resume"] = True
        self.assertEqual(claim_run(flags(**same, device=7), "run", images), Path("x"))
        self.bad_input("--lr 0.001, not 0.5", claim_run, flags(**same, lr=0.5), "run", images)
        self.bad_input("--clip-range None, not 1", claim_run, flags(**same, clip_range=1), "run",
                       images)
        for other in (changed, images[:1], None):
            self.bad_input("x had training images", claim_run, flags(**same), "run", other)
        for file in ("t.pt", "e/coach.pt"):
            Path(file).write_text("another")
            self.bad_input("x had checkpoints", claim_run, flags(**same), "run", images)
            Path(file).write_text(file)
        self.assertEqual(claim_run(flags(**same), "run", images), Path("x"))

    def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(self):
        for _ in range(2):
            claim_run(flags("x", resume=Path("x").exists()), "run")
            Path("x/.state.pt.99.tmp").write_bytes(b"PK")
            runs.log_line("x/log.jsonl", update=1)
            self.assertEqual(claim_run(flags("x", resume=True), "run"), Path("x"))
            found, text = quiet(checkpoints.load_state, "x/state.pt", {})
            self.assertEqual((found, runs.read_log("x/log.jsonl")), ((0, 0.0), []))
            self.assertIn("resumed at update 0", text)
            Path("x/state.pt").unlink()
            self.bad_input("--lr", claim_run, flags("x", resume=True, lr=2), "run")
        for damaged in ("", '{"--seed": 0, "--l', "[]", "3", "null"):
            Path("x/config.json").write_text(damaged)
            self.bad_input("no usable settings", claim_run, flags("x", resume=True), "run")

    def test_leftover_temporary_files_are_no_obstacle(self):
        Path("x").mkdir()
        for name in (".config.json.1.tmp", f".a.pt.{os.getpid()}.tmp"):
            Path("x", name).write_bytes(b"half")
        checkpoints.save_checkpoint(claim_run(flags("x"), "run") / "a.pt", "toy", n=1)
        self.assertEqual(checkpoints.load_checkpoint("x/a.pt", "toy")["n"], 1)

    def test_a_log_is_valid_json_without_nan_at_any_depth(self):
        runs.log_line("log.jsonl", loss=math.nan, rms=[1.0, math.inf, {"a": -math.inf}], folder="é")
        expected = dict(loss=None, rms=[1.0, None, {"a": None}], folder="é")
        self.assertEqual(json.loads(Path("log.jsonl").read_text()), expected)

    def test_a_torn_line_is_ended_and_left_out(self):
        self.assertEqual(runs.read_log("log.jsonl"), [])
        runs.log_line("log.jsonl", update=1)
        with open("log.jsonl", "ab") as file:
            file.write('{"update": 2, "name": "é'.encode()[:-1])
        self.assertEqual(runs.read_log("log.jsonl"), [{"update": 1}])
        runs.log_line("log.jsonl", update=3)
        runs.log_line("log.jsonl", update=4)
        self.assertEqual(runs.read_log("log.jsonl"), [{"update": n} for n in (1, 3, 4)])
        self.assertEqual(Path("log.jsonl").read_bytes().count(b"\n"), 4)


class CommandLine(Case):
    def ends(self, main, *words):
        """The exit code and the sentence that run_main ends with."""
        text = io.StringIO()
        with mock.patch.object(sys, "argv", [*words] or ["s.py"]), \
                contextlib.redirect_stderr(text), self.assertRaises(SystemExit) as caught:
            runs.run_main(main, "--n")
        self.assertEqual(text.getvalue().count("\n"), 1)
        return caught.exception.code, text.getvalue().strip()

    def test_numbers_out_of_range_are_refused_as_they_are_read(self):
        p = runs.parser_for(None, "x")                             # python -OO: no docstring
        p.add_argument("--n", type=runs.number(int, 1, 5))
        p.add_argument("--x", type=runs.number(float, 0))
        self.assertEqual(vars(p.parse_args(["--n", "5", "--x", "0"])), dict(n=5, x=0.0))
        for words in ("--n 0", "--n 6", "--n 1.5", "--x nan", "--x inf", "--x -1"):
            with self.assertRaises(SystemExit):
                quiet(p.parse_args, words.split())

    def test_every_script_has_the_flags_of_a_run_and_shows_their_defaults(self):
        for trains in (True, False):
            p = runs.parser_for("First line.\nMore.", "python s.py")
            runs.run_flags(p, trains)
            args = p.parse_args([])
            more = dict(resume=False, smoke=False) if trains else {}
            self.assertEqual(vars(args), dict(out=None, seed=0, device="auto", **more))
            for text in ("First line.", "the run", "(default: auto)", "python s.py"):
                self.assertIn(text, p.format_help())
            self.assertNotIn("None", p.format_help())
        self.assertEqual(runs.settings(args), dict(seed=0))

    def test_bad_input_a_full_disk_and_no_memory_are_one_sentence_and_other_errors_not_hidden(self):
        for text, error in (("no such", BadInput("no such")), ("no space", OSError(28, "no space")),
                            ("lower --n", torch.cuda.OutOfMemoryError("CUDA out of memory")),
                            ("lower --n", MemoryError()),
                            ("lower --n", RuntimeError("CPUAllocator: can't allocate memory: "))):
            code, sentence = self.ends(mock.Mock(side_effect=error), "dir/s.py")
            self.assertEqual(code, 2)
            self.assertRegex(sentence, f"^s.py: .*{text}")
        for error in (RuntimeError("a bug"), SystemExit(7)):
            with self.assertRaises(type(error)):
                runs.run_main(mock.Mock(side_effect=error))

    def test_ctrl_c_prints_the_command_that_goes_on_quoted(self):
        out, words = "my runs/a 'b'", ["../s.py", "--data", "a b", "--lr", "1"]

        def main(saves=True):
            folder = claim_run(flags(out, resume="--resume" in sys.argv), "run")
            if saves:
                checkpoints.save_state(folder / "state-coach.pt", {}, 1, 1.0)
            raise KeyboardInterrupt
        nothing = self.ends(mock.Mock(side_effect=KeyboardInterrupt), *words)
        for code, text in (nothing, self.ends(lambda: main(False), *words, "--out", out)):
            self.assertEqual(code, 130)
            self.assertIn("start it again", text)
        for given in (["--out", out, "--resume"], [f"--out={out}", "--resume"]):
            code, text = self.ends(main, *words[:3], *given, *words[3:])
            self.assertEqual(code, 130)
            self.assertEqual(shlex.split(text.split("to go on: ")[1]), [
                "python", *words[:3], *given[:-1], *words[3:], "--resume"])
        out = None
        text = self.ends(main, *words)[1]
        self.assertTrue(text.endswith("--lr 1 --out runs/run --resume"), text)

    def test_optimised_python_ascii_terminals_and_any_mplbackend_change_nothing(self):
        code = """import math, sys, torch
from harness import checkpoints, figures, runs
def main():
    print('0.5 ± 0.1')
    runs.parser_for(__doc__, '').format_help()
    figure, axes = figures.new_figure(1, 2)
    axes[1].plot([1, 2])
    figure.savefig(sys.argv[1] + '.png')
    print('matplotlib.pyplot' in sys.modules)
    checkpoints.save_checkpoint('a.pt', 'é', x=torch.tensor(math.nan))
runs.run_main(main)"""
        backends = ("module://matplotlib_inline.backend_inline", "unknown-thing")
        both = [process(code, str(n), MPLBACKEND=backend, PYTHONIOENCODING="ascii", PYTHONUTF8="0",
                        python=(sys.executable, *["-OO"] * n))
                for n, backend in enumerate(backends)]
        for n, one in enumerate(both):
            out, error = one.communicate()
            self.assertEqual(out, "0.5 ? 0.1\nFalse\n", error)
            self.assertEqual(one.returncode, 2)
            self.assertIn("is not finite", error)
            self.assertTrue(Path(f"{n}.png").exists())

    def test_devices_are_picked_and_unusable_ones_refused(self):
        for name in ("warp-drive", "cuda:99", "meta"):
            self.bad_input("cannot be used here", runs.pick_device, name)
        self.assertEqual(runs.pick_device("cpu"), torch.device("cpu"))
        with mock.patch.object(torch.cpu, "_is_avx512_bf16_supported", bool), \
                runs.autocast(torch.device("cpu")):
            self.assertFalse(torch.is_autocast_enabled("cpu"))

    def test_compiling_is_asked_for_and_changes_no_weights(self):
        net, cudnn = torch.nn.Linear(2, 2), torch.backends.cudnn
        self.addCleanup(setattr, cudnn, "benchmark", cudnn.benchmark)
        with mock.patch.object(torch, "compile", lambda net, mode: ("fast", net)):
            for wanted, result in ((True, ("fast", net)), (False, net)):
                self.assertEqual((teacher.compiled(net, wanted), cudnn.benchmark), (result, wanted))


class Checkpoints(Case):
    def save(self, name="a.pt", **content):
        checkpoints.save_checkpoint(name, "toy", **content)
        return Path(name)

    def test_what_is_saved_comes_back(self):
        net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).half().float()
        path = self.save(weights=checkpoints.half_weights(net), config=dict(a=[1, "x", None]))
        content = checkpoints.load_checkpoint(path, ("other", "toy"))
        again = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        again.load_state_dict(content["weights"])
        for a, b in zip(net.state_dict().values(), again.state_dict().values()):
            self.assertTrue(a.dtype == b.dtype and torch.equal(a, b))
        self.assertEqual(content["config"], dict(a=[1, "x", None]))
        self.assertEqual(content["format"], "redif-3")

    def test_a_checkpoint_that_is_none_is_refused_with_a_sentence(self):
        path, load = Path("a.pt"), checkpoints.load_checkpoint
        self.bad_input("there is no checkpoint", load, path, "toy")
        for data in (b"", b"not a checkpoint", pickle.dumps({"format": "redif-3"})):
            path.write_bytes(data)
            self.bad_input("cannot be read", load, path, "toy")
        for content in ([1, 2], torch.ones(2), {"kind": "toy"}, {"format": "redif-3"}):
            torch.save(content, path)
            self.bad_input("cannot be read", load, path, "toy")
        torch.save({"format": "redif-2", "kind": "toy"}, path)
        self.bad_input("not of format redif-3", load, path, "toy")
        self.bad_input("cannot be read", load, self.save(thing=Path("x")), "toy")

    def test_kinds_and_shapes_must_fit(self):
        self.bad_input("holds a toy; a student or teacher is needed", checkpoints.load_checkpoint,
                       self.save(), ("student", "teacher"))
        for weights in ({}, [], {"weight": 3}, torch.nn.Linear(3, 2).state_dict()):
            self.bad_input("b.pt does not fit", checkpoints.frozen_network, torch.nn.Linear(2, 2),
                           weights, "b.pt", "cpu")
        with self.assertRaisesRegex(BadInput, "c.pt has no usable config"), \
                checkpoints.rebuilding("c.pt", "config"):
            torch.nn.Linear(**dict(depth=3))

    def test_a_truncated_checkpoint_is_refused_at_every_length(self):
        whole = self.save(weights=torch.arange(500.0)).read_bytes()
        for length in (*range(0, len(whole), len(whole) // 20), len(whole) - 1):
            Path("a.pt").write_bytes(whole[:length])
            self.bad_input("cannot be read", checkpoints.load_checkpoint, "a.pt", "toy")

    def test_a_changed_byte_is_refused_or_changes_nothing(self):
        values, random, refused = torch.linspace(1, 2, 2000), np.random.default_rng(0), 0
        whole = self.save(weights=values, width=32).read_bytes()
        start = whole.index(values.numpy().tobytes())
        for where in (start, start + 7999, *random.integers(len(whole), size=60)):
            data = bytearray(whole)
            data[where] ^= 1 << int(random.integers(8))
            Path("a.pt").write_bytes(data)
            try:
                content = checkpoints.load_checkpoint("a.pt", "toy")
            except BadInput:
                refused += 1
            else:                                                  # a date, or filling
                self.assertFalse(start <= where < start + 8000)
                self.assertTrue(torch.equal(content["weights"], values) and content["width"] == 32)
        self.assertGreater(refused, 40)

    def test_a_number_that_is_not_finite_is_neither_saved_nor_read(self):
        net, p = torch.nn.BatchNorm1d(2), torch.nn.Parameter(torch.ones(2))
        adam = torch.optim.Adam([p])
        p.grad = torch.ones(2)
        adam.step()
        net.running_mean[0] = adam.state[p]["exp_avg_sq"][1] = math.nan
        before = self.save(n=1).read_bytes()
        for bad in (net.state_dict(), adam.state_dict(), [(1, torch.tensor(math.inf).half())]):
            self.bad_input("not finite; the last checkpoint is kept", self.save, bad=bad)
            self.assertEqual(Path("a.pt").read_bytes(), before)
            torch.save({"format": "redif-3", "kind": "toy", "bad": bad}, "b.pt")
            self.bad_input("not finite", checkpoints.load_checkpoint, "b.pt", "toy")

    def test_a_failed_save_leaves_the_old_file_and_no_debris(self):
        before = self.save(n=1).read_bytes()
        for what in ("torch.save", "os.fsync", "os.replace"):
            with mock.patch(what, side_effect=OSError("disk full")), self.assertRaises(OSError):
                self.save(n=2)
            self.assertEqual((Path("a.pt").read_bytes(), os.listdir()), (before, ["a.pt"]))

    def test_an_npz_is_whole_and_never_takes_the_place_of_another_file(self):
        array = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
        checkpoints.save_npz("new/a.npz", array)
        with np.load("new/a.npz") as file:
            self.assertTrue(np.array_equal(file["arr_0"], array))
            self.assertEqual(file["arr_0"].dtype, np.uint8)
        before = Path("new/a.npz").read_bytes()
        with mock.patch.object(Path, "exists", return_value=False):    # it came a moment later
            with self.assertRaises(FileExistsError):
                checkpoints.save_npz("new/a.npz", array + 1)
        self.assertEqual(Path("new/a.npz").read_bytes(), before)
        for error in (OSError("disk full"), KeyboardInterrupt()):
            with mock.patch("os.fsync", side_effect=error), self.assertRaises(type(error)):
                checkpoints.save_npz("new/b.npz", array)
        self.assertEqual(os.listdir("new"), ["a.npz"])

    def test_bundled_files_are_found_from_any_working_directory(self):
        self.assertEqual(runs.find("checkpoints/x.pt"), Path("checkpoints/x.pt"))
        self.assertEqual(runs.find("harness/runs.py"), runs.ROOT / "harness/runs.py")
        with mock.patch.object(runs, "ROOT", Path("root").resolve()):
            self.save("root/deep/c.pt")
            self.assertEqual(checkpoints.load_checkpoint("deep/c.pt", "toy")["kind"], "toy")
            self.save("deep/c.pt", mine=True)
            self.assertIn("mine", checkpoints.load_checkpoint("deep/c.pt", "toy"))

    def test_provenance_is_plain_and_names_no_folder(self):
        row = checkpoints.provenance("s.py", flags(data="/home/me/pics", reward="a+b"), 90,
                                     torch.device("cpu"), n=3)
        self.assertEqual(row["settings"], dict(seed=0, lr=1e-3, data="pics", reward="a+b"))
        self.assertEqual((row["script"], row["minutes"], row["n"]), ("s.py", 1.5, 3))
        checkpoints.load_checkpoint(self.save(provenance=row), "toy")


class Resume(Case):
    def parts(self):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
        optimizer = torch.optim.Adam(net.parameters(), 0.1)
        return dict(net=net, optimizer=optimizer, generator=torch.Generator().manual_seed(1),
                    schedule=torch.optim.lr_scheduler.StepLR(optimizer, 2))

    def train(self, parts, first, last):
        for update in range(first, last):
            x = torch.randn(8, 4, generator=parts["generator"])
            loss = parts["net"](x).square().mean()                     # dropout: global numbers
            parts["optimizer"].zero_grad()
            loss.backward()
            parts["optimizer"].step()
            parts["schedule"].step()
            runs.log_line("log.jsonl", update=update, loss=loss.item())

    def test_a_run_killed_in_the_middle_resumes_to_the_same_bits(self):
        whole = self.parts()
        self.train(whole, 0, 7)
        expected = runs.read_log("log.jsonl")
        Path("log.jsonl").unlink()
        cut = self.parts()
        self.train(cut, 0, 3)
        checkpoints.save_state("state.pt", cut, 3, 12.5)
        self.train(cut, 3, 5)                                          # lost
        again = self.parts()
        self.assertEqual(quiet(checkpoints.load_state, "state.pt", again)[0], (3, 12.5))
        self.train(again, 3, 7)
        self.assertEqual(runs.read_log("log.jsonl"), expected)
        self.assertTrue(torch.equal(again["net"][0].weight, whole["net"][0].weight))

    def test_a_log_shorter_than_its_checkpoint_or_gone_is_never_fatal(self):
        checkpoints.save_state("state.pt", {}, 2, 1.0)                 # where nothing was logged
        self.assertEqual(quiet(checkpoints.load_state, "state.pt", {})[0], (2, 1.0))
        self.train(self.parts(), 0, 3)
        checkpoints.save_state("state.pt", {}, 3, 1.0)
        os.truncate("log.jsonl", 70)
        for size in (70, 0):
            self.assertEqual(quiet(checkpoints.load_state, "state.pt", {})[0], (3, 1.0))
            self.assertEqual(os.path.getsize("log.jsonl"), size)
            Path("log.jsonl").unlink()

    def test_parts_that_do_not_fit_are_one_sentence(self):
        parts, load = self.parts(), checkpoints.load_state
        checkpoints.save_state("state.pt", parts, 3, 1.0)
        self.bad_input("no usable state", load, "state.pt", {**parts, "net": torch.nn.Linear(4, 4)})
        self.bad_input("no usable state", load, "state.pt", {**parts, "more": []})

    def test_a_second_network_of_a_run_keeps_the_log_of_the_first(self):
        runs.log_line("log.jsonl", update=1)
        checkpoints.save_state("state-judge.pt", {}, 0, 0.0)           # before its first update
        self.assertEqual(quiet(checkpoints.load_state, "state-judge.pt", {})[0], (0, 0.0))
        self.assertEqual(runs.read_log("log.jsonl"), [{"update": 1}])


class NoFloat64(TorchDispatchMode):
    """Within: a device that has no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if getattr(result, "dtype", None) is torch.float64:
            raise TypeError("this device has no float64")
        return result


class Images(Case):
    def write(self, name, image=np.full((32, 32), 50, np.uint8), **more):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(name, **more)

    def test_images_become_bytes_and_units_with_clipping(self):
        x = torch.tensor([-2.0, -1, 0, 1, 2])
        self.assertEqual(images.to_uint8(x).tolist(), [0, 0, 128, 255, 255])
        self.assertEqual(images.to_unit(x).tolist(), [0, 0, 0.5, 1, 1])

    def test_a_device_without_float64_is_no_obstacle(self):
        x, net = torch.zeros(2, 3, 4, 4), torch.nn.BatchNorm1d(2)
        with NoFloat64():
            runs.pick_device("cpu")
            images.to_uint8(x), images.to_unit(x), figures.tile(x)
            checkpoints.save_checkpoint("a.pt", "toy", weights=checkpoints.half_weights(net))
            weights = checkpoints.load_checkpoint("a.pt", "toy")["weights"]
            checkpoints.frozen_network(net, weights, "a.pt", "cpu")
            with self.assertRaises(TypeError):
                x.double()

    def test_a_folder_is_read_in_order_and_every_file_left_out_is_counted_and_named(self):
        self.write("d/a/1.png", np.full((40, 60, 3), (200, 0, 0), np.uint8))
        for name in ("b/deep/2.PNG", "b/._2.png", "loose.png"):
            self.write(f"d/{name}")
        Path("d/b/3.png").write_bytes(b"no image")
        Path("d/b/notes.txt").write_text("not an image either")
        (data, labels), text = quiet(images.load_images, "d")
        self.assertEqual((data.shape, data.dtype, labels.tolist()),
                         ((2, 3, 32, 32), torch.uint8, [0, 1]))
        self.assertEqual(data[:, :, 5, 5].tolist(), [[200, 0, 0], [50, 50, 50]])
        self.assertRegex(text, r"^left out 4 .*\._2.png .*3.png .*notes.txt .*loose.png\n$")

    def test_a_hidden_folder_is_no_class_and_its_files_are_left_out(self):
        for name in ("d/.cache/x.png", "d/a/.old/y.png", "d/a/1.png", ".hidden/d/a/1.png"):
            self.write(name)
        (_, labels), text = quiet(images.load_images, "d")
        self.assertEqual(labels.tolist(), [0])
        self.assertIn("left out 2 ", text)
        self.assertEqual(len(images.load_images(".hidden/d")[0]), 1)   # the user named this one

    def test_classes_of_the_test_split_are_matched_by_name(self):
        for name in ("train/bird", "train/cat", "train/dog", "test/dog", "test/cat"):
            self.write(f"d/{name}/1.png")
        self.assertEqual(images.load_images("d")[1].tolist(), [0, 1, 2])
        self.assertEqual(images.load_images("d", train=False)[1].tolist(), [1, 2])
        self.write("d/test/emu/1.png")
        self.bad_input("'emu'", images.load_images, "d", train=False)

    def test_hostile_files_are_left_out_and_sound_ones_upright_and_opaque(self):
        exif, palette = Image.Exif(), Image.new("P", (9, 9), 1)
        red_left = np.zeros((40, 40, 3), np.uint8)
        red_left[:, :20, 0] = 255
        exif[0x0112] = 6                                            # show turned clockwise
        palette.putpalette([0, 0, 0, 10, 20, 30])
        self.write("d/a/1.jpg", red_left, exif=exif, quality=95)
        self.write("d/a/2.png", Image.new("RGBA", (32, 32), (0, 0, 0, 0)))
        self.write("d/a/3.png", palette)
        self.write("d/a/huge.png", Image.new("1", (2000, 2000)))
        Path("d/a/empty.png").write_bytes(b"")
        Path("d/a/folder.png").mkdir()
        os.mkfifo("d/a/pipe.png")
        os.symlink(Path("d").resolve(), "d/a/circle")
        os.symlink("nowhere", "d/a/gone.png")
        with mock.patch.object(Image, "MAX_IMAGE_PIXELS", 10 ** 6):
            (data, _), text = quiet(images.load_images, "d")
        self.assertEqual(len(data), 3)
        self.assertGreater(data[0, 0, 4, 16], 200)                  # red is above now
        self.assertLess(data[0, 0, 28, 16], 50)
        self.assertEqual(data[1].unique().tolist(), [255])          # clear: white paper
        self.assertEqual(data[2, :, 3, 3].tolist(), [10, 20, 30])
        self.assertIn("left out 5 ", text)

    def test_deep_greyscale_is_left_out_for_its_range_is_not_known(self):
        ramp = np.linspace(0, 255, 1024).reshape(32, 32)
        for name, kind in (("8.png", "uint8"), ("16.png", "uint16"), ("16.tif", "uint16"),
                           ("i.tif", "int32"), ("f.tif", "float32")):
            self.write(f"d/a/{name}", ramp.astype(kind))
        (data, _), text = quiet(images.load_images, "d")
        self.assertEqual(data.tolist(), [[ramp.astype(int).tolist()] * 3])
        self.assertIn("left out 4 ", text)

    def test_folders_without_images_are_refused(self):
        self.bad_input("no such folder", images.load_images, "none")
        Path("d/a").mkdir(parents=True)
        self.bad_input("no class subfolders that fit", images.load_images, "d/a")
        self.bad_input("no readable image", images.load_images, "d")
        self.write("d/a/1.png")
        self.bad_input("no such folder", images.load_images, "d", train=False)

    def test_shapes_need_nothing_and_repeat(self):
        (a, labels), (b, _) = images.shapes_images(30), images.shapes_images(30)
        self.assertEqual((a.shape, a.dtype, set(labels.tolist())),
                         ((30, 3, 32, 32), torch.uint8, {0, 1, 2}))
        self.assertTrue(torch.equal(a, b))

    def test_an_existing_copy_of_cifar10_is_read_by_torchvision_in_its_own_format(self):
        base = Path("data", CIFAR10.base_folder)
        base.mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
        blob = pickle.dumps({"data": pixels, "labels": [3, 1, 0, 2]})
        names = pickle.dumps({"label_names": list("abcd")})
        (base / "batch").write_bytes(blob)
        (base / "meta").write_bytes(names)
        with mock.patch.multiple(CIFAR10, train_list=[["batch", hashlib.md5(blob).hexdigest()]],
                                 test_list=[], meta=dict(filename="meta", key="label_names",
                                                         md5=hashlib.md5(names).hexdigest())):
            (data, labels), _ = quiet(images.load_images, "cifar10")
        self.assertTrue(torch.equal(data, torch.from_numpy(pixels.reshape(4, 3, 32, 32))))
        self.assertEqual(labels.tolist(), [3, 1, 0, 2])

    def test_no_network_for_the_download_is_one_sentence(self):
        with mock.patch.object(CIFAR10, "download", side_effect=OSError("unreachable")):
            self.bad_input("no usable copy or download", images.load_images, "cifar10")
        self.assertEqual(os.listdir(), [])

    def test_pictures_leave_the_random_numbers_alone_and_show_what_they_should(self):
        x = torch.linspace(-1, 1, 5 * 3 * 16).reshape(5, 3, 4, 4)
        for n in range(4):
            runs.log_line("log.jsonl", images=1000 * n, loss=math.nan if n == 1 else 1 / (n + 1))
        runs.log_line("log.jsonl", images=4000, accuracy=0.5)          # rows that are no part of it
        runs.log_line("log.jsonl", update=1, loss=1.0)
        before, numpys = torch.get_rng_state(), str(np.random.get_state())
        figures.save_picture("a.png", x, columns=3, scale=2)
        figures.plot_strips([("one strip, ± é", x)], 4, (4, 2), "b.png")
        figures.plot_strips([("a", x), ("b", x)], 4, (4, 2), "c.png")
        figures.plot_loss(".", "images", "loss")
        self.assertTrue(torch.equal(torch.get_rng_state(), before))
        self.assertEqual(str(np.random.get_state()), numpys)
        picture = np.asarray(Image.open("a.png"))
        self.assertEqual(picture.shape, (2 * 11, 2 * 16, 3))
        self.assertTrue((picture[1::2, 1::2] == figures.tile(x, 3)).all())
        self.assertEqual(figures.tile(x, 3)[1, 1].tolist(), images.to_uint8(x)[0, :, 0, 0].tolist())
        self.assertEqual(figures.tile(x[:1], 1, gap=0).shape, (4, 4, 3))
        for name in ("b.png", "c.png", "loss.png"):
            self.assertGreater(np.asarray(Image.open(name)).std(), 1, name)


if __name__ == "__main__":
    unittest.main()
