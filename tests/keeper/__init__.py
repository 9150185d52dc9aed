"""The mount outlives its daemon."""
