"""What a worker leaves to the next one: which inodes and handles the kernel knows, and which requests were done."""
