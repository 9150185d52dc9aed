"""What is acknowledged and not in the bucket yet, as it is recorded: see `writing.journal`."""
