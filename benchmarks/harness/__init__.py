"""What several suites share: timings, memory, other libraries, trained networks, samplers."""
