"""What a command imports, imported once by the fork server."""

import importlib
import pkgutil

import lakehouse.cli

for module in pkgutil.iter_modules(lakehouse.cli.__path__):
    importlib.import_module(f"lakehouse.cli.{module.name}")
for name in ("lakehouse.failpoints", "writers.jobs", *(f"pyiceberg.catalog.{kind}" for kind in ("glue", "rest", "sql"))):
    importlib.import_module(name)
