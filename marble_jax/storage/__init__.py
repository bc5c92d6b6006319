"""Disks and buckets: files, workdirs, images, checkpoints with checksums."""
