"""`python -m marble_jax`."""

import sys

from marble_jax.cli.main import main

sys.exit(main())
