"""A language model behind an OpenAI-compatible address judges answers.

`judge` turns an answer into a request and a reply into a score; `server` asks, patiently and within a
budget; `replies` remembers on disk what was said.
"""
