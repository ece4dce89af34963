"""The specification of harness/, and of the six files as commands. Test names are sentences; no
network, no GPU, under a minute.

    python harness/test_harness.py
"""
import ast
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
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
from torch.utils._pytree import tree_flatten
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ddpm                                                                    # noqa: E402
import reward                                                                  # noqa: E402
import rl_distill as rl                                                        # noqa: E402
import sample                                                                  # noqa: E402
import student                                                                 # noqa: E402
import teacher                                                                 # noqa: E402
import test_all                                                                # noqa: E402
from ddpm import baseline_solver, seeded_noise                                 # noqa: E402
from harness import checkpoints, images, runs                                  # noqa: E402
from harness.checkpoints import load_checkpoint, save_checkpoint, save_network   # noqa: E402
from harness.runs import BadInput, checksum, claim_run, read_log               # noqa: E402
from test_all import AB, CPU, HERE, MODULES, TINY, by_hand, noise, randomised      # noqa: E402


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
    return types.SimpleNamespace(**{"out": out, "seed": 0, "lr": 1e-3,
                                    "device": torch.device("cpu"), **more})


class Case(unittest.TestCase):
    """A temporary folder is the working directory of every test."""

    def setUp(self):
        keep = tempfile.TemporaryDirectory()
        self.addCleanup(keep.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(keep.name)

    def bad_input(self, text, function, *args, **kw):
        with self.assertRaises(BadInput) as caught:
            quiet(function, *args, **kw)
        self.assertIn(text, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))


class Folders(Case):
    def test_a_run_takes_the_next_free_folder_and_notes_its_settings(self):
        Path("runs/run-2").mkdir(parents=True)
        Path("runs/run-2/file").touch()
        for expected in ("run", "run-3", "run-4"):
            found, text = quiet(claim_run, flags(lr=0.5), "run")
            self.assertEqual(found, Path("runs", expected))
            self.assertRegex(text, f"^config: .*'out': 'runs/{expected}'.*\n$")
        self.assertEqual(json.loads(Path("runs/run-4/config.json").read_text()),
                         dict(seed=0, lr=0.5))

    def test_no_run_lands_in_the_folder_of_another_and_a_refused_one_leaves_nothing(self):
        Path("x").mkdir()
        Path("x/file").write_text("mine")
        for text, args in (("not empty", flags("x")), ("no folder", flags("x/file"))):
            self.bad_input(text, claim_run, args, "run")
        Path("config.json").write_text("{}")                # of the working folder: another's
        for words in ("--out y", "--out x", ""):
            self.bad_input("a run of this script", teacher.parse_args, [*words.split(), "--resume"])
        self.assertEqual(sorted(map(str, Path().rglob("*"))), ["config.json", "x", "x/file"])

    def test_of_many_that_start_at_once_each_gets_its_own_default_folder(self):
        gate, got = threading.Barrier(8), []
        threads = [threading.Thread(target=lambda: (gate.wait(), got.append(
            claim_run(flags(), "run")))) for _ in range(8)]
        with contextlib.redirect_stdout(io.StringIO()):
            for step in (threading.Thread.start, threading.Thread.join):
                for thread in threads:
                    step(thread)
        self.assertEqual((len(got), len(set(got))), (8, 8))

    def test_of_two_processes_with_one_out_one_wins_and_one_gets_a_sentence(self):
        code = ("import sys; from types import SimpleNamespace as Flags; from harness.runs import *"
                "\nprint(flush=True); sys.stdin.read(1)\n"
                "run_main(lambda: claim_run(Flags(out='same', device=pick_device()), 'run'))")
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
        quiet(claim_run, flags("x"), "run")
        with mock.patch.object(Path, "iterdir", lambda self: iter([])):
            self.bad_input("give another --out", claim_run, flags("x", lr=9), "run")
        self.assertEqual(json.loads(Path("x/config.json").read_text())["lr"], 1e-3)

    def test_a_run_goes_on_with_its_own_flags_unless_others_are_given(self):
        words = ["--updates", "7", "--init", "a.pt", "b.pt", "--paper", "--seed", "3", "--smoke"]
        quiet(claim_run, args := rl.parse_args([*words, "--out", "x"]), "run")
        goes_on = rl.parse_args(["--out", "x", "--resume"])
        self.assertEqual(runs.settings(goes_on), runs.settings(args))
        changed = rl.parse_args(["--out", "x", "--resume", "--lr", "1e-6"])     # after a NaN
        self.assertEqual(runs.settings(changed), {**runs.settings(args), "lr": 1e-6})
        self.assertEqual(quiet(claim_run, changed, "run")[0], Path("x"))
        goes_on = rl.parse_args(["--out", "./x/", "--resume"])          # a wrong flag does no harm
        self.assertEqual(runs.settings(goes_on), runs.settings(args))
        self.bad_input("flags of another script", teacher.parse_args, ["--out", "x", "--resume"])
        for damaged in ("", '{"lr": 0, "--l', "[]", "3", "null"):
            Path("x/config.json").write_text(damaged)
            self.bad_input("no usable settings", rl.parse_args, ["--out", "x", "--resume"])

    def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(self):
        for _ in range(2):
            quiet(claim_run, flags("x", resume=Path("x").exists()), "run")
            Path("x/state.pt.tmp").write_bytes(b"PK")                   # of a save that was killed
            runs.log_line("x/log.jsonl", update=1)
            self.assertEqual(quiet(claim_run, flags("x", resume=True), "run")[0], Path("x"))
            self.assertEqual(quiet(checkpoints.load_state, "x/state.pt", {})[0], (0, 0.0))
            self.assertFalse(Path("x/log.jsonl").exists())
            checkpoints.save_state("x/state.pt", {}, 1, 1.0)
            self.assertEqual([*Path("x").glob("*.tmp")], [])
            Path("x/state.pt").unlink()

    def test_a_log_is_a_row_a_line(self):
        rows = [dict(update=1, folder="é"), dict(update=2, gains=[[0.5]], loss=None)]
        for row in rows:
            runs.log_line("log.jsonl", **row)
        self.assertEqual(runs.read_log("log.jsonl"), rows)


