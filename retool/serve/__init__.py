"""`retool serve MODEL`: the engine behind OpenAI's HTTP API, and behind what RL asks of a server.

`engine_thread` samples for all requests together. `fields` reads what was asked,
`completions`, `chat` (with `turn_reader`) and `generate` are the three forms of question and answer,
`answering` sends them, `weights` takes new ones over, `app` has the routes, `serving` begins and ends
it all.
"""
