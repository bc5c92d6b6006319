#!/usr/bin/env bash
# Trains on hosts that ssh reaches, all of them with this checkout at the same place and one shared directory.
#
#   HOSTS="gpu0 gpu1" tools/launch/ssh.sh --config=configs/sd3.py --workdir=/shared/run
#
#   HOSTS      ssh destinations, one process each, process 0 first
#   ADDRESS    HOST:PORT of process 0 as the others reach it (the first of HOSTS, port 8476)
#   DIRECTORY  the checkout (where this one is)
#   SETUP      run first on every host, such as "source .venv/bin/activate"
#   SSH        how to reach a host (ssh -o BatchMode=yes)
#   REWARD_ARGS REWARD_PORT RESTARTS MARBLE   see host.sh
#
# Ctrl-C or SIGTERM saves and stops the run on all hosts. The status is the first one that is not 0.
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
run="marble-$$-$RANDOM"

remote() { # what process $1 runs
  local settings=""
  for name in REWARD_ARGS REWARD_PORT RESTARTS MARBLE; do
    if [ -n "${!name:-}" ]; then settings+="$name=$(printf '%q' "${!name}") "; fi
  done
  printf 'cd %q && { %s; } && env PID_FILE=/tmp/%s-%d.pid %sbash tools/launch/host.sh' "$directory" "${SETUP:-:}" "$run" \
    "$1" "$settings"
  printf ' %q' "${@:2}" "--coordinator=$address" "--num_processes=${#hosts[@]}" "--process_id=$1"
}

stop() {
  for i in "${!hosts[@]}"; do
    "${ssh[@]}" "${hosts[$i]}" "kill -TERM \$(cat /tmp/$run-$i.pid)" < /dev/null
  done
}
trap stop TERM INT

processes=()
for i in "${!hosts[@]}"; do
  "${ssh[@]}" "${hosts[$i]}" "$(remote "$i" "$@")" < /dev/null &
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
