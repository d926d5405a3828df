"""What a wheel holds, and what its command line says of what it does not hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import accel
import pytest

ROOT = Path(accel.__file__).parent
SHIPPED = ("compiler", "kernels", "passes")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel of this tree installs. Built from a copy, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder / "tree",
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def _is_shipped(path: Path) -> bool:
    """Pages are for who reads the code."""
    return "__pycache__" not in path.parts and path.suffix != ".md" and (ROOT / path).is_file()


def test_the_wheel_holds_the_whole_compiler_and_nothing_else(installed: Path) -> None:
    """A package, or a kind of file, that pyproject.toml does not list is missing here."""
    tree = [path.relative_to(ROOT) for each in SHIPPED for path in (ROOT / each).rglob("*")]
    kept = {path for path in tree if _is_shipped(path)}
    wanted = {Path("__init__.py"), Path("py.typed"), *kept}
    package = installed / "accel"
    found = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    assert found == wanted
    assert {path.suffix for path in found} >= {".py", ".json", ".cpp"}
    (information,) = (path for path in installed.iterdir() if path != package)
    assert information.suffix == ".dist-info"


@pytest.mark.parametrize("arguments", [("demo", "--pictures", "2"), ("bench", "pade"), ("bench",)])
def test_an_installed_wheel_says_where_the_commands_of_the_examples_are(
    installed: Path, arguments: tuple[str, ...]
) -> None:
    # Without the site module there is no editable installation, which would find the examples.
    program = (
        "import accel; from accel.compiler.cli import main\n"
        f"assert accel.__path__ == [{str(installed / 'accel')!r}]; main()"
    )
    places = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    done = subprocess.run([sys.executable, "-S", "-c", program, *arguments], cwd=installed.parent,
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": places})  # fmt: skip
    assert done.returncode == 1
    expected = f"accel: `accel {arguments[0]}` belongs to a checkout of accel's repository"
    assert done.stderr.startswith(expected)
    assert "Clone the repository and, in it, run pip install -e '.[examples]'" in done.stderr
