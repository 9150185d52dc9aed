"""The workloads, in the order of the table."""

from bench.scenarios import apps, files, names, trees

SCENARIOS = (*files.SCENARIOS, *trees.SCENARIOS, *names.SCENARIOS, *apps.SCENARIOS)
