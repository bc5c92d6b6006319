#!/usr/bin/env bash
# One host of a run: `marble-jax train "$@"`, a reward server beside it, and new starts after another host was lost.
# The other launchers call this on every host.
#
#   REWARD_ARGS  arguments of `marble-jax reward serve`, such as "--rewards_path=rewards --rewards=geneval"; empty: no server.
#                It listens on 127.0.0.1, and rewards.json asks it as {"kind": "remote", "urls": ["http://127.0.0.1:8810"]}:
#                every host has its own images scored by its own server.
#   REWARD_PORT  its port (8810)
#   RESTARTS     how often to start again after status 75 (another host was lost), or when the training was killed (0)
#   PID_FILE     where to leave the process id of this script; SIGTERM to it saves and stops the run on all hosts
#   MARBLE       the command (that of install.sh in this checkout's .venv, else marble-jax)
set -uo pipefail

installed="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin/marble-jax"
if [ -n "${MARBLE:-}" ]; then
  read -r -a marble <<< "$MARBLE"
elif [ -x "$installed" ]; then
  marble=("$installed")
else
  marble=(marble-jax)
fi
port="${REWARD_PORT:-8810}"
server="" training="" stopped=""

# The server again whenever it ends by itself: a reward took it along, or its calls hang (status 75).
serve() {
  local child=""
  trap 'if [ -n "$child" ]; then kill "$child" 2> /dev/null; fi; exit 0' TERM
  while true; do
    "${marble[@]}" reward serve --host=127.0.0.1 --port="$port" "${reward[@]}" &
    child=$!
    wait "$child"
    local status=$?
    case $status in
      0 | 2 | 130 | 143) exit "$status" ;; # it was told to end, or can never start
    esac
    echo "host.sh: the reward server ended with status $status, starting it again" >&2
    sleep 1
  done
}

end_server() { if [ -n "$server" ]; then kill "$server" 2> /dev/null; fi; }
# Where the whole host is told to stop, the training has a SIGTERM of its own already: it takes several for one.
tell() { kill -TERM "$training" 2> /dev/null; }
stop() { stopped=yes; if [ -n "$training" ]; then tell; fi; }
trap end_server EXIT
trap stop TERM INT HUP
if [ -n "${PID_FILE:-}" ]; then echo $$ > "$PID_FILE"; fi

if [ -n "${REWARD_ARGS:-}" ]; then
  read -r -a reward <<< "$REWARD_ARGS"
  serve &
  server=$!
  for _ in $(seq 600); do
    if [ -n "$stopped" ]; then break; fi
    if (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then break; fi
    if ! kill -0 "$server" 2> /dev/null; then
      echo "host.sh: expected a reward server at port $port; received one that ended" >&2
      exit 2
    fi
    sleep 1
  done
fi

left="${RESTARTS:-0}"
while true; do
  # While the server started, or before another try: there is nothing to save.
  if [ -n "$stopped" ]; then exit 143; fi
  "${marble[@]}" train "$@" &
  training=$!
  # A signal that came before its id was known.
  if [ -n "$stopped" ]; then tell; fi
  while true; do
    wait "$training"
    status=$?
    kill -0 "$training" 2> /dev/null || break # else a signal came, and the training is still saving
  done
  case $status in
    75 | 134 | 137) ;;
    *) exit "$status" ;;
  esac
  if [ -n "$stopped" ] || [ "$left" -le 0 ]; then exit "$status"; fi
  left=$((left - 1)) training=""
  echo "host.sh: status $status, starting again ($left more)" >&2
  sleep 2
done
