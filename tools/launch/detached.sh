#!/usr/bin/env bash
# A run on this host that outlives the session which started it: host.sh in a session of its own, with a log.
#
#   tools/launch/detached.sh start --config=... --workdir=...   # and shows the log until the run ends
#   tools/launch/detached.sh stop                               # saves and stops, and waits for it
#
#   NAME    of the run on this host (marble-train): its files are NAME.{pid,log,status} in STATE
#   STATE   a folder (~/.marble_jax)
#   and what host.sh takes. NAME.env in STATE, if it is there, is sourced first: for HF_TOKEN and other secrets, which a
#   command line would show.
#
# `start` where the run is there already shows its log again. The status is that of the run.
set -uo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
state="${STATE:-$HOME/.marble_jax}"
mkdir -p "$state"
base="$state/${NAME:-marble-train}"

running() { [ -f "$base.pid" ] && kill -0 "$(cat "$base.pid")" 2> /dev/null; }

end() { # waits for the run to end, and passes its status on
  while running; do sleep 0.2; done
  exit "$(cat "$base.status" 2> /dev/null || echo 1)"
}

action="${1:-}"
shift || true
case "$action" in
  start)
    if ! running; then
      rm -f "$base.pid" "$base.status" "$base.host"
      : > "$base.log"
      # shellcheck disable=SC2016
      setsid nohup bash -c 'base="$1"; shift
        if [ -f "$base.env" ]; then set -a; . "$base.env"; set +a; fi
        PID_FILE="$base.host" bash "$@"
        echo $? > "$base.status"' detached "$base" "$here/host.sh" "$@" >> "$base.log" 2>&1 < /dev/null &
      echo $! > "$base.pid"
    fi
    tail -n +1 -s 0.2 --pid="$(cat "$base.pid")" -F "$base.log" 2> /dev/null
    end
    ;;
  stop)
    if ! running; then
      echo "detached.sh: expected a run called ${NAME:-marble-train} on this host; received none" >&2
      exit 2
    fi
    # host.sh says where it is once it can be told; the number of an earlier run may be another process by now.
    while running && [ ! -s "$base.host" ]; do sleep 0.1; done
    if running; then kill -TERM "$(cat "$base.host")"; fi
    end
    ;;
  *)
    echo "detached.sh: expected one of start, stop; received '$action'" >&2
    exit 2
    ;;
esac
