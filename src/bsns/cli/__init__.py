"""The `bsns` command, one file per verb."""
