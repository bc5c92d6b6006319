#!/usr/bin/env bash
# Trains on hosts that ssh reaches, all of them with this checkout at the same place and one shared directory.
#
#   HOSTS="gpu0 gpu1" tools/launch/ssh.sh --config=sd3:gpu_8x80gb --workdir=/shared/run
#
#   HOSTS      ssh destinations, one process each, process 0 first
#   ADDRESS    HOST:PORT of process 0 as the others reach it (the first of HOSTS, port 8476)
#   DIRECTORY  the checkout (where this one is), installed on every host by install.sh
#   SETUP      run first on every host, such as "module load cuda"
#   SSH        how to reach a host (ssh -o BatchMode=yes)
#   NAME       of the run (marble-train), where hosts have several
#   REWARD_ARGS REWARD_PORT RESTARTS MARBLE   see host.sh
#   HF_TOKEN HF_HOME WANDB_API_KEY JAX_COMPILATION_CACHE_DIR   passed on, through standard input
#
# Ctrl-C or SIGTERM saves and stops the run on all hosts; a session that breaks off does not, and the same command shows
# its log again. The status is the first one that is not 0.
set -uo pipefail

read -r -a hosts <<< "${HOSTS:-}"
if [ ${#hosts[@]} -eq 0 ]; then
  echo 'ssh.sh: expected HOSTS="first second ..."; received nothing' >&2
  exit 2
fi
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
directory="${DIRECTORY:-$here}"
first="${hosts[0]#*@}"
address="${ADDRESS:-$first:8476}"
read -r -a ssh <<< "${SSH:-ssh -o BatchMode=yes}"
run="${NAME:-marble-train}"

settings() { # NAME=value of those that are set
  for name in "$@"; do
    if [ -n "${!name:-}" ]; then printf '%s=%q ' "$name" "${!name}"; fi
  done
}

detached() { # detached.sh on host $1 with the other arguments
  printf 'cd %q && { %s; } && env NAME=%q ' "$directory" "${SETUP:-:}" "$run-$1"
  settings REWARD_ARGS REWARD_PORT RESTARTS MARBLE
  printf 'bash tools/launch/detached.sh'
  printf ' %q' "${@:2}"
}

start() { # what process $1 runs; its secrets come through standard input
  # shellcheck disable=SC2016
  printf '(umask 077 && mkdir -p "$HOME/.marble_jax" && cat > "$HOME/.marble_jax/%s.env") && ' "$run-$1"
  detached "$1" start "${@:2}" "--coordinator=$address" "--num_processes=${#hosts[@]}" "--process_id=$1"
}

stop() {
  for i in "${!hosts[@]}"; do
    "${ssh[@]}" "${hosts[$i]}" "$(detached "$i" stop)" < /dev/null > /dev/null &
  done
}
trap stop TERM INT

processes=()
for i in "${!hosts[@]}"; do
  settings HF_TOKEN HF_HOME WANDB_API_KEY JAX_COMPILATION_CACHE_DIR \
    | "${ssh[@]}" "${hosts[$i]}" "$(start "$i" "$@")" &
  processes+=($!)
done
failed=0
for process in "${processes[@]}"; do
  while true; do
    wait "$process"
    status=$?
    kill -0 "$process" 2> /dev/null || break # else a signal came, and the host is still saving
  done
  if [ "$failed" -eq 0 ]; then failed=$status; fi
done
exit "$failed"
