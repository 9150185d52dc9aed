"""The write path: dirty ranges (`extents`, `layers`), their bytes (`staging`), the `journal`, and `plan` and `upload` to the bucket."""
