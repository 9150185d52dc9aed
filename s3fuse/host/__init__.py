"""This host's side of a mount."""
