"""One file per model family: how it reads its `config.json`, its block, what a layer costs, and
Hugging Face's names.

`read.FAMILIES` lists them. `hf_names` says what a family's list of stored parameters is made of,
`fields` and `shape` what they share in reading a `config.json`, `layer_costs` what costs are.
"""
