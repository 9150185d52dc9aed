"""Where the bytes of dirty files are until the bucket has them, and how much room they take."""
