"""One file per model family. Each has the same three names: `read_config` (what its `config.json`
says), `Block` (its layer, and Hugging Face's names of the weights) and `costs` (what a layer costs).

`retool.model.catalogue.families` lists them. What families share lies beside this folder: fields
of a `config.json` and names of weights in `hf`, what a layer costs in `layer_costs`, the expert
layer in `experts.layer`.
"""
