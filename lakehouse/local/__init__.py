"""Services of the `local` profile on this machine's loopback, for tests and benchmarks; each dies with its parent."""
