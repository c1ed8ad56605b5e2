"""What the formats of calls share: a `call`, how a turn is read with a `form`, arguments as JSON or text."""
