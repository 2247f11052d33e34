"""The machine: declarations, Iceberg access, the commit protocol, running transforms. It knows no table by name."""
