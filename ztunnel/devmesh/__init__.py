"""A mesh on one machine: for the demo, the end-to-end tests and the benchmarks."""
