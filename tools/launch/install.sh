#!/usr/bin/env bash
# Installs this checkout on a bare machine image, which may have an older Python and no pip.
#
#   tools/launch/install.sh tpu                      # or cuda13, cuda12, cpu
#   EXTRAS=rewards,s3 tools/launch/install.sh cuda13
#
#   EXTRAS   what else a run needs (rewards,geneval,gcs): OCR, the GenEval detector with its torch, gs:// workdirs;
#            s3 for s3:// ones
#   VENV     where (.venv in the checkout)
#   PYTHON   version, or a path (3.12); uv fetches it where the machine has none
#   UV       the command (uv; installed for this user where there is none)
#
# torch's own wheels bring CUDA 13: beside cuda12 both write the same files of cuDNN and NCCL, the later one wins, and
# nothing says so. Take cuda13, or leave geneval out of EXTRAS and serve that reward from another environment, or have
# UV_TORCH_BACKEND=cpu in the environment: torch without CUDA overwrites nothing, and the detector runs on the CPU.
# A TPU host has no use for torch's CUDA: UV_TORCH_BACKEND=cpu saves gigabytes there.
# CUDA 13 needs an NVIDIA driver of 580 or later, CUDA 12 one of 525; where nvidia-smi is, an older one is refused.
set -euo pipefail

case "${1:-}" in
  tpu | cuda13 | cuda12) extras="$1," ;;
  cpu) extras="" ;;
  *)
    echo "install.sh: expected one of tpu, cuda13, cuda12, cpu; received '${1:-}'" >&2
    exit 2
    ;;
esac
extras="$extras${EXTRAS-rewards,geneval,gcs}"
extras="${extras%,}"
if [[ "$1" == cuda12 && ",$extras," =~ ,(geneval|torch), && "${UV_TORCH_BACKEND:-}" != cpu ]]; then
  echo "install.sh: expected EXTRAS without ${BASH_REMATCH[1]} beside cuda12, whose cuDNN torch would overwrite; received" \
    "'$extras' (cuda13 takes both, and so does UV_TORCH_BACKEND=cpu)" >&2
  exit 2
fi
case "$1" in
  cuda13) oldest=580 instead=" (the extra cuda12 takes 525 or later)" ;;
  cuda12) oldest=525 instead="" ;;
  *) oldest=0 instead="" ;;
esac
# A machine without nvidia-smi may be an image that is made for others, and a GPU that does not answer has no version.
driver=""
if [ "$oldest" -gt 0 ] && command -v nvidia-smi > /dev/null; then
  answer="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null)" || answer=""
  # One line a GPU, such as 570.133.20.
  if [[ "$answer" =~ ^[[:space:]]*([0-9]+)\. ]]; then driver="${BASH_REMATCH[1]}"; fi
fi
if [ -n "$driver" ] && [ "$driver" -lt "$oldest" ]; then
  echo "install.sh: expected an NVIDIA driver of $oldest or later for $1; received $driver$instead" >&2
  exit 2
fi
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="${VENV:-$here/.venv}"

as_root() { # root in a container needs no sudo, and often has none
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

export PATH="$HOME/.local/bin:$PATH"
read -r -a uv <<< "${UV:-uv}"
if ! command -v "${uv[0]}" > /dev/null; then
  if ! python3 -m pip --version > /dev/null 2>&1; then
    as_root apt-get update -qq
    as_root apt-get install -y -qq python3-pip
  fi
  # Newer images mark their Python as the system's; uv is for this user alone.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv
fi
if [ ! -x "$venv/bin/python" ]; then "${uv[@]}" venv -q --python "${PYTHON:-3.12}" "$venv"; fi
"${uv[@]}" pip install -q --python "$venv/bin/python" -e "$here${extras:+[$extras]}"
"$venv/bin/marble-jax" --help > /dev/null
echo "install.sh: $venv/bin/marble-jax with ${extras:-no extras}"
