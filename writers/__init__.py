"""SOURCE -> raw: Kafka, Stripe webhooks, the Stripe API, CRM."""
