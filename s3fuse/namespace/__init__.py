"""Names and inodes: `inodes` is the table, `directories` what the bucket says, `changes` what it does not have yet.

`merge` makes inodes of answers. `syncer` brings changes to the bucket, with `clearing` before it writes, `deletes` for
what is gone and `conflicts` when somebody else was faster. `recovery` begins with the journal.
"""
