import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitwright.errors import BitwrightError
from bitwright.training.data import sources
from bitwright.training.data.sources import Remote, fetch, fetch_missing, search_folders

CONTENT = bytes(range(256)) * 5000


@contextlib.contextmanager
def server(content: bytes, claim: int | None = None, status: int = 200) -> Iterator[str]:
    """A web server on this machine that answers everything with `content` and closes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) if claim is None else claim))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None: ...

    listening = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/set.bin"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


def remote(url: str) -> Remote:
    return Remote(url, len(CONTENT), hashlib.md5(CONTENT).hexdigest())


def test_a_download_arrives_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server(CONTENT) as url:
        fetch(remote(url), tmp_path / "new" / "set.bin")
        assert capsys.readouterr().err == f"downloading {url} (1 MB) to {tmp_path / 'new' / 'set.bin'}\n"
    assert (tmp_path / "new" / "set.bin").read_bytes() == CONTENT
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["set.bin"]


@pytest.mark.parametrize(
    ("sent", "claim", "status", "message"),
    [
        (CONTENT[:-1], None, 200, "not the expected file .1279999 bytes.* expected 1280000 bytes"),
        (CONTENT + b"x", None, 200, "not the expected file"),
        (b"y" + CONTENT[1:], None, 200, "not the expected file .1280000 bytes, MD5"),
        (CONTENT[:100], len(CONTENT), 200, "cannot download|not the expected file .100 bytes"),
        (b"", None, 404, "cannot download .*set.bin: Not Found"),
    ],
)
def test_anything_else_leaves_what_was_there(
    sent: bytes, claim: int | None, status: int, message: str, tmp_path: Path
) -> None:
    target = tmp_path / "set.bin"
    target.write_bytes(b"old")
    with server(sent, claim, status) as url, pytest.raises(BitwrightError, match=message):
        fetch(remote(url), target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_no_network_is_one_line_with_the_address(tmp_path: Path) -> None:
    with server(CONTENT) as url:
        pass  # the port is free again: connecting is refused
    with pytest.raises(BitwrightError, match=r"^cannot download http://127\.0\.0\.1:\d+/set\.bin: .*refused"):
        fetch(remote(url), tmp_path / "set.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(sources, "CONNECT_SECONDS", 0.2)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/set.bin"
        with pytest.raises(BitwrightError, match=r"cannot download .*timed out"):
            fetch(remote(url), tmp_path / "set.bin")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BitwrightError, match=r"cannot write to .*file/sub: "):
        fetch(remote("http://127.0.0.1/set.bin"), tmp_path / "file" / "sub" / "set.bin")


def test_only_what_is_missing_is_fetched(tmp_path: Path) -> None:
    with server(CONTENT) as url:
        here = Remote(url.replace("set.bin", "here.bin"), 3, "not asked for")
        (tmp_path / "here.bin").write_bytes(b"abc")
        fetch_missing("d", [], [here, remote(url)], tmp_path, allowed=True, remedy="")
    assert (tmp_path / "here.bin").read_bytes() == b"abc"
    assert (tmp_path / "set.bin").read_bytes() == CONTENT


def test_without_leave_to_download_it_says_where_it_looked_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BitwrightError) as caught:
        fetch_missing("d", [Path("/a"), Path("/b")], [remote("http://x/y")], tmp_path, allowed=False, remedy="get y")
    assert str(caught.value) == "data 'd' not found in /a, /b; downloads are switched off; get y"


def test_folders_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = sources.SYSTEM_FOLDER / "d"
    assert search_folders("d", tmp_path, tmp_path / "c") == [tmp_path, system, tmp_path / "c" / "d"]
    monkeypatch.delenv("BITWRIGHT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert search_folders("d", None, None) == [system, tmp_path / ".cache" / "bitwright" / "d"]
    with pytest.raises(BitwrightError, match=r"data folder .*none: no such folder"):
        search_folders("d", tmp_path / "none", None)
