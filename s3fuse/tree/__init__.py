"""The tree of one mount: see `namespace.inodes`."""
