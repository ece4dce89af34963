"""The specification of train_encoders.py. Test names are sentences; no network, no GPU, seconds.

    python checkpoints/test_train_encoders.py
"""
import contextlib
import io
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

import train_encoders as encoders               # puts the repository on the path   # noqa: E402
# From the repository:
import reward                                                                  # noqa: E402
from harness.checkpoints import load_checkpoint                                # noqa: E402
from harness.images import shapes_images                                       # noqa: E402
from harness.runs import BadInput, read_log                                    # noqa: E402


def rng():
    return torch.Generator().manual_seed(0)


def run(*words):
    """main() on the CPU; returns what it printed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        encoders.main([*map(str, words), "--device", "cpu"])
    return text.getvalue()


class Batches(unittest.TestCase):
    def test_the_crop_shifts_images_and_nothing_else(self):
        x, seen = torch.rand(50, 3, 16, 16, generator=rng()), []
        padded = F.pad(x, [4] * 4, mode="reflect")
        for i, y in enumerate(encoders.random_crop(x, rng())):
            seen += [(a, b) for a in range(9) for b in range(9)
                     if torch.equal(y, padded[i, :, a:a + 16, b:b + 16])]
        self.assertEqual(len(seen), 50)
        self.assertEqual([{*side} for side in zip(*seen)], [{*range(9)}] * 2)

    def test_an_image_keeps_its_label_and_half_are_mirrored(self):
        ramp = torch.arange(16)[None, :] * 2 + torch.arange(7)[:, None] * 30
        data = ramp[:, None, None, :].expand(7, 3, 16, 16).byte()
        x, y = encoders.draw_labelled(data, torch.arange(7), 500, rng())
        self.assertTrue(torch.equal(((x + 1) * 127.5).mean((1, 2, 3)).div(30).long(), y))
        self.assertEqual({*y.tolist()}, {*range(7)})
        mirrored = (x[:, 0, 0, 12] < x[:, 0, 0, 4]).float().mean().item()
        self.assertAlmostEqual(mirrored, 0.5, delta=0.07)
        self.assertTrue(torch.equal(x[:, :, 0], x[:, :, -1]))          # rows stay rows


class Files(unittest.TestCase):
    def setUp(self):
        keep = tempfile.TemporaryDirectory()
        self.addCleanup(keep.cleanup)
        self.folder = Path(keep.name)
        self.data = shapes_images(60, 8)
        patcher = mock.patch.multiple(encoders, SAVE_EVERY=1, LOG_EVERY=1,
                                      load_images=lambda *args, **more: self.data)
        patcher.start()
        self.addCleanup(patcher.stop)

    def test_the_judges_file_holds_moments_of_all_images(self):
        torch.manual_seed(0)
        judge = reward.Judge().eval()
        data = torch.randint(256, (40, 3, 32, 32), generator=rng()).byte()
        real = judge(data.float() / 127.5 - 1)[1].detach()
        file = encoders.judge_reference(judge, data)
        for got, expected in zip((file["mean"], file["covariance"]), reward.moments(real)):
            self.assertLess((got - expected).abs().max(), 1e-9)

    def test_killed_at_any_checkpoint_the_training_ends_in_the_same_bits(self):
        a, save = self.folder / "a", encoders.save_state
        self.assertIn("judge: ", run("--smoke", "--out", a))
        for kills in range(8):                  # before a first update, between, after a last one
            b, calls = self.folder / f"b{kills}", []

            def killed(*args):
                save(*args)
                calls.append(args)
                if len(calls) > kills:
                    raise KeyboardInterrupt
            with mock.patch.object(encoders, "save_state", killed), \
                    contextlib.suppress(KeyboardInterrupt):
                run("--smoke", "--out", b)
            run("--smoke", "--out", b, "--resume")
            for role in ("coach", "judge"):
                one, other = (load_checkpoint(f / f"{role}.pt", role)["weights"] for f in (a, b))
                self.assertTrue(all(torch.equal(one[key], other[key]) for key in one), kills)
                reward.load_encoder(b / f"{role}.pt", role)
            self.assertEqual(*([{**row, "seconds": 0} for row in read_log(f / "log.jsonl")]
                               for f in (a, b)))

    def test_bad_input_is_refused(self):
        self.data = shapes_images(1, 8)
        with self.assertRaisesRegex(BadInput, "at least 2 and 1 are needed"):
            run("--smoke", "--out", self.folder / "b")
        self.assertFalse((self.folder / "b").exists())
        for words in (["--epochs", "0"], ["--lr", "nan"], ["--help"]):
            with self.assertRaises(SystemExit) as caught:
                run(*words)
            self.assertEqual(caught.exception.code, 0 if words == ["--help"] else 2)


if __name__ == "__main__":
    unittest.main()
