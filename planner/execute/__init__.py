"""Does a plan run as predicted? A small engine of our own that executes it on this machine, on a real clock."""
