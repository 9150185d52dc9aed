"""Names and inodes: `inodes` the table, `directories` what the bucket says, `changes` what is not there yet, `syncer` bringing it there."""
