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
# nothing says so. Take cuda13, or leave geneval out of EXTRAS and serve that reward from another environment.
# A TPU host has no use for torch's CUDA: have UV_TORCH_BACKEND=cpu in the environment, which saves gigabytes.
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
if [[ "$1" == cuda12 && ",$extras," =~ ,(geneval|torch), ]]; then
  echo "install.sh: expected EXTRAS without ${BASH_REMATCH[1]} beside cuda12, whose cuDNN torch would overwrite; received" \
    "'$extras' (cuda13 takes both)" >&2
  exit 2
fi
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="${VENV:-$here/.venv}"

export PATH="$HOME/.local/bin:$PATH"
read -r -a uv <<< "${UV:-uv}"
if ! command -v "${uv[0]}" > /dev/null; then
  if ! python3 -m pip --version > /dev/null 2>&1; then
    sudo apt-get update -qq
    sudo apt-get install -y -qq python3-pip
  fi
  # Newer images mark their Python as the system's; uv is for this user alone.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv
fi
if [ ! -x "$venv/bin/python" ]; then "${uv[@]}" venv -q --python "${PYTHON:-3.12}" "$venv"; fi
"${uv[@]}" pip install -q --python "$venv/bin/python" -e "$here${extras:+[$extras]}"
"$venv/bin/marble-jax" --help > /dev/null
echo "install.sh: $venv/bin/marble-jax with ${extras:-no extras}"