class CommandLine(Case):
    def ends(self, main, *words):
        """The exit code and the sentence that run_main ends with."""
        text = io.StringIO()
        with mock.patch.object(sys, "argv", [*words] or ["s.py"]), \
                contextlib.redirect_stderr(text), self.assertRaises(SystemExit) as caught:
            runs.run_main(main)
        self.assertEqual(text.getvalue().count("\n"), 1)
        return caught.exception.code, text.getvalue().strip()

    def test_numbers_out_of_range_are_refused_as_they_are_read(self):
        p = runs.parser_for(None, "x")                             # python -OO: no docstring
        p.add_argument("--n", type=runs.number(int, 1, 5))
        p.add_argument("--x", type=runs.number(float, 0))
        args = p.parse_args(["--n", "5", "--x", "0"])
        self.assertEqual((args.n, args.x), (5, 0.0))
        for words in ("--n 0", "--n 6", "--n 1.5", "--x nan", "--x inf", "--x -1"):
            with self.assertRaises(SystemExit):
                quiet(p.parse_args, words.split())

    def test_every_script_has_the_flags_of_a_run_and_shows_their_defaults(self):
        for trains in (True, False):
            p = runs.parser_for("First line.\nMore.", "python s.py", trains)
            args = p.parse_args([])
            more = dict(resume=False, smoke=False) if trains else {}
            self.assertEqual(vars(args), dict(out=None, seed=0, device=runs.pick_device(), **more))
            for text in ("First line.", "the run", "(default: auto)", "python s.py"):
                self.assertIn(text, p.format_help())
            self.assertNotIn("None", p.format_help())
        self.assertEqual(runs.settings(args), dict(seed=0))

    def test_bad_input_a_full_disk_and_no_memory_are_one_sentence_and_other_errors_not_hidden(self):
        for text, error in (("no such", BadInput("no such")), ("no space", OSError(28, "no space")),
                            ("ran out; take", torch.cuda.OutOfMemoryError("CUDA out of memory")),
                            ("ran out; take", MemoryError()),
                            ("ran out; take", RuntimeError("CPUAllocator: can't allocate memory"))):
            code, sentence = self.ends(mock.Mock(side_effect=error), "dir/s.py")
            self.assertEqual(code, 2)
            self.assertRegex(sentence, f"^s.py: .*{text}")
        for error in (RuntimeError("a bug"), SystemExit(7)):
            with self.assertRaises(type(error)):
                runs.run_main(mock.Mock(side_effect=error))

    def test_ctrl_c_is_a_sentence_and_130(self):
        code, text = self.ends(mock.Mock(side_effect=KeyboardInterrupt), "s.py")
        self.assertEqual(code, 130)
        self.assertIn("goes on with --out FOLDER --resume", text)

    def test_optimised_python_ascii_terminals_and_any_mplbackend_change_nothing(self):
        code = """import math, sys, torch
from harness import checkpoints, images, runs
def main():
    print('0.5 ± 0.1')
    runs.parser_for(__doc__, '').format_help()
    figure, axes = images.new_figure(1, 2)
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
            self.assertIn("not finite, and is not written; start again", error)
            self.assertTrue(Path(f"{n}.png").exists())

    def test_devices_are_picked_and_unusable_ones_refused(self):
        for name in ("warp-drive", "cuda:99", "meta"):
            self.bad_input("no usable hardware here", runs.pick_device, name)
        self.assertEqual(runs.pick_device("cpu"), torch.device("cpu"))
        with mock.patch.object(torch, "zeros"), mock.patch.object(
                torch.cuda, "is_available", bool):              # as on a Mac
            self.assertEqual(runs.pick_device("auto"), torch.device("cpu"))
            self.bad_input("computes on cuda or cpu')); try --device cpu", runs.pick_device, "mps")
        with mock.patch.object(torch.cpu, "_is_avx512_bf16_supported", bool), \
                runs.autocast(torch.device("cpu")):
            self.assertFalse(torch.is_autocast_enabled("cpu"))

    def test_compiling_is_asked_for_and_changes_no_weights(self):
        net = torch.nn.Linear(2, 2)
        with mock.patch.object(torch, "compile", lambda net, mode: ("fast", net)):
            self.assertEqual(teacher.compiled(net, True), ("fast", net))
            self.assertIs(teacher.compiled(net, False), net)


class Checkpoints(Case):
    def save(self, name="a.pt", **content):
        checkpoints.save_checkpoint(name, "toy", **content)
        return Path(name)

    def test_what_is_saved_comes_back(self):
        net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        path = self.save(weights=net.state_dict(), config=dict(a=[1, "x", None]))
        content = checkpoints.load_checkpoint(path, "other", "toy")
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
                       self.save(), "student", "teacher")
        config = dict(in_features=2, out_features=2)
        for weights in ({}, [], {"weight": 3}, torch.nn.Linear(3, 2).state_dict()):
            self.bad_input("b.pt does not fit", checkpoints.rebuild, torch.nn.Linear, dict(
                kind="toy", config=config, weights=weights), "b.pt")
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

    def test_a_number_that_is_not_finite_is_not_saved(self):
        net, p = torch.nn.BatchNorm1d(2), torch.nn.Parameter(torch.ones(2))
        adam = torch.optim.Adam([p])
        p.grad = torch.ones(2)
        adam.step()
        net.running_mean[0] = adam.state[p]["exp_avg_sq"][1] = math.nan
        before = self.save(n=1).read_bytes()
        for bad in (net.state_dict(), adam.state_dict(), [(1, torch.tensor(math.inf).half())]):
            self.bad_input("over the last good one; start again", self.save, bad=bad)
            self.assertEqual(Path("a.pt").read_bytes(), before)

    def test_a_failed_save_leaves_the_old_file(self):
        before = self.save(n=1).read_bytes()
        for what in ("torch.save", "os.fsync", "os.replace"):
            with mock.patch(what, side_effect=OSError("disk full")), self.assertRaises(OSError):
                self.save(n=2)
            self.assertEqual(Path("a.pt").read_bytes(), before)
        self.save(n=3)
        self.assertEqual(os.listdir(), ["a.pt"])

    def test_bundled_files_are_found_from_any_working_directory(self):
        with mock.patch.object(checkpoints, "ROOT", Path("root").resolve()):
            self.save("root/deep/c.pt")
            self.assertEqual(checkpoints.load_checkpoint("deep/c.pt", "toy")["kind"], "toy")
            self.save("deep/c.pt", mine=True)
            self.assertIn("mine", checkpoints.load_checkpoint("deep/c.pt", "toy"))

    def test_provenance_is_plain_and_names_no_folder(self):
        row = checkpoints.provenance("s.py", flags(data="/home/me/pics", init=["/b/a.pt"]), 90,
                                     torch.device("cpu"), n=3)
        self.assertEqual(row["settings"], dict(seed=0, lr=1e-3, data="pics", init=["a.pt"]))
        self.assertEqual((row["script"], row["minutes"], row["n"]), ("s.py", 1.5, 3))
        checkpoints.load_checkpoint(self.save(provenance=row), "toy")


class Kept(Case):
    def ask(self, key=dict(a=1), value=1.0):
        """(what kept() gives, was it made?, what was printed)."""
        make = mock.Mock(side_effect=lambda: torch.full((2, 3), value))
        x, text = quiet(checkpoints.kept, "things", key, make, torch.device("cpu"))
        self.assertEqual((x.shape, x.dtype), ((2, 3), torch.float32))
        return x[1, 2].item(), make.call_count, text

    def test_what_was_made_once_is_read_the_second_time_and_other_keys_are_others(self):
        self.assertEqual([self.ask(), self.ask(value=2.0)], [(1.0, 1, ""), (1.0, 0, "")])
        self.assertEqual([self.ask(dict(a=2), 3.0), self.ask(dict(a=2)), self.ask()],
                         [(3.0, 1, ""), (3.0, 0, ""), (1.0, 0, "")])
        self.assertEqual(len(os.listdir("runs/things")), 2)

    def test_a_file_that_does_not_fit_is_told_and_made_anew(self):
        self.ask()
        path, = Path("runs/things").iterdir()
        whole = path.read_bytes()
        self.ask(dict(a=2))
        other, = (file for file in Path("runs/things").iterdir() if file != path)
        for damage in (whole[:len(whole) // 2], b"", pickle.dumps(1), other.read_bytes()):
            path.write_bytes(damage)
            x, made, text = self.ask(value=4.0)
            self.assertEqual((x, made), (4.0, 1))
            self.assertIn("made anew", text)
            self.assertEqual(self.ask(), (4.0, 0, ""))

    def test_where_nothing_can_be_written_it_is_made_each_time(self):
        Path("runs").write_text("a file")
        self.assertEqual([self.ask(value=n) for n in (1.0, 2.0)], [(1.0, 1, ""), (2.0, 1, "")])

    def test_two_runs_may_make_the_same_at_once(self):
        def slow(*paths, real=os.replace, done=[]):
            if not done.append(0) and len(done) == 1:                   # the other is faster
                self.ask(value=2.0)
            real(*paths)
        with mock.patch.object(os, "replace", slow):
            self.assertEqual(self.ask(), (1.0, 1, ""))
        self.assertEqual(self.ask(), (2.0, 0, ""))
        self.assertEqual(len(os.listdir("runs/things")), 1)

    def test_a_checksum_of_weights_knows_every_weight_and_buffer(self):
        net, words = torch.nn.BatchNorm1d(3), set()
        with torch.no_grad():
            for value in (net.weight, net.bias, net.running_mean, net.running_var):
                words.add(runs.checksum(net))
                value[2] += 1e-6
        self.assertEqual(len(words | {runs.checksum(net)}), 5)
        again = torch.nn.BatchNorm1d(3)
        again.load_state_dict(net.state_dict())
        self.assertEqual(runs.checksum(again), runs.checksum(net))

    def test_a_network_is_saved_in_fp16_or_as_it_is_with_more_beside_it(self):
        net = torch.nn.Linear(2, 3)
        net.config = dict(in_features=2, out_features=3)
        for half, tol in ((True, 1e-3), (False, 0)):
            checkpoints.save_network("n.pt", "toy", net, dict(b=1), half, solver=[[1, 2], None])
            content = checkpoints.load_checkpoint("n.pt", "toy")
            again = checkpoints.rebuild(torch.nn.Linear, content, "n.pt")
            self.assertEqual((content["solver"], content["provenance"]["b"]), ([[1, 2], None], 1))
            self.assertEqual(content["weights"]["bias"].dtype == torch.float16, half)
            self.assertLessEqual((again.weight - net.weight).abs().max(), tol)
            self.assertFalse(again.training or again.weight.requires_grad)


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
            torch.manual_seed(update)                                  # of dropout, as in fit()
            loss = parts["net"](x).square().mean()
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
        self.assertEqual(quiet(checkpoints.load_state, "state.pt", {})[0], (3, 1.0))
        self.assertEqual(os.path.getsize("log.jsonl"), 70)
        Path("log.jsonl").unlink()
        self.assertEqual(quiet(checkpoints.load_state, "state.pt", {})[0], (3, 1.0))

    def test_parts_that_do_not_fit_are_one_sentence(self):
        parts, load = self.parts(), checkpoints.load_state
        Path("log.jsonl").touch()
        checkpoints.save_state("state.pt", parts, 3, 1.0)
        self.bad_input("no usable state", load, "state.pt", {**parts, "net": torch.nn.Linear(4, 4)})
        self.bad_input("no usable state", load, "state.pt", {**parts, "more": []})
        with mock.patch.object(os, "truncate", side_effect=PermissionError("read-only")), \
                self.assertRaises(PermissionError):                 # the state itself is sound
            quiet(load, "state.pt", parts)
        saved = {**checkpoints.load_checkpoint("state.pt", "state")["parts"],
                 "generator": torch.zeros(16, dtype=torch.uint8)}   # as of a GPU
        checkpoints.save_checkpoint("state.pt", "state", parts=saved)
        self.bad_input("give the --device and the flags", load, "state.pt", parts)

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

    def test_images_become_bytes_with_clipping(self):
        x = torch.tensor([-2.0, -1, 0, 1, 2])
        self.assertEqual(images.to_uint8(x).tolist(), [0, 0, 128, 255, 255])

    def test_a_device_without_float64_is_no_obstacle(self):
        x, net = torch.zeros(2, 3, 4, 4), torch.nn.BatchNorm1d(2)
        with NoFloat64():
            runs.pick_device("cpu")
            images.to_uint8(x), images.tile(x)
            checkpoints.save_checkpoint("a.pt", "toy", weights=net.half().state_dict())
            weights = checkpoints.load_checkpoint("a.pt", "toy")["weights"]
            checkpoints.rebuild(torch.nn.BatchNorm1d, dict(
                kind="toy", config=dict(num_features=2), weights=weights), "a.pt")
            with self.assertRaises(TypeError):
                x.double()

    def test_a_folder_is_read_in_order_of_classes_and_names(self):
        self.write("d/a/1.png", np.full((40, 60, 3), (200, 0, 0), np.uint8))
        for name in ("b/deep/2.PNG", "loose.png", ".ipynb_checkpoints/1.png"):
            self.write(f"d/{name}")
        Path("d/b/notes.txt").write_text("not an image")
        (data, labels), text = quiet(images.load_images, "d")
        self.assertEqual((data.shape, data.dtype, labels.tolist()),
                         ((2, 3, 32, 32), torch.uint8, [0, 1]))
        self.assertEqual(data[:, :, 5, 5].tolist(), [[200, 0, 0], [50, 50, 50]])
        self.assertIn("reads 2 images of 2 classes below d", text)

    def test_the_test_split_has_the_same_classes(self):
        for name in ("train/cat", "train/dog", "test/dog", "test/cat"):
            self.write(f"d/{name}/1.png")
        for train in (True, False):
            self.assertEqual(quiet(images.load_images, "d", train)[0][1].tolist(), [0, 1])
        self.write("d/test/emu/1.png")
        self.bad_input("must be those of", images.load_images, "d", train=False)
        Path("d/train").rename("d/Training")
        Path("d/test").rename("d/val")
        self.assertEqual(quiet(images.load_images, "d")[0][1].tolist(), [0, 1])
        self.write("d/other/1.png")                         # now these are classes themselves
        found, text = quiet(images.load_images, "d")
        self.assertEqual({*found[1].tolist()}, {0, 1, 2})
        self.assertIn("of 3 classes", text)

    def test_images_are_shown_upright_and_opaque(self):
        exif, palette = Image.Exif(), Image.new("P", (9, 9), 1)
        red_left = np.zeros((40, 40, 3), np.uint8)
        red_left[:, :20, 0] = 255
        exif[0x0112] = 6                                            # show turned clockwise
        palette.putpalette([0, 0, 0, 10, 20, 30])
        self.write("d/a/1.jpg", red_left, exif=exif, quality=95)
        self.write("d/a/2.png", Image.new("RGBA", (32, 32), (0, 0, 0, 0)))
        self.write("d/a/3.png", palette)
        (data, _), _ = quiet(images.load_images, "d")
        self.assertEqual(len(data), 3)
        self.assertGreater(data[0, 0, 4, 16], 200)                  # red is above now
        self.assertLess(data[0, 0, 28, 16], 50)
        self.assertEqual(data[1].unique().tolist(), [255])          # clear: white paper
        self.assertEqual(data[2, :, 3, 3].tolist(), [10, 20, 30])

    def test_a_file_that_is_no_image_of_8_bits_is_named_in_one_sentence(self):
        ramp = np.linspace(0, 255, 1024).reshape(32, 32)
        for name, kind in (("16.png", "uint16"), ("16.tif", "uint16"), ("i.tif", "int32"),
                           ("f.tif", "float32")):
            self.write(f"d/a/{name}", ramp.astype(kind))
            self.bad_input(f"d/a/{name} has no usable image of 8 bits", images.load_images, "d")
            Path(f"d/a/{name}").unlink()
        self.write("d/a/huge.png", Image.new("1", (2000, 2000)))
        with mock.patch.object(Image, "MAX_IMAGE_PIXELS", 10 ** 6):
            self.bad_input("huge.png", images.load_images, "d")
        for content in (b"", b"no image"):
            Path("d/a/huge.png").write_bytes(content)
            self.bad_input("huge.png", images.load_images, "d")
        Path("d/a/huge.png").unlink()
        self.write("d/a/8.png", ramp.astype("uint8"))
        self.assertEqual(quiet(images.load_images, "d")[0][0].tolist(),
                         [[ramp.astype(int).tolist()] * 3])

    def test_folders_without_images_are_one_sentence(self):
        Path("d/a").mkdir(parents=True)
        for folder in ("none", "d/a", "d"):
            with self.assertRaisesRegex(FileNotFoundError, folder):
                images.load_images(folder)
        self.write("d/a/1.png")
        with self.assertRaisesRegex(FileNotFoundError, "d/test"):
            images.load_images("d", train=False)

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
            self.bad_input("try --data DIR or --data shapes", images.load_images, "cifar10")
        self.assertEqual(os.listdir(), [])

    def test_pictures_leave_the_random_numbers_alone_and_show_what_they_should(self):
        x = torch.linspace(-1, 1, 5 * 3 * 16).reshape(5, 3, 4, 4)
        for n in range(4):
            runs.log_line("log.jsonl", images=1000 * n, loss=1 / (n + 1))
        runs.log_line("log.jsonl", images=4000, accuracy=0.5)          # rows that are no part of it
        runs.log_line("log.jsonl", update=1, loss=1.0)
        before, numpys = torch.get_rng_state(), str(np.random.get_state())
        images.save_picture("a.png", x, columns=3, scale=2)
        images.plot_strips([("one strip, ± é", x)], 4, "b.png")
        images.plot_strips([("a", x), ("b", x)], 4, "c.png")
        images.plot_loss(".", "images", "loss")
        Path("log.jsonl").unlink()
        for n, gains in enumerate((None, [[]] * 2, [[0.1] * 3] * 2, [[0.1] * 99] * 2)):
            for update in (0, 4):
                runs.log_line("log.jsonl", update=update, validation=-1.0, times=[1000, n + 1, 0],
                              leans=[0.0, 0.5], gains=gains, **dict(batch=-1.0) if update else {})
            row = types.SimpleNamespace(name="a row")
            images.plot_learned(".", row, row)
            os.replace("learned.png", f"learned{n}.png")
        Path("log.jsonl").write_text(Path("log.jsonl").read_text().splitlines()[-1])
        images.plot_learned(".", row, row)                             # what is left of a lost log
        self.assertTrue(torch.equal(torch.get_rng_state(), before))
        self.assertEqual(str(np.random.get_state()), numpys)
        picture = np.asarray(Image.open("a.png"))
        self.assertEqual(picture.shape, (2 * 11, 2 * 16, 3))
        self.assertTrue((picture[1::2, 1::2] == images.tile(x, 3)).all())
        self.assertEqual(images.tile(x, 3)[1, 1].tolist(), images.to_uint8(x)[0, :, 0, 0].tolist())
        self.assertEqual(images.tile(x[:1], 1, gap=0).shape, (4, 4, 3))
        for name in ("b.png", "c.png", "loss.png", *(f"learned{n}.png" for n in range(4))):
            self.assertGreater(np.asarray(Image.open(name)).std(), 1, name)


# ==== COMMANDS: every script end to end, tiny; resume; bad input =============================

def parser_of(module):
    """The argument parser of a script."""
    found = []
    with mock.patch("argparse.ArgumentParser.parse_args", autospec=True,
                    side_effect=lambda p, argv: found.append(p) or sys.exit()), \
            contextlib.suppress(SystemExit):
        module.parse_args([])
    return found[0]


class Working(test_all.Case):
    """In a temporary folder, with a target of three steps, and tiny checkpoints in `tiny`."""
    tiny = None

    def setUp(self):
        self.folder(enter=True)
        for module in (teacher, student, rl, sample):
            self.patch(module, TARGET=baseline_solver("DDIM", "quadratic", 3))
        if Working.tiny is None:
            Working.keep = tempfile.TemporaryDirectory()
            Working.tiny = Path(Working.keep.name)
            torch.manual_seed(0)
            save_network(self.tiny / "teacher.pt", "teacher", randomised(ddpm.UNet(**TINY)), {})
            teacher_, *_ = student.load_model(self.tiny / "teacher.pt")
            first = randomised(student.JumpUNet(**TINY), 1)
            save_network(self.tiny / "student.pt", "student", first, dict(
                teacher=checksum(teacher_), teacher_paths=5, updates=7,
                settings=dict(batch_size=2)))
            c, j, x = reward.Coach().eval(), reward.Judge().eval(), test_all.images(64)
            mean, covariance = reward.moments(reward.encode(j, x))
            for name, net, more in (
                    ("coach", c, dict(scales=test_all.Rewards.scales)),
                    ("judge", j, dict(mean=mean, covariance=covariance))):
                save_checkpoint(self.tiny / f"{name}.pt", name, config=dict(classes=10),
                                weights=net.half().state_dict(), provenance={}, **more)
        self.net, self.first = (sample.load_model(self.tiny / f"{name}.pt", CPU)[0]
                                for name in ("teacher", "student"))
        self.words = ["--teacher", f"{self.tiny}/teacher.pt", "--encoders", f"{self.tiny}"]
        self.job = self.words + ["--smoke", "--init", "teacher", f"{self.tiny}/student.pt"]

    def run_main(self, module, *words):
        """Run a script's main on the CPU; returns what it printed."""
        return quiet(module.main, [str(w) for w in words] + ["--device", "cpu"])[1]

    def bad_input(self, text, function, *args, **kw):
        with self.assertRaises(BadInput) as caught:
            function(*args, **kw)
        self.assertIn(text, str(caught.exception))


