"""Disks and buckets: files, workdirs, sealed checkpoints."""
