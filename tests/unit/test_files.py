"""Atomic writing, noise per image, downloads."""

import functools
import hashlib
import http.server
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from qdiff.errors import CheckpointError, ConfigError
from qdiff.utils.download import fetch
from qdiff.utils.files import atomic_write
from qdiff.utils.noise import CALIBRATION, NoiseSource


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_noise_depends_on_seed_and_index_alone():
    whole = NoiseSource(5, range(10), (3, 4))
    first, second = whole(), whole()
    part = NoiseSource(5, [7, 2], (3, 4))
    assert torch.equal(part(), first[[7, 2]]) and torch.equal(part(), second[[7, 2]])
    draws = [
        NoiseSource(seed, [0], (64,), stream=s)() for seed, s in ((5, 0), (6, 0), (5, CALIBRATION), (2**40 + 5, 0))
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    many = NoiseSource(0, range(2000), (8,))()
    assert abs(many.mean().item()) < 0.03 and abs(many.std().item() - 1) < 0.03
    assert len(np.unique(many[:, 0].numpy())) > 1990


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder with byte ranges; `cut` breaks each answer off after that many bytes."""

    cut: int | None = None

    def do_GET(self):
        content = Path(self.translate_path(self.path)).read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: type(self).cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "remote").mkdir()
    content = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "remote" / "model").write_bytes(content)
    handler = functools.partial(Server, directory=str(tmp_path / "remote"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}/model", content
        httpd.shutdown()
    Server.cut = None


def test_a_broken_download_continues(server, tmp_path):
    url, content = server
    path, md5 = tmp_path / "cache" / "model", hashlib.md5(content).hexdigest()
    Server.cut = 100_000
    with pytest.raises(ConfigError, match="broke after 100000"):
        fetch(url, path, md5)
    assert not path.exists() and (tmp_path / "cache" / "model.partial").stat().st_size == 100_000
    Server.cut = None
    assert fetch(url, path, md5).read_bytes() == content
    assert not (tmp_path / "cache" / "model.partial").exists()


def test_two_that_want_the_same_file_download_it_once(server, tmp_path, monkeypatch):
    url, content = server
    asked, answer = [], Server.do_GET

    def slow(self):
        asked.append(self.path)
        time.sleep(0.3)
        answer(self)

    monkeypatch.setattr(Server, "do_GET", slow)
    with ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(fetch, url, tmp_path / "cache" / "model", hashlib.md5(content).hexdigest()) for _ in range(2)
        ]
        assert all(future.result().read_bytes() == content for future in futures)
    assert len(asked) == 1


def test_a_wrong_download_is_refused(server, tmp_path):
    url, _ = server
    with pytest.raises(CheckpointError, match="md5"):
        fetch(url, tmp_path / "cache" / "model", "0" * 32)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model.lock"]


def test_a_damaged_cache_is_named(tmp_path):
    (tmp_path / "model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="md5"):
        fetch("http://127.0.0.1:9/none", tmp_path / "model", "0" * 32)


def test_offline_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be reached"):
        fetch("http://127.0.0.1:9/none", tmp_path / "model", "0" * 32)
