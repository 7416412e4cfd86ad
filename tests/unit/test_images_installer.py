"""How pip and uv inside a build reach what they reach outside."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from images.installer import INSIDE, Installer, installer


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_an_index_that_is_set_is_passed_and_paths_of_this_machine_are_not(tmp_path: Path) -> None:
    environ = {
        "PIP_INDEX_URL": "https://index.invalid/simple",
        "UV_INDEX_MINE_PASSWORD": "geheim",
        "HTTPS_PROXY": "http://proxy.invalid:3128",
        "PIP_FIND_LINKS": "/somewhere/wheels",
        "UV_PYTHON": "/usr/bin/python3",
        "AWS_SECRET_ACCESS_KEY": "foreign",
    }
    env = installer(tmp_path, environ, {}).env
    assert env["PIP_INDEX_URL"] == "https://index.invalid/simple"
    assert env["UV_INDEX_MINE_PASSWORD"] == "geheim"
    assert env["HTTPS_PROXY"] == "http://proxy.invalid:3128"
    assert not {"PIP_FIND_LINKS", "UV_PYTHON", "AWS_SECRET_ACCESS_KEY"} & set(env)


def test_pip_s_configuration_counts_where_the_environment_says_nothing(tmp_path: Path) -> None:
    config = {"index-url": "https://file.invalid/simple", "trusted-host": "file.invalid"}
    env = installer(tmp_path, {"PIP_INDEX_URL": "https://env.invalid/simple"}, config).env
    assert env["PIP_INDEX_URL"] == "https://env.invalid/simple"
    assert env["PIP_TRUSTED_HOST"] == "file.invalid"


def test_the_ca_bundle_in_force_is_mounted_read_only_and_named_to_both_tools(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text("certificates")
    found = installer(tmp_path, {"SSL_CERT_FILE": str(bundle)}, {})
    assert (bundle, f"{INSIDE}/ca.crt", "ro") in found.mounts
    assert found.env["SSL_CERT_FILE"] == found.env["PIP_CERT"] == f"{INSIDE}/ca.crt"


def test_uv_s_configuration_file_is_mounted(tmp_path: Path, home: Path) -> None:
    file = home / ".config" / "uv" / "uv.toml"
    file.parent.mkdir(parents=True)
    file.write_text("offline = true\n")
    found = installer(tmp_path, {}, {})
    assert (file, f"{INSIDE}/uv.toml", "ro") in found.mounts
    assert found.env["UV_CONFIG_FILE"] == f"{INSIDE}/uv.toml"


def test_downloads_are_kept_below_the_caches_or_where_the_user_keeps_them(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    found = installer(tmp_path / "caches", {"UV_CACHE_DIR": str(mine)}, {})
    assert (mine, f"{INSIDE}/uv", "rw") in found.mounts
    assert (tmp_path / "caches" / "pip", f"{INSIDE}/pip", "rw") in found.mounts


def test_a_value_reaches_the_shell_of_a_build_as_it_is(tmp_path: Path) -> None:
    value = """it's "$(false)" `true` \\ & ; #"""
    secret = tmp_path / "installer-env"
    secret.write_text(Installer({"PIP_PROXY": value}, ()).secret())
    script = f'set -a; . {secret}; set +a; printf %s "$PIP_PROXY"'
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout == value
