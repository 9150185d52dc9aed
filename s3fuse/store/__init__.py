"""Object stores behind one protocol: `base` says what a store does, the others do it."""
