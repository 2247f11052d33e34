"""What `lakehouse audit` asks: a table's answers derived a second time, by other code than the one that wrote them."""
