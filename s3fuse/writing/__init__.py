"""The write path: dirty ranges (`extents`, `layers`), their bytes (`staging`), the `journal`, `plan` and `upload`."""
