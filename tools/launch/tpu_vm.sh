#!/usr/bin/env bash
# Trains on a Cloud TPU slice, one process a host (--worker=all); JAX finds out which host is which.
#
#   TPU=slice ZONE=us-west4-a tools/launch/tpu_vm.sh setup
#   TPU=slice ZONE=us-west4-a tools/launch/tpu_vm.sh train --config=configs/sd3.py --workdir=gs://bucket/run
#   TPU=slice ZONE=us-west4-a tools/launch/tpu_vm.sh stop
#
#   setup  copies this checkout to every host and installs it with jax[tpu]
#   train  the run; the same command goes on after a stop, a preemption or a lost host
#   stop   saves and stops it
#
#   TPU ZONE PROJECT   of the slice, made with: gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE"
#                      --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite [--spot]
#   REWARD_ARGS REWARD_PORT RESTARTS   see host.sh; reward servers run on the CPUs of the slice's hosts
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
pid_file=/tmp/marble-train.pid

action="$1"
shift
case "$action" in
  setup)
    packed="$(mktemp -d)/marble_jax.tar.gz"
    tar -czf "$packed" --exclude=.git --exclude=runs --exclude=.venv -C "$here" .
    "${gcloud[@]}" compute tpus tpu-vm scp "$packed" "$TPU:marble_jax.tar.gz" "${where[@]}"
    everywhere "mkdir -p marble_jax && tar -xzf marble_jax.tar.gz -C marble_jax && python3 -m venv venv && \
venv/bin/pip install -q -e 'marble_jax[tpu,rewards]'"
    ;;
  train)
    settings="PID_FILE=$pid_file MARBLE=\$HOME/venv/bin/marble-jax"
    for name in REWARD_ARGS REWARD_PORT RESTARTS; do
      if [ -n "${!name:-}" ]; then settings+=" $name=$(printf '%q' "${!name}")"; fi
    done
    everywhere "cd marble_jax && env $settings bash tools/launch/host.sh --distributed=on$(printf ' %q' "$@")"
    ;;
  stop)
    everywhere "kill -TERM \$(cat $pid_file)"
    ;;
  *)
    echo "tpu_vm.sh: expected one of setup, train, stop; received '$action'" >&2
    exit 2
    ;;
esac