class Samples(Working):
    def models(self):
        """(net, solver) of a teacher, a student, and a policy of four jumps from its file."""
        solver = baseline_solver("DDIM", "uniform", 3)
        policy = randomised(by_hand("DPM++", "quadratic", len(self.net.branches), 4), 0, 0.2)
        save_network("policy.pt", "policy", self.net, {}, network="UNet",
                     solver=[*policy.solver()])
        return (self.net, solver), (self.first, solver), sample.load_model("policy.pt", CPU)[::2]

    def test_an_image_is_the_same_in_any_batch(self):
        seeds = range(5, 10)
        z = seeded_noise(seeds, (3, 8, 8))
        for (net, solver), eta in itertools.product(self.models(), (0.0, 0.7)):
            many = sample.draw(net, solver, z, AB, eta, seeds)
            with mock.patch.dict(teacher.CHUNK, cpu=2):
                self.close(sample.draw(net, solver, z, AB, eta, seeds), many)
            self.close(sample.draw(net, solver, z[2:3], AB, eta, seeds[2:3]), many[2:3])
            self.assertLessEqual(many.abs().max(), 1)

    def test_the_path_goes_from_noise_to_image_in_11_states(self):
        z, more = noise(2), [(test_all.Toy(), baseline_solver("DDIM", "uniform", K))
                             for K in (10, 12, 1000)]
        for net, solver in [*self.models(), *more]:
            K = len(solver.leans)
            path = sample.draw_path(net, solver, z, AB, 0.0, range(2))
            self.assertEqual(path.shape, (2, min(K + 1, 11), 3, 8, 8))
            self.close(path[:, 0], z, 0)
            self.close(path[:, -1].clamp(-1, 1), sample.draw(net, solver, z, AB), 1e-6)
            every = ddpm.sample(net, z, solver, AB, path=True)
            self.close(path[:, 1], every[round(K / 10) or 1], 0)


