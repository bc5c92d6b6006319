#!/usr/bin/env bash
# Trains on a Cloud TPU slice, one process a host (--worker=all); JAX finds out which host is which.
#
#   TPU=slice ZONE=us-east5-b tools/launch/tpu_vm.sh setup
#   TPU=slice ZONE=us-east5-b tools/launch/tpu_vm.sh train --config=sd3:tpu_v6e --workdir=gs://bucket/run
#   TPU=slice ZONE=us-east5-b tools/launch/tpu_vm.sh stop
#
#   setup  copies this checkout to every host and installs it there (install.sh), whatever Python the image has
#   train  the run, which goes on when this session breaks off; the same command shows its log again, and goes on after
#          a stop, a preemption or a lost host
#   stop   saves and stops it
#
#   TPU ZONE PROJECT   of the slice, made with: gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE"
#                      --accelerator-type=v6e-16 --version=v2-alpha-tpuv6e [--spot]; a v5e has no room
#                      for reward models beside the training
#   HF_TOKEN           read access to gated models such as SD3.5; also HF_HOME, WANDB_API_KEY,
#                      JAX_COMPILATION_CACHE_DIR: sent as a file, not on a command line
#   REWARD_ARGS REWARD_PORT RESTARTS   see host.sh; reward servers run on the CPUs of the slice's hosts
#   EXTRAS PYTHON      see install.sh
#   GCLOUD             the command (gcloud)
set -euo pipefail

if [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ] || [ $# -eq 0 ]; then
  echo "tpu_vm.sh: expected TPU, ZONE and one of setup, train, stop; received TPU='${TPU:-}' ZONE='${ZONE:-}' $*" >&2
  exit 2
fi
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
read -r -a gcloud <<< "${GCLOUD:-gcloud}"
where=("--zone=$ZONE" "--worker=all")
if [ -n "${PROJECT:-}" ]; then where+=("--project=$PROJECT"); fi
everywhere() { "${gcloud[@]}" compute tpus tpu-vm ssh "$TPU" "${where[@]}" --command="$1"; }
send() { "${gcloud[@]}" compute tpus tpu-vm scp "$1" "$TPU:$2" "${where[@]}"; }
settings() { # NAME=value of those that are set
  for name in "$@"; do
    if [ -n "${!name:-}" ]; then printf '%s=%q ' "$name" "${!name}"; fi
  done
}

action="$1"
shift
case "$action" in
  setup)
    packed="$(mktemp -d)"
    trap 'rm -rf "$packed"' EXIT
    tar -czf "$packed/marble_jax.tar.gz" --exclude=.git --exclude=runs --exclude=.venv \
      --exclude='.*_cache' --exclude=__pycache__ -C "$here" .
    send "$packed/marble_jax.tar.gz" marble_jax.tar.gz
    everywhere "mkdir -p marble_jax && tar -xzf marble_jax.tar.gz -C marble_jax && env UV_TORCH_BACKEND=cpu \
$(settings EXTRAS PYTHON)VENV=\$HOME/venv bash marble_jax/tools/launch/install.sh tpu"
    ;;
  train)
    secrets="$(settings HF_TOKEN HF_HOME WANDB_API_KEY JAX_COMPILATION_CACHE_DIR)"
    if [ -n "$secrets" ]; then
      packed="$(mktemp -d)"
      trap 'rm -rf "$packed"' EXIT
      (umask 077 && echo "$secrets" > "$packed/env")
      everywhere "umask 077 && mkdir -p .marble_jax && touch .marble_jax/marble-train.env"
      send "$packed/env" .marble_jax/marble-train.env
    fi
    everywhere "cd marble_jax && env MARBLE=\$HOME/venv/bin/marble-jax $(settings REWARD_ARGS REWARD_PORT RESTARTS)bash \
tools/launch/detached.sh start --distributed=on$(printf ' %q' "$@")"
    ;;
  stop)
    everywhere "bash marble_jax/tools/launch/detached.sh stop"
    ;;
  *)
    echo "tpu_vm.sh: expected one of setup, train, stop; received '$action'" >&2
    exit 2
    ;;
esac
