"""The wheel: installed elsewhere it brings its own conf/ and the bundled models."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent


def check(*words: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the wheel and, without opd, the packages of the one that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    check(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=CHECKOUT)
    [wheel] = folder.glob("opd-*.whl")
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    # .pth files are not read in a folder that is itself on the path because of one, so an editable opd stays out.
    (site_packages(environment) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    check(sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return environment


def site_packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))


def files(folder: Path) -> set[Path]:
    return {file.relative_to(folder) for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts}


def test_the_installed_command_composes_from_the_conf_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    shown = check(installed / "bin" / "opd", "train", "model=qwen3b", "--cfg", "job", cwd=tmp_path)
    assert "path: Qwen/Qwen2.5-3B-Instruct" in shown
    searched = check(installed / "bin" / "opd", "train", "--info", "searchpath", cwd=tmp_path)
    assert str(site_packages(installed) / "opd" / "conf") in searched
    assert str(CHECKOUT) not in searched


def test_conf_and_assets_are_complete(installed: Path) -> None:
    package = site_packages(installed) / "opd"
    assert files(package / "conf") == files(CHECKOUT / "conf")
    assert files(package / "assets") == files(CHECKOUT / "opd" / "assets")
    assert {"tiny-student", "tiny-teacher"} <= {path.name for path in (package / "assets").iterdir()}


def test_the_version_is_said_once(installed: Path, tmp_path: Path) -> None:
    import opd

    assert check(installed / "bin" / "opd", "--version", cwd=tmp_path) == f"opd {opd.__version__}\n"
    assert (site_packages(installed) / f"opd-{opd.__version__}.dist-info").is_dir()
