"""Several nodes on one bucket: a random load whose history a checker judges."""
