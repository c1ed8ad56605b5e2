"""Models without a file in `families`: transformers' own module, trained here (a *borrowed* model).

read       config.json → `BorrowedConfig`, or what can't run so, by name
module     the module with our head: units, names, forward
attention  what transformers' attention layers call instead of theirs
trial      one forward on the meta device: does every block mix tokens only through us?
logits     what the model does between its last hidden state and its logits
costs      what a block keeps for its backward, measured in such a forward
again      blocks that run again in the backward
buffers    values of what is no parameter and in no file
"""
