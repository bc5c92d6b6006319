"""tools/launch/install.sh: what it asks of the machine, and of uv, in whose place is a script that writes it down."""

from __future__ import annotations

import shutil

import pytest
from launch_scripts import MARBLE, ROOT, named, run

UV_OF_A_FOLDER = """
# uv venv and uv pip install that write down what they are asked for, next to a marble-jax in their own folder.
here="$(dirname "$0")"
echo "$@" >> "$here/asked"
if [ "$1" = venv ]; then mkdir -p "$5/bin"; cp "$here/marble" "$5/bin/python"; cp "$here/marble" "$5/bin/marble-jax"; fi
"""


def installing(tmp_path, driver=None):
    """The environment of install.sh with a uv that installs nothing; `driver` is nvidia-smi, if it is there."""
    named(tmp_path, "marble", MARBLE)
    binaries = tmp_path / "binaries"
    binaries.mkdir()
    if driver is not None:
        named(binaries, "nvidia-smi", driver)
    return {
        "VENV": str(tmp_path / "venv"),
        "UV": named(tmp_path, "uv", UV_OF_A_FOLDER),
        "PYTHON": "3.11",
        "PATH": f"{binaries}:/usr/bin:/bin",
    }


@pytest.mark.parametrize(
    ("arguments", "extras", "installed"),
    [
        (["cuda13"], None, "[cuda13,rewards,geneval,gcs]"),
        (["cuda12"], "rewards,s3", "[cuda12,rewards,s3]"),
        (["cpu"], "", ""),
    ],
)
def test_what_is_installed(tmp_path, arguments, extras, installed):
    environ = installing(tmp_path)
    if extras is not None:
        environ["EXTRAS"] = extras
    done = run("install.sh", *arguments, **environ)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "asked").read_text().splitlines() == [
        f"venv -q --python 3.11 {tmp_path}/venv",
        f"pip install -q --python {tmp_path}/venv/bin/python -e {ROOT}{installed}",
    ]


def test_what_is_not_installed(tmp_path):
    done = run("install.sh", "gpu")
    assert done.returncode == 2 and "expected one of tpu, cuda13, cuda12, cpu" in done.stderr
    # Both bring a cuDNN of their own to the same place.
    done = run("install.sh", "cuda12", VENV=str(tmp_path / "venv"))
    assert done.returncode == 2 and "expected EXTRAS without geneval" in done.stderr
    done = run("install.sh", "cuda12", VENV=str(tmp_path / "venv"), EXTRAS="rewards,torch")
    assert done.returncode == 2 and "expected EXTRAS without torch beside cuda12" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_torch_without_cuda_goes_with_cuda12(tmp_path):
    environ = installing(tmp_path) | {"UV_TORCH_BACKEND": "cpu", "EXTRAS": "geneval"}
    done = run("install.sh", "cuda12", **environ)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "asked").read_text().endswith(f"-e {ROOT}[cuda12,geneval]\n")


@pytest.mark.parametrize(
    ("kind", "driver", "message"),
    [
        ("cuda13", "570.133.20", "of 580 or later for cuda13; received 570 (the extra cuda12 "),
        ("cuda12", "470.57", "of 525 or later for cuda12; received 470\n"),
        ("cuda13", "580.65.06", ""),
        ("cuda13", "1000.1", ""),
        ("cuda12", "525.60.13", ""),
        ("cpu", "470.57", ""),
        ("tpu", "470.57", ""),
    ],
)
def test_the_driver_is_as_new_as_cuda_asks(tmp_path, kind, driver, message):
    answer = f"echo {driver}; echo {driver}\n"
    done = run("install.sh", kind, **installing(tmp_path, answer), EXTRAS="rewards")
    assert done.returncode == (2 if message else 0), done.stderr
    # Nothing is installed for a driver that could not run it.
    assert (tmp_path / "asked").exists() != bool(message)
    if message:
        assert done.stderr.startswith("install.sh: expected an NVIDIA driver ")
        assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("driver", [None, "echo 'No devices were found'; exit 6\n", "exit 9\n"])
def test_a_machine_whose_driver_says_nothing_is_installed_on(tmp_path, driver):
    done = run("install.sh", "cuda13", **installing(tmp_path, driver), EXTRAS="")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("user", "asked"), [("0", ""), ("1000", "sudo ")])
def test_pip_is_fetched_as_root_with_sudo_only_where_that_is_needed(tmp_path, user, asked):
    """A machine without uv and pip; the command that would install them stops the script."""
    binaries = tmp_path / "binaries"
    binaries.mkdir()
    for name in ("bash", "dirname"):
        (binaries / name).symlink_to(shutil.which(name))
    named(binaries, "id", f"echo {user}\n")
    named(binaries, "python3", "exit 1\n")
    named(binaries, "apt-get", f'echo "apt-get $*" >> {tmp_path}/asked; [ "$1" = update ]\n')
    if user != "0":
        named(binaries, "sudo", f'echo -n "sudo " >> {tmp_path}/asked; exec "$@"\n')
    environ = {"PATH": str(binaries), "HOME": str(tmp_path), "EXTRAS": "", "UV": "uv"}
    done = run("install.sh", "cpu", **environ, VENV=str(tmp_path / "venv"))
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "asked").read_text().splitlines() == [
        f"{asked}apt-get update -qq",
        f"{asked}apt-get install -y -qq python3-pip",
    ]
