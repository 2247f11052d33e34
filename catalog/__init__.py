"""WHAT every table is: one declaration a table, as data."""
