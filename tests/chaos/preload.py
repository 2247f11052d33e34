"""What a command imports, imported once by the fork server."""

import pyiceberg.catalog.glue
import pyiceberg.catalog.rest
import pyiceberg.catalog.sql  # noqa: F401

import writers.jobs  # noqa: F401
