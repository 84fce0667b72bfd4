"""One folder for everything that can be made again."""

from pathlib import Path

from bitwright.cache import cache_folder


def test_argument_then_own_variable_then_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BITWRIGHT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "bitwright"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/bitwright")
    monkeypatch.setenv("BITWRIGHT_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    assert cache_folder("/given") == Path("/given")
