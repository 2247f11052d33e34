"""Everything rendered from the declarations."""
