"""billing: canonical tables, a function of the set of Stripe events."""
