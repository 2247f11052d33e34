"""Chaos: seeded rounds of writers and faults on real services, and an independent verifier. See docs/faults.md."""