class Commands(Working):
    def fails(self, module, *words):
        """Must end with code 2 and one sentence, which is returned, and touch nothing."""
        text, before = io.StringIO(), sorted(Path().rglob("*"))
        with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(text), \
                contextlib.redirect_stdout(text):
            runs.run_main(lambda: module.main([str(w) for w in words]))
        self.assertEqual((caught.exception.code, sorted(Path().rglob("*"))), (2, before))
        self.assertNotRegex(text.getvalue(), "Traceback|usage")
        return text.getvalue().strip().splitlines()[-1]

    def resumes(self, module, *words, kills=(1,), saves=None):
        """Run to `a`, and to `b` with a kill after that many checkpoints: the same bits, in all
        state.pt, policy.pt, logs and results."""
        def killed(*args):
            save(*args)
            if next(count) == kill:
                raise KeyboardInterrupt
        saves = saves or module                        # whose save_state is called
        save, text = saves.save_state, self.run_main(module, *words, "--out", "a")
        for kill in kills:
            shutil.rmtree("b", ignore_errors=True)
            count = itertools.count(1)
            with mock.patch.object(saves, "save_state", killed), \
                    self.assertRaises(KeyboardInterrupt):
                self.run_main(module, *words, "--out", "b")
            self.assertNotEqual(*({path.relative_to(f): path.read_bytes() for path in sorted(
                Path(f).rglob("*")) if path.suffix in (".pt", ".json")} for f in "ab"))
            self.assertIn("resumed at", self.run_main(module, "--out", "b", "--resume"))
            files = [path.relative_to("a") for path in sorted(Path("a").rglob("*.pt"))]
            for file in files:
                a, b = (tree_flatten({k: v for k, v in load_checkpoint(Path(f, file),
                    "state", "teacher", "student", "policy").items() if k in (
                        "parts", "weights", "solver")})[0] for f in "ab")
                self.assertGreater(len(a), 3)
                self.assertEqual(len(a), len(b))
                self.assertTrue(all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
                                    for x, y in zip(a, b)), file)
                self.assertEqual(*([{**row, "seconds": 0} for row in read_log(
                    Path(f, file).with_name("log.jsonl"))] for f in "ab"))
            if Path("a/result.json").exists():
                self.assertEqual(*(json.loads(Path(f, "result.json").read_text())["rows"]
                                   for f in "ab"))
        return text

    def test_every_script_explains_itself_and_refuses_numbers_out_of_range(self):
        for module in MODULES:
            p = parser_of(module)
            text = io.StringIO()
            with self.assertRaises(SystemExit) as caught, contextlib.redirect_stdout(text):
                module.parse_args(["--help"])
            self.assertEqual(caught.exception.code, 0)
            for word in ["example: python", *reward.TERMS] if module is rl else ["example: python"]:
                self.assertIn(word, text.getvalue())
            for flag, value in itertools.product(
                    [a.option_strings[0] for a in p._actions
                     if a.type not in (None, os.path.expanduser, runs.pick_device)],
                    ["nan", "inf", "-inf", "-1", "1e400", "x", "", "1e-400j", "-0.5"]):
                with self.subTest(flag=flag, value=value), self.assertRaises(SystemExit) as caught:
                    quiet(p.parse_args, [f"{flag}={value}"])
                self.assertEqual(caught.exception.code, 2)

    def test_every_flag_is_read_after_parsing_and_there_are_not_too_many(self):
        for module in MODULES:
            tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
            read = {node.attr for part in tree.body if getattr(part, "name", "") != "parse_args"
                    for node in ast.walk(part) if isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name) and node.value.id == "args"}
            own = set(vars(module.parse_args([]))) - {"out", "resume", "smoke"}    # the harness's
            own -= {"lr"} if module is student else set()              # teacher.fit reads it
            self.assertEqual(own - read, set(), module.__name__)
        self.assertLessEqual(len(parser_of(rl)._actions) - 1, 18)
        tree = ast.parse(source := Path(rl.__file__).read_text(encoding="utf-8"))
        self.assertLessEqual(source.count("p.error("), 3)
        self.assertLessEqual(sum(len(node.names) for node in ast.walk(tree) if isinstance(
            node, ast.ImportFrom) and node.module in {m.__name__ for m in MODULES}), 30)

    def test_bad_input_of_every_script_as_a_command_is_one_sentence(self):
        nowhere = ["--device", "nowhere"]
        commands = [[module.__name__ + ".py", *nowhere] for module in MODULES] + [
            ["checkpoints/train_encoders.py", "--smoke", *nowhere], ["study/run.py", *nowhere],
            ["study/estimators.py", *nowhere], ["assignments/bugs.py", "none", *nowhere],
            ["assignments/measure.py", "gains", "--policy", "nowhere"]]
        started = [subprocess.Popen([sys.executable, HERE / words[0], *words[1:]], text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                   for words in commands]
        for words, one in zip(commands, started):
            with self.subTest(command=words):
                out, error = one.communicate()
                self.assertEqual((one.returncode, out), (2, ""), error[-300:])
                self.assertRegex(error, r"^\w+\.py: .*nowhere.*\n$")

    def test_importing_prints_nothing_and_optimised_python_parses_from_any_folder(self):
        names = [module.__name__ for module in MODULES]
        done = subprocess.run(
            [sys.executable, "-OO", "-c", f"import {', '.join(names)}\n"
             f"for m in {', '.join(names)}: m.parse_args([])"], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(HERE)})
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))

    def test_bundled_files_are_found_from_another_folder(self):
        rl.load_inputs(rl.parse_args([]), CPU)
        path, = sample.parse_args([]).model
        self.assertEqual(sample.parse_args([]).model, [path])
        self.assertIsNotNone(sample.load_model(path, CPU)[2])

    def test_the_commands_of_readme_and_sources_parse(self):
        files = [HERE / "README.md", *(Path(module.__file__) for module in MODULES)]
        text = "\n".join(f.read_text(encoding="utf-8") for f in files).replace("\\\n", " ")
        commands = re.findall(r"python ([\w/]+\.py)([^`\"\n#]*)", text)
        self.assertGreater(len(commands), 20)
        scripts = {Path(module.__file__).name: module for module in MODULES}
        for script, words in commands:
            with self.subTest(command=script + words):
                self.assertTrue((HERE / script).exists())
                try:
                    quiet(scripts[script].parse_args, shlex.split(words))
                except SystemExit:
                    self.fail("does not parse")
                except KeyError:                           # in a folder with tests of its own
                    self.assertIn("/", script.replace("test_all.py", "/"))

    def test_the_demonstration_and_the_rewards_are_shown(self):
        self.patch(ddpm, POINTS=20, baseline_solver=lambda kind, grid, steps: baseline_solver(
            kind, grid, min(steps, 20)))
        text = self.run_main(ddpm, "--out", "d")
        self.assertIn("wrote d/ddpm.png", text)
        *baselines, learned = (row["rms"] for row in read_log("d/log.jsonl"))
        self.assertLess(learned, min(baselines))                       # what is learned is better
        self.assertIn("standardised", self.run_main(reward, *self.words, "--out", "r"))
        self.assertTrue(Path("d/ddpm.png").exists() and Path("r/rewards.png").exists())

    def test_the_teacher_trains_and_resumes_to_the_same_bits(self):
        self.patch(teacher, SAVE_EVERY=2, LOG_EVERY=1, SMALL_UNET=TINY,
                   load_images=lambda data: images.shapes_images(60, 8))
        text = self.resumes(teacher, "--data", "shapes", "--smoke")
        self.assertIn("wrote a/teacher.pt", text)
        self.assertEqual(student.load_model("a/teacher.pt")[1]["provenance"]["images"], 16)

    def test_the_student_clones_and_resumes_to_the_same_bits(self):
        self.patch(teacher, SAVE_EVERY=1, LOG_EVERY=1)
        self.patch(student, STUDENT_UNET=TINY)
        self.assertIn("3-step image", self.resumes(
            student, *self.words[:2], "--smoke", saves=teacher))
        self.run_main(student, *self.words[:2], "--smoke", "--init", "teacher", "--out", "c")
        self.assertEqual(student.load_model("c/student.pt")[0].config, TINY)

    def test_jumps_of_two_learners_resume_to_the_same_bits_and_are_sampled_and_evaluated(self):
        self.patch(rl, LOG_EVERY=2)                      # saves after 0, 2, 4 updates of each
        text = self.resumes(rl, *self.job, "--gains", "channel", kills=(2, 5, 6))
        for folder in ("a", "a/learner-2"):
            kept = load_checkpoint(f"{folder}/policy.pt", "policy")
            self.assertTrue(all(w.dtype == torch.float16 for w in kept["weights"].values()))
            self.assertEqual(len(kept["solver"][2][0]), sum(self.net.branches))
        self.assertRegex(text, r" 1 [0-9.e-]+ [0-9.]+\n[^@]*closed[^@]*student: learned ")
        for name in (*re.search(r"wrote a/(images.*)", text)[1].split(", "), "learned.png",
                     "learner-2/learned.png"):
            self.assertTrue(Path("a", name).exists(), name)
        text = self.run_main(sample, "--model", "a/policy.pt", "--n", "5", "--npz", "i.npz")
        self.assertIn("5 images", text)
        with mock.patch.object(sample, "draw", side_effect=AssertionError("too late")):
            for path in ("i.npz", "a/policy.pt/i.npz"):
                with self.assertRaises(BadInput):                   # before the work
                    self.run_main(sample, "--model", "a/policy.pt", "--npz", path)
        text = self.run_main(sample, "--evaluate", "--n", "8", "--steps", "2", *self.words, "--out",
                             "e", "--model", "a/policy.pt", self.tiny / "teacher.pt")
        self.assertRegex(text, r"a/policy, learned +3 [^@]*its target +3 +-?0\.0000 ± +0\.0000")

    def policy(self, path, net, n_gains=0, K=3):
        """A policy.pt that was distilled from the tiny teacher; n_gains None: as of --paper."""
        solver = (baseline_solver("AB2", "uniform", K) if n_gains is None else
                  by_hand("AB2", "uniform", n_gains, K).solver())
        save_network(path, "policy", net, dict(teacher=checksum(self.net), trained=9),
                     half=False, network=type(net).__name__, solver=[*solver])

    def test_weights_go_on_from_a_policy_and_resume_to_the_same_bits(self):
        self.patch(rl, LOG_EVERY=2)
        self.policy("p.pt", self.first, len(self.first.branches))
        words = [*self.words, "--smoke", "--learn", "weights", "--group", "4", "--init", "p.pt",
                 "--eta", "0.3"]
        text = self.resumes(rl, *words, kills=(2,))
        self.assertRegex(text, r"[0-9] 1\n[^@]*p: before [^@]*p: learned ")
        old, new = (load_checkpoint(path, "policy") for path in ("p.pt", "a/policy.pt"))
        self.assertEqual(list(new["solver"]), list(old["solver"]))
        self.assertEqual(new["provenance"]["trained"], 9 + rl.training_evaluations(
            rl.parse_args(words), 8))
        for name, w in new["weights"].items():                     # in fp32: the steps are small
            self.assertEqual(w.dtype, torch.float32)
            self.assertFalse(torch.equal(w, old["weights"][name]), name)
        self.run_main(rl, *self.words, "--paper", "--smoke", "--out", "q")
        row, = (row for row in json.loads(Path("q/result.json").read_text())["rows"]
                if row["name"] == "learned")
        start = row["start"].split()
        self.assertEqual(start[0], "DDIM")                         # leans magnify noise
        self.assertEqual(rl.load_model("q/policy.pt")[2].times, baseline_solver(*start, 3).times)

    def test_jumps_go_on_from_a_policy_of_other_gains_or_it_is_refused_in_a_sentence(self):
        many = len(self.first.branches)
        for n, gains in ((None, "none"), (None, "block"), (0, "block"), (many, "none"),
                         (many, "channel")):
            self.policy("p.pt", self.first, n)
            try:
                text = self.run_main(rl, *self.words, "--smoke", "--gains", gains, "--init", "p.pt")
                self.assertNotRegex(text, r"\bnan\b")
            except BadInput as error:
                self.assertIn("--gains", str(error))

    def test_training_validation_and_table_share_no_noise(self):
        spies = [mock.Mock(side_effect=f) for f in (
            rl.best_baselines, rl.train, rl.deploy, rl.print_table, seeded_noise)]
        self.patch(rl, **dict(zip(("best_baselines", "train", "deploy", "print_table"), spies)))
        self.patch(teacher, seeded_noise=spies[-1])
        self.run_main(rl, *self.job)
        base, train, score, (rows, *_) = (spy.call_args[0] for spy in spies[:4])
        coach, _ = reward.load_encoder(self.tiny / "coach.pt", "coach")
        drawn = [set(call[0][0]) for call in spies[-1].call_args_list]
        self.assertTrue(all(not a & b for a, b in itertools.combinations(drawn, 2)))
        for (z, target), trains in ((train[2], True), (base[2:4], True), (train[3], False),
                                    (score[2:4], False)):
            seeds, = [s for s in drawn if torch.equal(seeded_noise(sorted(s), (3, 8, 8)), z)]
            self.assertTrue(max(seeds) + rl.NOISES < student.CLONE_SEEDS if trains else
                            min(seeds) >= teacher.HELD_OUT)
            made = teacher.draw(self.net, rl.TARGET, z, AB)            # each noise's own target
            self.close(target.images, made)
            self.close(target.features, coach(made)[1], 1e-4)
        self.assertLess(rl.HELD_NOISES, max(map(min, drawn)) - teacher.HELD_OUT)  # at full size
        trained, update = {row.name: row.trained for row in rows}, rl.training_evaluations(
            rl.parse_args(self.job), 8)
        self.assertEqual([trained[name] for name in ("target", "learned", "student: learned")],
                         [0, update, 5 * 3 + 3 * 7 * 2 + update])      # the student was cloned
        self.assertEqual(len(trained), len(rows))

    def test_a_saved_policy_comes_back_as_it_was(self):
        nets = randomised(self.net, 5, 1e-6), self.first               # too little for fp16
        for net, half, some in itertools.product(nets, (True, False), (0, 1)):
            n = some * len(net.branches)
            policy = randomised(by_hand("DPM++", "uniform", n), 1, 0.3).solver()
            save_network("p.pt", "policy", net, {}, half, network=type(net).__name__,
                         solver=[*policy])
            back, content, again = rl.load_model("p.pt")
            self.assertEqual((type(back), again), (type(net), policy))
            self.assertFalse(back.training or any(p.requires_grad for p in back.parameters()))
            x, y = (ddpm.sample(some, noise(2), policy, AB) for some in (net, back))
            self.close(x, y, 0.05 if half else 0)
            self.assertEqual({w.dtype for w in content["weights"].values()},
                             {torch.float16 if half else torch.float32})
        content["network"] = "Another"
        save_checkpoint("q.pt", **{k: v for k, v in content.items() if k != "format"})
        self.bad_input("no usable policy", rl.load_model, "q.pt")

    def test_who_learns_is_the_teachers_copy_a_student_or_a_policy(self):
        self.policy("p.pt", self.first, len(self.first.branches))
        known, learners, *_ = rl.load_inputs(rl.parse_args([*self.job, "p.pt"]), CPU)
        self.assertEqual([(type(net), solver is None, spent) for _, net, solver, spent in learners],
                         [(ddpm.UNet, True, 0), (student.JumpUNet, True, 5 * 3 + 3 * 7 * 2),
                          (student.JumpUNet, False, 9)])
        self.assertIsNot(learners[0][1], known)                        # training must not move it
        for p, q in zip(learners[0][1].parameters(), known.parameters(), strict=True):
            self.close(p, q, 0)

    def test_the_npz_is_what_fid_tools_read(self):
        big = randomised(ddpm.UNet(**{**TINY, "image_size": 32}))
        save_network("big.pt", "teacher", big, {})
        words = shlex.split("--model big.pt --steps 2 --n 3 --npz a.npz --seed 7")
        self.run_main(sample, *words)
        with np.load("a.npz") as file:
            array = file["arr_0"]
        self.assertEqual((array.shape, array.dtype), ((3, 32, 32, 3), np.uint8))
        x = sample.draw(student.load_model("big.pt")[0], baseline_solver(
            "DDIM", "quadratic", 2), seeded_noise([7, 8, 9], (3, 32, 32)), AB)
        self.close(array, images.to_uint8(x).permute(0, 2, 3, 1), 1)
        before = Path("a.npz").read_bytes()
        self.bad_input("a.npz exists", self.run_main, sample, *words)
        self.assertEqual(Path("a.npz").read_bytes(), before)

    def test_everything_a_checkpoint_can_do_is_compared(self):
        save_network("policy.pt", "policy", self.net, {}, network="UNet", solver=[
            *by_hand("DPM++", "quadratic", 0, 4).solver()])
        names = [(f"{kind} {grid}", K) for K in (2, 5) for kind in ddpm.SOLVERS
                 for grid in ddpm.GRIDS]
        for path, expected in ((self.tiny / "teacher.pt", names + [("its target", 3)]),
                               (self.tiny / "student.pt", names[:3] + names[9:12]),
                               ("policy.pt", [("learned", 4)])):
            found = [(name.split(", ")[1], len(solver.leans), solver)
                     for name, _, solver in sample.contenders(path, [2, 5], CPU)]
            self.assertEqual([c[:2] for c in found], expected)
            for name, K, solver in [c for c in found if c[1] in (2, 5)]:
                self.assertEqual(solver, baseline_solver(*name.split(), K))

    def test_bad_input_is_one_sentence_and_code_2_and_touches_nothing(self):
        Path("cut.pt").write_bytes((self.tiny / "student.pt").read_bytes()[:5000])
        Path("empty").mkdir()
        save_network("another.pt", "teacher", randomised(ddpm.UNet(**TINY), 3), {})
        save_network("policy.pt", "policy", self.net, {}, network="UNet", solver=[
            *by_hand("DPM++", "quadratic", len(self.net.branches), 4).solver()])
        coach, plain_ = f"{self.tiny}/coach.pt", self.words[1]
        init = [*self.words, "--smoke", "--init"]
        self.policy("two.pt", self.net, K=2)
        save_checkpoint("bare.pt", "student", config=self.first.config,
                        weights=self.first.state_dict())
        Path("few").mkdir()
        Path("few/coach.pt").write_bytes((self.tiny / "coach.pt").read_bytes())
        save_checkpoint("few/judge.pt", "judge", config=dict(classes=10),
                        weights=reward.Judge().state_dict())
        self.policy("plain.pt", self.net, None, K=2)
        for expected, module, *words in [
                ("no checkpoint", rl, *init, "none.pt"),
                ("cannot be read", rl, *init, "cut.pt"),
                ("a student or policy is needed", rl, *init, coach),
                ("learned from another", rl, *self.job, "--teacher", "another.pt"),
                ("learned from another", rl, *init, "policy.pt"),
                ("two.pt has 2 jumps", rl, *init, "two.pt"),
                ("plain.pt has 2 jumps", rl, *init, "plain.pt", "--learn", "weights"),
                ("no checkpoint empty", rl, *self.job, "--encoders", "empty"),
                ("few has no usable scales and moments", rl, *self.job, "--encoders", "few"),
                ("bare.pt has no usable student", rl, *init, "bare.pt"),
                ("bare.pt has no usable student", sample, "--model", "bare.pt"),
                ("'clip' is unknown", rl, *self.job, "--reward", "clip+mse"),
                ("antithetic pairs", rl, *self.job, "--group", "3"),
                ("antithetic pairs", rl, *self.job, "--eta", "0.3"),
                ("nothing to learn", rl, *self.job, "--steps", "1", "--gains", "none"),
                ("is not empty", rl, *self.job, "--out", "."),
                ("--resume needs", rl, *self.job, "--resume"),
                ("no usable hardware here", rl, *self.job, "--device", "warp"),
                ("no checkpoint", sample, "--model", "none.pt"),
                ("student or policy is needed", sample, "--model", coach),
                *(("learned its own jumps", sample, "--model", "policy.pt", *f.split()) for f in (
                    "--eta 1", "--steps 8", "--solver DDIM", "--grid uniform")),
                ("takes all solvers", sample, "--evaluate", "--grid", "uniform"),
                ("no images to lean on", sample, "--solver", "AB2", "--model",
                 f"{self.tiny}/student.pt"),
                ("go with --evaluate", sample, "--model", plain_, "--steps", "1", "2"),
                ("goes with --solver DDIM", sample, "--eta", "1", "--solver", "AB2", "--model",
                 plain_),
                ("at least 8", sample, "--evaluate", "--model", plain_, "--n", "7"),
                ("nowhere", teacher, "--data", "nowhere"),
                ("--updates: must be", student, "--updates", "0"),
                ("invalid choice", student, "--init", "nobody")]:
            with self.subTest(expected=expected, words=words[-2:]):
                self.assertTrue(expected)
                self.assertIn(expected, self.fails(module, *words))


if __name__ == "__main__":
    unittest.main()
