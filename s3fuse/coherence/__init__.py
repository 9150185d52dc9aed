"""What nodes that share a bucket let each other know."""
