"""Between the kernel and `vfs`: `adapter` decodes and encodes, `errno` maps errors, `wait` waits for requests."""
