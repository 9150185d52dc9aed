"""What a mount counts of itself."""
