"""Names and inodes: `inodes` is the table, `directories` what the bucket says, `changes` what it does not have yet.

`syncer` brings it there, `conflicts` decides when somebody else was faster, `recovery` begins with the journal.
"""
