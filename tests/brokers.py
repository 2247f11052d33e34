"""Either broker: what the embedded one and Apache Kafka have in common is all that most tests need."""

from lakehouse.broker import EmbeddedBroker
from lakehouse.local.kafka import KafkaBroker

Broker = EmbeddedBroker | KafkaBroker
