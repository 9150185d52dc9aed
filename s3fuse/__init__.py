"""s3fuse: an S3 bucket as a POSIX directory."""

__version__ = "0.1.0"
