"""Measurements that a stranger can repeat: one file per `bsns bench` verb."""
