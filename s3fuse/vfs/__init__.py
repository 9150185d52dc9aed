"""What each file operation means: `names` (the tree), `files` (open files), `attributes` (stat and xattrs)."""
