"""What a config will take: compiled for a machine that is not there, and timed on this one."""
