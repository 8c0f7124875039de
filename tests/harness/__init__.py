"""What runs the tests: MPI tests under a real launcher, watchdogs, and programs that can be ended whole."""
