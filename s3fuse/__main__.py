"""python -m s3fuse: the same as the command s3fuse."""

from s3fuse.cli import main

main()
