"""The Python interface: settings, training, runs and samples, as the command line has them.

`import marble_jax` has all of its names; they are imported when they are first used.
"""
