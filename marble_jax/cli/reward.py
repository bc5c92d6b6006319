"""`marble-jax reward check` scores golden images with every reward; `marble-jax reward serve` puts rewards online."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from marble_jax.cli.options import check_either, split
from marble_jax.errors import one_of

ACTIONS = {"check": "marble_jax.cli.reward_check", "serve": "marble_jax.cli.reward_serve"}
"""Action -> module with its `OPTIONS` and `run`."""


def help_text() -> str:
    """Returns what `--help` prints."""
    return """usage: marble-jax reward check (--config=FILE[:preset] | --path=DIR) [--rewards=a,b]
       marble-jax reward serve (--config=FILE[:preset] | --path=DIR) [--rewards=a,b] [--host=127.0.0.1] [--port=8810]

  --path=DIR         directory with rewards.json, or 'embedded'
  --rewards=a,b      rewards of it, or functions as module:function; all of them by default
  --frames=CHOICE    frames of clips that rewards of images see: all, first, every:K or count:M (the run's own with
                     --config); --frame_reduction=mean or min makes one score of theirs

check: loads each reward, scores images whose scores (or whose order) are known, measures speed; 2 if one is broken
  --size=PIXELS      of the golden images (the run's own with --config; 64 for 'embedded', else 512)
  --num_frames=N     of golden clips, for rewards that take clips (the run's own with --config, else 5)
  --batch=16         images, or clips, at once when the speed is measured
  --timeout=120      seconds a call may take
  --write            record the scores as the expected ones, in golden.json beside rewards.json

serve: answers POST /score and GET /health; the format is described in marble_jax/rewards/http/protocol.py
  --host=127.0.0.1 --port=8810   any other than a loopback address needs a token
  --token_file=FILE  (or --token=TEXT, which other users of this machine can see) clients have to know it
  --workers=2        requests scored at the same time
  --waiting=256 --queue_timeout=40   whole requests that wait for a worker besides, and for how many seconds
  --connections=1024 of clients that know the token
  --batch=0          images scored at once; 0 takes a request as it is
  --timeout=300      seconds a request's scores may take
  --tls_cert=FILE --tls_key=FILE   speak TLS; clients name a certificate of their own authority by ca_file
  --max_mb=64 --max_images=256 --max_side=2048   of a request, every frame counted; pixels of an image's side"""


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, rewards that do not load, or, of a check, rewards that do not pass.
    """
    from marble_jax.cli.configuration import load_settings

    name, *arguments = argv or [""]
    one_of("reward", name, ACTIONS)
    # Imported here, as both need JAX and the help does not.
    action = importlib.import_module(ACTIONS[name])
    values, config_args = split(arguments, action.OPTIONS)
    check_either("reward", {"config": config_args, "path": values["path"]}, "config", "path")
    settings = None
    if config_args:
        settings = load_settings(config_args)
    return action.run(values, settings)
