"""Kills of the daemon at named points and at random moments, under load, and what must be left of it afterwards."""
