"""Speed beside the peers, in one process, on one server, in turns. `make bench`."""
