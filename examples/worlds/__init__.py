"""Three small worlds in which a tiny model learns: a search, a customer, a notebook."""
