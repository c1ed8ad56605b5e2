"""Talking to a trained model, its tools really run: `retool chat`, and `retool generate` for files.

`options` and `agent` are of both. `chat` has its command, the `dialogue` in the terminal, the
`session` (what was said, and the answer that streams), `screen` and `lines`. `generate` has its
command, the `writing` of answers, the `questions` of a file, the `batch` of episodes, and the file
of `answers`.
"""
