"""What travels between our processes.  Pure: no I/O, no clock, no randomness; Python 3.9, stdlib only."""
