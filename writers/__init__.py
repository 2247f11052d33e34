"""SOURCE -> raw: Kafka, Stripe webhooks, CRM."""
