"""Many training runs of the embedded pipeline under one budget, and the tables and plots they come to."""
