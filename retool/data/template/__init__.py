"""Messages into text by a chat template, and where the assistant's turns stand in that text."""
